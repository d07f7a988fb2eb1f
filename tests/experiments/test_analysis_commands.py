"""depth_sweep.py and trajectories.py as a person uses them: what they leave, what is drawn, and how they refuse."""

import csv
import importlib
import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
from experiment_scripts import script
from small_runs import SHAPE, prepared, saved

from rdlm.config import DataConfig, InputError, ModelConfig
from rdlm.perf import flops
from rdlm.report import (
    plot_contraction,
    plot_distance,
    plot_heatmap,
    plot_independence,
    plot_lens,
    plot_paths,
    shown,
    write_result,
    write_table,
)


@pytest.fixture(scope="module")
def task_run(tmp_path_factory):
    data = DataConfig(tokenizer_size=7, sequence_length=17, task="s3", task_size=16)
    return saved(tmp_path_factory.mktemp("task") / "s3", 7, {"data": data})


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("text"), 0.5)


def test_a_sweep_leaves_rows_that_say_what_they_cost(task_run, command):
    code, out, err = command("depth_sweep", task_run, "--depths", "3", "1", "--batches", "1", "--rules", "kl", "cosine")
    assert code == 0, err
    found = json.loads((task_run / "analysis/depth_sweep.json").read_text())
    assert found["command"].startswith("python experiments/depth_sweep.py")
    assert (found["step"], found["tokens"], found["length"]) == (7, 64 * 16, 17)
    assert found["commit"]
    config = ModelConfig(vocab_size=7, **SHAPE)
    fixed = [row for row in found["rows"] if row["rule"] == "fixed depth"]
    assert [row["iterations"] for row in fixed] == [1, 3]
    rules = [row["rule"] for row in found["rows"][2:]]
    assert set(rules) == {"kl", "cosine"}
    for row in found["rows"]:
        looks = row["iterations"] if row["rule"] == "kl" else 0
        assert row["looks"] == pytest.approx(looks)
        price = flops.forward_flops(config, row["iterations"], 17) + looks * flops.check_flops(config, 17)
        assert row["flops_per_token"] == pytest.approx(price, rel=1e-5)
        whole = flops.materialised_parameters(config, row["iterations"])
        assert row["equivalent_parameters"] == pytest.approx(whole, rel=1e-5)
        assert 1 <= row["iterations"] <= row["most_iterations"] <= 3
        assert 0 <= row["accuracy"] <= 1
        assert row["bits_per_byte"] is None  # a task has no text
        assert f"{row['accuracy']:.2%}" in out
        assert set(row) - {"rule"} <= set(found["units"])
    with (task_run / "analysis/depth_sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["nats"] for row in table] == [str(row["nats"]) for row in found["rows"]]
    assert (task_run / "analysis/depth_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_of_text_has_bits_per_byte_and_does_without_matplotlib(text_run, command, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else real(name))
    code, out, err = command("depth_sweep", text_run, "--depths", "1", "2", "--rules", "latent_diff", "--batches", "2")
    assert code == 0, err
    assert "picture: none, matplotlib is not installed (pip install 'rdlm[plots]')" in out
    assert not (text_run / "analysis/depth_sweep.png").exists()
    for row in json.loads((text_run / "analysis/depth_sweep.json").read_text())["rows"]:
        assert row["bits_per_byte"] == pytest.approx(row["nats"] / math.log(2), rel=0.2)  # bytes, and a few specials


PICTURES = ("paths", "distance", "heatmap", "independence", "contraction", "lens")


def test_trajectories_leave_all_six_answers(text_run, command):
    code, out, err = command(
        "trajectories", text_run, "--prompt", "a $1_^ b", "--recurrences", "16", "--starts", "2", "--depths", "1", "4"
    )
    assert code == 0, err
    folder = text_run / "analysis/trajectories"
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in PICTURES}
    for name, tree in found.items():
        assert {"command", "commit", "step", "units", "run", "text"} <= set(tree), name
        assert len(tree["tokens"]) == 9  # with the token that begins a text
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sum(found["paths"]["counts"].values()) == len(found["paths"]["rows"]) == 9
    assert np.shape(found["distance"]["distance"]) == (9, 9)  # [r = 0 .. R / 2][token]
    assert np.shape(found["independence"]["spread"]) == (17, 9)
    assert [row["r"] for row in found["contraction"]["rows"]] == [1, 4, 16]
    assert len(found["lens"]["rows"]) == 9
    assert found["lens"]["rows"][-1]["label"] is None
    assert [row["label"] for row in found["lens"]["rows"][:-1]] == found["lens"]["tokens"][1:]
    assert len((folder / "tokens.csv").read_text().splitlines()) == 10
    assert "fixed point" in out


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("depth_sweep", ("--depths", "0", "4"), ["--depths = (0, 4)", "at least 1"]),
        ("depth_sweep", ("--batches", "0"), ["--batches = 0", "at least 1"]),
        ("depth_sweep", ("--size", "60"), ["--size 60", "61 tokens", "max_length"]),
        ("depth_sweep", ("--step", "3"), ["step = 3", "there are 7"]),
        ("trajectories", ("--depths", "0"), ["--depths = (0,)", "from 1 to --recurrences (128)"]),
        ("trajectories", ("--depths", "200"), ["--depths = (200,)", "(128)"]),
        ("trajectories", ("--recurrences", "15"), ["--recurrences = 15", "at least 16"]),
        ("trajectories", ("--prompt", "a"), ["--prompt", "trained on a task", "--row"]),
        ("trajectories", ("--row", "256"), ["--row 256", "there are 256 rows"]),
        ("trajectories", ("--size", "60"), ["--size 60", "61 tokens", "at most 40"]),
    ],
)
def test_wrong_arguments_are_one_line(name, arguments, words, task_run, command):
    refused(command(name, task_run, *arguments), words)


