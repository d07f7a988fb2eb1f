"""Streams: the same batches from any saved state, nothing held out ever trained on, files closed."""

import contextlib
import gc
import json
import os
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdlm.config import IGNORED, DataConfig
from rdlm.data import PackedData, Reading, Recipe, StreamedData, open_data, prefetch
from rdlm.data.prepare import Corpus, build, cut_files, find_files, held_out
from rdlm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_only()
TEXTS = [f"document {i} é " + "y" * (i * 7 % 60) for i in range(120)]
RECIPE = Recipe(16, validation_fraction=0.2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    base = tmp_path_factory.mktemp("stream")
    for name, texts in (("0.jsonl", TEXTS[:60]), ("1.jsonl", TEXTS[60:])):
        (base / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = Corpus("files", "sample", cut_files(find_files([str(base / "0.jsonl")]), RECIPE.reading, 10**6))
    build(base / "sample", corpus, RECIPE, BYTES, processes=1, say=print)
    return base


@pytest.fixture
def stream(source):
    sample = PackedData(source / "sample", "validation", sequence_length=16, batch_size=1)

    def stream(batch_size=4, part_bytes=1500, window=8, **kwargs):
        paths = [str(source / "*.jsonl")]
        return StreamedData(paths, sample, batch_size=batch_size, part_bytes=part_bytes, window=window, **kwargs)

    return stream


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def saved(streams, step):
    """The state that all processes would save together."""
    states = [s.state(step) for s in streams]
    return json.loads(json.dumps({**states[0], "stream": [text for state in states for text in state["stream"]]}))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 80), processes=st.sampled_from([1, 2, 4]), window=st.sampled_from([1, 8]))
def test_it_goes_on_from_any_saved_state_at_the_same_host_count(stream, stop, processes, window):
    def start():
        return [stream(process_index=i, process_count=processes, window=window) for i in range(processes)]

    first = start()
    before = [[s.batch(step) for s in first] for step in range(stop)]
    state = saved(first, stop)
    after = [[s.batch(step) for s in first] for step in range(stop, stop + 6)]
    resumed = start()
    for i, s in enumerate(resumed):
        s.restore(stop, state)
        for step, batches in enumerate(after):
            assert same(s.batch(stop + step), batches[i])
    if before:
        assert not same(before[-1][0], after[-1][0])  # control


def test_a_state_of_some_steps_ago_serves_a_run_that_prefetches(stream):
    first = stream()
    batches = [first.batch(step) for step in range(10)]
    again = stream()
    again.restore(6, saved([first], 6))
    assert same(again.batch(6), batches[6])


def test_every_train_document_comes_whole_once_per_epoch_and_no_other(stream):
    wanted = Counter(text for text in TEXTS if not held_out(text, 0.2))
    assert 0 < len(wanted) < len(TEXTS)
    data = stream(batch_size=1, window=1)
    tokens = []
    for step in range(3 * data.steps_per_epoch):
        row = data.batch(step)
        tokens += row["tokens"][0].tolist()
    texts = BYTES.decode(tokens, skip_special=False).split("<|begin_text|>")[1:-1]
    seen = Counter(text.removesuffix("<|end_text|>") for text in texts)
    assert set(seen) == set(wanted)
    assert 2 <= min(seen.values()) >= max(seen.values()) - 1
    epoch = [text.removesuffix("<|end_text|>") for text in texts[: len(wanted)]]
    assert Counter(epoch) == wanted
    second = [text.removesuffix("<|end_text|>") for text in texts[len(wanted) : 2 * len(wanted)]]
    assert Counter(second) == wanted
    assert second != epoch  # parts in another order


