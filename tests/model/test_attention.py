"""Attention with its hand-written backward pass against plain softmax attention differentiated by JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdlm.model import attention
from rdlm.model.attention import HIDDEN, causal_bias
from rdlm.model.kernels import (
    Stored,
    attend,
    attend_cached,
    attend_copied,
    attend_filled,
    attend_flash,
    attend_flat,
    attend_in_training,
    attend_stored,
    fits_stored,
)

B, H, Q = 2, 4, 8


def softmax_attention(q, k, v, visible):
    """The textbook formula in float32; visible bool [B or 1, L, T]. q [B,L,H,Q], k [B,T,Hk,Q], v [B,T,K,Q]."""
    k, v = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("blhq,bthq->bhlt", q, k) / Q**0.5
    p = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhlt,bthq->blhq", p, v).reshape(*q.shape[:2], -1)


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(L, key_heads=H, value_heads=H):
    return random(1, B, L, H, Q), random(2, B, L, key_heads, Q), random(3, B, L, value_heads, Q)


def segments(L):
    """Three documents of different lengths per row, then padding in the first."""
    cuts = np.array([[0.2, 0.5, 0.9], [0.4, 0.45, 1.0]])
    return (1 + (np.arange(L)[None, :, None] >= cuts[:, None] * L).sum(-1)) % 4


def sees(ids, L, window=10_000):
    """visible [B or 1, L, L]: itself, and the window - 1 tokens before it in its document; padding is in none."""
    ids = np.ones((1, L), int) if ids is None else ids
    t, p = np.arange(L)[:, None], np.arange(L)[None, :]
    same = (ids[:, :, None] == ids[:, None, :]) & (ids[:, None, :] > 0)
    return (t == p) | ((p < t) & (p > t - window) & same)


def both(ours, reference, arguments):
    """Output and gradients (of one random projection, to every argument) of two functions, in one program."""

    def with_gradients(attention, arguments):
        def projected(arguments):
            out = attention(*arguments)
            return jnp.sum(out * random(9, *out.shape)), out

        grads, out = jax.grad(projected, has_aux=True)(arguments)
        return [out, *grads]

    return jax.jit(lambda a: (with_gradients(ours, a), with_gradients(reference, a)))(tuple(arguments))


def assert_same(ours, reference):
    for a, b in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


# Queries go in blocks of at least 64 and at least an eighth of the row. These make one block, a full one, one and a
# rest of one token, and seven of 73 and a rest.
@pytest.mark.parametrize("L", [1, 5, 64, 65, 577])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attend", [attend, attend_in_training])
def test_attend_is_softmax_attention_with_its_gradients(attend, L, packed):
    ids = segments(L) if packed else None
    bias, visible = causal_bias(None if ids is None else jnp.asarray(ids), L), sees(ids, L)
    assert_same(*both(lambda *a: attend(*a, bias), lambda *a: softmax_attention(*a, visible), inputs(L)))


@pytest.mark.parametrize(("key_heads", "value_heads"), [(4, 2), (2, 2), (1, 1)])
@pytest.mark.parametrize("attend", [attend, attend_in_training])
def test_attend_with_fewer_key_heads(attend, key_heads, value_heads):
    # A bias on keys is per query head, so keys may have all heads while values are shared (docs/model.md, Block).
    ids, given = segments(70), inputs(70, key_heads, value_heads)
    bias, visible = causal_bias(jnp.asarray(ids), 70), sees(ids, 70)
    ours, reference = both(lambda *a: attend(*a, bias), lambda *a: softmax_attention(*a, visible), given)
    assert_same(ours, reference)
    if value_heads == 2:  # control: another assignment of query heads to value heads is another function
        swapped = jax.jit(softmax_attention)(given[0], given[1], given[2][:, :, ::-1], visible)
        assert np.abs(swapped - reference[0]).max() > 0.1


def stored(k, v):
    """Keys and values [B, T, heads, Q] as a cache of one set holds them."""
    k, v = (x.reshape(1, *x.shape[:2], -1) for x in (k, v))
    return Stored(k, v, jnp.int32(0))


def attend_as_stored(q, new, past):
    k, v, bias = past
    return attend_cached(q, new, stored(k, v), bias)


@pytest.mark.parametrize(("L", "T", "heads"), [(1, 7, 4), (5, 1, 4), (6, 33, 2)])
def test_attend_cached_is_one_softmax_over_both_parts(L, T, heads):
    own, past = inputs(L, heads, heads), (random(4, B, T, heads, Q), random(5, B, T, heads, Q))
    held = np.arange(T)[None, None] < np.array([T, T // 2])[:, None, None]  # the second row's cache is half empty
    own_bias, cached_bias = causal_bias(None, L), jnp.where(held, 0.0, HIDDEN)
    visible = np.concatenate([np.broadcast_to(held, (B, L, T)), np.broadcast_to(sees(None, L), (B, L, L))], -1)

    def ours(q, k, v, past_k, past_v):
        return attend_cached(q, (k, v, own_bias), stored(past_k, past_v), cached_bias)

    def joined(q, k, v, past_k, past_v):
        return softmax_attention(q, jnp.concatenate([past_k, k], 1), jnp.concatenate([past_v, v], 1), visible)

    assert_same(*both(ours, joined, (*own, *past)))


@pytest.mark.parametrize("L", [1, 20])
def test_attend_filled_reads_the_next_power_of_two_of_the_longest_row(L):
    own, past = [jnp.asarray(x) for x in inputs(L, 2, 2)], (random(4, B, 300, 2, Q), random(5, B, 300, 2, Q))

    @functools.partial(jax.jit, static_argnames="attend")
    def over(attend, filled, k, v):
        held = jnp.arange(300)[None, None] < filled[:, None, None]
        new, bias = (own[1], own[2], causal_bias(None, L)), jnp.where(held, 0.0, HIDDEN)
        return attend(own[0], new, stored(k, v), bias)

    def plain(q, new, cached, bias):
        return attention.softmax_attention(q, cached.part(new, bias), new)

    for longest, read in ((0, 128), (128, 128), (129, 256), (256, 256), (257, 300), (300, 300)):
        filled = jnp.array([longest, longest // 3])
        # Beyond what it reads there may be anything.
        spoilt = [np.where(np.arange(300)[None, :, None, None] < read, x, np.nan) for x in past]
        ours = over(attend_filled, filled, *spoilt)
        np.testing.assert_allclose(ours, over(plain, filled, *past), rtol=1e-5, atol=1e-6)
        if read < 300:  # control
            assert np.isnan(over(plain, filled, *spoilt)).all()


@pytest.mark.parametrize("L", [1, 5])
@pytest.mark.parametrize("paged", [False, True])
def test_attend_filled_reads_rows_in_blocks(L, paged):
    R, S, T, size = 4, 2, 512, 32
    q, k, v = (jnp.asarray(random(i, R, L, n, Q)) for i, n in enumerate((4, 2, 2)))
    past = [random(3 + i, S, R, T, 2 * Q) for i in range(2)]
    chosen = np.array([1, 0, 0, 1]) if paged else np.int32(1)
    table = np.random.default_rng(0).permutation(R * T // size).reshape(R, -1)

    def cached(past):
        if not paged:
            return Stored(*map(jnp.asarray, past), jnp.asarray(chosen))
        held = [np.zeros((S, R * T // size, size, 2 * Q), np.float32) for _ in past]
        for x, y in zip(held, past, strict=True):
            x[:, table] = y.reshape(S, R, -1, size, 2 * Q)
        return Stored(*map(jnp.asarray, held), jnp.asarray(chosen), jnp.asarray(table))

    @functools.partial(jax.jit, static_argnames="attend")
    def over(attend, past, filled):
        held = jnp.arange(T)[None] < filled[:, None]
        return attend(q, (k, v, causal_bias(None, L)), past, jnp.where(held, 0.0, HIDDEN)[:, None])

    def plain(q, new, cached, bias):
        return attention.softmax_attention(q, cached.part(new, bias), new)

    for filled in ([1, 512, 0, 129], [128, 128, 400, 30], [0, 0, 0, 0], [512] * 4):
        ours = over(attend_filled, cached(past), np.array(filled))
        np.testing.assert_allclose(ours, over(plain, cached(past), np.array(filled)), rtol=1e-5, atol=2e-6)
    one_long = np.array([90, 30, 500, 128])
    ours = np.asarray(over(attend_filled, cached(past), one_long))
    # The others are read for one block.
    unread = (np.arange(T) >= 128) & (one_long <= 128)[:, None]
    spoilt = cached([np.where(unread[None, ..., None], np.nan, x) for x in past])
    np.testing.assert_array_equal(over(attend_filled, spoilt, one_long), ours)
    assert np.isnan(np.asarray(over(plain, spoilt, one_long))[[0, 1, 3]]).all()  # control


def test_attend_cached_with_an_empty_cache_is_attend():
    nothing = stored(jnp.zeros((B, 3, H, Q)), jnp.zeros((B, 3, H, Q))), jnp.full((B, 1, 3), HIDDEN)
    bias = causal_bias(None, 6)
    assert_same(*both(lambda q, k, v: attend_cached(q, (k, v, bias), *nothing), lambda *a: attend(*a, bias), inputs(6)))


@pytest.mark.parametrize("attend", [attend, attend_in_training])
def test_large_scores_stay_finite(attend):
    bias = causal_bias(jnp.asarray(segments(65)), 65)
    q, k, v = inputs(65)
    ours, _ = both(lambda *a: attend(*a, bias), lambda *a: attend(*a, bias), (q * 1e3, k * 1e3, v))
    assert all(np.isfinite(x).all() for x in ours)


@pytest.mark.parametrize("attend", [attend, attend_in_training])
def test_bfloat16_is_close_to_float32(attend):
    # Tokens after the first 128 through the cached path, all through the other.
    bias = causal_bias(jnp.asarray(segments(130)), 130)
    given = [jnp.asarray(x, jnp.bfloat16) for x in inputs(130)]

    def cached(q, k, v):
        own, past = (slice(None), slice(128, None)), (slice(None), slice(None, 128))
        return attend_cached(
            q[own], (k[own], v[own], bias[:, 128:, 128:]), stored(k[past], v[past]), bias[:, 128:, :128]
        )

    ours, ours_cached = both(lambda *a: attend(*a, bias), cached, given)
    wide = [x.astype(jnp.float32) for x in given]
    exact, exact_cached = both(lambda *a: attend(*a, bias), cached, wide)
    for a, b in zip(ours + ours_cached, exact + exact_cached, strict=True):
        assert a.dtype == jnp.bfloat16
        assert np.linalg.norm(a.astype(jnp.float32) - b) / np.linalg.norm(b) < 0.01


@pytest.mark.parametrize("later", [False, True])
def test_control_a_wrong_mask_shows(later):
    # Letting one query see one token too many, a later one or another document's, moves the result.
    visible, too_many = sees(segments(20), 20), sees(segments(20), 20)
    too_many[0, 10, 12 if later else 0] = True
    out = jax.jit(attend)(*inputs(20), causal_bias(jnp.asarray(segments(20)), 20))
    right, wrong = (jax.jit(softmax_attention)(*inputs(20), v) for v in (visible, too_many))
    assert np.abs(out - right).max() < 1e-5
    assert np.abs(out - wrong).max() > 0.01


@pytest.mark.parametrize("L", [20, 150])
def test_a_prefix_whose_tokens_see_each_other(L):
    """Beyond 64 tokens `attend` goes by blocks, whose keys end with them where no later token is seen."""
    prefix = np.array([L // 2, L - 1])
    t, p = np.arange(L)[:, None], np.arange(L)[None, :]
    visible = (p <= t) | ((p < prefix[:, None, None]) & (t < prefix[:, None, None]))
    bias = causal_bias(None, L, prefix=jnp.asarray(prefix))
    out = jax.jit(attend, static_argnums=4)(*inputs(L), bias, False)
    assert np.abs(out - softmax_attention(*inputs(L), visible)).max() < 1e-5


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_a_window_of_tokens(window):
    L, ids = 20, segments(20)
    out = jax.jit(attend)(*inputs(L), causal_bias(jnp.asarray(ids), L, window))
    assert np.abs(out - jax.jit(softmax_attention)(*inputs(L), sees(ids, L, window))).max() < 1e-5
    if window < 8:  # of the longest document
        assert np.abs(out - jax.jit(softmax_attention)(*inputs(L), sees(ids, L, window + 1))).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("width", "window"), [(96, None), (128, None), (128, 50)])
def test_the_fused_kernel_is_softmax_attention_with_its_gradients(width, window):
    """The TPU kernel interpreted on the CPU, at both head widths of the large presets, over packed documents."""
    L, heads = 256, 2
    q, k, v = (random(i, 1, L, heads, width) for i in (1, 2, 3))
    ids = jnp.asarray(segments(L)[:1], jnp.int32)
    read = random(4, 1, L, heads * width) * (np.asarray(ids) > 0)[..., None]  # nobody reads padding
    bias = causal_bias(ids, L, window)

    def fused(*x):
        return (attend_flash(*x, ids, window, interpret=True) * read).sum()

    flash = jax.value_and_grad(fused, argnums=(0, 1, 2))
    plain = jax.value_and_grad(lambda *x: (attend(*x, bias) * read).sum(), argnums=(0, 1, 2))
    found, expected = flash(q, k, v), plain(q, k, v)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    wrong = flash(q, k, np.roll(v, 1, axis=1))
    assert abs(wrong[0] - expected[0]) > 1e-2


def test_forward_mode_is_that_of_softmax_attention():
    """Along a tangent, in a length of two blocks; nothing of what the derivative reads may be missing."""
    bias, visible = causal_bias(jnp.asarray(segments(130)), 130), sees(segments(130), 130)
    given, along = inputs(130), tuple(random(seed, *x.shape) for seed, x in enumerate(inputs(130), 4))

    @jax.jit
    def tangents(given, along):
        plain = jax.jvp(lambda *a: softmax_attention(*a, visible), given, along)[1]
        return jax.jvp(lambda *a: attend(*a, bias), given, along)[1], plain

    ours, reference = tangents(given, along)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    assert np.abs(tangents(given, along[::-1])[0] - reference).max() > 0.1


# What is hidden may hold anything.


def hidden_by(attention, bias, visible, spoilt):
    """(Output with zeros in the keys and values that `visible` [B, T] hides from all, with `spoilt` in them)."""
    q, k, v = inputs(visible.shape[1])
    run = jax.jit(lambda q, k, v: attention(q, k, v, bias))
    filled = [[np.where(visible[..., None, None], x, np.float32(fill)) for x in (k, v)] for fill in (0, spoilt)]
    return [np.asarray(run(q, *kv)) for kv in filled]


def over_a_cache(attention):
    """`attention` of the last two tokens over cached ones before them."""

    def run(q, k, v, bias):
        own, past = (slice(None), slice(-2, None)), (slice(None), slice(None, -2))
        return attention(q[own], (k[own], v[own], bias[:, -2:, -2:]), (k[past], v[past], bias[:, -2:, :-2]))

    return run


SPOILT = [np.nan, np.inf, -np.inf, 3e38]


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("L", [20, 70])
def test_padding_may_hold_anything(L, spoilt):
    ids = np.where(np.arange(L) < np.array([[L - 9], [L - 1]]), 1, 0)
    bias = causal_bias(jnp.asarray(ids), L)
    clean, other = hidden_by(attend, bias, ids > 0, spoilt)
    assert np.array_equal(clean[ids > 0], other[ids > 0])
    assert np.isfinite(clean).all()


@pytest.mark.parametrize("spoilt", SPOILT)
def test_later_tokens_and_other_documents_may_hold_anything(spoilt):
    ids, at = np.repeat([[1, 2, 3], [1, 1, 2]], 5, axis=1), np.arange(15)
    bias, visible = causal_bias(jnp.asarray(ids), 15), ids != 2
    clean, other = hidden_by(attend, bias, visible, spoilt)
    assert np.array_equal(clean[visible], other[visible])
    whole, spoilt_late = hidden_by(attend, causal_bias(None, 15), np.broadcast_to(at < 12, (B, 15)), spoilt)
    assert np.array_equal(whole[:, :12], spoilt_late[:, :12])
    if not np.isfinite(spoilt):
        assert not np.isfinite(spoilt_late[:, 12:]).any()  # whoever sees it knows


@pytest.mark.parametrize("spoilt", [3e38, -3e38])
@pytest.mark.parametrize("attention", [attend_as_stored, attend_flat])
def test_an_empty_place_of_the_cache_may_hold_any_finite_number(attention, spoilt):
    visible = np.arange(20) != np.array([[3], [17]])
    bias = jnp.where(visible, 0.0, HIDDEN)[:, None] + causal_bias(None, 20)
    clean, other = hidden_by(over_a_cache(attention), bias, visible, spoilt)
    assert np.array_equal(clean, other)
    assert np.isfinite(clean).all()


def one_device():
    """Programs know of one device only by their mesh."""
    return jax.set_mesh(jax.make_mesh((1,), ("tensor",), devices=jax.devices()[:1]))


SHAPES = {
    # query, key and value heads, width of a head, tokens of a pass
    "a key and a value for each query": (4, 4, 4, 24, 1),
    "shared values, keys with a bias": (6, 6, 2, 16, 1),
    "shared keys and values, three tokens": (6, 2, 2, 16, 3),
    "more key heads than a tile has rows": (20, 20, 20, 4, 2),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("size", "beyond"), [(1536, 0), (128, 0), (128, 28)])
def test_attend_stored_reads_the_set_and_the_pages_of_each(name, size, beyond):
    heads, key_heads, value_heads, width, L = SHAPES[name]
    pages = np.array([[1], [1], [3]]) if size > 128 else np.array([[5, 0, 2], [9, 9, 9], [4, 1, 9]])
    S, rows, R, T = 3, 6, 3, pages.shape[1] * size - beyond
    q, k, v = (jnp.asarray(random(i, R, L, n, width)) for i, n in enumerate((heads, key_heads, value_heads)))
    held = [jnp.asarray(random(3 + i, S, rows, size, 128)) for i in range(2)]
    chosen = np.array([2, 0, 1])
    filled = np.array([[T], [0], [T // 2]])
    bias = jnp.where(np.arange(T) < filled, 0.0, HIDDEN)[:, None]
    new = k, v, causal_bias(None, L)
    cached = Stored(*held, jnp.array(chosen), jnp.array(pages))
    with one_device():
        assert fits_stored(q, value_heads, cached)
    ours = jax.jit(lambda *x: attend_stored(*x, interpret=True))(q, new, cached, bias)
    there = np.minimum(pages, rows - 1)  # what is beyond is hidden
    read = [
        x[chosen[:, None], there, :, : n * width].reshape(R, -1, n, width)[:, :T]
        for x, n in zip(held, (key_heads, value_heads), strict=True)
    ]
    right = attention.softmax_attention(q, (*read, bias), new)
    np.testing.assert_allclose(ours, right, atol=2e-6)
    for plain in (attend_cached, attend_copied, attend_filled):
        np.testing.assert_allclose(plain(q, new, cached, bias), right, atol=2e-6)
    # Controls: what lies in another set or page, or beyond what is filled, is not read; what is filled is.
    elsewhere = np.ones((S, rows, size, 1), bool)
    for r in range(R):
        for t in range(filled[r, 0]):
            elsewhere[chosen[r], pages[r, t // size], t % size] = False
    spoilt = Stored(*(jnp.where(elsewhere, 3e38, x) for x in held), cached.set, cached.pages)
    other = jax.jit(lambda *x: attend_stored(*x, interpret=True))(q, new, spoilt, bias)
    np.testing.assert_allclose(other, ours, rtol=1e-6, atol=1e-7)
    moved = cached._replace(pages=cached.pages.at[0, 0].set(2))
    assert np.abs(attend_stored(q, new, moved, bias, interpret=True)[0] - ours[0]).max() > 0.1


def test_what_attend_stored_does_not_serve():
    def fits(L=1, heads=4, T=256, width=128, key_heads=None, dtype="float32"):
        held = jax.ShapeDtypeStruct((1, 1, T, width), dtype)
        q = jax.ShapeDtypeStruct((1, L, heads, 8), dtype)
        return fits_stored.__wrapped__(q, key_heads or heads, Stored(held, held, jnp.int32(0)))

    assert not fits(), "a program of several devices, as far as it knows"
    with one_device():
        assert fits()
        assert fits(heads=55, width=5376, dtype="bfloat16")
        assert not fits(T=200)
        assert not fits(width=96)
        assert not fits(L=9)
        assert not fits(L=2, heads=55, width=5376)
        assert not fits(L=8, heads=64, key_heads=1)
