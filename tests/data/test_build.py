"""Preparing files: one result for any number of processes and any kills, and one line for whatever goes wrong."""

import dataclasses
import errno
import fcntl
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rdlm.data import PackedData, Reading, Recipe, best_fit, read_manifest
from rdlm.data.prepare import Corpus, build, cut_files, find_files, held_out
from rdlm.data.prepare.shards import DOCUMENT_STRIDE, digest
from rdlm.data.records import RowFiles
from rdlm.tokenizer import Tokenizer

module = importlib.import_module("rdlm.data.prepare.build")
ROOT = Path(__file__).parents[2]
RECIPE = Recipe(32, validation_fraction=0.2)
BYTES = Tokenizer.bytes_only()


def texts(count=300):
    draw = random.Random(0)
    return [f"{i} é " + "".join(draw.choices("abcdefg \n", k=draw.randint(1, 300))) for i in range(count)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return path


def corpus_of(path, part_bytes=4000, reading=RECIPE.reading):
    return Corpus("files", path.name, cut_files(find_files([str(path)]), reading, part_bytes))


@pytest.fixture
def prepare_it(tmp_path, source):
    """prepare_it("name", recipe) -> (folder, manifest, lines said)."""

    def prepare(name="out", recipe=RECIPE, tokenizer=BYTES, processes=1, part_bytes=4000):
        said = []
        corpus = corpus_of(source, part_bytes, recipe.reading)
        manifest = build(tmp_path / name, corpus, recipe, tokenizer, processes=processes, say=said.append)
        return tmp_path / name, manifest, said

    return prepare


def contents(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def rows_of(folder, split):
    manifest = read_manifest(folder)
    entry = manifest.split(split)
    files = RowFiles([(folder / shard.file, shard.rows) for shard in entry.shards], manifest.token_dtype)
    return [files[i] for i in range(len(files))]


# Content


def test_rows_hold_the_documents_of_each_split_in_order(prepare_it, tmp_path):
    folder, manifest, _ = prepare_it()
    assert len(manifest.train.shards) > 5
    for split, out in (("train", False), ("validation", True)):
        expected = [text for text in texts() if held_out(text, 0.2) == out]
        found = []
        for row in rows_of(folder, split):
            for (number, offset, n), tokens in zip(
                row.chunks.tolist(), np.split(row.tokens, np.cumsum(row.chunks[:, 2]))[:-1], strict=True
            ):
                again = bool(found) and found[-1][0] == number
                assert again or offset == 0
                if not again:
                    found.append((number, []))
                found[-1][1].append(tokens[again:])  # a cut shares one token
                assert n == len(tokens)
        assert [BYTES.decode(np.concatenate(tokens)) for _, tokens in found] == expected
        assert len({number for number, _ in found}) == len(found)
        entry = manifest.split(split)
        assert (entry.documents, entry.bytes) == (len(expected), sum(len(text.encode()) for text in expected))
        assert entry.tokens == sum(len(np.concatenate(tokens)) for _, tokens in found)
    assert not list(tmp_path.glob(".*"))
    read_manifest(folder, checksums=True)


def test_documents_are_numbered_apart_in_every_shard(prepare_it):
    folder, manifest, _ = prepare_it()
    first = {int(row.chunks[0, 0]) // 1000 * 1000 for row in rows_of(folder, "train")}
    wanted = {n * DOCUMENT_STRIDE % 2**32 // 1000 * 1000 for n in range(len(manifest.train.shards))}
    assert wanted <= first | {n + 1000 for n in first}


def test_the_number_of_processes_changes_no_byte(prepare_it):
    one, two = prepare_it("one")[0], prepare_it("two", processes=2)[0]
    assert contents(one) == contents(two)
    assert contents(prepare_it("other", recipe=dataclasses.replace(RECIPE, packing="best_fit"))[0]) != contents(one)


def test_best_fit_keeps_documents_whole(prepare_it):
    folder, manifest, _ = prepare_it(recipe=Recipe(400, "best_fit", 0.2))
    rows = rows_of(folder, "train")
    assert sum(len(row.chunks) for row in rows) == manifest.train.documents > len(rows)
    assert best_fit  # whose own properties test_packing holds


def test_duplicates_are_dropped_wherever_they_are(tmp_path):
    again = [*texts(60), *reversed(texts(60)), "only once"]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in again))
    made = {}
    for drop in (False, True):
        recipe = dataclasses.replace(RECIPE, deduplicate=drop)
        made[drop] = build(tmp_path / str(drop), corpus_of(path), recipe, BYTES, processes=1, say=print)
    documents = {drop: m.train.documents + m.validation.documents for drop, m in made.items()}
    assert documents == {False: 121, True: 61}
    assert (made[True].skipped.duplicate, made[False].skipped.duplicate) == (60, 0)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts(60), "only once"]))
    clean = build(tmp_path / "clean", corpus_of(path, 10**9), RECIPE, BYTES, processes=1, say=print)
    assert (clean.train.bytes, clean.validation.bytes) == (made[True].train.bytes, made[True].validation.bytes)


