"""Chats and pairs from a file to a trained model: only what the assistant says, or the completion, counts."""

import csv
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import rdlm
from rdlm.config import PRESETS
from rdlm.data import PackedData, Reading, Recipe, read_manifest
from rdlm.data.prepare import Corpus, build, cut_files, find_files, marked_example, read_documents
from rdlm.data.prepare.parts import Pair
from rdlm.losses import IGNORED, as_batch, bind_batch, cross_entropy
from rdlm.tokenizer import Tokenizer
from rdlm.train import Trainer
from rdlm.train.metrics import read_metrics
from tests.support import chat_templates as published
from tests.support.foreign_tokenizers import load

BYTES = Tokenizer.bytes_only()
PAIRS = [{"prompt": f"Q: what is {i} + {i}?\nA:", "completion": f" {2 * i}.", "id": i} for i in range(40)]
LAND = [("France", "Paris"), ("Peru", "Lima"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Cuba", "Havana")]
CHATS = [
    [
        {"role": "system", "content": f"You are guide {i}."},
        {"role": "user", "content": f"The capital of {land}?"},
        {"role": "assistant", "content": f"{city}."},
        {"role": "user", "content": "Zzz?"},
    ]
    for i in range(8)
    for land, city in LAND
]


def prepared(folder, records, tokenizer, reading, **recipe):
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = Recipe(**{"sequence_length": 96, "packing": "best_fit", "validation_fraction": 0.2, **recipe},
                    reading=reading)  # fmt: skip
    corpus = Corpus("files", path.name, cut_files(find_files([str(path)]), reading, 10**6))
    return build(folder / "out", corpus, recipe, tokenizer, processes=1, say=print)


# Prompts and completions

PAIRED = Reading("completion", prompt_field="prompt")


def documents(path, reading, skipped=None):
    [part] = cut_files(find_files([str(path)]), reading, 10**9)
    return list(read_documents(part, reading, skipped=skipped))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.arrow"])
def test_pairs_are_read_from_every_format(tmp_path, name):
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    elif name == "a.csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "prompt", "completion"])
            writer.writeheader()
            writer.writerows(PAIRS)
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    else:
        table = pyarrow.Table.from_pylist(PAIRS)
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    assert documents(path, PAIRED) == [Pair(p["prompt"], p["completion"]) for p in PAIRS]


def test_of_pairs_the_completions_are_scored(tmp_path):
    manifest = prepared(tmp_path, PAIRS, BYTES, PAIRED)
    data = PackedData(tmp_path / "out", sequence_length=96, batch_size=1)
    labels = np.concatenate([batch["labels"].reshape(-1) for batch in data.batches()])
    said = BYTES.decode(labels[labels != IGNORED], skip_special=False)
    answers = said.removesuffix("<|end_text|>").split("<|end_text|>")
    assert len(answers) == manifest.train.documents > 20
    assert set(answers) <= {pair["completion"] for pair in PAIRS}
    assert len(said.replace("<|end_text|>", "")) + len(answers) == manifest.train.labels  # a byte is a token
    assert manifest.recipe.settings()["prompt_field"] == "prompt"
    assert "prompt_field" not in Recipe(8).settings()  # so that runs on older data resume


def test_a_pair_is_encoded_as_generation_encodes_its_prompt(tmp_path):
    merging = Tokenizer.train(["the cat sat on the mat"] * 9, 274)
    metaspace = load("mistral", tmp_path)
    for tokenizer in (merging, metaspace, BYTES):
        for prompt, completion in [("the cat", " sat"), ("the c", "at"), ("the ", "cat"), ("", "the cat")]:
            ids, scored = tokenizer.encode_completion(prompt, completion)
            np.testing.assert_array_equal(ids[~scored], tokenizer.encode(prompt))
            assert ids[-1] == tokenizer.eos_id
            if tokenizer is not metaspace or completion == " sat":
                text = tokenizer.decode(ids[scored], after=ids[~scored])
                assert text == completion
    joined = merging.encode("the cat")
    assert len(joined) < len(merging.encode_completion("the c", "at")[0]) - 1  # control: "cat" is one token there


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "x"}, "no field 'completion'; pass --field with one of: 'prompt'"),
        ({"completion": "x"}, "no field 'prompt'; pass --prompt-field with one of: 'completion'"),
        ({"prompt": [CHATS[0][1]], "completion": "x"}, "'prompt' is messages, but 'completion' is text; write both"),
        ({"prompt": "x", "completion": CHATS[0]}, "'prompt' is text, but 'completion' is messages; write both"),
        ({"prompt": CHATS[0], "completion": CHATS[0]}, "'prompt' holds words of the assistant, .* --prompt-field"),
        ({"prompt": "x", "completion": 3}, "field 'completion' is int"),
    ],
)
def test_pairs_that_are_none_are_refused_or_left_out(tmp_path, record, words, one_line):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*PAIRS[:3], record, {"prompt": "x", "completion": " "}]))
    with one_line(f"a.jsonl, line 4: {words}"):
        documents(path, PAIRED)
    skipped = {"bad": 0, "empty": 0}
    assert len(documents(path, dataclasses.replace(PAIRED, bad_documents="skip"), skipped)) == 3
    assert skipped == {"bad": 1, "empty": 1}


