"""rdlm.report.page and report.py: one page that holds everything, with and without a browser to look at it."""

import base64
import dataclasses
import fcntl
import functools
import html.parser
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import rdlm
from rdlm.checkpoint import save_parameters
from rdlm.config import DataConfig, InputError, ModelConfig, RunConfig
from rdlm.evaluation import calibration
from rdlm.report import page
from rdlm.report.charts import Series, line_chart

SECTIONS = ["model", "training", "depth", "sweep", "exits", "trajectories", "benchmarks", "files"]
TINY = ModelConfig(
    vocab_size=290, embed_dim=16, num_heads=2, mlp_dim=32, prelude_layers=0, core_layers=1, coda_layers=1,
    max_length=64, mean_recurrence=4, backprop_depth=2,
)  # fmt: skip
PNG = base64.b64decode(  # one grey pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
CALIBRATED = calibration.Calibrated(
    "kl", 2e-4, calibration.Goal(0.01, 0.05, num_steps=8, step=4, data="some text"), rows=700, checked_rows=200,
    full_flops_per_token=1e7, effect=calibration.Effect(0.996, 0.995, 5.0, 8e6),
    tried=(calibration.Tried(1e-7, 1.0, 7.0, 0.001), calibration.Tried(2e-4, 0.996, 5.0, 0.04)),
)  # fmt: skip
NASTY = "<script>alert(1)</script>"
COMMANDS = dict.fromkeys(
    ("train", "evaluate", "depth_sweep", "calibrate_exits", "trajectories", "questions", "lm_eval"), "type this"
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run folder with a checkpoint and nothing else."""
    folder = tmp_path_factory.mktemp("page") / "bare"
    run = RunConfig(model=TINY, data=DataConfig(tokenizer_size=290, sequence_length=16), preset="nano", steps=9)
    save_parameters(folder, zeros(TINY), run, {}, step=4)
    return folder


def zeros(config):
    """Parameters that need no compilation: the page is about what was found, not about the model."""
    shapes = jax.eval_shape(lambda key: rdlm.init_params(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def fill(folder):
    """Everything that the other commands write, short; with a token that is markup."""
    rows = [
        {"step": i, "loss": 5 / (1 + i), "n": i % 7, "k": 2, "learning_rate": 1e-3, "tokens_per_second": 1e6 + i,
         "grad_norm": 1.0, "mfu": 0.4, "seconds": i}
        for i in range(500)
    ]  # fmt: skip
    rows[100] = {"step": 100, "validation_loss_r1": 3.0, "validation_loss_r8": 2.5, "vital_gain": 0.001,
                 "vital_residual": 0.1, "alarms": ["recurrence ignored: vital_gain = 0.001"]}  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 500, "lo')  # cut short by a kill
    (folder / "loss_by_depth.json").write_text(json.dumps({"1": 2.9, "2": 2.6, "8": 2.4}))
    calibration.save(folder, CALIBRATED)
    calibration.save(folder, dataclasses.replace(CALIBRATED, rule="cosine", threshold=None, effect=None))
    common = {"command": "python experiments/made.py", "commit": "abc1234", "step": 4}
    row = {"rule": "fixed depth", "threshold": None, "nats": 2.5, "bits_per_byte": None, "accuracy": 0.5,
           "iterations": 2.0, "flops_per_token": 1e6, "equivalent_parameters": 9000.0, "pareto": True}  # fmt: skip
    sweep = {"data": "text", "tokens": 100, "rows": [row, row | {"rule": "kl", "threshold": 1e-3}], "units": {}}
    tokens = {"text": "row 0", "tokens": ["a", NASTY], "recurrences": 16}
    table = [[10.0**-r, 10.0 ** -(r / 2)] for r in range(9)]
    logs = [[math.log10(x) for x in row] for row in table[1:]]
    path = {"position": 1, "token": NASTY, "kind": "orbit", "settled_after": 9, "rate": 0.5, "period": None}
    lens = {"token": NASTY, "top": ["b", NASTY], "probability": [0.5, 0.75], "hit": [False, True]}
    share, cost = {"accuracy": 0.3125, "low": 0.2, "high": 0.4}, {"iterations": 4.0, "flops_per_token": 1e6}
    results = {
        "depth_sweep": sweep,
        "questions_mine": {
            "count": 40, "baselines": {"chance": 0.25},
            "categories": {NASTY: {"count": 9, "sum": {"4": [0.5, 0.3, 0.7]}}},
            "rows": [{"depth": "r = 4", "sum": share, "nats": 1.0, "iterations": 4.0, "flops_per_token": 1e6}],
            "new_token_steps": {"default": {NASTY: share | {"questions": 9, "mean": 3.25}}},
        },
        "lm_eval": {
            "published": {"Huginn r=32": {"mine": 69.91}}, "protocol": {"limit": 10},
            "rows": [{"name": "r = 4", "results": {"mine": {"acc,none": 0.4375}}, "cost": {"mine": cost}}],
        },
        "trajectories/paths": tokens | {"counts": {"fixed point": 1, "orbit": 1}, "rows": [path], "units": {}},
        "trajectories/distance": tokens | {"distance": table, "units": {"distance": "share"}},
        "trajectories/heatmap": tokens | {"log10_distance": logs, "units": {}},
        "trajectories/independence": tokens | {
            "starts": 5, "same_limit": 2, "same_within": 0.01, "spread": table, "units": {"spread": "share"}
        },
        "trajectories/contraction": tokens | {"rows": [{"r": 1, "norm": 2, "radius": 1, "period": None}], "units": {}},
        "trajectories/lens": tokens | {"depths": [1, 4], "rows": [lens], "units": {"hit": "whether it is right"}},
    }  # fmt: skip
    (folder / "analysis" / "trajectories").mkdir(parents=True)
    for name, result in results.items():
        (folder / "analysis" / f"{name}.json").write_text(json.dumps(common | result))
        if name != "lm_eval":
            (folder / "analysis" / f"{name}.png").write_bytes(PNG)
    (folder / "analysis" / "of_my_own.png").write_bytes(PNG)


@pytest.fixture
def empty(bare, tmp_path):
    """A copy of the bare run, to fill or to damage."""
    return Path(shutil.copytree(bare, tmp_path / "run"))


@pytest.fixture(scope="module")
def full(bare, tmp_path_factory):
    """A filled run; tests must not change it."""
    folder = Path(shutil.copytree(bare, tmp_path_factory.mktemp("full") / "run"))
    fill(folder)
    return folder


@pytest.fixture
def report(command):
    """report(folder, ...) -> (exit code, stdout, stderr), as a process would have it."""
    return functools.partial(command, "report")


class Checked(html.parser.HTMLParser):
    """Reads a page and holds it to the rules."""

    VOID = ("meta", "img", "br")

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.images, self.links, self.headings, self.words = [], [], [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object", "embed", "form"), tag
        assert not any(name.startswith("on") for name in given), given
        for name, value in given.items():
            if name in ("src", "href", "srcset", "data", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#")), value[:60]
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "img":
            base64.b64decode(given["src"].partition(",")[2], validate=True)
            self.images.append(given["alt"])
        if tag == "svg":
            assert given["role"] == "img"
            self.images.append(given["aria-label"])
        if tag == "a":
            self.links.append(given["href"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def check(source):
    """The page, well-formed, complete and self-contained."""
    found = Checked(source)
    assert source.startswith("<!DOCTYPE html>")
    assert 'content="width=device-width' in source
    assert not re.search(r"https?://|@import|url\(", source)
    assert [id for id in found.ids if not re.fullmatch("m[0-9a-f]{10}", id)] == SECTIONS  # the others are of charts
    assert len(set(found.ids)) == len(found.ids)
    assert found.links == [f"#{name}" for name in SECTIONS]
    assert all(found.images), "a picture without words"
    return found


def test_a_full_run_is_told_in_full(full, report, tmp_path):
    code, out, err = report(full, "--out", tmp_path / "page.html")
    assert code == 0, err
    assert str(tmp_path / "page.html") in out
    source = (tmp_path / "page.html").read_text()
    found = check(source)
    pictures = len(list(full.rglob("*.png")))
    assert source.count("<img ") == pictures == 9
    assert source.count("<svg ") >= 10
    words = " ".join(" ".join(found.words).split())
    for fact in (
        "10,240",  # parameters, as flops counts them
        "recurrence ignored: vital_gain = 0.001",
        "2.4000", "-0.2000",  # loss by depth and its change
        "99.60 %", "99.50 %", "20 %",  # calibrated: agreement, on other rows, saved
        "cosine: no threshold that was tried agrees",
        "2 of 2 tokens reach the same limit",
        "orbit", "of my own",
        "31.2 % (20 to 40)", "chance 25.0 %", "3.25 (0.2 to 0.4)", "0.4375", "69.91", "first 10 examples",
    ):  # fmt: skip
        assert fact.replace("10,240", f"{rdlm.perf.flops.parameters(TINY):,}").casefold() in words.casefold(), fact
    assert NASTY not in source
    assert "<script>alert(1)</script>"[:11] in words  # shown as text
    assert "missing" not in words.partition("Benchmarks")[0].partition("Training")[2]


def test_a_bare_run_says_how_to_make_the_rest(empty, report):
    code, _, err = report(empty)
    assert code == 0, err
    words = " ".join(check((empty / "report.html").read_text()).words)
    commands = ("train", "evaluate", "depth_sweep", "calibrate_exits", "trajectories", "questions", "lm_eval")
    for command in commands:
        assert f"python experiments/{command}.py" in words, command
    assert not list(empty.glob("*.partial"))


def test_results_of_another_checkpoint_are_marked(empty, report):
    fill(empty)
    path = empty / "analysis" / "depth_sweep.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))
    calibration.save(empty, dataclasses.replace(CALIBRATED, goal=CALIBRATED.goal._replace(step=2)))
    assert report(empty)[0] == 0
    words = " ".join(check((empty / "report.html").read_text()).words)
    assert "This is about step 3; the checkpoint is step 4." in words
    assert "Calibrated for step 2, not 4." in words


def test_a_task_is_asked_for_no_text(tmp_path, report):
    run = RunConfig(
        model=dataclasses.replace(TINY, vocab_size=7),
        data=DataConfig(tokenizer_size=7, sequence_length=17, task="s3", task_size=16),
    )
    save_parameters(tmp_path / "run", zeros(run.model), run, {}, step=4)
    assert report(tmp_path / "run")[0] == 0
    words = " ".join(check((tmp_path / "run" / "report.html").read_text()).words)
    assert "instances of the task s3" in words
    assert "evaluate.py" not in words
    assert "lm_eval.py" not in words


def write(name, text):
    def damage(run):
        (run / name).write_text(text)

    damage.__name__ = f"{name} {text[:20]!r}"
    return damage


def without_checkpoint(run):
    shutil.rmtree(run / "checkpoints")


def a_folder_in_the_way(run):
    (run / "report.html").mkdir()


def a_rotten_picture(run):
    (run / "analysis" / "depth_sweep.png").write_bytes(b"GIF89a")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_checkpoint, ["no complete checkpoint"]),
        (a_folder_in_the_way, ["report.html", "cannot be written"]),
        (a_rotten_picture, ["depth_sweep.png", "is not a PNG", "make it again"]),
        (write("metrics.jsonl", '{"step": 0, "loss": 1}\n{"loss: 3}\n'), ["metrics.jsonl", "line 2"]),
        (write("metrics.jsonl", '{"loss": 3}\n'), ["metrics.jsonl", "line 1"]),
        (write("loss_by_depth.json", '{"1": 2.9, "2":'), ["loss_by_depth.json", "evaluate.py"]),
        (write("loss_by_depth.json", "{}"), ["loss_by_depth.json", "no depth"]),
        (write("calibrated_exits.json", "[]"), ["calibrated_exits.json", "calibrate again"]),
        (write("analysis/depth_sweep.json", '{"rows": [{'), ["depth_sweep.json", "damaged", "delete it"]),
        (write("analysis/depth_sweep.json", '{"rows": 3}'), ["depth_sweep.json", "damaged", "depth_sweep.py"]),
        (write("analysis/questions_a.json", "[1, 2]"), ["questions_a.json", "an object was expected", "questions.py"]),
        (write("analysis/lm_eval.json", '{"rows": []}'), ["lm_eval.json", "lm_eval.py"]),
        (write("analysis/trajectories/lens.json", "{}"), ["lens.json", "UndefinedError", "trajectories.py"]),
        (write("analysis/trajectories/paths.json", '{"counts": {}, "rows": [], "units": {}}'), ["paths.json", "tok"]),
        (write("analysis/trajectories/paths.json", "\0"), ["paths.json", "damaged"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_damaged_files_are_named(damage, words, empty, report):
    fill(empty)
    damage(empty)
    code, out, err = report(empty)
    assert code == 2
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    for word in words:
        assert word in err
    assert not out
    assert not (empty / "report.html").is_file()


CURVES = {
    "all NaN": ({"1": math.nan, "2": math.nan}, 0), "some": ({"1": 2.5, "2": math.inf, "4": math.nan}, 1),
    "null": ({"1": None, "4": None}, 0), "the first": ({"1": math.nan, "2": 3.0}, 1),
}  # fmt: skip


@pytest.mark.parametrize(("curve", "finite"), CURVES.values(), ids=CURVES)
def test_a_diverged_run_has_a_page(curve, finite, empty, report):
    fill(empty)
    (empty / "loss_by_depth.json").write_text(json.dumps(curve))
    code, _, err = report(empty)
    assert code == 0, err
    words = (empty / "report.html").read_text()
    assert words.count("not finite") == len(curve) - finite
    assert "Validation loss by recurrences" in words or not finite


@pytest.mark.parametrize("name", ["depth_sweep", "questions_mine", "lm_eval"])
def test_results_that_are_not_finite_are_shown(name, empty, report):
    fill(empty)
    path = empty / f"analysis/{name}.json"
    found, times = re.subn(r'("(nats|bits_per_byte|acc,none)": )[\d.]+', r"\1null", path.read_text())
    assert times  # as `write_result` writes what is not finite
    path.write_text(found)
    code, _, err = report(empty)
    assert code == 0, err


def test_every_set_of_tasks_is_on_the_page(empty, report):
    fill(empty)
    newest = empty / "analysis/lm_eval.json"
    text = newest.read_text()
    newest.with_name("lm_eval_other.json").write_text(text.replace("0.4375", "0.8125"))
    for copy, times in ((False, 1), (True, 1)):
        if copy:
            newest.with_name("lm_eval_mine.json").write_text(text)
        report(empty)
        words = (empty / "report.html").read_text()
        assert (words.count("0.4375"), words.count("0.8125")) == (times, 1)


@pytest.mark.parametrize(
    ("out", "fault"),
    [("", "is empty; name a file")]
    + [(out, "it is a folder; give the name of a file") for out in (".", "..", "folder")],
)
def test_a_page_needs_a_name(out, fault, empty, command, monkeypatch):
    monkeypatch.chdir(empty)
    (empty / "folder").mkdir()
    before = sorted(empty.parent.rglob("*"))
    code, _, err = command("report", empty, "--out", out)
    assert code == 2
    assert fault in err
    assert sorted(empty.parent.rglob("*")) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "thesis.tex"])
def test_a_page_replaces_pages_only(name, empty, command):
    fill(empty)
    (empty / "thesis.tex").write_text("chapter one")
    before = (empty / name).read_bytes()
    code, _, err = command("report", empty, "--out", empty / name)
    assert (code, err.count("\n")) == (2, 1)
    assert "exists and is not a page" in err
    assert (empty / name).read_bytes() == before
    (empty / "real.html").write_text("<!DOCTYPE html>old")
    (empty / "page.html").symlink_to("real.html")
    assert command("report", empty, "--out", empty / "page.html")[0] == 0
    assert (empty / "page.html").is_symlink()
    assert len((empty / "real.html").read_text()) > 1000


# Parts


def test_numbers_are_readable():
    values = (0.012344, 12.3456, 1234567.0, 2.5e-7, 3.1e12, 0.0, float("nan"))
    assert [page.number(x) for x in values] == ["0.01234", "12.35", "1,234,567", "2.5e-07", "3.1e+12", "0", "nan"]


def test_columns_of_numbers_are_aligned_and_others_are_not():
    rows = [["a", 1, 1.5, "99.5 %"], ["b", "x", None, "-0.1 %"]]
    assert page.numeric_columns(rows) == [False, False, True, True]


def test_lines_lie_where_their_values_are():
    made = line_chart([Series("a", [1, 2, 4, 8], [0, 5, math.nan, 1])], x="r", y="loss", alt='a "<', log_x=True)
    path = re.search(r'd="(M[^"]*)" style="fill: none; stroke: var\(--c0\)', made)[1]
    (x0, y0), (x1, y1) = ([float(x) for x in p.split()] for p in re.split("[ML]", path)[1:3])
    assert x0 < x1
    assert y0 > y1  # upwards
    assert path.count("L") == 1  # the gap
    assert 'aria-label="a &#34;&lt;"' in made
    with pytest.raises(ValueError, match="finite point"):
        line_chart([Series("a", [1], [math.nan])], x="r", y="loss", alt="what")


def test_a_page_is_the_same_every_time(full):
    assert page.html_page(full, COMMANDS) == page.html_page(full, COMMANDS)


def test_without_matplotlib_the_page_has_its_tables_and_says_what_to_install(full, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    source = page.html_page(full, COMMANDS)
    assert "<svg" not in source
    assert "rdlm[plots]" in " ".join(check(source).words)


def test_a_picture_needs_to_be_one(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    found = page.read_png(tmp_path / "a.png")
    assert (found.width, found.height) == (1, 1)
    with pytest.raises(InputError, match="cannot be read"):
        page.read_png(tmp_path / "b.png")


# In a browser


class Browser:
    """Headless Chromium, driven over its debugging pipe: JSON messages that end with a zero byte."""

    def __init__(self, program):
        self.profile = tempfile.mkdtemp()
        pipes = os.pipe(), os.pipe()
        # Out of the way of 3, from which the program reads, and 4, to which it writes.
        (reads, self.out), (self.inp, writes) = ([fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in ends] for ends in pipes)
        for fd in (*pipes[0], *pipes[1]):
            os.close(fd)
        wiring = f'exec 3<&{reads} 4>&{writes} {reads}<&- {writes}>&-; exec "$@"'
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", wiring, "bash", program, *options, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(reads, writes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(reads), os.close(writes)
        self.count, self.buffer, self.events, self.session = 0, b"", [], None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(self.out, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self.read()).get("id") != self.count:
            self.events.append(answer)
        return answer["result"]

    def read(self):
        while b"\0" not in self.buffer:
            part = os.read(self.inp, 1 << 20)
            assert part, "the browser has gone"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, path, width):
        """Show a file in a window of this width; what was logged and asked for meanwhile."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
        self.events = []
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        said = [e for e in self.events if e["method"] in (
            "Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"
        )]  # fmt: skip
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return said, [url for url in asked if not url.startswith("data:")]

    def value(self, expression):
        """What a JavaScript expression is, as JSON."""
        found = self("Runtime.evaluate", expression=f"JSON.stringify({expression})")
        return json.loads(found["result"]["value"])

    def close(self):
        self.session = None
        self("Browser.close")  # in good order: killed, it would leave its helpers behind
        self.process.wait(timeout=60)
        os.close(self.out), os.close(self.inp)
        shutil.rmtree(self.profile, ignore_errors=True)


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no Chromium on this machine (apt install chromium); the page is checked without a browser above")
    opened = Browser(program)
    yield opened
    opened.close()


# Boxes that scroll are allowed to hold more than the window, and so is what lies in them.
TOO_WIDE = """[...document.querySelectorAll('body *')]
    .filter(e => !e.parentElement.closest('.scroll'))
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
    .map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_a_browser_shows_the_page_without_complaint_and_within_its_window(width, browser, full, report, tmp_path):
    path = tmp_path / "page.html"
    assert report(full, "--out", path)[0] == 0
    said, asked = browser.open(path, width)
    assert said == []
    assert asked == [path.as_uri()]
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true) ?? 0")
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value(TOO_WIDE) == []
    assert browser.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.value("document.querySelectorAll('section').length") == len(SECTIONS)
    assert browser.value("matchMedia('(max-width: 400px)').matches") == (width < 400)


def test_the_browser_would_have_complained(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        "<!DOCTYPE html><meta name=viewport content='width=device-width'><body><div style='width:900px'>wide</div>"
        "<img src='missing.png' alt=''><script>console.error('no'); undefined.x</script>"
    )
    said, asked = browser.open(path, 390)
    assert {e["method"] for e in said} >= {"Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
    assert len(asked) == 2
    assert browser.value(TOO_WIDE) != []