def test_chats_score_only_the_assistant(tmp_path):
    lines = []
    for i in range(40):
        chat = [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"{i} is a number"}]
        lines.append(json.dumps({"messages": chat}) + "\n")
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(lines))
    recipe = Recipe(128, "best_fit", 0.2, reading=Reading(field="messages"))
    build(tmp_path / "out", corpus_of(path, reading=recipe.reading), recipe, BYTES, processes=1, say=print)
    batch = PackedData(tmp_path / "out", sequence_length=128, batch_size=4).batch(0)
    for labels in batch["labels"]:
        said = BYTES.decode(labels[labels >= 0], skip_special=False)
        assert said
        assert set(part.partition(" ")[2] for part in said.split("<|end_turn|>")[:-1]) == {"is a number"}


def chats(*more):
    """40 conversations, and others."""
    ask, answer = ({"role": role} for role in ("user", "assistant"))
    usual = [[{**ask, "content": f"what is {i}?"}, {**answer, "content": f"{i} is a number"}] for i in range(40)]
    return "".join(json.dumps({"messages": chat}) + "\n" for chat in (*usual, *more))


def with_template(template):
    return Tokenizer(BYTES._backend, {**BYTES._config, "chat_template": template})


CHATML = "{% for m in messages %}<|begin_header|>{{ m.role }}\n{{ m.content }}<|end_turn|>\n{% endfor %}"
NEVER = "{% for m in messages %}{{ m.content }}{% if m.role == 'model' %}{% generation %}{% endgeneration %}{% endif %}"


def prepare_chats(tmp_path, content, tokenizer, bad_documents="refuse", fraction=0.2):
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    recipe = Recipe(128, "best_fit", fraction, reading=Reading("messages", bad_documents=bad_documents))
    return build(tmp_path / "out", corpus_of(path, reading=recipe.reading), recipe, tokenizer, processes=1, say=print)


def test_chats_whose_template_marks_nothing_are_scored(tmp_path):
    manifest = prepare_chats(tmp_path, chats(), with_template(CHATML))
    for split in ("train", "validation"):
        data = PackedData(tmp_path / "out", split, sequence_length=128, batch_size=4)
        labels = np.concatenate([batch["labels"].reshape(-1) for batch in data.batches()])
        assert (labels >= 0).sum() == manifest.split(split).labels > 0
        said = BYTES.decode(labels[labels >= 0], skip_special=False)
        assert "is a number<|end_turn|>" in said
        assert "what is" not in said


def test_labels_are_counted(prepare_it):
    folder, manifest, _ = prepare_it()
    data = PackedData(folder, "validation", sequence_length=32, batch_size=1)
    assert manifest.validation.labels == sum((batch["labels"] >= 0).sum() for batch in data.batches())


@pytest.mark.parametrize(
    ("content", "template"),
    [
        (chats(), NEVER + "{% endfor %}"),  # the tag is there, and never reached
        (chats().replace("assistant", "model"), CHATML),
    ],
)
def test_chats_of_which_nothing_is_scored_are_refused(tmp_path, content, template, one_line):
    with one_line("messages: none of the .* tokens of the .* train documents counts as a label; .*{% generation %}"):
        prepare_chats(tmp_path, content, with_template(template))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl"]


