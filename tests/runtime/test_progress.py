"""The progress display: plain lines without a terminal, one live line on one, nothing on other processes."""

import io
import subprocess
import sys

import pytest

import rdlm.runtime.progress as module
from rdlm.runtime import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until the test moves it."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


READERLESS = """
import sys
from rdlm.runtime import Progress

sys.stdin.readline()  # by now nobody reads what this process says
progress = Progress(3)
for step in (1, 2, 3):
    progress.say("a line")
    progress.update(step, last=step == 3)
open(sys.argv[1], "w").write("done")
"""


def test_work_goes_on_when_the_reader_of_its_progress_is_gone(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", READERLESS, tmp_path / "end"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stderr.close()
    process.stdin.close()
    assert process.wait(60) == 0
    assert (tmp_path / "end").read_text() == "done"


def test_steps_are_plain_lines_ten_seconds_apart(clock, capsys):
    progress = Progress(200)
    for step in range(1, 201):
        clock[0] += 0.1
        progress.update(step, f"loss {step}", last=step == 200)
    progress.say("done")
    assert capsys.readouterr().err.splitlines() == [
        "step   1/200  loss 1", "step 101/200  loss 101", "step 200/200  loss 200", "done"
    ]  # fmt: skip


def test_bytes_say_the_rate_and_the_time_left(clock):
    said = []
    with Progress(50_000_000, "Packing", done=10_000_000, unit="bytes", say=said.append) as progress:
        for _ in range(20):
            clock[0] += 1
            progress.advance(1_000_000)
    assert said == ["Packing: 40%, 1.0 MB/s, about 30 s left", "Packing: 60%, 1.0 MB/s, about 20 s left"]


def test_another_process_is_quiet(capsys):
    progress = Progress(1, quiet=True)
    progress.update(1, "loss", last=True)
    progress.say("done")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("unit", ["steps", "bytes"])
def test_a_terminal_shows_one_line_that_is_closed_even_after_an_error(unit, clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)

    def work():
        with Progress(4_000_000, "Title", unit=unit) as progress:
            for done in (1_000_000, 3_000_000):
                clock[0] += 1
                progress.update(done, "loss [1]")
            progress.say("a line [that] stays")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        work()
    shown = terminal.getvalue()
    assert "a line [that] stays\n" in shown
    assert ("step 3000000/4000000" in shown and "loss [1]" in shown) if unit == "steps" else "3.0/4.0 MB" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is back"


def test_durations():
    assert [duration(s) for s in (45.4, 192, 7500)] == ["45s", "3m12s", "2h05m"]