def test_prompts_and_completions_of_messages_are_one_chat(tmp_path, one_line):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": CHATS[0][:2], "completion": CHATS[0][2:3]}))
    assert documents(path, PAIRED) == [CHATS[0][:3]]
    (tmp_path / "b.jsonl").write_text(json.dumps(PAIRS[0]))
    with one_line("no field 'text'; .*; prompts and completions: --prompt-field prompt --field completion"):
        documents(tmp_path / "b.jsonl", Reading())


# What is counted and shown

LONG = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]


@pytest.mark.parametrize("packing", ["document_start", "best_fit", "concatenate_and_split"])
def test_chats_and_rows_without_a_label_are_counted(tmp_path, command, packing):
    chats = [*CHATS[:20], LONG, [*CHATS[0][:2]]]
    manifest = prepared(
        tmp_path, [{"messages": c} for c in chats], published.ouro(), Reading("messages"), packing=packing,
        sequence_length=110, validation_fraction=0,
    )  # fmt: skip
    data = PackedData(tmp_path / "out", sequence_length=110, batch_size=1, shuffle=False)
    labels = np.concatenate([batch["labels"] for batch in data.batches()])
    said = published.ouro().decode(labels[labels != IGNORED], skip_special=False)
    answers = {"document_start": 0, "best_fit": 1, "concatenate_and_split": 1}[packing]
    assert said.count("y<|im_end|>") == answers  # what follows a long prompt is cut off
    if packing == "document_start":
        assert manifest.train.unscored_documents == len(chats) - said.count("<|im_end|>")
    else:
        assert manifest.train.unscored_documents == 1  # the one without an answer
    assert manifest.train.dropped_rows > 0
    assert manifest.train.rows == len(labels)
    assert (labels != IGNORED).any(1).all()
    code, out, err = command("prepare_data", tmp_path / "records.jsonl", "--field", "messages", "--tokenizer",
                             tmp_path / "out" / "tokenizer", "--packing", packing, "--sequence-length", 110,
                             "--validation-fraction", 0, "--out", tmp_path / "again")  # fmt: skip
    assert code == 0, err
    assert "  > " in out
    assert (
        f"fine-tune on it: python experiments/train.py finetune --init FOLDER --data.prepared {tmp_path}/again" in out
    )
    assert f"{manifest.train.unscored_documents} documents have no label" in out
    assert f"{manifest.train.dropped_rows} rows had no label and were left out" in out


@pytest.mark.parametrize("tokenizer", [published.ouro, published.smollm2, Tokenizer.bytes_only])
def test_empty_replies_are_context_and_not_scored(tmp_path, tokenizer):
    ask, silent = {"role": "user", "content": "x"}, {"role": "assistant", "content": " \n"}
    said = {"role": "assistant", "content": "y"}
    tokens, scored = tokenizer().encode_conversation([ask, silent, ask, said], reply=False)
    assert tokenizer().decode(tokens[scored]).strip() == "y"
    assert scored.sum() == tokenizer().encode_conversation([ask, said], reply=False)[1].sum()  # y and its end of turn
    chats = [{"messages": [ask, silent]}, {"messages": [ask, said]}]
    manifest = prepared(tmp_path, chats, tokenizer(), Reading("messages"), validation_fraction=0)
    assert (manifest.train.documents, manifest.train.unscored_documents) == (2, 1)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_chats_written_as_text_are_chats(tmp_path, name, one_line):
    texts = [json.dumps(CHATS[0]), f"  {json.dumps(CHATS[1], indent=1)}\n", json.dumps([{"id": 3}]), "[{'role': 1}"]

    def write(texts):
        if name == "a.csv":
            with (tmp_path / name).open("w", newline="") as file:
                csv.writer(file).writerows([["messages"], *([text] for text in texts)])
        elif name == "a.jsonl":
            (tmp_path / name).write_text("".join(json.dumps({"messages": text}) + "\n" for text in texts))
        else:
            pyarrow.parquet.write_table(pyarrow.table({"messages": texts}), tmp_path / name)

    write(texts)
    assert documents(tmp_path / name, Reading("messages")) == [CHATS[0], CHATS[1], *texts[2:]]
    write([str(CHATS[0])])  # as Python prints it
    with one_line("field 'messages' holds chat messages as text that is not JSON; write them with json.dumps"):
        documents(tmp_path / name, Reading("messages"))


