"""The bench of the server: what it computes from the times of tokens, and a run of it."""

import json

import pytest
from experiment_scripts import script

pytestmark = pytest.mark.slow


@pytest.fixture
def bench():
    return script("bench/serve")


def request(bench, sent, *events):
    return bench.Request([1], sum(n for _, n in events), sent, list(events))


def test_latencies_are_those_of_the_events(bench):
    turn = [request(bench, 1.0, (1.5, 1), (2.0, 2), (2.5, 2)), request(bench, 2.0, (2.1, 1))]
    found = bench.latencies(turn)
    assert found["TTFT p50"] == pytest.approx(300)
    assert found["TTFT p99"] == pytest.approx(496)
    assert found["TPOT p99"] == pytest.approx(247.5)  # of 250 and, with one token alone, 0
    assert found["ITL p50"] == found["ITL p99"] == pytest.approx(500)
    assert bench.speed(turn) == pytest.approx(6 / 1.5)


def test_gaps_beside_a_long_prompt_are_those_that_touch_its_reading(bench):
    turn = [request(bench, 0.0, (1.0, 1), (2.0, 1), (5.0, 1), (6.0, 1)), request(bench, 0.0, (1.0, 1), (4.5, 1))]
    assert bench.split_gaps(turn, [(3.0, 4.0)]) == ([1.0, 1.0], [3.0, 3.5])
    assert bench.split_gaps(turn, []) == ([1.0, 3.0, 1.0, 3.5], [])


def test_it_measures_the_server_beside_its_engine(toy_run, server, command, tmp_path):
    sizes = ("--prompt-tokens", "2", "6", "--new-tokens", "8", "12", "--long-prompt", "28", "--turns", "1")
    flags = ("--streams", "1", "4", "--rates", "50", "--lanes", "4", "--exit", "kl", "--json", tmp_path / "rows.json")
    code, out, err = command("bench/serve", toy_run.folder, *sizes, *flags)
    assert (code, err) == (0, "")
    tables = json.loads((tmp_path / "rows.json").read_text())
    assert list(tables) == ["closed loop, 1 streams", "closed loop, 4 streams", "open loop", "long prompt"]
    for title, rows in tables.items():
        assert title in out
        for row in rows:
            assert all(value > 0 for name, value in row.items() if not isinstance(value, str)), (title, row)
    engine, http = tables["closed loop, 4 streams"]
    assert http["of the engine"] == pytest.approx(http["tokens/s"] / engine["tokens/s"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--prompt-tokens", "1", "2", "--new-tokens", "1", "2", "--long-prompt", "31"],
            "long_prompt = 33: exceed the context of 32",
        ),
        (["--new-tokens", "4", "40"], "prompt_tokens, new_tokens = 104: exceed"),
        (["--new-tokens", "4", "2"], "new_tokens = (4, 2)"),
        (["--streams", "0"], "must be at least 1"),
        (["--rates", "-1"], "rates"),
        (["--long-prompt", "-5"], "long_prompt = -5: must not be negative"),
        (["--streams", "--new-tokens", "4", "2"], "new_tokens = (4, 2)"),
    ],
)
def test_what_cannot_be_measured_is_refused(toy_run, command, flags, words):
    code, _, err = command("bench/serve", toy_run.folder, *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
