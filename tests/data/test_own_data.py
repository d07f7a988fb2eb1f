"""From one's own text to a training run: the commands, the loss, and resuming; and how the commands refuse."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdlm
from rdlm.checkpoint import saved_steps
from rdlm.config import PRESETS, DataConfig, InputError
from rdlm.data import Document, PackedData, Reading, Recipe, StreamedData, best_fit, concatenate_and_split, open_data
from rdlm.data.loader import Example, stack
from rdlm.data.packing import EMPTY
from rdlm.data.prepare import Corpus, build, cut_files, find_files, held_out
from rdlm.tokenizer import Tokenizer
from rdlm.train import Trainer
from rdlm.train.metrics import read_metrics

TEXTS = [f"{i} The capital of land {i} is city {i % 7}; its river é flows {i * i} km.\n" * 3 for i in range(60)]
BYTES = Tokenizer.bytes_only()


@pytest.fixture
def folder(tmp_path):
    """A folder of text files."""
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{i:02d}.txt").write_text(text)
    return tmp_path / "texts"


# The loss


def test_the_loss_of_packed_rows_is_that_of_documents_alone():
    model = PRESETS["nano"].model
    params = rdlm.init_params(model, jax.random.key(0))
    draw = np.random.default_rng(0)
    documents = [Document(i, draw.integers(0, model.vocab_size, n)) for i, n in enumerate([9, 17, 4, 30, 12, 2, 25])]
    mean = jax.jit(lambda batch: rdlm.loss(params, model, batch, steps=(2, 2), key=jax.random.key(1)))

    def loss(rows):  # always of 12 rows, the last of padding: compiled once
        batch = stack([Example(row, 0) for row in [*rows, *[EMPTY] * (12 - len(rows))]], 39, 0)
        return float(mean({name: jnp.asarray(value) for name, value in batch.items()}))

    for pack in (concatenate_and_split, best_fit):
        packed = list(pack(documents, 39))
        alone = [row for row in packed for row in one_by_one(row)]  # a cut document in its pieces
        assert len(packed) < len(documents) <= len(alone)
        assert loss(packed) == pytest.approx(loss(alone), abs=2e-6)
        merged = [dataclasses.replace(row, chunks=np.array([[0, 0, len(row.tokens)]])) for row in packed]
        assert abs(loss(merged) - loss(alone)) > 1e-4  # control: seeing neighbours shows


def one_by_one(row):
    ends = np.cumsum(row.chunks[:, 2])
    for chunk, end in zip(row.chunks, ends, strict=True):
        yield dataclasses.replace(row, tokens=row.tokens[end - chunk[2] : end], chunks=chunk[None])


# A whole run


def settings_of(tmp_path, **data):
    nano = PRESETS["nano"]
    sizes = {"tokenizer_size": 288, "sequence_length": 32, "batch_size": 8, "folder": str(tmp_path / "cache")}
    return dataclasses.replace(
        nano,
        model=dataclasses.replace(nano.model, vocab_size=288),
        data=dataclasses.replace(nano.data, **sizes, **data),
        checkpoint=dataclasses.replace(nano.checkpoint, every=3),
        evaluation=dataclasses.replace(nano.evaluation, every=100, batches=1, depths=(1, 2)),
        run_dir=str(tmp_path / "run"),
        steps=5,
    )


@pytest.fixture
def sources(tmp_path):
    """Two prepared folders of JSON lines, and the glob of both files."""
    made = []
    for name, texts in (("a", TEXTS[:30]), ("b", TEXTS[30:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        recipe = Recipe(32, validation_fraction=0.3)
        corpus = Corpus("files", path.name, cut_files(find_files([str(path)]), recipe.reading, 2000))
        build(tmp_path / name, corpus, recipe, BYTES, processes=1, say=print)
        made.append(str(tmp_path / name))
    return made, str(tmp_path / "*.jsonl")


@pytest.mark.slow
def test_a_run_keeps_its_place_in_a_stream_and_notices_other_data(tmp_path, sources, monkeypatch, one_line):
    folders, files = sources
    config = settings_of(tmp_path, prepared=(folders[0],), stream=(files,))
    seen = {}
    real = StreamedData.batch

    def spy(self, step):
        batch = real(self, step)
        seen.setdefault(step, []).append(batch["tokens"].tobytes())
        return batch

    monkeypatch.setattr(StreamedData, "batch", spy)
    assert Trainer(dataclasses.replace(config, steps=3), say=lambda line: None).run() == 0
    before = {step: len(batches) for step, batches in seen.items()}
    assert Trainer(config, say=lambda line: None).run() == 0
    sample = PackedData(folders[0], "validation", sequence_length=32, batch_size=1)
    straight = StreamedData([files], sample, batch_size=8)
    for step in range(5):
        assert set(seen[step]) == {real(straight, step)["tokens"].tobytes()}
    assert len(seen[3]) > before.get(3, 0)  # control: the second run did go on at step 3
    assert len(seen[0]) == before[0]
    manifest = Path(folders[0]) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"validation_fraction": 0.3', '"validation_fraction": 0.2'))
    with one_line("a: has changed since the checkpoint: validation_fraction = 0.2, not 0.3; put the same data back"):
        Trainer(dataclasses.replace(config, steps=9), say=lambda line: None).run()


class InOrder(StreamedData):
    """A stream that is not shuffled."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options, window=1)


