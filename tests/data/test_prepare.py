"""Preparation: split by document, complete or absent, equal everywhere, clear when it cannot be done."""

import dataclasses
import errno
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rdlm.data import Document, concatenate_and_split, read_manifest
from rdlm.data.prepare import held_out, prepare_embedded, prepared_folder
from rdlm.data.records import RowFiles
from rdlm.runtime.files import complete_folder
from rdlm.tokenizer import Tokenizer

module = importlib.import_module("rdlm.data.prepare.embedded")  # the package's `prepare_embedded` is the function


def rows_of(folder, split):
    manifest = read_manifest(folder)
    entry = manifest.split(split)
    files = RowFiles([(folder / s.file, s.rows) for s in entry.shards], manifest.token_dtype)
    return [files[i] for i in range(len(files))]


def siblings(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# Content


def test_rows_are_the_packed_documents_of_each_split(tiny_data, tiny_texts):
    folder = prepare_embedded(tiny_data)
    tokenizer, manifest = Tokenizer.load(folder / "tokenizer"), read_manifest(folder, checksums=True)
    for split, out in (("train", False), ("validation", True)):
        chosen = [(i, text) for i, text in enumerate(tiny_texts) if held_out(text, 0.2) == out]
        documents = [Document(i, tokenizer.encode(text, bos=True, eos=True)) for i, text in chosen]
        expected = list(concatenate_and_split(documents, 16))
        for found, row in zip(rows_of(folder, split), expected, strict=True):
            np.testing.assert_array_equal(found.tokens, row.tokens)
            np.testing.assert_array_equal(found.chunks, row.chunks)
        entry = manifest.split(split)
        assert entry.documents == len(documents)
        assert entry.tokens == sum(len(tokens) for _, tokens, _ in documents)
        assert entry.bytes == sum(len(text.encode()) for _, text in chosen)
        assert entry.rows == len(expected)
    assert manifest.tokenizer_hash == tokenizer.hash
    assert manifest.vocab_size == tokenizer.vocab_size == 320


def test_the_tokenizer_learns_from_train_documents_only(tiny_data, tiny_texts):
    used = read_manifest(prepare_embedded(tiny_data)).tokenizer_hash
    train = [text for text in tiny_texts if not held_out(text, 0.2)]
    assert used == Tokenizer.train(train, 320).hash
    assert used != Tokenizer.train(tiny_texts, 320).hash  # control: leaking would show


def test_a_given_tokenizer_is_used_and_has_a_folder_of_its_own(tiny_data, tiny_texts):
    mine = Tokenizer.train(tiny_texts[:30], 320)
    folder = prepare_embedded(tiny_data, tokenizer=mine)
    assert Tokenizer.load(folder / "tokenizer").hash == mine.hash == read_manifest(folder).tokenizer_hash
    assert folder != prepare_embedded(tiny_data)


def test_the_split_is_disjoint_stable_and_of_the_asked_size(tiny_texts):
    texts = [f"document {i}" for i in range(4000)]
    share = np.mean([held_out(text, 0.05) for text in texts])
    assert abs(share - 0.05) < 0.015
    # A function of the text alone: what else is in the corpus, and its order, cannot matter. Growing the fraction
    # only moves documents from train to validation.
    small, large = ({t for t in texts if held_out(t, f)} for f in (0.05, 0.2))
    assert small < large
    assert held_out("document 11", 0.5) is held_out("document 11", 0.5)


def test_no_document_is_in_both_splits(real_folder):
    documents = {
        split: {d for row in rows_of(real_folder, split) for d in row.chunks[:, 0]} for split in ("train", "validation")
    }
    assert not documents["train"] & documents["validation"]
    assert documents["train"] | documents["validation"] == set(range(256))


def test_the_real_corpus_comes_back_word_for_word(real_data, real_folder):
    from rdlm.data.prepare import factbook

    texts = factbook.documents(Path(real_data.folder) / "tfds")
    tokenizer = Tokenizer.load(real_folder / "tokenizer")
    rows = rows_of(real_folder, "validation")
    stream = np.concatenate([rows[0].tokens[:1], *(row.tokens[1:] for row in rows)])
    expected = [text for text in texts if held_out(text, 0.05)]
    assert tokenizer.decode(stream) == "".join(expected)
    # token_bytes are exact on real text
    assert tokenizer.token_bytes[stream].sum() == sum(len(text.encode()) for text in expected)


def test_equal_settings_give_equal_bytes(tiny_data, tmp_path):
    first = prepare_embedded(tiny_data)
    second = prepare_embedded(dataclasses.replace(tiny_data, folder=str(tmp_path / "elsewhere")))
    assert (first / "manifest.json").read_text() == (second / "manifest.json").read_text()
    read_manifest(second, checksums=True)


# Folders


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "factbook-320-16-v0.2"),
        ({"validation_fraction": 0.05}, "factbook-320-16"),
        ({"sequence_length": 32}, "factbook-320-32-v0.2"),
        ({"batch_size": 99}, "factbook-320-16-v0.2"),
    ],
)
def test_the_folder_is_named_by_what_decides_its_content(tiny_data, change, name):
    assert prepared_folder(dataclasses.replace(tiny_data, **change)).name == name


