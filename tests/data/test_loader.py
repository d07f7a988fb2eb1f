"""The loader: batch(step) is a pure function, whoever asks, in whatever order, on however many processes."""

import shutil
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdlm.data import IGNORED, PackedData, Row, read_manifest
from rdlm.data.prepare import prepare_embedded
from rdlm.data.records import RowFiles, token_dtype, write_rows
from rdlm.tokenizer import Tokenizer

NAMES = ["tokens", "labels", "segment_ids", "positions", "sequence_ids"]


@pytest.fixture
def tiny_folder(tiny_data):
    return prepare_embedded(tiny_data)


@pytest.fixture
def load(tiny_folder):
    def load(split="train", batch_size=4, folder=tiny_folder, **kwargs):
        return PackedData(folder, split, sequence_length=16, batch_size=batch_size, **kwargs)

    return load


def assert_equal(a, b):
    assert list(a) == list(b) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def row_keys(batch):
    """What identifies a row: its tokens and segments (sequence ids change with the epoch)."""
    return [
        tokens.tobytes() + segments.tobytes()
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True)
    ]


def epochs_of(data, count):
    """Keys of the rows of the first `count` epochs, in the order in which they are seen."""
    steps = -(-count * data.len_rows // data.batch_size)
    keys = [key for step in range(steps) for key in row_keys(data.batch(step))]
    return [keys[e * data.len_rows : (e + 1) * data.len_rows] for e in range(count)]


# Shapes


def test_batches_are_int32_of_batch_by_length(load):
    batch = load().batch(0)
    assert list(batch) == NAMES
    assert all(a.shape == (4, 16) and a.dtype == np.int32 for a in batch.values())


# Order


def test_every_epoch_sees_every_row_once_across_batch_borders(load):
    data = load(batch_size=7)
    assert data.len_rows % 7  # control: batches do run over the border of epochs
    on_disk = sorted(key for batch in load(batch_size=1, shuffle=False).batches() for key in row_keys(batch))
    first, second, third = epochs_of(data, 3)
    assert sorted(first) == sorted(second) == sorted(third) == on_disk
    assert len({tuple(first), tuple(second), tuple(third), tuple(on_disk)}) == 4  # and in its own order each time


def test_without_shuffling_the_order_is_that_on_disk(load):
    data = load(shuffle=False)
    for step, batch in enumerate(data.batches(3)):
        assert_equal(batch, data.batch(step))


def test_the_order_depends_on_the_seed_alone(load):
    assert_equal(load(seed=3).batch(5), load(seed=3).batch(5))
    assert row_keys(load(seed=3).batch(5)) != row_keys(load(seed=4).batch(5))


def test_the_order_of_rows_does_not_depend_on_the_batch_size(load):
    small, large = load(batch_size=3), load(batch_size=6)
    assert [*row_keys(small.batch(8)), *row_keys(small.batch(9))] == row_keys(large.batch(4))


def test_any_step_can_be_resumed(load):
    data = load()
    straight = [data.batch(step) for step in range(3 * data.steps_per_epoch)]
    for step in (0, 1, data.steps_per_epoch - 1, data.steps_per_epoch, len(straight) - 1):
        assert_equal(load().batch(step), straight[step])  # a new process that has seen nothing before


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(step=st.integers(0, 10**6), processes=st.sampled_from([1, 2, 3, 6]))
def test_processes_read_contiguous_slices_of_the_same_batch(load, step, processes):
    whole = load(batch_size=6).batch(step)
    parts = [load(batch_size=6, process_index=i, process_count=processes).batch(step) for i in range(processes)]
    assert_equal({name: np.concatenate([part[name] for part in parts]) for name in NAMES}, whole)


def test_threads_may_share_the_loader(load):
    data = load()
    expected = [data.batch(step) for step in range(40)]
    wrong = []

    def check():
        for step, batch in enumerate(expected):
            if any((data.batch(step)[name] != batch[name]).any() for name in NAMES):
                wrong.append(step)

    workers = [threading.Thread(target=check) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


# Noise


def test_a_row_gets_fresh_sequence_ids_every_epoch(load):
    data = load(batch_size=1)
    seen = {}
    for step in range(2 * data.len_rows):
        batch = data.batch(step)
        seen.setdefault(row_keys(batch)[0], []).append(batch["sequence_ids"][batch["segment_ids"] > 0])
    for first, second in seen.values():
        assert (first != second).all()


def test_one_segment_one_sequence_id(load):
    for batch in load("validation").batches():
        for segments, sequences in zip(batch["segment_ids"], batch["sequence_ids"], strict=True):
            pairs = set(zip(segments.tolist(), sequences.tolist(), strict=True))
            assert len(pairs) == len(set(segments.tolist())) == len({s for _, s in pairs})


# Validation


@pytest.mark.parametrize("batch_size", [1, 4, 5, 1000])
def test_validation_reads_each_row_once_and_pads_the_last_batch(load, batch_size):
    data = load("validation", batch_size=batch_size)
    batches = list(data.batches())
    assert len(batches) == data.steps_per_epoch
    assert all(batch["tokens"].shape == (batch_size, 16) for batch in batches)
    rows = [row for batch in batches for row in batch["segment_ids"]]
    assert [bool(row.any()) for row in rows] == [i < data.len_rows for i in range(len(rows))]
    labels = np.concatenate([batch["labels"].ravel() for batch in batches])
    entry = data.manifest.validation
    assert (labels != IGNORED).sum() == entry.tokens - entry.documents  # all tokens but the begin tokens


def test_label_bytes_add_up_to_the_bytes_of_the_text(real_data, real_folder):
    token_bytes = Tokenizer.load(real_folder / "tokenizer").token_bytes
    data = PackedData(real_folder, "validation", sequence_length=128, batch_size=32)
    labels = np.concatenate([batch["labels"].ravel() for batch in data.batches()])
    # So bits per byte divide by exactly the text, neither special tokens nor cut documents change it.
    assert token_bytes[labels[labels != IGNORED]].sum() == read_manifest(real_folder).validation.bytes


def test_validation_is_cut_and_sliced_like_training(load):
    some = list(load("validation").batches(2))
    assert len(some) == 2
    halves = [list(load("validation", process_index=i, process_count=2).batches()) for i in range(2)]
    for whole, low, high in zip(load("validation").batches(), *halves, strict=True):
        assert_equal({name: np.concatenate([low[name], high[name]]) for name in NAMES}, whole)


# Large vocabularies


def test_ids_beyond_uint16_are_stored_as_int32(tmp_path, tiny_folder):
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == ("uint16", "int32")
    for dtype, largest in (("uint16", 2**16 - 1), ("int32", 2**16)):
        row = Row(np.array([0, largest], np.int32), np.array([[0, 0, 2]]))
        assert write_rows(tmp_path / dtype, [row], dtype) == 1
        assert RowFiles([(tmp_path / dtype, 1)], dtype)[0].tokens.tolist() == [0, largest]


# Errors


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"batch_size": 10_000}, "data.batch_size = 10000: .* has only .* train rows"),
        ({"batch_size": 0}, "data.batch_size = 0"),
        ({"batch_size": 4, "process_count": 3}, "data.batch_size = 4: must be a positive multiple of 3 processes"),
        ({"process_index": 2, "process_count": 2}, "process_index = 2"),
        ({"split": "test"}, "split = 'test'"),
        ({"tokenizer_hash": "f" * 64}, r"its tokenizer .* is not the model's \(ffffffff\)"),
        ({"folder": "nowhere"}, "nowhere: not prepared data"),
    ],
)
def test_wrong_arguments_are_refused(load, kwargs, match, one_line):
    with one_line(match):
        load(**kwargs)