def test_chats_without_a_label_name_their_roles_and_empty_documents_their_field(tmp_path, one_line):
    chats = [{"messages": [{"role": "user", "content": "x"}, {"role": "model", "content": f"{i}"}]} for i in range(9)]
    with one_line(r"counts as a label; .*role 'assistant' say counts \(found roles: model, user\)"):
        prepared(tmp_path, chats, published.ouro(), Reading("messages"))
    with one_line("field = 'text': no document is left, 60 empty; name the field .* with --field"):
        prepared(tmp_path, [{"text": " "}] * 60, BYTES, Reading())


def test_an_example_is_shown_with_what_is_scored(tmp_path, capsys):
    hello = [{"role": "user", "content": "Hi\x1b[2J\nthere"}, {"role": "assistant", "content": "one\n\ntwo é"}]
    prepared(tmp_path, [{"messages": hello}] * 3, published.smollm2(), Reading("messages"), validation_fraction=0,
             sequence_length=300)  # fmt: skip
    assert marked_example(tmp_path / "out") == [
        "    <|im_start|>system\\n",
        "    You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n",
        "    <|im_start|>user\\n",
        "    Hi\\x1b[2J\\n",
        "    there<|im_end|>\\n",
        "    <|im_start|>assistant\\n",
        "  > one\\n",
        "  > \\n",
        "  > two é<|im_end|>",
        "    \\n",
    ]


def test_between_prompt_and_completion_no_line_break_is_invented(tmp_path):
    for i, (prompt, shown) in enumerate([("Q: a?\nA:", "    A:"), ("Q: a?\nA:\n", "    A:\\n")]):
        (folder := tmp_path / str(i)).mkdir()
        prepared(folder, [{"prompt": prompt, "completion": " b"}] * 3, BYTES, PAIRED, validation_fraction=0)
        assert marked_example(folder / "out") == ["    <|begin_text|>Q: a?\\n", shown, "  >  b<|end_text|>"]


@pytest.mark.parametrize("place", [".", "tokenizer"])
def test_the_model_that_the_tokenizer_belongs_to_is_named(tmp_path, command, place):
    model = tmp_path / "model"
    BYTES.save(model / place)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(60)))
    arguments = ("prepare_data", tmp_path / "texts.jsonl", "--tokenizer", model / place, "--sequence-length", 16)
    assert "fine-tune" not in command(*arguments, "--out", tmp_path / "a")[1]  # no model there
    (model / "config.json").write_text("{}")
    assert f"train.py finetune --init {model} --data.prepared" in command(*arguments, "--out", tmp_path / "b")[1]


def test_a_long_example_is_shown_around_the_first_words_that_are_scored(tmp_path):
    long = [{"role": "user", "content": "a\n" * 90 + "z" * 300}, {"role": "assistant", "content": "b\n" * 90}]
    prepared(tmp_path, [{"messages": long}], published.ouro(), Reading("messages"), validation_fraction=0,
             sequence_length=900)  # fmt: skip
    lines = marked_example(tmp_path / "out")
    assert len(lines) == 42
    assert lines[0].startswith("    ... ")
    assert lines[-1].startswith("    ... ")
    assert "  > b\\n" in lines
    assert max(map(len, lines)) < 180
    texts = tmp_path / "texts"
    texts.mkdir()
    prepared(texts, [{"text": "only text"}] * 9, BYTES, Reading(), validation_fraction=0)
    assert marked_example(texts / "out") == []


# Trained and evaluated