def test_processes_share_the_documents(stream):
    both = [stream(batch_size=2, window=1, process_index=i, process_count=2) for i in range(2)]
    texts = []
    for s in both:
        tokens = [t for step in range(s.steps_per_epoch // 2) for t in s.batch(step)["tokens"][0].tolist()]
        texts.append(set(BYTES.decode(tokens, skip_special=False).split("<|begin_text|>")[1:-1]))
    assert texts[0]
    assert texts[1]
    assert not texts[0] & texts[1]


def test_rows_are_full_and_labelled_like_prepared_ones(stream):
    data = stream()
    for step in range(20):
        batch = data.batch(step)
        assert batch["segment_ids"].all()
        inside = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
        np.testing.assert_array_equal(batch["labels"][:, :-1][inside], batch["tokens"][:, 1:][inside])
        assert (batch["labels"][:, :-1][~inside] == -100).all()


def test_files_and_thread_are_closed_when_the_consumer_fails(stream, source):
    def open_files():
        return [p for p in os.listdir("/proc/self/fd") if str(source) in _target(p) and p.isdigit()]

    def _target(p):
        try:
            return os.readlink(f"/proc/self/fd/{p}")
        except OSError:
            return ""

    gc.collect()
    before, data = len(open_files()), stream(part_bytes=10**6)
    batches = prefetch(data.batch)
    next(batches)
    assert len(open_files()) == before + 1  # control
    batches.close()
    data.close()
    assert len(open_files()) == before
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_steps_come_in_order_only(stream):
    data = stream()
    data.batch(0)
    with pytest.raises(ValueError, match="step = 0: a stream continues at 1"):
        data.batch(0)


def test_what_does_not_fit_is_refused(stream, source, tmp_path, one_line):
    with one_line("data.stream: saved by 1 processes, not 2; resume on as many"):
        stream(process_count=2).restore(3, saved([stream()], 0))
    with one_line("parts are too few for 100 processes"):
        stream(batch_size=100, process_count=100)
    state = saved([stream()], 0)
    state["sources"][0]["field"] = "body"
    with one_line('has changed since the checkpoint: field = "text", not "body"'):
        stream().restore(0, state)
    recipe = Recipe(16, "best_fit", 0.2)
    corpus = Corpus("files", "sample", cut_files(find_files([str(source / "0.jsonl")]), recipe.reading, 10**6))
    build(tmp_path / "fit", corpus, recipe, BYTES, processes=1, say=print)
    config = DataConfig(
        prepared=(str(tmp_path / "fit"),), stream=(str(source / "*.jsonl"),), sequence_length=16, batch_size=4
    )
    with one_line("packing = best_fit; a stream can only be packed by concatenate_and_split"):
        open_data(config, seed=0)
    only = tmp_path / "held.jsonl"
    only.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS if held_out(t, 0.2)))
    sample = PackedData(source / "sample", "validation", sequence_length=16, batch_size=1)
    with one_line("the files hold no train document"):
        StreamedData([str(only)], sample, batch_size=1).batch(0)


FILES = ("0.jsonl", "1.jsonl")


def edit(name, change):
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "1.jsonl").rename(folder / "2.jsonl"), 'files = "2.jsonl .*, not "1.jsonl'),
        (lambda folder: (folder / "1.jsonl").unlink(), 'files = null, not "1.jsonl'),
        (lambda folder: (folder / "+.jsonl").write_text('{"text": "new"}'), 'files = "[+].jsonl .*, not "0.jsonl'),
        (lambda folder: (folder / "9.jsonl").write_text('{"text": "new"}'), 'files = "9.jsonl .*, not null'),
        (edit("1.jsonl", lambda text: text.replace("y", "z")), 'files = "1.jsonl .*, not "1.jsonl'),
        (edit("0.jsonl", lambda text: text[: text.rindex("{")]), 'files = "0.jsonl .*, not "0.jsonl'),
    ],
)
def test_other_files_are_refused_when_it_goes_on(source, tmp_path, change, said, one_line):
    folder = tmp_path / "files"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((source / name).read_bytes())
    sample = PackedData(source / "sample", "validation", sequence_length=16, batch_size=1)
    state = saved([StreamedData([str(folder)], sample, batch_size=4)], 0)
    StreamedData([str(folder)], sample, batch_size=4).restore(0, state)
    moved = folder.rename(tmp_path / "moved")  # to another place
    os.utime(moved / "0.jsonl", (1, 1))
    StreamedData([str(moved)], sample, batch_size=4).restore(0, state)
    change(moved)
    with one_line(f"data.stream: the files have changed since the checkpoint: {said}.*put the same files back"):
        StreamedData([str(moved)], sample, batch_size=4).restore(0, state)
    del state["files"]  # as older checkpoints
    StreamedData([str(moved)], sample, batch_size=4).restore(0, state)