@pytest.mark.slow
def test_a_bad_document_in_a_stream_ends_a_run_that_has_saved_its_steps(tmp_path, sources, monkeypatch, one_line):
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "c.jsonl").write_text("".join([*lines[:25], "{no JSON\n", *lines[25:]]))
    monkeypatch.setattr("rdlm.data.from_config.StreamedData", InOrder)
    config = settings_of(tmp_path, prepared=(sources[0][0],), stream=(str(tmp_path / "bad"),))
    config = dataclasses.replace(config, steps=18, checkpoint=dataclasses.replace(config.checkpoint, every=100))
    with one_line(r"c.jsonl, line \d+: not JSON .*; saved step \d+ in .*run") as caught:
        Trainer(config, say=lambda line: None).run()
    [step] = saved_steps(tmp_path / "run")
    assert step > 1
    assert f"saved step {step} in" in str(caught.value)
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row] == list(range(step))
    recipe = Recipe(32, validation_fraction=0.3, reading=Reading(bad_documents="skip"))
    corpus = Corpus("files", "a.jsonl", cut_files(find_files([str(tmp_path / "a.jsonl")]), recipe.reading, 2000))
    build(tmp_path / "skips", corpus, recipe, BYTES, processes=1, say=print)
    skipping = dataclasses.replace(config, data=dataclasses.replace(config.data, prepared=(str(tmp_path / "skips"),)))
    said = []
    assert Trainer(skipping, say=said.append).run() == 0
    assert any(f"resuming {tmp_path / 'run'} at step {step}" in line for line in said)


# The commands