@pytest.mark.parametrize("counted", [True, False])
def test_prepared_data_without_labels_are_refused_when_they_are_opened(tmp_path, counted, one_line):
    prepare_chats(tmp_path, chats(), BYTES)
    shards = importlib.import_module("rdlm.data.prepare.shards")
    rows = [
        dataclasses.replace(row, scored=np.zeros(len(row.tokens), bool)) for row in rows_of(tmp_path / "out", "train")
    ]
    path = next((tmp_path / "out").glob("train-*"))
    shards.write_rows(path, rows, "uint16")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["train"]["labels"] = 0 if counted else None  # None: as older folders have it
    manifest["train"]["shards"] = [{"file": path.name, "rows": len(rows)}]
    manifest["files"] = [f for f in manifest["files"] if not f["name"].startswith("train-")]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with one_line("out: no token of its .* train rows counts as a label"):
        PackedData(tmp_path / "out", sequence_length=128, batch_size=1)
    PackedData(tmp_path / "out", "validation", sequence_length=128, batch_size=1)


ALTERNATE = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
FROM_ASSISTANT = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
BY_LENGTH = "{{ messages | length }}" + CHATML


@pytest.mark.parametrize(
    ("template", "chat", "reason"),
    [
        (ALTERNATE, FROM_ASSISTANT, "chat template: begin with the user"),
        (CHATML.replace("m.role", "m.nothing.role"), FROM_ASSISTANT, "chat template: .*no attribute 'nothing'"),
        ("{% if messages | length > 2 %}" + BY_LENGTH + "{% else %}" + CHATML + "{% endif %}",
         [*FROM_ASSISTANT[::-1], *FROM_ASSISTANT[::-1]], "chat template .*cannot be found; put {% generation %}"),
    ],
)  # fmt: skip
def test_a_chat_that_the_template_refuses_is_named_or_left_out(tmp_path, template, chat, reason, one_line):
    everything = "nothing" in template
    tokenizer = with_template(template)
    place = 1 if everything else chats().count("\n") + 1
    with one_line(f"chats.jsonl, line {place}: {reason}"):
        prepare_chats(tmp_path, chats(chat), tokenizer)
    if everything:
        with one_line("leave no train row of 0 documents .41 bad left out.; give more"):
            prepare_chats(tmp_path, chats(chat), tokenizer, "skip")
    else:
        manifest = prepare_chats(tmp_path, chats(chat), tokenizer, "skip")
        assert manifest.skipped.bad == 1
        assert manifest.train.documents + manifest.validation.documents == 40


# Killed and run again