REFUSES = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}{% endif %}"
    "<|begin_header|>{{ m.role }}\n{{ m.content }}<|end_turn|>{% endfor %}"
)


@pytest.fixture
def chats(tmp_path):
    """chats("sample", bad_documents) -> the sample, a file with one refused conversation more, one of these alone."""

    def chat(i, content):
        return [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": content}]

    def write(name, chats):
        (tmp_path / name).write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
        return str(tmp_path / name)

    def chats(name, bad_documents):
        recipe = Recipe(16, reading=Reading("messages", bad_documents=bad_documents), validation_fraction=0.2)
        tokenizer = Tokenizer(BYTES._backend, {**BYTES._config, "chat_template": REFUSES})
        good = [chat(i, f"{i} is it") for i in range(30)]
        cut = cut_files(find_files([write("sample.jsonl", good)]), recipe.reading, 10**6)
        build(tmp_path / name, Corpus("files", "sample", cut), recipe, tokenizer, processes=1, say=print)
        sample = PackedData(tmp_path / name, "validation", sequence_length=16, batch_size=1)
        return sample, write("more.jsonl", [*good, chat(99, "no")]), write("bad.jsonl", [chat(99, "no")] * 30)

    return chats


def test_a_chat_that_the_template_refuses_is_left_out(chats, one_line, capsys):
    sample, file, bad = chats("sample", "skip")
    with contextlib.closing(StreamedData([file], sample, batch_size=4, window=1)) as data:
        capsys.readouterr()
        for step in range(20):
            data.batch(step)
    assert "data.stream: 1 bad documents left out so far" in capsys.readouterr().err
    with one_line("the files hold no train document, or none with a label"):  # and does not search for ever
        StreamedData([bad], sample, batch_size=4).batch(0)


def test_rows_without_a_label_are_left_out(chats):
    sample, _, _ = chats("sample", "refuse")
    long = sample.folder.parent / "long.jsonl"
    pair = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]
    long.write_text("".join(json.dumps({"messages": [*pair, {**pair[0], "n": i}]}) + "\n" for i in range(30)))
    with contextlib.closing(StreamedData([str(long)], sample, batch_size=1, window=1)) as data:
        labels = np.concatenate([data.batch(step)["labels"] for step in range(40)])
        state = saved([data], 40)
        after = data.batch(40)
        data.restore(40, state)
        np.testing.assert_array_equal(data.batch(40)["tokens"], after["tokens"])
    assert (labels != IGNORED).any(1).all()


def test_a_stream_stopped_by_a_bad_document_goes_on_with_a_sample_that_skips_them(chats, one_line):
    sample, file, _ = chats("sample", "refuse")
    data, state, seen = StreamedData([file], sample, batch_size=4, window=1), None, []
    with one_line("more.jsonl, line .*: chat template: not this"):
        for step in range(20):
            state = saved([data], step)
            seen.append(data.batch(step))
    assert seen
    sample, file, _ = chats("other", "skip")
    with contextlib.closing(StreamedData([file], sample, batch_size=4, window=1)) as data:
        data.restore(len(seen), state)
        assert data.batch(len(seen))["tokens"].shape == (4, 16)


def test_a_sample_without_duplicates_is_refused(source, tmp_path, one_line):
    recipe = Recipe(16, validation_fraction=0.2, deduplicate=True)
    corpus = Corpus("files", "sample", cut_files(find_files([str(source / "0.jsonl")]), recipe.reading, 10**6))
    build(tmp_path / "once", corpus, recipe, BYTES, processes=1, say=print)
    sample = PackedData(tmp_path / "once", "validation", sequence_length=16, batch_size=1)
    with one_line("data.stream: .*once was prepared with --deduplicate, but a stream keeps duplicates"):
        StreamedData([str(source / "0.jsonl")], sample, batch_size=1)


def test_open_data_streams(source, stream):
    config = DataConfig(
        prepared=(str(source / "sample"),), stream=(str(source / "*.jsonl"),), sequence_length=16, batch_size=4
    )
    data = open_data(config, seed=0)
    assert same(data.train.batch(0), stream(part_bytes=64_000_000, window=1024).batch(0))
    assert data.validation.len_rows