def test_a_second_call_reuses_the_folder(tiny_data, monkeypatch):
    folder = prepare_embedded(tiny_data)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(module, "_write", None)  # would fail if called
    assert prepare_embedded(tiny_data) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_preparation_leaves_nothing(tiny_data, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_embedded(tiny_data)
    assert siblings(tiny_data.folder) == []
    read_manifest(prepare_embedded(tiny_data))


def test_what_a_killed_process_left_is_never_read(tiny_data):
    final = prepared_folder(tiny_data)
    left = final.parent / f".{final.name}.partial-0123456789ab"
    left.mkdir(parents=True)
    (left / "train-00000.array_record").write_bytes(b"half")
    folder = prepare_embedded(tiny_data)
    read_manifest(folder, checksums=True)
    assert siblings(tiny_data.folder) == sorted([left.name, final.name])


def test_the_first_of_two_finishers_wins_and_the_other_leaves_no_trace(tmp_path):
    final = tmp_path / "final"
    with complete_folder(final) as slow:
        with complete_folder(final) as fast:
            (fast / "by").write_text("fast")
        (slow / "by").write_text("slow")
    assert (final / "by").read_text() == "fast"
    assert siblings(tmp_path) == ["final"]


def test_two_processes_may_prepare_at_once(tmp_path):
    program = (
        "import sys, importlib\n"
        "from rdlm.config import DataConfig\n"
        "from rdlm.data import read_manifest\n"
        "from rdlm.data.prepare import prepare_embedded\n"
        "texts = [f'{i} ' + ' '.join(dir(str)[i % 9::9] + dir(int)[i % 7::7]) for i in range(200)]\n"
        "importlib.import_module('rdlm.data.prepare.embedded')._documents = lambda data: texts\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "folder = prepare_embedded(DataConfig(folder=sys.argv[1], tokenizer_size=300, sequence_length=8))\n"
        "print(read_manifest(folder, checksums=True).tokenizer_hash)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert siblings(tmp_path) == ["factbook-300-8"]


# Errors


def test_a_folder_that_cannot_be_written_is_named(tiny_data, tmp_path, one_line):
    (tmp_path / "file").write_text("")
    with one_line("file/factbook.*cannot be written.*data.folder"):
        prepare_embedded(dataclasses.replace(tiny_data, folder=str(tmp_path / "file")))


def test_a_full_disk_is_reported_and_leaves_nothing(tiny_data, monkeypatch, one_line):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importlib.import_module("rdlm.data.prepare.shards"), "write_rows", full)
    with one_line("No space left on device"):
        prepare_embedded(tiny_data)
    assert siblings(tiny_data.folder) == []


def test_a_bucket_is_refused(tiny_data, one_line):
    with one_line("must be a local path"):
        prepare_embedded(dataclasses.replace(tiny_data, folder="gs://bucket/data"))


def test_a_tokenizer_of_another_size_is_refused(tiny_data, tiny_texts, one_line):
    with one_line("data.tokenizer_size = 320: the tokenizer given has 300 entries"):
        prepare_embedded(tiny_data, tokenizer=Tokenizer.train(tiny_texts, 300))


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_an_empty_split_is_refused(tiny_data, fraction, split, one_line):
    with one_line(f"data.validation_fraction = .*leaves no {split} document of 60"):
        prepare_embedded(dataclasses.replace(tiny_data, validation_fraction=fraction))


def test_too_little_text_for_the_tokenizer_is_reported(tiny_data, one_line):
    with one_line("yield only"):
        prepare_embedded(dataclasses.replace(tiny_data, tokenizer_size=4096))


def _edit(folder, **changes):
    tree = json.loads((folder / "manifest.json").read_text())
    recipe = {**tree["recipe"], **changes.pop("recipe", {})}
    (folder / "manifest.json").write_text(json.dumps({**tree, "recipe": recipe, **changes}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "not a manifest"),
        (lambda f: (f / "manifest.json").write_text("[]"), "not a manifest"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "cannot be read"),
        (lambda f: _edit(f, format_version=99), "format version 99"),
        (lambda f: _edit(f, surprise=1), "unknown field 'surprise'"),
        (lambda f: _edit(f, recipe={"validation_fraction": 0.3}), "prepared with validation_fraction = 0.3, not 0.2"),
        (
            lambda f: _edit(f, recipe={"packing": "best_fit"}),
            'prepared with packing = "best_fit", not "concatenate_and',
        ),
        (lambda f: (f / "train-00000.array_record").unlink(), "train-00000.array_record: missing"),
        (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer.json: 2 bytes instead of"),
        (lambda f: (f / "train-00000.array_record").write_bytes(b""), "0 bytes instead of"),
    ],
)
def test_a_folder_that_was_damaged_or_is_another_is_refused(tiny_data, damage, match, one_line):
    damage(prepare_embedded(tiny_data))
    with one_line(match):
        prepare_embedded(tiny_data)


def test_checksums_see_a_single_changed_byte(tiny_data, one_line):
    folder = prepare_embedded(tiny_data)
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("end_turn", "end_tern", 1))
    read_manifest(folder)  # control: sizes alone do not
    with one_line("checksum"):
        read_manifest(folder, checksums=True)


# Progress


def test_progress_is_plain_lines_where_there_is_no_terminal(tiny_data, capsys):
    prepare_embedded(tiny_data)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "Reading factbook",
        "Training a tokenizer of 320 entries on 48 documents",
        "Packing 60 documents into rows of 16",
    ]
    prepare_embedded(tiny_data)
    assert capsys.readouterr().err == ""
