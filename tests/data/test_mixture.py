"""Mixtures: a pure function of the step on any number of hosts, in the asked proportions, every epoch counted."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdlm.config import DataConfig, InputError
from rdlm.data import Mixture, PackedData, Recipe, open_data, open_validation
from rdlm.data.prepare import Corpus, build, cut_files, find_files
from rdlm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes_only()
SIZES = {"a": 40, "b": 15, "c": 90}


def prepared(folder, name, count, tokenizer=BYTES, length=16):
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": f"{name} {i} " + "x" * (i % 40)}) + "\n" for i in range(count)))
    corpus = Corpus("files", source.name, cut_files(find_files([str(source)]), Recipe(length).reading, 500))
    build(folder / name, corpus, Recipe(length, validation_fraction=0.3), tokenizer, processes=1, say=print)
    return folder / name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("mixture")
    return [prepared(base, name, count) for name, count in SIZES.items()]


@pytest.fixture
def mix(folders):
    def mix(weights=(1, 2, 5), batch_size=8, seed=0, shuffle=True, **kwargs):
        sources = [PackedData(f, sequence_length=16, batch_size=1, seed=seed, shuffle=shuffle) for f in folders]
        return Mixture(sources, weights, batch_size=batch_size, **kwargs)

    return mix


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=st.integers(0, 10**6),
    processes=st.sampled_from([1, 2, 4]),
    weights=st.lists(st.floats(0.01, 10), min_size=3, max_size=3),
)
def test_any_number_of_hosts_sees_the_same_batch_at_any_step(mix, step, processes, weights):
    whole = mix(weights).batch(step)
    slices = [mix(weights, process_index=i, process_count=processes).batch(step) for i in range(processes)]
    assert same(joined(slices), whole)
    assert not same(whole, mix(weights).batch(step + 1))  # control


def test_any_step_can_be_resumed(mix):
    straight = mix()
    batches = [straight.batch(step) for step in range(60)]
    for step in (0, 1, 17, 59):
        assert same(mix().batch(step), batches[step])


@pytest.mark.parametrize("weights", [(1, 2, 5), (0.001, 0.5, 0.499), (7, 7, 7)])
def test_sources_appear_in_proportion_at_all_times(mix, weights):
    mixture = mix(weights)
    share = np.array(weights) / sum(weights)
    owners = np.array([mixture.place(n)[0] for n in range(25_000)])
    for n in (10, 100, 1000, 10_000, 25_000):
        seen = np.bincount(owners[:n], minlength=3)
        assert np.abs(seen - share * n).max() < 3.5


def test_every_row_of_every_source_is_seen_once_per_epoch_of_its_own(mix):
    mixture = mix()
    places = [mixture.place(n) for n in range(20_000)]
    for m, source in enumerate(mixture.sources):
        own = [place for owner, place in places if owner == m]
        assert own == list(range(len(own)))  # every source goes on without a gap
        rows = [source.examples[place].row.tokens.tobytes() for place in own[: source.len_rows]]
        on_disk = [source.examples[place].row.tokens.tobytes() for place in range(source.len_rows)]
        assert Counter(rows) == Counter(on_disk)
    step = 20_000 // mixture.batch_size
    counts = np.bincount([owner for owner, _ in places])
    assert mixture.seen(step) == [n / s.len_rows for n, s in zip(counts, mixture.sources, strict=True)]


def test_without_weights_all_sources_end_together(mix):
    mixture = mix(())
    seen = mixture.seen(mixture.steps_per_epoch)
    assert max(seen) - min(seen) < 0.2
    assert all(abs(epochs - 1) < 0.2 for epochs in seen)


def test_sources_with_equal_document_numbers_get_different_noise(mix, folders):
    twice = [PackedData(folders[0], sequence_length=16, batch_size=1, shuffle=False) for _ in range(2)]
    batch = Mixture(twice, (1, 1), batch_size=2).batch(0)
    np.testing.assert_array_equal(batch["tokens"][0], batch["tokens"][1])
    assert (batch["sequence_ids"][0] != batch["sequence_ids"][1]).all()
    alone = PackedData(folders[0], sequence_length=16, batch_size=1, shuffle=False).batch(0)
    np.testing.assert_array_equal(batch["sequence_ids"][0], alone["sequence_ids"][0])


# What is refused


@pytest.mark.parametrize(
    "weights", [(1, 2), (1, 2, 0), (1, 1, 1e-9), (1, math.nan, 1), (1, math.inf, 1), (1e308, 1e308, 1)]
)
def test_weights_that_do_not_fit_are_refused(mix, weights, one_line):
    with one_line("data.weights = "):
        mix(weights)


@pytest.mark.parametrize("weights", [(1, math.nan), (math.nan, 1), (1, math.inf), (1, -math.inf), (1e308, 1e308)])
def test_a_configuration_refuses_weights_without_a_finite_sum(weights, one_line):
    with one_line("data.weights = "):
        DataConfig(prepared=("a", "b"), weights=weights)


def test_sources_of_different_tokenizers_are_refused(tmp_path, folders, one_line):
    other = prepared(tmp_path, "d", 40, Tokenizer.train([f"word {i} and more" for i in range(99)] * 3, 270))
    config = DataConfig(prepared=(str(folders[0]), str(other)), sequence_length=16, batch_size=4)
    with one_line("d has another tokenizer"):
        open_data(config, seed=0)


def test_resuming_with_other_data_or_weights_is_refused_and_says_what_differs(mix, folders, tmp_path, one_line):
    state = json.loads(json.dumps(mix().state(5)))  # as a checkpoint keeps it
    mix().restore(5, state)
    with one_line(r"data.weights: in 10,000 rows \[1250, 1250, 7500\] of each, not"):
        mix((1, 1, 6)).restore(5, state)
    with one_line("data.prepared: 1 folders, but this run was trained on 3"):
        PackedData(folders[0], sequence_length=16, batch_size=4).restore(5, state)
    recipe = Recipe(16, "best_fit", 0.3)
    source = folders[0].parent / "a.jsonl"
    corpus = Corpus("files", source.name, cut_files(find_files([str(source)]), recipe.reading, 500))
    build(tmp_path / "a", corpus, recipe, BYTES, processes=1, say=print)
    one = PackedData(folders[0], sequence_length=16, batch_size=4)
    with one_line('has changed since the checkpoint: packing = "best_fit", not "concatenate_and_split"'):
        PackedData(tmp_path / "a", sequence_length=16, batch_size=4).restore(5, one.state(5))
    for name in ("documents", "tokenizer", "files", "validation_fraction"):
        changed = one.state(5)
        changed["sources"][0] = {**changed["sources"][0], name: "other"}
        with one_line(f"has changed since the checkpoint: {name} = "):
            one.restore(5, changed)


# From the configuration


def test_open_data_gives_train_validation_and_tokenizer(folders, mix):
    config = DataConfig(prepared=tuple(map(str, folders)), weights=(1, 2, 5), sequence_length=16, batch_size=8)
    data = open_data(config, seed=3)
    assert same(data.train.batch(7), mix(seed=3).batch(7))
    assert data.tokenizer.hash == BYTES.hash
    single = open_data(dataclasses.replace(config, prepared=(str(folders[0]),), weights=()), seed=3)
    assert isinstance(single.train, PackedData)
    seen = Counter(int(n) for batch in data.validation.batches() for n in (batch["segment_ids"] > 0).any(1))
    assert seen[1] == sum(PackedData(f, "validation", sequence_length=16, batch_size=1).len_rows for f in folders)
    assert len(list(open_validation(config, BYTES).batches(2))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1.0,)}, "data.weights = "),
        ({"stream": ("x",)}, "data.stream = "),
        ({"sequence_length": 32}, "data.sequence_length = 32: .* was prepared with 16"),
        ({"tokenizer_size": 100}, "tokenizer_size = 100: the tokenizer of .* has 288 .*--model.vocab-size 288"),
        ({"prepared": ("nowhere",), "weights": ()}, "nowhere"),
        ({"prepared": ("file:///nowhere/at/all",), "weights": ()}, "not prepared data"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folders, change, message, one_line):
    base = {"prepared": tuple(map(str, folders)), "sequence_length": 16, "batch_size": 8}
    with one_line(message):
        open_data(DataConfig(**{**base, **change}), seed=0)


def test_a_folder_behind_a_url_is_copied_once_and_checked(folders, tmp_path, one_line):
    url, cache = f"file://{folders[0]}", str(tmp_path / "cache")
    config = DataConfig(prepared=(url,), folder=cache, sequence_length=16, batch_size=4)
    here = PackedData(folders[0], sequence_length=16, batch_size=4)
    assert same(open_data(config, seed=0).train.batch(3), here.batch(3))
    [copy] = (tmp_path / "cache").iterdir()
    stamp = copy.stat().st_mtime_ns
    open_data(config, seed=0)
    assert copy.stat().st_mtime_ns == stamp
    # A copy that arrives damaged is not kept.
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folders[0].rglob("*"):
        if path.is_file():
            target = damaged / path.relative_to(folders[0])
            target.parent.mkdir(exist_ok=True)
            content = bytearray(path.read_bytes())
            if path.name == "train-00000.array_record":
                content[100] ^= 1
            target.write_bytes(content)
    with one_line("its checksum differs"):
        open_data(dataclasses.replace(config, prepared=(f"file://{damaged}",)), seed=0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [copy.name]


def test_an_error_of_the_prefetched_loader_reaches_the_consumer(folders):
    from rdlm.data import prefetch

    data = PackedData(folders[0], sequence_length=16, batch_size=4)
    batches = prefetch(data.batch)
    next(batches)
    data.len_rows = 0
    with pytest.raises(InputError, match="has only 0 train rows"):
        list(batches)