@pytest.fixture(scope="module")
def chats_run(tmp_path_factory):
    """A run folder: 40 steps on the chats, a loss at every one."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = published.ouro()
    prepared(folder, [{"messages": c} for c in CHATS], tokenizer, Reading("messages"), sequence_length=128)
    nano = PRESETS["nano"]
    model = dataclasses.replace(nano.model, vocab_size=tokenizer.vocab_size, max_length=128)
    sizes = {"tokenizer_size": tokenizer.vocab_size, "sequence_length": 128, "batch_size": 8}
    config = dataclasses.replace(
        nano, model=model, steps=40, run_dir=str(folder / "run"),
        data=dataclasses.replace(nano.data, **sizes, prepared=(str(folder / "out"),)),
        checkpoint=dataclasses.replace(nano.checkpoint, every=40),
        evaluation=dataclasses.replace(nano.evaluation, every=1000, batches=1, depths=(1, 4)),
    )  # fmt: skip
    assert Trainer(config, say=lambda line: None).run() == 0
    return folder


@pytest.mark.slow
def test_the_loss_on_what_the_assistant_says_falls(chats_run):
    losses = [row["loss"] for row in read_metrics(chats_run / "run") if "loss" in row]
    assert losses[0] > 5
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def nats_at_4(run, batch):
    """Of every token as a label of the one before it, f32 [B, L]."""
    bound = bind_batch(run.params, run.config, batch, jax.random.key(0))
    s = bound.s0
    for i in range(4):
        s = bound.step(s, i)
    scores, labels = jax.nn.log_softmax(bound.read(s)[0]), jnp.roll(batch.tokens, -1, axis=1)
    return -jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]


@pytest.mark.slow
def test_held_out_chats_are_scored_on_what_the_assistant_says(chats_run):
    run = rdlm.load(chats_run / "run")
    curve = run.evaluate([1, 4])
    entry = read_manifest(chats_run / "out").validation
    assert curve.tokens == entry.labels < entry.tokens / 4
    nats = jax.jit(lambda batch: nats_at_4(run, batch))
    said, rest = [], []
    for batch in map(as_batch, run.validation().batches()):
        found, scored = np.asarray(nats(batch)), np.asarray(batch.labels) != IGNORED
        said += found[scored].tolist()
        rest += found[~scored & (np.asarray(batch.segment_ids) > 0)].tolist()
    assert curve.nats[1] == pytest.approx(np.mean(said), rel=1e-4)
    assert abs(np.mean([*said, *rest]) - curve.nats[1]) > 0.3  # control: of all tokens
    assert all(map(math.isfinite, curve.bits_per_byte))


@pytest.mark.slow
def test_tokens_that_are_not_scored_leave_no_gradient(chats_run):
    run = rdlm.load(chats_run / "run")
    batch = as_batch(PackedData(chats_run / "out", sequence_length=128, batch_size=8).batch(0))
    labels, segments = np.asarray(batch.labels), np.asarray(batch.segment_ids)
    s0 = bind_batch(run.params, run.config, batch, jax.random.key(0)).s0

    def loss(s0, shift):
        """As `rdlm.loss`; `shift` is added to the logits."""
        bound = bind_batch(run.params, run.config, batch, jax.random.key(0))
        logits = bound.read(bound.step(bound.step(s0, 0), 1))[0] + shift
        return cross_entropy(logits, batch.labels).sum() / (batch.labels != IGNORED).sum()

    shift = jnp.zeros((*labels.shape, run.config.rows))
    value, (by_state, by_logits) = jax.jit(jax.value_and_grad(loss, (0, 1)))(s0, shift)
    theirs = jax.jit(lambda b: rdlm.loss(run.params, run.config, b, steps=2, key=jax.random.key(0)))(batch._asdict())
    assert float(value) == pytest.approx(float(theirs), rel=1e-5)
    np.testing.assert_array_equal(np.abs(by_logits).max(-1) > 0, labels != IGNORED)
    # "Zzz?", the last question of each chat, comes after all that is scored.
    later = np.zeros(labels.shape, bool)
    for row, segment in {(r, s) for r, s in zip(np.nonzero(segments)[0], segments[segments > 0], strict=True)}:
        inside = segments[row] == segment
        last = np.flatnonzero(inside & (labels[row] != IGNORED)).max()
        later[row] |= inside & (np.arange(labels.shape[1]) > last)
    moved = np.abs(by_state).max(-1) > 0
    assert later.sum() > 20
    assert not moved[later | (segments == 0)].any()
    assert moved[(segments > 0) & ~later].mean() > 0.9  # control: what comes before an answer moves it
