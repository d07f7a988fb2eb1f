"""Paths that a user gives: remote ones are refused everywhere alike, ~ is expanded everywhere."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from experiment_scripts import EXPERIMENTS

import rdlm
from rdlm.checkpoint import load_tokenizer, read_config, read_meta, save_parameters, saved_steps
from rdlm.config import PRESETS, DataConfig, InputError, local_path
from rdlm.data.manifest import read_manifest
from rdlm.data.prepare import build
from rdlm.evaluation.question_files import read_questions
from rdlm.evaluation.question_sets import question_file
from rdlm.report import read_curve
from rdlm.runtime import complete_folder, keep_compiled_programs, write_output
from rdlm.tokenizer import Tokenizer

NANO = PRESETS["nano"]
URLS = ["gs://bucket/x", "s3://bucket/x", "https://host/x", "file:///tmp/x", "gs:/bucket/x"]
DOORS = {
    "run_dir": lambda path: dataclasses.replace(NANO, run_dir=str(path)),
    "data.folder": lambda path: DataConfig(folder=str(path)),
    "rdlm.load": rdlm.load,
    "load_checkpoint": rdlm.load_checkpoint,
    "load_huggingface": rdlm.load_huggingface,
    "save_huggingface": lambda path: rdlm.save_huggingface(path, {}, NANO.model),
    "save_parameters": lambda path: save_parameters(path, {}, NANO, {}),
    "read_config": read_config,
    "read_meta": read_meta,
    "saved_steps": saved_steps,
    "load_tokenizer": load_tokenizer,
    "Tokenizer.load": Tokenizer.load,
    "Tokenizer.save": Tokenizer.bytes_only().save,
    "read_manifest": read_manifest,
    "build": lambda path: build(path, None, None, None, processes=1, say=print),
    "read_questions": read_questions,
    "question_file": lambda path: question_file("fcc", path),
    "read_curve": read_curve,
    "write_output": lambda path: write_output(path, ""),
    "complete_folder": lambda path: complete_folder(path).__enter__(),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_url_is_refused_wherever_a_local_path_is_read_or_written(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for url in (*URLS, *map(Path, URLS)):
        with pytest.raises(InputError, match=r"is a URL, and this must be a local path; mount the bucket") as refused:
            DOORS[door](url)
        assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


COMMANDS = [
    ("train", "nano", "--run-dir", "URL"),
    ("train", "nano", "--data.folder", "URL"),
    ("train_tokenizer", "--bytes", "--out", "URL"),
    ("prepare_data", "t.jsonl", "--tokenizer", "bytes", "--out", "URL"),
    ("prepare_data", "t.jsonl", "--tokenizer", "URL", "--out", "x"),
    ("evaluate", "URL"),
    ("evaluate", "URL", "--saved"),
    ("generate", "URL", "--prompt", "a"),
    ("depth_sweep", "URL"),
    ("calibrate_exits", "URL"),
    ("trajectories", "URL"),
    ("questions", "URL"),
    ("lm_eval", "URL"),
    ("report", "URL"),
    ("report", "runs/x", "--out", "URL"),
    ("fetch_model", "smollm2", "--out", "URL"),
    ("convert_huggingface", "URL", "x"),
    ("convert_huggingface", "x", "URL"),
    ("retrofit", "URL", "x"),
    ("retrofit", "x", "URL"),
    ("studies/baselines", "--runs", "URL"),
    ("studies/depth_scaling", "--runs", "URL"),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_refuse_a_url_at_the_start(arguments, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*[word.replace("URL", "gs://bucket/x") for word in arguments])
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert re.search("'?gs://bucket/x'?: is a URL, and this must be a local path", err), err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [c for c in COMMANDS if "--run-dir" not in c], ids=" ".join)
def test_commands_refuse_an_empty_path_at_the_start(arguments, command, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")  # which a command could take for that of a folder
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*["" if word == "URL" else word for word in arguments])
    assert (code, out) == (2, ""), err
    assert re.fullmatch(r"error: [^\n]*= '': [^\n]+\n", err), err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_empty_path_is_refused_and_the_current_folder_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for door in set(DOORS) - {"run_dir"}:  # empty: runs/PRESET
        with pytest.raises(InputError, match=r"= '': is empty; name a file or folder, the current one as \."):
            DOORS[door]("")
    assert local_path(".") == local_path(Path("")) == Path(".")


@pytest.mark.parametrize("name", ["RDLM_COMPILE_CACHE", "XDG_CACHE_HOME"])
def test_compiled_programs_are_kept_in_a_local_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RDLM_COMPILE_CACHE")
    monkeypatch.setenv(name, "gs://bucket/x")
    with pytest.raises(InputError, match=r"RDLM_COMPILE_CACHE = 'gs://bucket/x.*is a URL"):
        keep_compiled_programs()
    assert not list(tmp_path.iterdir())


def test_a_home_folder_is_expanded_everywhere(tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert local_path("~/x") == local_path(Path("~/x")) == tmp_path / "x"
    assert dataclasses.replace(NANO, run_dir="~/x").folder == str(tmp_path / "x")
    Tokenizer.bytes_only().save("~/tokenizer")
    assert Tokenizer.load("~/tokenizer").hash == Tokenizer.bytes_only().hash
    with pytest.raises(InputError, match=rf"run folder {tmp_path}/none: does not exist"):
        rdlm.load("~/none")
    write_output(Path("~/file"), "text")
    assert f"run folder {tmp_path}/none: does not exist" in command("evaluate", "~/none")[2]
    assert {path.name for path in tmp_path.iterdir()} == {"file", "tokenizer"}
    with pytest.raises(InputError, match=r"there is no such home folder; write \./~nobody-here/x"):
        local_path("~nobody-here/x")


@pytest.mark.parametrize("path", [None, 3, b"x", "a\0b", "a\udcffb"])
def test_what_is_no_path_is_one_line(path):
    with pytest.raises(InputError) as refused:
        local_path(path, "out")
    assert str(refused.value).startswith("out = ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.py", "nano", "--run-dir", "données"],
        ["train_tokenizer.py", "--bytes", "--out", "données"],
        ["prepare_data.py", "t.txt", "--tokenizer", "bytes", "--out", "données"],
        ["evaluate.py", "données"],
    ],
    ids=lambda words: words[0],
)
def test_a_name_that_the_locale_cannot_encode_is_one_line(arguments, tmp_path):
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "JAX_PLATFORMS": "cpu"}
    (tmp_path / "t.txt").write_text("text")
    words = [sys.executable, EXPERIMENTS / arguments[0], *arguments[1:]]
    done = subprocess.run(words, env=os.environ | ascii_locale, cwd=tmp_path, capture_output=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(b"error: ")
    assert b"set PYTHONUTF8=1" in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]
