"""A run knows its data again by their digests: moved or spelled otherwise they are the same, edited they are not."""

import dataclasses
import json
import os
import shutil

import pytest

from rdlm.config import PRESETS, DataConfig, InputError
from rdlm.data import Recipe
from rdlm.data.prepare import Corpus, build, cut_files, find_files
from rdlm.evaluation.held_out import held_out
from rdlm.run import find
from rdlm.tokenizer import Tokenizer
from rdlm.train.loop import Trainer

RECIPE = Recipe(sequence_length=32, validation_fraction=0.2)


def prepared(folder, word):
    folder.mkdir(parents=True)
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the {word} number {i} sat on the mat"}) + "\n" for i in range(60)))
    parts = cut_files(find_files([str(text)]), RECIPE.reading, 10**6)
    build(folder / "data", Corpus("files", "text", parts), RECIPE, Tokenizer.bytes_only(), processes=1, say=print)
    return folder / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run of one step in run/, its data in a/data, and others in b/data."""
    base = tmp_path_factory.mktemp("moved")
    for name, word in (("a", "cat"), ("b", "dog")):
        prepared(base / name, word)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        assert Trainer(configured("a/data")).run() == 0
    return base


def configured(*data, stream=(), run_dir="run"):
    run = PRESETS["nano"]
    sizes = {"tokenizer_size": 288, "sequence_length": 32, "batch_size": 8, "prepared": data, "stream": stream}
    model = dataclasses.replace(run.model, vocab_size=288)
    evaluation = dataclasses.replace(run.evaluation, depths=(1,))
    return dataclasses.replace(
        run, model=model, data=DataConfig(**sizes), steps=1, run_dir=str(run_dir), evaluation=evaluation
    )


@pytest.mark.parametrize("spelled", ["a/data", "a/data/", "./a/../a/data", "ABSOLUTE", "LINK", "MOVED"])
def test_the_same_data_at_another_place_are_recognised(spelled, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    if spelled == "LINK":
        os.symlink(folder / "a/data", tmp_path / "link")
    if spelled == "MOVED":
        shutil.copytree(folder / "a/data", tmp_path / "moved")
    places = {"ABSOLUTE": folder / "a/data", "LINK": tmp_path / "link", "MOVED": tmp_path / "moved"}
    said = []
    assert Trainer(configured(str(places.get(spelled, spelled))), say=said.append).run() == 0
    assert "is finished" in said[-1]


def test_other_data_are_refused_even_by_a_finished_run(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    for data in (("b/data",), ("a/data", "b/data")):
        with pytest.raises(InputError, match=r"has changed since the checkpoint|2 folders, but this run"):
            Trainer(configured(*data), say=print).run()


def test_validation_data_may_have_moved(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = find(folder / "run")
    with pytest.raises(InputError, match="prepared data are not in a/data; give their place with --prepared"):
        run.validation()
    place = str(folder / "a/data")
    assert run.validation(prepared=[place]).steps_per_epoch >= 1
    assert held_out(folder / "run", prepared=[place]).total >= 1
    with pytest.raises(InputError, match="has changed since the checkpoint"):
        run.validation(prepared=[str(folder / "b/data")])
    with pytest.raises(InputError, match="not prepared data"):
        run.validation(prepared=[str(folder / "a")])


def test_the_identity_of_data_names_every_folder_and_every_file_of_a_stream(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "run").rename(folder / "other_run")
    try:
        ours, theirs = (
            Trainer(configured("a/data", stream=(name,)), say=print).data_identity
            for name in ("a/text.jsonl", "b/text.jsonl")
        )
    finally:
        (folder / "other_run").rename(folder / "run")
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {"data.stream: file 0"}
    assert "a/data: documents" in ours
