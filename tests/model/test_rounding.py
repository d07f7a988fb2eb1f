"""Keys and values in 8 bits: what a row holds, and attention that reads rows without widening the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rdlm.model import attention
from rdlm.model.attention import HIDDEN, causal_bias
from rdlm.model.kernels import Stored, attend, attend_copied, attend_filled, attend_flat, fits_stored
from rdlm.model.rounding import from_row, to_row

H, K, Q = 4, 2, 16


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def widened(x):
    return x.values.astype(jnp.float32) * x.scale


@pytest.mark.usefixtures("full_compile")  # which may leave out a cast and back
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_holds_vectors_to_half_a_step(dtype):
    x = jnp.asarray(random(0, 3, 5, K, Q) * 10.0 ** np.arange(-15, 15, 2).reshape(3, 5, 1, 1), dtype)
    row = jax.jit(to_row)(x)
    held = from_row(jnp.pad(row, [(0, 0), (0, 0), (0, 7)]), K, Q, jnp.float32)
    assert (row.dtype, row.shape) == (jnp.int8, (3, 5, K * (Q + 2)))
    step = np.abs(np.asarray(x, np.float32)).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(held.scale, step, rtol=2**-8)
    assert (np.abs(widened(held) - x) <= held.scale * 0.5001).all()
    assert (np.abs(widened(held) - x) > step * 0.4).any()  # control: it is rounded
    assert not np.any(widened(from_row(to_row(jnp.zeros_like(x)), K, Q, jnp.float32)))


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_has_no_scale(broken):
    x = random(0, 2, K, Q)
    x[1, 0, 3] = broken
    found = from_row(to_row(jnp.asarray(x)), K, Q, jnp.float32)
    assert np.isnan(found.scale[..., 0]).tolist() == [[False, False], [True, False]]


def case(L, R=3, S=2, T=256, size=32):
    """(Queries, new keys and values of L tokens, a cache in pages, bias, filled) of R rows."""
    q, k, v = (jnp.asarray(random(i, R, L, n, Q)) for i, n in enumerate((H, K, K)))
    new = *(from_row(to_row(x), K, Q, jnp.float32) for x in (k, v)), causal_bias(None, L)
    past = [to_row(jnp.asarray(random(3 + i, S, R * T // size, size, K, Q))) for i in range(2)]
    pages = jnp.asarray(np.random.default_rng(0).permutation(R * T // size).reshape(R, -1))
    filled = np.array([T, 5, 130])[:R]
    bias = jnp.where(np.arange(T)[None] < filled[:, None], 0.0, HIDDEN)[:, None]
    return q, new, Stored(*past, jnp.array([1, 0, 1])[:R], pages), bias


def by_hand(q, new, cached, bias):
    """Attention over widened keys and values."""
    parts = new, cached.part(new, bias)
    return attention.softmax_attention(q, *((widened(k), widened(v), seen) for k, v, seen in parts))


@pytest.mark.parametrize("L", [1, 5])
def test_attention_over_rows_is_attention_over_what_they_hold(L):
    given = case(L)
    assert not fits_stored(given[0], K, given[2]), "the TPU kernel reads floats"
    right = by_hand(*given)
    for attend_cached in (attend_filled, attend_copied):
        np.testing.assert_allclose(jax.jit(attend_cached)(*given), right, rtol=1e-5, atol=2e-6)
    q, new, cached, bias = given
    np.testing.assert_allclose(attend_flat(q, cached.part(new, bias), new), right, rtol=1e-5, atol=2e-6)
    floats = widened(new[0]), widened(new[1]), new[2]
    np.testing.assert_allclose(attend(q, *new), attend(q, *floats), rtol=1e-5, atol=2e-6)
    # Control: a scale belongs to one position and one head.
    for one in (to_row(jnp.ones((1, 1, 1, K, Q))), cached.v[:, :, ::-1]):
        moved = jnp.concatenate([cached.v[..., : K * Q], jnp.broadcast_to(one, cached.v.shape)[..., K * Q :]], -1)
        assert np.abs(attend_filled(q, new, cached._replace(v=moved), bias) - right).max() > 1e-2


def test_a_hidden_row_may_hold_anything():
    q, new, cached, bias = case(5)
    broken = to_row(jnp.full((1, 1, K, Q), jnp.nan))
    page, size = np.asarray(cached.pages)[1, 0], cached.k.shape[2]
    spoilt = cached._replace(k=cached.k.at[:, page, 5:].set(broken), v=cached.v.at[:, page, 5:].set(broken))
    assert size > 5
    np.testing.assert_array_equal(attend_filled(q, new, spoilt, bias), attend_filled(q, new, cached, bias))