def test_another_sequence_length_is_refused(tiny_folder, one_line):
    with one_line("data.sequence_length = 32: .* was prepared with 16"):
        PackedData(tiny_folder, sequence_length=32, batch_size=4)


def test_the_right_tokenizer_is_accepted(load, tiny_folder):
    load(tokenizer_hash=Tokenizer.load(tiny_folder / "tokenizer").hash)


def test_a_small_validation_split_is_read_but_not_drawn_from(load, one_line):
    data = load("validation", batch_size=1000)
    assert len(list(data.batches())) == 1
    with one_line("has only"):
        data.batch(0)


def test_a_flipped_bit_is_found_when_its_row_is_read(load, tiny_folder, tmp_path, one_line):
    folder = shutil.copytree(tiny_folder, tmp_path / "copy")
    tokens = load(shuffle=False, batch_size=1).batch(3)["tokens"][0].astype("<u2").tobytes()
    path = folder / "train-00000.array_record"
    content = bytearray(path.read_bytes())
    content[content.index(tokens) + 5] ^= 1
    path.write_bytes(content)
    data = load(shuffle=False, batch_size=1, folder=folder)
    assert_equal(data.batch(2), load(shuffle=False, batch_size=1).batch(2))  # control: its neighbour is intact
    with one_line("train-00000.array_record: damaged"):
        data.batch(3)


@pytest.mark.parametrize("content", ["half", "garbage"])
def test_a_file_that_is_no_array_record_is_refused(load, tiny_folder, content, one_line):
    path = tiny_folder / "train-00000.array_record"
    size = path.stat().st_size
    old = path.read_bytes()
    path.write_bytes(old[: size // 2] + bytes(size - size // 2) if content == "half" else bytes([7]) * size)
    with one_line("train-00000.array_record: damaged"):
        data = load()
        for step in range(data.steps_per_epoch):
            data.batch(step)


def test_a_file_with_another_number_of_rows_is_refused(tiny_folder, one_line):
    rows = read_manifest(tiny_folder).train.rows
    path = tiny_folder / "train-00000.array_record"
    RowFiles([(path, rows)], "uint16")[0]  # control
    with one_line(f"damaged \\({rows} rows instead of {rows + 1}\\)"):
        RowFiles([(path, rows + 1)], "uint16")[0]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_and_truncated_files_are_refused(load, tiny_folder, damage, one_line):
    path = tiny_folder / "train-00000.array_record"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with one_line("missing" if damage == "missing" else "bytes instead of"):
        load()


def test_a_negative_step_is_a_bug(load):
    with pytest.raises(ValueError, match="step = -1"):
        load().batch(-1)
