"""bench/peers.py: what it refuses and measures with peers that compute nothing, and a real process of this project."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiment_scripts import script

import rdlm
from rdlm.config import ModelConfig
from rdlm.runtime import RunError

FAKE = Path(__file__).parents[1] / "support/fake_peer.py"
SMALL = ModelConfig(16, 16, 2, 16, prelude_layers=1, core_layers=1, coda_layers=1, mean_recurrence=2)
OTHERS = script("bench/peers").Load.others
WORK = ("--work", "prefill", "decode", "train", "--dtypes", "float32", "--turns", "2", "--new-tokens", "4")


@pytest.fixture
def bench(monkeypatch):
    """The bench, of peers that compute nothing, on a machine that does nothing else."""
    bench = script("bench/peers")
    monkeypatch.setattr(bench, "PROCESS", FAKE)
    monkeypatch.setattr(bench, "PAUSE", 0.0)
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(bench, "environment", lambda folder: Path(sys.executable))
    monkeypatch.setattr(bench.Load, "others", lambda load: 0.01)
    monkeypatch.setattr("rdlm.runtime.cli.leave", lambda code, at_once=False: sys.exit(code))
    monkeypatch.setenv("FAKE_PEER", "")
    return bench


@pytest.fixture
def run(bench, command, tmp_path):
    """run(*flags) -> (exit code, stdout, stderr), with some folder as the model."""
    return lambda *flags: command("bench/peers", "--model", tmp_path, "--folder", tmp_path / "work", *WORK, *flags)


def test_ratios_are_those_of_the_times_that_the_peers_tell(run, tmp_path):
    code, out, err = run("--json", tmp_path / "rows.json", "--prompt-tokens", "30")
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["work"] for row in rows] == ["prefill", "decode", "train"]
    for row, tokens in zip(rows, (30, 4, 4 * 256), strict=True):
        assert row["ours"] == pytest.approx(tokens / 0.1)
        assert row["theirs"] == pytest.approx(tokens / 0.3)
        assert row["ratio"] == row["least"] == row["most"] == pytest.approx(3)
        assert row["load"] == 0.01
    assert "3.00" in out


def test_a_busy_machine_is_refused_before_anything_is_made(run, bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.Load, "others", lambda load: 1.5)
    code, out, err = run("--max-load", "1.4")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "1.50 of" in err
    assert "--max-load 1.4" in err
    assert not (tmp_path / "work").exists()
    assert run("--max-load", "1.6")[0] == 0


def test_load_that_comes_later_is_shown_and_judges_nothing(run, bench, monkeypatch):
    found = iter([0.0, 0.0, 0.9, 0.0])  # at the start, and for each kind of work
    monkeypatch.setattr(bench.Load, "others", lambda load: next(found))
    code, out, err = run("--max-load", "0.5")
    assert code == 1
    assert "0.90" in out
    assert err.count("\n") == 1
    assert "judges nothing" in err


def test_an_unknown_load_is_refused_unless_a_limit_is_given(run, bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.Load, "others", OTHERS)
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **o: read(Path(str(path).replace("/proc/", "/nowhere/")), **o))
    assert bench.Load().others() is None
    code, out, err = run()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "give --max-load" in err
    assert not (tmp_path / "work").exists()
    code, out, err = run("--max-load", "0.5", "--json", tmp_path / "rows.json")
    assert (code, err) == (0, "")
    assert "unknown" in out
    text = (tmp_path / "rows.json").read_text()
    assert [row["load"] for row in json.loads(text, parse_constant=pytest.fail)] == [None] * 3


def test_load_that_nobody_knew_later_judges_nothing(run, bench, monkeypatch):
    found = iter([0.0, 0.0, None, 0.0])
    monkeypatch.setattr(bench.Load, "others", lambda load: next(found))
    code, out, err = run()
    assert (code, err.count("\n")) == (1, 1)
    assert "unknown" in out
    assert "give --max-load" in err


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the load is read from /proc")
def test_load_is_what_other_processes_use():
    bench = script("bench/peers")
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            every, others = bench.Load(), bench.Load(busy.pid)
            bench.time.sleep(2)
            assert every.others() > others.others() + 0.02  # on a busy machine its share is small
        finally:
            busy.kill()


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("logits", "transformers: logits and rdlm's are 1 of 4 apart in float32, more than 0.001 of it"),
        ("tokens", "transformers: greedy token 1 is 0 and rdlm's 1 in float32, whose logits are 4 apart"),
        ("loss", "transformers: loss and rdlm's are 1 of 2 apart"),
        ("dies", "transformers: ended with code 7 when asked to train: killed by the test"),
        ("fails", "transformers: cannot train: ValueError: no gradient"),
    ],
)
def test_what_is_not_the_same_is_not_compared(run, monkeypatch, does, words):
    monkeypatch.setenv("FAKE_PEER", does)
    code, out, err = run()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert words in err


def test_texts_may_part_where_logits_are_as_good_as_equal(run, monkeypatch):
    monkeypatch.setenv("FAKE_PEER", "near tokens")  # 3.999 where the largest is 4
    assert run()[0] == 0


def test_exits_must_agree_with_the_reference(bench, monkeypatch, tmp_path):
    o = bench.Options(folder=tmp_path, work=("adaptive",), new_tokens=4)

    def compare():
        with bench.started(o, "reference", tmp_path, Path(sys.executable)) as pair:
            return list(bench.compare(o, pair, "float32"))

    assert [row.work for row in compare()] == ["adaptive"]
    monkeypatch.setenv("FAKE_PEER", "steps")
    with pytest.raises(RunError, match=r"exits after 4.00 recurrences in the mean and rdlm after 3.00"):
        compare()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--reference", "nowhere"], "reference = nowhere: is no folder"),
        (["--turns", "0"], "turns = 0"),
        (["--max-load", "-1"], "max_load = -1.0"),
    ],
)
def test_wrong_input_is_one_line(bench, command, tmp_path, flags, words):
    code, out, err = command("bench/peers", "--folder", tmp_path / "work", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (tmp_path / "work").exists()


def test_a_folder_without_the_code_is_no_reference(run, tmp_path):
    code, _, err = run("--reference", tmp_path)
    assert code == 2
    assert "has no raven_modeling_minimal.py" in err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small model that the bench has made, beside code."""
    bench, folder = script("bench/peers"), tmp_path_factory.mktemp("made")
    (folder / "raven_modeling_minimal.py").write_text("first")
    return bench.toy(folder / "made", SMALL, folder)