def test_from_a_folder_of_text_to_prepared_data(command, folder, tmp_path):
    code, out, err = command("train_tokenizer", folder, "--size", "320", "--out", tmp_path / "tok")
    assert code == 0, err
    assert "320 entries; special: 288 <|begin_text|>, 289 <|end_text|>" in out
    wanted = Tokenizer.train([text for text in TEXTS if not held_out(text, 0.05)], 320, "last")
    assert Tokenizer.load(tmp_path / "tok").hash == wanted.hash
    arguments = (folder, "--tokenizer", tmp_path / "tok", "--sequence-length", "32", "--processes", "1",
                 "--validation-fraction", "0.2", "--out", tmp_path / "out")  # fmt: skip
    code, out, err = command("prepare_data", *arguments)
    assert code == 0, err
    held = sum(held_out(text, 0.2) for text in TEXTS)
    assert f"train       {60 - held} documents" in out
    assert f"validation  {held} documents" in out
    assert "--data.prepared" in out
    assert command("prepare_data", *arguments)[1] == out  # again: it is there


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("prepare_data", (), ["paths", "--tfds NAME"]),
        ("prepare_data", ("TEXTS", "--embedded", "--out", "x", "--tokenizer", "bytes"), ["paths", "one of them"]),
        ("prepare_data", ("TEXTS", "--tokenizer", "bytes"), ["--out"]),
        ("prepare_data", ("TEXTS", "--out", "x"), ["--tokenizer", "train_tokenizer.py"]),
        ("prepare_data", ("TEXTS", "--out", "x", "--tokenizer", "nowhere"), ["nowhere", "no tokenizer.json"]),
        ("prepare_data", ("nowhere", "--out", "x", "--tokenizer", "bytes"), ["nowhere: no such file or folder"]),
        ("prepare_data", ("TEXTS", "--out", "gs://b/x", "--tokenizer", "bytes"), ["gs://b/x", "--beam"]),
        (
            "prepare_data",
            ("TEXTS", "--out", "x", "--tokenizer", "bytes", "--sequence-length", "0"),
            ["sequence_length"],
        ),
        ("prepare_data", ("--tfds", "imdb_reviewz", "--out", "x", "--tokenizer", "bytes"), ["'imdb_reviews'"]),
        ("train_tokenizer", ("TEXTS",), ["--out"]),
        ("train_tokenizer", ("--out", "x"), ["paths", "--bytes"]),
        ("train_tokenizer", ("TEXTS", "--out", "x", "--size", "100"), ["vocab_size = 100", "at least 288"]),
        ("train_tokenizer", ("TEXTS", "--out", "x", "--size", "99999"), ["vocab_size = 99999", "yield only"]),
        ("train_tokenizer", ("TEXTS", "--out", "TEXTS"), ["is there already"]),
    ],
)
def test_the_commands_refuse_in_one_line_and_leave_nothing(
    command, folder, tmp_path, monkeypatch, name, arguments, words
):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = command(name, *(str(folder) if word == "TEXTS" else word for word in arguments))
    said = [line for line in err.splitlines() if not line.endswith("MB")]  # how much there is to read
    assert (code, len(said), out) == (2, 1, ""), err
    assert all(word in said[0] for word in words), err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_was_taken_and_left_out_is_said(command, folder, tmp_path):
    (folder / "image.png").write_bytes(b"")
    (folder / ".notes.txt").write_text("hidden")
    arguments = ("--tokenizer", "bytes", "--sequence-length", "32", "--processes", "1", "--out", tmp_path / "out")
    code, out, err = command("prepare_data", folder, folder / "00.txt", *arguments)
    assert code == 0, err
    assert "60 files (60 .txt); left out: 1 hidden, 1 of unknown kind, 1 named twice: 0.0 MB" in err
    assert " rows of 32, " in out
    assert " labels" in out
    code, out, err = command("train_tokenizer", folder, folder / "00.txt", "--size", "320", "--out", tmp_path / "tok")
    assert "1 named twice: learning from 0.0 of 0.0 MB" in err


CHATS = {  # name -> a conversation
    "parts": [{"role": "user", "content": [{"type": "text", "text": "tea"}, {"type": "text", "text": "tea"}]}],
    "sharegpt": [{"from": "human", "value": "teatea"}, {"from": "gpt", "value": "teatea"}],
}


@pytest.mark.parametrize("name", CHATS)
def test_a_tokenizer_learns_the_words_of_chats(command, tmp_path, name):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"chat": CHATS[name]}) + "\n" + '{"chat": "half \\ud83d"}\n')
    arguments = (tmp_path / "chats.jsonl", "--field", "chat", "--size", "290", "--out", tmp_path / "tok",
                 "--validation-fraction", "0")  # fmt: skip
    code, _, err = command("train_tokenizer", *arguments)
    assert (code, err.count("\n")) == (2, 2), err
    assert "chats.jsonl, line " in err
    assert "not valid Unicode" in err
    code, _, err = command("train_tokenizer", *arguments, "--bad-documents", "skip")
    assert code == 0, err
    assert "Skipped: 1 bad" in err
    assert len(Tokenizer.load(tmp_path / "tok").encode("tea", bos=False)) < 3
    assert len(Tokenizer.load(tmp_path / "tok").encode("'type': 'text'", bos=False)) >= 14


