"""The experiment end to end at its smallest: run folders that load, tables and pictures, reruns and refusals."""

import json
import subprocess
import sys

import pytest
from experiment_scripts import EXPERIMENTS, script

import rdlm
from rdlm.checkpoint import read_config
from rdlm.train.metrics import read_metrics

SCRIPT = EXPERIMENTS / "studies/depth_scaling.py"


@pytest.mark.slow
def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["depth_scaling.py", "--quick", "--task", "pointers", "--seeds", "3"])
    main = script("studies/depth_scaling").main
    assert main() == 0
    table = tmp_path / "runs/quick/depth_scaling_pointers.json"
    found = json.loads(table.read_text())
    (row,) = found["seeds"]
    assert found["failed_seeds"] == [3]  # twelve steps teach nothing, and that is said
    (test,) = row["tests"].values()
    assert set(test["by_difficulty"]) == {str(h) for h in range(1, 9)}
    assert test["answers"] == 64 * 8
    assert set(test["exits"]["kl 5e-4, per sequence"]["steps_by_difficulty"]) == set(test["by_difficulty"])
    assert row["programs"] == 1
    assert table.with_suffix(".png").stat().st_size > 10_000
    folder = tmp_path / "runs/quick/pointers_seed3"
    params, config = rdlm.load_checkpoint(folder)
    assert config.vocab_size == params["wte"].shape[0] == 14
    run = read_config(folder)
    assert (run.seed, run.data.task, run.data.task_size) == (3, "pointers", 4)
    assert {(m["n"], m["k"]) for m in read_metrics(folder)} != {(4, 4)}  # depths are drawn

    # Again: read, not trained; the same numbers. Refused when the folder holds something else.
    before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())
    assert main() == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()) == before
    assert json.loads(table.read_text())["seeds"] == found["seeds"]
    config_file = folder / "config.json"
    config_file.write_text(config_file.read_text().replace('"learning_rate": 0.002', '"learning_rate": 0.004'))
    with pytest.raises(rdlm.InputError, match=r"optimizer.learning_rate = 0.004, not 0.002"):
        main()


@pytest.mark.slow
def test_a_task_is_shown_beside_a_text_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["depth_scaling.py", "--quick", "--task", "s3_local", "--beside", "text"]
    monkeypatch.setattr(sys, "argv", words)
    main = script("studies/depth_scaling").main
    with pytest.raises(rdlm.InputError, match=r"--beside text: has no loss_by_depth.json"):
        main()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/loss_by_depth.json").write_text('{"1": 2.5, "4": 2.25}')
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[2:] == ["1", "2", "4", "8"]
    assert lines[2].split()[-2:] == ["2.5000", "2.2500"]
    found = json.loads((tmp_path / "runs/quick/s3_local/accuracy_by_depth.json").read_text())
    (values,) = found["accuracy"].values()
    assert lines[1].split()[-3:] == [f"{x:.3f}" for x in values]
    assert (tmp_path / "runs/quick/s3_local/accuracy_by_depth.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "0", "1"])
    with pytest.raises(rdlm.InputError, match=r"--seeds = \(0, 1\): must be one seed with --beside"):
        main()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seeds", "-1"], "--seeds = -1: must be in [0, 1000000)"),
        (["--seeds", "1", "1"], "--seeds = (1, 1): must be different seeds"),
    ],
)
def test_refusals(tmp_path, words, line):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_task_is_refused_by_the_parser(tmp_path):
    words = [sys.executable, str(SCRIPT), "--task", "s4"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "'s4'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