def test_a_small_model_is_made_once_and_the_code_lies_beside_it(made):
    assert rdlm.load_huggingface(made)[1].mean_recurrence == SMALL.mean_recurrence
    assert (made / "raven_modeling_minimal.py").read_text() == "first"
    before = (made / "model.safetensors").stat().st_mtime_ns
    (made.parent / "raven_modeling_minimal.py").write_text("second")
    script("bench/peers").toy(made, SMALL, made.parent)
    assert (made / "raven_modeling_minimal.py").read_text() == "second"
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_an_environment_that_cannot_be_made_leaves_nothing(command, monkeypatch, tmp_path):
    bench = script("bench/peers")
    monkeypatch.setattr(bench, "PACKAGES", ("no-such-package==1",))
    monkeypatch.setattr(bench.Load, "others", lambda load: 0.0)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    code, out, err = command("bench/peers", "--folder", tmp_path / "work")
    assert code == 2
    assert "pip downloads no-such-package==1" in out
    assert "could not be made" in err.splitlines()[-1]
    assert not (tmp_path / "work/environment").exists()


def test_this_project_answers_what_it_computes(made):
    ours, tokens = script("bench/peer_process").Ours(), [3, 1, 4, 1, 5]
    params, config = rdlm.load_huggingface(made)
    assert ours.load(str(made), "float32", trusted=False)["vocab"] == config.vocab_size
    forward = jax.jit(rdlm.forward, static_argnames="config")
    logits = forward(params, config, np.asarray([tokens]), state=jnp.zeros((1, 5, config.state_dim))).logits[0]
    np.testing.assert_allclose(ours.logits(tokens)["logits"], logits[-1], rtol=1e-5, atol=1e-5)
    fixed, adaptive = (ours.generate(tokens, 2, adaptive) for adaptive in (False, True))
    assert fixed["tokens"][0] == int(logits[-1].argmax())
    assert fixed["steps"] == [config.mean_recurrence] * 2
    assert len(adaptive["tokens"]) == 2
    losses = [ours.train([tokens, tokens])["loss"] for _ in range(2)]
    expected = -np.mean(jax.nn.log_softmax(logits)[np.arange(4), tokens[1:]])
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses[1] < losses[0], "nothing was learnt"


def test_a_process_of_this_project_tells_its_errors(tmp_path):
    bench = script("bench/peers")
    with (
        bench.started(bench.Options(folder=tmp_path), "transformers", tmp_path, Path(sys.executable)) as pair,
        pytest.raises(RunError, match=r"rdlm: cannot load: InputError: .*nowhere"),
    ):
        pair.ours.ask("load", folder="nowhere", dtype="float32", trusted=False)