def test_data_that_cannot_be_validated_alone_say_so(command, folder, tmp_path):
    code, out, err = command("prepare_data", folder, "--tokenizer", "bytes", "--validation-fraction", "0",
                             "--processes", "1", "--out", tmp_path / "out")  # fmt: skip
    assert code == 0, err
    assert "out holds no validation rows: train on it beside a folder that holds some" in out
    assert "PRESET" not in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data.prepared", "A", "--data.prepared", "B"), ["--data.prepared: given 2 times", "all its values"]),
        (("--data.prepared", "A", "--data.prepared=B"), ["--data.prepared: given 2 times"]),
        (("--data.sequence-length", "32", "--data.sequence_length", "64"), ["--data.sequence-length: given 2 times"]),
        (("--data.prepared", "A", "A/"), ["data.prepared", "is given twice", "with a weight"]),
        (("--data.prepared", "A", "B/../a"), ["data.prepared", "is given twice"]),
        (("--data.prepared", "TEXTS"), ["texts: not prepared data", "that prepare_data.py made"]),
        (("--data.prepared", "TEXTS/00.txt"), ["00.txt: not prepared data"]),
        (("--data.prepared", ""), ["data.prepared = '': is empty"]),
        (
            ("--data.prepared", "A", "B", "--data.weights", "1", "nan"),
            ["data.weights = (1.0, nan)", "finite number"],
        ),
        (("--data.prepared", "A", "B", "--data.weights", "1", "inf"), ["data.weights = (1.0, inf)"]),
        (("--data.prepared", "A", "B", "--data.weights", "1e308", "1e308"), ["data.weights = (1e+308, 1e+308)"]),
    ],
)
def test_training_refuses_data_named_wrongly(command, sources, folder, tmp_path, monkeypatch, flags, words):
    [a, b], _ = sources
    names = {"TEXTS": str(folder), "A": a, "B": b}
    sizes = ("--data.tokenizer-size", "288", "--model.vocab-size", "288", "--data.batch-size", "8")
    given = [names[flag.partition("/")[0]] + flag[len(flag.partition("/")[0]) :] if flag.partition("/")[0] in names
             else flag for flag in flags]  # fmt: skip
    if "32" not in flags:
        sizes += ("--data.sequence-length", "32")
    monkeypatch.chdir(tmp_path)
    code, out, err = command("train", "nano", *given, *sizes, "--steps", "1", "--run-dir", tmp_path / "run")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert all(word in err for word in words), err
    assert not (tmp_path / "run").exists()


def test_a_setting_without_effect_is_said(sources, capsys):
    [a, _], _ = sources
    config = DataConfig(prepared=(a,), sequence_length=32, tokenizer_size=288, batch_size=2)
    open_data(config, seed=0)
    assert "no effect" not in capsys.readouterr().err
    open_data(dataclasses.replace(config, validation_fraction=0.5), seed=0)
    assert "data.validation_fraction = 0.5 has no effect" in capsys.readouterr().err


def test_a_large_document_is_prepared_in_pieces_and_needs_no_validation(tmp_path):
    line = "The quick brown fox jumps over the lazy dog, 1234 times.\n"
    (tmp_path / "large.txt").write_text(line * (3_000_000 // len(line)))
    (tmp_path / "small.txt").write_text("small")
    recipe = Recipe(1024, validation_fraction=0.0, reading=Reading())
    corpus = Corpus("files", "large", cut_files(find_files([str(tmp_path)]), recipe.reading, 10**6))
    manifest = build(tmp_path / "out", corpus, recipe, BYTES, processes=1, say=print)
    assert manifest.train.tokens == manifest.train.bytes + 4
    config = DataConfig(prepared=(str(tmp_path / "out"),), sequence_length=1024, batch_size=1)
    with pytest.raises(InputError, match="holds no validation rows"):
        open_data(config, seed=0)


def test_the_embedded_corpus_can_be_prepared_like_any_other(command, tmp_path):
    arguments = ("--embedded", "--tokenizer", "bytes", "--sequence-length", "512", "--processes", "1",
                 "--tfds-dir", tmp_path / "tfds", "--out", tmp_path / "out")  # fmt: skip
    code, out, err = command("prepare_data", *arguments)
    assert code == 0, err
    assert "train       244 documents" in out
    assert "validation  12 documents" in out