SCRIPT = [sys.executable, str(ROOT / "experiments" / "prepare_data.py")]


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_it_gives_the_same_bytes(tmp_path, source):
    command = [*SCRIPT, str(source), "--tokenizer", "bytes", "--sequence-length", "32", "--shard-bytes", "3000",
               "--processes", "2", "--deduplicate"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def start(out):
        return subprocess.Popen([*command, "--out", str(out)], env=environment, stderr=subprocess.PIPE, text=True)

    began = time.monotonic()
    whole = start(tmp_path / "whole")
    whole.communicate(timeout=120)
    took = time.monotonic() - began
    assert whole.returncode == 0
    draw, kills, kept = random.Random(1), 0, 0
    work = tmp_path / ".killed.unfinished" / "work"
    for _ in range(2):
        process = start(tmp_path / "killed")
        while process.poll() is None and not list(work.glob("shard-*")) and not list(work.glob("digests-*")):
            time.sleep(0.01)  # the first seconds only start Python
        time.sleep(draw.uniform(0, took / 20))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        kept = max(kept, len(list(work.glob("shard-*.json"))))
        if (tmp_path / "killed").exists():
            break
    last = start(tmp_path / "killed")
    _, said = last.communicate(timeout=120)
    assert last.returncode == 0, said
    assert kills >= 1
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("moment", range(0, 30, 3))
def test_stopped_at_any_write_and_run_again_it_gives_the_same_bytes(prepare_it, monkeypatch, tmp_path, moment):
    class Killed(BaseException):
        pass

    counter = {"replace": 0}
    replace, rename = Path.replace, Path.rename

    def dying(original):
        def call(self, target):
            if counter["replace"] == moment:
                raise Killed
            counter["replace"] += 1
            return original(self, target)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying(replace))
        patch.setattr(Path, "rename", dying(rename))
        # A killed process removes nothing either.
        patch.setattr("shutil.rmtree", lambda *a, **k: None)
        with pytest.raises(Killed):
            prepare_it()
        assert not (tmp_path / "out").exists()
    folder, _, said = prepare_it()
    assert bool(said) == (moment > 3), "shards that were complete are kept"
    assert contents(folder) == contents(prepare_it("whole")[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts.jsonl", "whole"]


def test_complete_shards_are_kept_and_incomplete_ones_made_again(prepare_it, monkeypatch, tmp_path):
    made = []
    real = module._write_shard

    def spy(context, number, part):
        if len(made) == 3:
            raise RuntimeError("power cut")
        real(context, number, part)
        made.append(number)

    monkeypatch.setattr(module, "_write_shard", spy)
    with pytest.raises(RuntimeError, match="power cut"):
        prepare_it()
    half = tmp_path / ".out.unfinished"
    (half / "train-00001.array_record").write_bytes(b"half")  # what its JSON file says is no longer true
    made.clear()
    monkeypatch.setattr(module, "_write_shard", lambda *a: (made.append(a[1]), real(*a)))
    folder, manifest, said = prepare_it()
    assert said == [f"Preparing: 2 of {len(manifest.train.shards)} parts are there already"]
    assert made == [1, *range(3, len(manifest.train.shards))]
    read_manifest(folder, checksums=True)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": "best_fit"}, 'packing = "concatenate_and_split", not "best_fit"'),
        ({"sequence_length": 16}, "sequence_length = 32, not 16"),
        ({"deduplicate": True}, "deduplicate = false, not true"),
        ({"reading": Reading(bad_documents="skip")}, 'bad_documents = "refuse", not "skip"'),
        ("tokenizer", "tokenizer = "),
        ("source", "source = "),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_named(
    prepare_it, source, tmp_path, change, message, finished, one_line, monkeypatch
):
    if finished:
        prepare_it()
    else:
        with monkeypatch.context() as patch:
            patch.setattr(module, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare_it()
    before = contents(tmp_path)
    recipe = dataclasses.replace(RECIPE, **change) if isinstance(change, dict) else RECIPE
    if change == "source":
        source.rename(source.with_name("other.jsonl"))
        before = contents(tmp_path)
        source = source.with_name("other.jsonl")
    tokenizer = Tokenizer.train(texts(), 300) if change == "tokenizer" else BYTES
    if not finished and change == {"reading": Reading(bad_documents="skip")}:
        assert prepare_it(recipe=recipe)[2]  # there were none so far: goes on
        return
    with one_line(message):
        build(tmp_path / "out", corpus_of(source), recipe, tokenizer, processes=1, say=print)
    assert contents(tmp_path) == before


def test_input_that_changed_on_the_way_is_refused(prepare_it, source, monkeypatch, one_line):
    with monkeypatch.context() as patch:
        patch.setattr(module, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_it()
    before = source.read_bytes()
    source.write_bytes(before.replace(b"g", b"G"))
    with one_line("unfinished preparation, whose settings differ .files = .texts.jsonl .[0-9]+ bytes, "):
        prepare_it()
    source.write_bytes(before)  # the same again, at another time
    prepare_it()


def test_a_file_edited_since_is_named(prepare_it, source, tmp_path, one_line):
    folder, manifest, _ = prepare_it()
    before, made = source.read_bytes(), contents(folder)
    source.write_bytes(before.replace(b"g", b"G"))  # of the same size
    with one_line(
        "out: was prepared with files = .texts.jsonl .* bytes, .*, not .texts.jsonl .*; choose another --out"
    ):
        prepare_it()
    assert contents(folder) == made
    source.write_bytes(before)
    assert prepare_it()[1] == manifest
    source.rename(tmp_path / "moved")  # elsewhere under the same name
    (tmp_path / "new").mkdir()
    (tmp_path / "moved").rename(tmp_path / "new" / "texts.jsonl")
    corpus = corpus_of(tmp_path / "new" / "texts.jsonl")
    assert build(folder, corpus, RECIPE, BYTES, processes=1, say=print) == manifest
    identity = manifest.identity()
    (folder / "inputs.json").unlink()  # as in older folders
    tree = json.loads((folder / "manifest.json").read_text())
    tree["files"] = [file for file in tree["files"] if file["name"] != "inputs.json"]
    (folder / "manifest.json").write_text(json.dumps(tree))
    assert build(folder, corpus, RECIPE, BYTES, processes=1, say=print).identity() == identity


@pytest.mark.parametrize("kind", ["folder", "file", "empty"])
def test_what_is_the_users_own_is_neither_used_nor_removed(prepare_it, tmp_path, kind, one_line):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "manifest.txt").write_text("mine")
    before = contents(tmp_path)
    with one_line("out: is there already and holds no prepared data; choose another --out"):
        prepare_it()
    assert contents(tmp_path) == before


def test_a_folder_in_the_way_of_the_unfinished_one_is_kept(prepare_it, tmp_path, one_line, monkeypatch):
    hidden = tmp_path / ".out.unfinished"
    (hidden / "work").mkdir(parents=True)
    (hidden / "work" / "thesis.txt").write_text("mine")
    (hidden / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with one_line("out: .*.out.unfinished is in the way and no preparation; choose another --out"):
        prepare_it()
    assert contents(tmp_path) == before
    monkeypatch.setattr(module, "_write_shard", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    (tmp_path / ".new.unfinished").mkdir()
    with pytest.raises(KeyboardInterrupt):
        prepare_it("new")
    assert not (tmp_path / ".new.unfinished").exists()
    monkeypatch.undo()
    real = module.finish

    def noted(folder, *args):
        (folder / "notes.txt").write_text("mine")
        return real(folder, *args)

    monkeypatch.setattr(module, "finish", noted)
    folder, *_ = prepare_it("new")
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "settings.json").exists()
    assert not (folder / "work").exists()


def test_a_link_as_target_is_followed(prepare_it, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "data")
    folder, manifest, _ = prepare_it()
    assert folder.is_symlink()
    assert read_manifest(tmp_path / "disk" / "data") == manifest


def test_what_is_there_is_not_made_again(prepare_it, monkeypatch):
    folder, first, _ = prepare_it()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(module, "_shards", None)  # would fail if called
    assert prepare_it()[1] == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_two_at_once_do_not_disturb_each_other(prepare_it, tmp_path, one_line):
    (tmp_path / ".out.unfinished").mkdir()
    handle = os.open(tmp_path / ".out.unfinished", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with one_line("another process is preparing it"):
        prepare_it()
    os.close(handle)
    prepare_it()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_document_ends_it_and_leaves_no_target(prepare_it, source, tmp_path, processes, one_line):
    with source.open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with one_line("texts.jsonl, line .*: not UTF-8"):
        prepare_it(processes=processes)
    assert not (tmp_path / "out").exists()
    recipe = dataclasses.replace(RECIPE, reading=Reading(bad_documents="skip"))
    assert prepare_it(recipe=recipe, processes=processes)[1].skipped.bad == 1


def test_a_full_disk_is_one_line_and_the_work_so_far_is_kept(prepare_it, monkeypatch, one_line):
    shards = importlib.import_module("rdlm.data.prepare.shards")
    real, calls = shards.write_rows, []

    def full(*args):
        calls.append(args)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch, one_line("out: cannot be written .No space left on device.; free space"):
        patch.setattr(shards, "write_rows", full)
        prepare_it()
    assert prepare_it()[2][0].startswith("Preparing: 3 of ")


def test_a_split_left_empty_is_refused_and_forgotten(prepare_it, tmp_path, one_line):
    with one_line("leave no validation row of 300 documents; .*--document line"):
        prepare_it(recipe=dataclasses.replace(RECIPE, validation_fraction=1e-9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]
    assert prepare_it(recipe=dataclasses.replace(RECIPE, validation_fraction=0.0))[1].validation.rows == 0


def test_a_conversation_has_one_digest_however_it_is_written():
    assert digest([{"role": "user", "content": "a"}]) == digest([{"content": "a", "role": "user"}])
    assert digest([{"role": "user", "content": "a"}]) != digest([{"role": "user", "content": "b"}])