def refused(result, words):
    code, out, err = result
    assert code == 2, err
    assert (err.count("\n"), out) == (1, ""), err
    assert err.startswith("error: ")
    for word in words:
        assert word in err


@pytest.mark.parametrize("name", ["depth_sweep", "trajectories"])
def test_runs_that_cannot_be_analysed_are_one_line(name, text_run, task_run, tmp_path, command):
    refused(command(name, tmp_path / "nothing"), ["nothing", "does not exist"])
    shutil.copytree(task_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    refused(command(name, tmp_path / "run"), ["no complete checkpoint"])
    empty = prepared(tmp_path, 0.0)
    refused(command(name, empty), ["no validation rows", "validation fraction above 0"])
    config = json.loads((empty / "config.json").read_text())
    (empty / "config.json").write_text(
        json.dumps(config | {"data": config["data"] | {"task": "chess", "task_size": 8}})
    )
    refused(command(name, empty), ["data.task = 'chess'", "Known: s3"])
    refused(command(name, text_run, "--size", "4"), ["--size 4", "trained on text"])


def test_a_prompt_needs_the_tokenizer_alone(text_run, command, tmp_path, monkeypatch):
    run = shutil.copytree(text_run, tmp_path / "elsewhere/run")
    config = json.loads((run / "config.json").read_text())
    config["data"]["prepared"] = [str(tmp_path / "gone")]
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    words = ("--recurrences", "16", "--starts", "2", "--depths", "1", "4")
    code, _, err = command("trajectories", run, "--prompt", "a $1_^ b", *words)
    assert code == 0, err
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]  # no data folder
    refused(command("trajectories", run), ["gone"])  # a row of the validation text does need it
    for flag, value in (("--row", "1"), ("--size", "4"), ("--prepared", "x")):
        refused(command("trajectories", run, "--prompt", "ab", flag, value), [flag, "leave one of them out"])


def test_prompts_that_do_not_fit_are_one_line(text_run, command):
    refused(command("trajectories", text_run, "--prompt", "x" * 40), ["--prompt", "41 tokens", "at most 40"])
    refused(command("trajectories", text_run, "--prompt", ""), ["--prompt", "fewer than two tokens"])


# Pictures of what the models at hand do not show


def test_pictures_of_any_kind_of_path_and_token(tmp_path):
    names = ["$x_1^", "\n", "", "a very long token indeed", "\x1f", "\\frac"]
    r = np.arange(1, 33)
    circle = np.stack([np.cos(r), np.sin(r)], 1)
    panels = [
        {
            "token": name,
            "position": i,
            "kind": kind,
            "note": "",
            "coordinates": circle * (i + 1),
            "explained": [0.5, 0.5],
        }
        for i, (name, kind) in enumerate(zip(names, ["orbit", "drift", "unsettled"] * 2, strict=True))
    ]
    far = np.abs(np.random.default_rng(0).normal(size=(33, 6)))
    rows = [
        {"token": n, "position": i, "top": [n, "b"], "probability": [0.1, 0.9], "hit": [True, False]}
        for i, n in enumerate(names)
    ]  # fmt: skip
    drawn = [
        plot_paths(tmp_path / "paths.png", "title", panels[:5]),
        plot_paths(tmp_path / "one.png", "title", panels[:1]),
        plot_distance(tmp_path / "distance.png", "title", far, names, 0.01),
        plot_distance(tmp_path / "settled.png", "title", 0 * far, names, 0.01),
        plot_heatmap(tmp_path / "heatmap.png", "title", np.tile(far, (1, 8)), names * 8),
        plot_independence(tmp_path / "starts.png", "title", far),
        plot_contraction(tmp_path / "rates.png", "title", [1, 2], [3.0, 2.0], [0.5, 0.6], [None, 0.4]),
        plot_contraction(tmp_path / "none.png", "title", [1, 2], [3.0, 2.0], [0.5, 0.6], [None, None]),
        plot_lens(tmp_path / "lens.png", "title", rows, [1, 2], "the label"),
    ]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5_000
    assert [shown(name) for name in names] == ["$x_1^", "↵", "∅", "a·very·long…", "□", "\\frac"]


def test_results_are_plain_json_and_csv(tmp_path):
    found = {"a": np.float32(0.1), "b": [math.nan, np.arange(2)], "c": {1: math.inf, "t": (True, None)}}
    path = write_result(tmp_path / "deep/found.json", found, {"a": "nats"})
    tree = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (tree["a"], tree["b"], tree["c"], tree["units"]) == (
        0.1, [None, [0, 1]], {"1": None, "t": [True, None]}, {"a": "nats"}
    )  # fmt: skip
    assert {"command", "commit"} <= set(tree)
    table = write_table(tmp_path / "found.csv", [{"a": 1, "b": math.nan}, {"a": "x,y", "b": 2.5}])
    assert table.read_text() == 'a,b\n1,\n"x,y",2.5\n'
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_result(tmp_path / "file/below.json", {}, {})


def test_results_of_two_question_files_of_one_name_are_both_kept(tmp_path):
    name = script("questions").result_file
    a, b = tmp_path / "a" / "mine.jsonl", tmp_path / "b" / "mine.jsonl"
    usual = name(tmp_path, a)
    assert usual == tmp_path / "questions_mine.json"
    usual.write_text(json.dumps({"questions": str(a)}))
    assert name(tmp_path, a) == usual
    other = name(tmp_path, b)
    assert other != usual
    assert other.name.startswith("questions_mine_")
    other.write_text(json.dumps({"questions": str(b)}))
    assert (name(tmp_path, a), name(tmp_path, b)) == (usual, other)
