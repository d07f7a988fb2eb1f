"""The model as a function: who influences whom, packing and padding, shapes, dtypes, noise, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Oracle, random_params

import rdlm
import rdlm.model.noise
from rdlm import exits
from rdlm.config import InputError, ModelConfig
from rdlm.losses import IGNORED, as_batch, cross_entropy, loss
from rdlm.model import (
    check_tokens,
    compute_dtype,
    context,
    core_step,
    embed,
    forward,
    init_params,
    inject,
    noisy,
    readout,
    split_steps,
)
from rdlm.recurrence import initial_state

TINY = ModelConfig(
    vocab_size=24, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1,
    coda_layers=1, max_length=32, mean_recurrence=3, backprop_depth=3, tie_embeddings=False,
)  # fmt: skip
L = 12


run = jax.jit(forward, static_argnums=1)
run_loss = jax.jit(loss, static_argnums=1)


@functools.cache
def params():
    return random_params(TINY)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, shape)


# Who influences whom


@functools.partial(jax.jit, static_argnames="r")
def influence(segment_ids, r):
    """[L, L]: norm of the derivative of the logits at t to the embedding of the token at p; every token is another."""
    row, projection = jnp.arange(L)[None], jax.random.normal(jax.random.key(1), (TINY.vocab_size,))

    def logits(table):
        out = forward(params() | {"wte": table}, TINY, row, (1, r), segment_ids=segment_ids)
        return out.logits[0] @ projection

    return jnp.linalg.norm(jax.jacrev(logits)(params()["wte"])[:, :L], axis=-1)


@pytest.mark.parametrize("packed", [False, True])
def test_causality_and_isolation_by_gradients(packed):
    # Two documents and padding. Padding sees itself, whatever comes of it; nobody else sees it.
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3]) if packed else np.ones((1, L), int)
    found = influence(segments, 2) > 0
    t, p = np.arange(L)[:, None], np.arange(L)[None]
    same = (segments == segments.T) & (segments != 0)
    np.testing.assert_array_equal(found, (t == p) | ((p < t) & same))


def test_control_without_segments_documents_touch():
    assert np.all(influence(np.ones((1, L), int), 2)[5:9, :5] > 0)


# Packing and padding give the single-sequence result

LENGTHS = (5, 3, 5)


def documents():
    return [tokens(n, seed=i) for i, n in enumerate(LENGTHS)]


def packed(parts, order, width, pad=0):
    """A row of the parts in this order, `pad` paddings in front: (row, segment ids, where part i starts)."""
    row, segments, starts = np.zeros(width, int), np.zeros(width, int), {}
    at = pad
    for number, i in enumerate(order):
        row[at : at + len(parts[i])] = parts[i]
        segments[at : at + len(parts[i])] = number + 1
        starts[i], at = at, at + len(parts[i])
    return row, segments, starts


@pytest.mark.parametrize("rule", [None, exits.latent_diff(0.2)], ids=["fixed depth", "exits"])
def test_packed_and_padded_batches_are_the_single_sequences(rule):
    parts = documents()
    rows = [packed(parts, [0, 1, 2], 16), packed(parts, [2, 0], 16), packed(parts, [1], 16, pad=2)]
    key = jax.random.key(3)
    batch = run(params(), TINY, np.array([r for r, _, _ in rows]), 6, key=key, exit_rule=rule,
                segment_ids=np.array([s for _, s, _ in rows]))  # fmt: skip
    for i, part in enumerate(parts):
        alone = run(params(), TINY, part[None], 6, key=key, exit_rule=rule)
        for b, (_, _, starts) in enumerate(rows):
            if i in starts:
                at = slice(starts[i], starts[i] + len(part))
                np.testing.assert_allclose(batch.logits[b, at], alone.logits[0], atol=2e-5, rtol=0)
                np.testing.assert_allclose(batch.latents[b, at], alone.latents[0], atol=2e-5, rtol=0)
                np.testing.assert_array_equal(batch.steps[b, at], alone.steps[0])
    assert not np.any(np.asarray(batch.steps)[np.array([s for _, s, _ in rows]) == 0])
    # Control: without segment ids the second document of the first row is another.
    leaked = run(params(), TINY, rows[0][0][None], 6, key=key, exit_rule=rule)
    at = slice(rows[0][2][1], rows[0][2][1] + LENGTHS[1])
    assert np.abs(leaked.logits[0, at] - batch.logits[0, at]).max() > 1e-2


def labelled(row, segments, ids, width):
    """A batch entry: labels are the next tokens, whatever they belong to."""
    labels = np.append(row[1:], 0)
    return {"tokens": row, "labels": labels, "segment_ids": segments, "sequence_ids": ids}


@pytest.mark.parametrize("keyed", [False, True])
def test_loss_of_packed_rows_is_the_weighted_loss_of_the_documents(keyed):
    # `keyed`: every document has noise of its own, by its number, wherever it lies.
    parts, key, numbers = documents(), jax.random.key(4), (11, 7, 30)
    rows = []
    for order in ([2, 0, 1], [1]):
        row, segments, starts = packed(parts, order, 16)
        ids = np.zeros(16, int)
        for i, start in starts.items():
            ids[start : start + len(parts[i])] = numbers[i]
        rows.append(labelled(row, segments, ids, 16))
    batch = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
    if not keyed:
        del batch["sequence_ids"]
    total = scored = 0
    for i in (2, 0, 1, 1):
        alone = {"tokens": parts[i][None, :-1], "labels": parts[i][None, 1:]}
        if keyed:
            alone["sequence_ids"] = np.full_like(alone["tokens"], numbers[i])
        total += (LENGTHS[i] - 1) * float(run_loss(params(), TINY, alone, steps=(2, 2), key=key))
        scored += LENGTHS[i] - 1
    assert float(run_loss(params(), TINY, batch, steps=(2, 2), key=key)) == pytest.approx(total / scored, abs=1e-5)
    if keyed:  # control: another number is other noise
        batch["sequence_ids"] = batch["sequence_ids"] + 1
        assert abs(float(run_loss(params(), TINY, batch, steps=(2, 2), key=key)) - total / scored) > 1e-4


def test_loss_is_the_mean_over_scored_labels():
    rows, key = tokens(2, 9), jax.random.key(2)
    labels = np.where(np.arange(8) % 3 == 0, IGNORED, rows[:, 1:])
    logits = np.asarray(run(params(), TINY, rows[:, :-1], 4, key=key).logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    by_hand = -np.mean([log_p[b, t, labels[b, t]] for b, t in zip(*np.nonzero(labels != IGNORED), strict=True)])
    batch = {"tokens": rows[:, :-1], "labels": labels}
    assert float(run_loss(params(), TINY, batch, steps=4, key=key)) == pytest.approx(by_hand, abs=1e-5)
    batch["labels"] = np.full_like(labels, IGNORED)
    assert float(run_loss(params(), TINY, batch, steps=4, key=key)) == 0.0


def test_rows_of_tokens_are_the_dict_of_inputs_and_labels():
    rows, key = tokens(2, 9), jax.random.key(2)
    batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:]}
    assert float(run_loss(params(), TINY, rows, steps=3, key=key)) == float(
        run_loss(params(), TINY, batch, steps=3, key=key)
    )


def test_labels_over_a_border_and_of_padding_are_ignored():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    batch = as_batch({"tokens": tokens(2, 6), "labels": np.full((2, 6), 5), "segment_ids": segments})
    expected = [[5, 5, IGNORED, 5, IGNORED, IGNORED], [5, 5, 5, 5, 5, 5]]
    assert batch.labels.tolist() == expected
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    losses = cross_entropy(jnp.zeros((2, 6, 8)), batch.labels)
    np.testing.assert_allclose(losses, np.where(np.array(expected) == IGNORED, 0, np.log(8)), rtol=1e-6)


# States and keys


def test_one_key_serves_every_row_and_keys_serve_one_each():
    row, keys = tokens(1, 5), jax.random.split(jax.random.key(8), 3)
    batch = np.repeat(row, 3, axis=0)
    shared = run(params(), TINY, batch, 4, key=keys[0]).logits
    assert np.array_equal(shared[0], shared[2])
    own = run(params(), TINY, batch, 4, key=keys).logits
    for b in range(3):
        np.testing.assert_allclose(own[b], run(params(), TINY, row, 4, key=keys[b]).logits[0], atol=2e-5, rtol=0)
    assert np.abs(own[0] - own[1]).max() > 1e-3
    default = run(params(), TINY, batch, 4).logits
    assert np.array_equal(default, run(params(), TINY, batch, 4, key=jax.random.key(0)).logits)


def test_a_state_wins_over_the_key():
    row, s0 = tokens(2, 5), np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
    out = run(params(), TINY, row, 4, state=s0, key=jax.random.key(5))
    assert np.array_equal(out.logits, run(params(), TINY, row, 4, state=s0).logits)
    for b in range(2):
        np.testing.assert_allclose(out.logits[b], Oracle(params(), TINY).process(row[b], s0[b], 4).logits, atol=3e-4)


# Depth and compilation


def test_one_program_for_every_depth():
    program, row = jax.jit(lambda *a, **k: forward(*a, **k), static_argnums=1), tokens(2, 6)
    traced = {r: program(params(), TINY, row, jnp.int32(r)) for r in (1, 3, 5)}
    assert program._cache_size() == 1
    assert all(np.all(out.steps == r) for r, out in traced.items())
    for r, depth in ((3, None), (5, (2, 3)), (5, (jnp.int32(3), jnp.int32(2)))):
        out = forward(params(), TINY, row, depth)
        np.testing.assert_allclose(out.logits, traced[r].logits, atol=1e-5, rtol=0)
        assert np.all(out.steps == r)


def test_depth_without_gradient_reaches_neither_prelude_nor_core():
    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    for steps, reached in (((3, jnp.int32(0)), False), (3, False), ((1, jnp.int32(2)), True)):
        g = gradients(params(), TINY, tokens(2, 6), steps=steps)
        for name in ("prelude_0", "core_0", "adapter", "wte"):  # untied: wte only embeds
            assert all(bool(np.any(x)) is reached for x in jax.tree.leaves(g[name])), name
        for name in ("coda_0", "ln_f", "head"):
            assert all(np.any(x) for x in jax.tree.leaves(g[name])), name


# Shapes and dtypes


def test_shapes_with_fewer_key_heads():
    shapes = jax.eval_shape(lambda key: init_params(TINY, key), jax.random.key(0))
    attention = shapes["core_0"]["attn"]
    assert attention["qkv"].shape == (16, (4 + 2 * 2) * 4)  # columns of 4 query, 2 key and 2 value heads
    assert attention["qk_bias"].shape == (2, 4, 4)  # per query head
    assert attention["proj"].shape == (16, 16)


def test_logits_are_float32_in_every_dtype():
    row = tokens(2, 6)
    exact = run(params(), TINY, row, 4)
    assert exact.logits.dtype == exact.latents.dtype == jnp.float32
    half = rdlm.cast(params(), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    mixed = dataclasses.replace(TINY, compute_dtype="bfloat16")
    assert compute_dtype(half, TINY) == compute_dtype(params(), mixed) == jnp.bfloat16
    for out in (run(half, TINY, row, 4), run(params(), mixed, row, 4)):
        assert out.logits.dtype == jnp.float32
        assert out.latents.dtype == out.state.dtype == jnp.bfloat16
        assert np.linalg.norm(out.logits - exact.logits) < 0.1 * np.linalg.norm(exact.logits)
    wide = run(half, dataclasses.replace(TINY, compute_dtype="float32"), row, 4)
    assert wide.latents.dtype == jnp.float32


# Test-time noise

KINDS = ("fixed", "geom", "sqrt", "line", "chi")
noise = jax.jit(noisy, static_argnums=1)


def with_noise(kind, t=0.3):
    return dataclasses.replace(TINY, test_time_noise=t, test_time_noise_type=kind, mean_recurrence=8, backprop_depth=3)


def states(B=2):
    return np.random.default_rng(3).normal(size=(B, 6, 16)).astype(np.float32)


def test_noise_off_changes_nothing():
    s = states()
    assert noise(params(), TINY, s, 1, jax.random.key(0), jnp.arange(6)) is not None
    assert np.array_equal(noise(params(), TINY, s, 1, jax.random.key(0), jnp.arange(6)), s)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_mixes_by_its_schedule_and_renormalises(kind, monkeypatch):
    # xi is what remains of a zero state under "fixed"; every other amount must follow from the formula (docs/model.md).
    s, key, positions, t = states(), jax.random.key(6), jnp.arange(6), 0.3
    rows = jnp.asarray(s)
    renormalised = {i: noisy(params(), with_noise(kind), rows, i, key, positions) for i in (0, 5)}
    monkeypatch.setattr(rdlm.model.noise, "renorm", lambda params, config, s: s)
    for i, normed in renormalised.items():
        n = t * np.sqrt(0.4)
        xi = np.asarray(noisy(params(), with_noise("fixed"), 0 * rows, i, key, positions)) / n
        if kind == "chi":  # one U(0, 1) per call
            shares = np.asarray(noisy(params(), with_noise(kind), 0 * rows, i, key, positions)) / xi
            assert np.ptp(shares) < 1e-5
            n = shares.mean()
            assert 0 < n < 2 * t * np.sqrt(0.4)
        n = {"geom": n / (i + 1), "sqrt": n / np.sqrt(i + 1), "line": max(n, (8 - i) / 8)}.get(kind, n)
        mixed = s * (1 - n) + xi * n
        np.testing.assert_allclose(noisy(params(), with_noise(kind), rows, i, key, positions), mixed, atol=1e-5)
        weight = np.asarray(params()["core_0"]["norm_4"]["scale"])
        by_hand = mixed / np.sqrt((mixed**2).mean(-1, keepdims=True) + TINY.norm_eps) * weight
        np.testing.assert_allclose(normed, by_hand, atol=1e-5)


def test_noise_is_normal_and_keyed_by_recurrence_and_position(monkeypatch):
    monkeypatch.setattr(rdlm.model.noise, "renorm", lambda params, config, s: s)
    config, zero, at = with_noise("fixed"), jnp.zeros((1, 512, 16)), jnp.arange(512)

    def xi(i, key, positions=at, rows=zero):
        return np.asarray(noisy(params(), config, rows, i, key, positions)) / (0.3 * np.sqrt(0.4))

    first = xi(0, jax.random.key(0))
    assert first.std() == pytest.approx(1, abs=0.03)
    assert abs(first.mean()) < 0.03
    others = [xi(1, jax.random.key(0)), xi(0, jax.random.key(1)), xi(0, jax.random.key(0), at[::-1])]
    assert all(abs(np.corrcoef(first.ravel(), x.ravel())[0, 1]) < 0.05 for x in others)
    assert np.array_equal(others[2][0, ::-1], first[0])
    keys = jax.random.split(jax.random.key(0), 2)
    both = xi(0, keys, rows=jnp.zeros((2, 512, 16)))
    assert np.array_equal(both[1], xi(0, keys[1])[0])
    # Not the noise of the initial state, which has the same key and position.
    s0 = initial_state(jax.random.key(0), at, 16)
    assert abs(np.corrcoef(first.ravel(), np.asarray(s0).ravel())[0, 1]) < 0.05


def test_forward_adds_noise_before_every_core_call():
    config, row, key = with_noise("sqrt"), tokens(2, 6), jax.random.key(9)
    out = run(params(), config, row, 3, key=key)
    assert np.array_equal(out.logits, run(params(), config, row, 3, key=key).logits)
    assert np.abs(out.logits - run(params(), config, row, 3, key=jax.random.key(10)).logits).max() > 1e-2
    positions = jnp.arange(6)
    ctx = context(config, positions, None)
    injected = inject(params(), config, embed(params(), config, row, ctx)[0])
    s = jnp.broadcast_to(initial_state(key, positions, 16), (2, 6, 16))
    for i in range(3):
        s = core_step(params(), config, noisy(params(), config, s, i, key, positions), injected, ctx)[0]
    np.testing.assert_allclose(out.logits, readout(params(), config, s, ctx)[0], atol=2e-5, rtol=0)
    exiting = run(params(), config, row, 7, key=key, exit_rule=exits.fixed(3))
    np.testing.assert_allclose(out.logits, exiting.logits, atol=2e-5, rtol=0)
    # Off: the key of the state changes, nothing else does.
    s0 = states()
    quiet = [run(params(), TINY, row, 3, state=s0, key=jax.random.key(k)).logits for k in (1, 2)]
    assert np.array_equal(*quiet)


# What is refused, in one line


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (np.zeros(5, int), r"expected integers \[B, L\].*int64 \(5,\)"),
        (np.zeros((2, 0), int), "L >= 1"),
        (np.zeros((2, 5)), "float64"),
        (np.zeros((2, 33), int), "exceeds config.max_length = 32"),
        (np.full((1, 3), 24), r"ids must be in \[0, 24\), found 24 .. 24"),
        ([[1, -1]], "found -1"),
        ([], "expected integers"),
    ],
)
def test_bad_tokens(bad, match):
    with pytest.raises(InputError, match=match) as error:
        check_tokens(bad, TINY)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=match):
        forward(params(), TINY, bad)


def test_good_tokens_become_int32():
    assert check_tokens([[1, 2]], TINY).dtype == jnp.int32
    padded = dataclasses.replace(TINY, padded_vocab_size=32)
    assert check_tokens(np.full((1, 3), 31), padded).shape == (1, 3)


@pytest.mark.parametrize(
    "steps", [0, -1, (0, 0), (-1, 3), (3, -1), (jnp.int32(2), -1), (-1, jnp.int32(2)), np.int64(0)]
)
def test_bad_depths(steps):
    with pytest.raises(InputError, match="at least one recurrence"):
        split_steps(steps, TINY)


def test_good_depths():
    assert split_steps(None, TINY) == (3, 0)
    assert split_steps(5, TINY) == (5, 0)
    assert split_steps((0, 2), TINY) == (0, 2)
    assert split_steps([np.int64(4), np.int32(9)], TINY) == (4, 9)
    assert all(type(x) is int for x in split_steps((np.int64(4), np.int32(9)), TINY))
    n, k = split_steps((jnp.int32(2), np.int64(20)), TINY)
    assert (int(n), k, type(k)) == (2, 20, int)  # a Python k may be any


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("segment_ids", np.ones((2, 4), int), r"segment_ids: expected shape \[2, 5\], got \[2, 4\]"),
        ("positions", np.arange(4), r"positions: expected shape \[5\] or \[2, 5\], got \[4\]"),
        ("state", np.zeros((2, 5, 8)), r"state: expected shape \[2, 5, 16\]"),
        ("key", jax.random.split(jax.random.key(0), 3), r"key: expected shape \[\] or \[2\]"),
    ],
)
def test_bad_shapes(name, value, match):
    with pytest.raises(InputError, match=match):
        forward(params(), TINY, tokens(2, 5), 2, **{name: value})


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (np.zeros(5, int), r"\[B, L\+1\]"),
        (np.zeros((2, 1), int), "L >= 1"),
        (np.zeros((2, 5)), "expected integers, got float64"),
        ({"tokens": np.zeros((2, 5), int)}, "'labels' is missing"),
        ({"labels": np.zeros((2, 5), int)}, "'tokens' is missing"),
        ({"tokens": np.zeros((2, 5), int), "labels": np.zeros((2, 5), int), "mask": 1}, "unknown entry 'mask'"),
        ({"tokens": np.zeros((2, 5), int), "labels": np.zeros((2, 4), int)}, r"labels has shape \(2, 4\)"),
        ({"tokens": np.zeros(5, int), "labels": np.zeros(5, int)}, r"tokens: expected integers \[B, L\]"),
        ({"tokens": np.zeros((2, 5), int), "labels": np.zeros((2, 5), int), "positions": np.arange(4)}, "positions"),
        ({"tokens": np.zeros((2, 5)), "labels": np.zeros((2, 5), int)}, "tokens: expected integers, got float64"),
    ],
)
def test_bad_batches(bad, match):
    with pytest.raises(InputError, match=match) as error:
        as_batch(bad)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [0, np.array([3, 0]), (2, 2)], ids=str)
def test_bad_depths_with_an_exit_rule(depth):
    with pytest.raises(InputError, match="num_steps"):
        forward(params(), TINY, tokens(2, 5), depth, exit_rule=exits.kl())
