"""The cache's own arithmetic: writes land where they should, wide columns and the TPU's attention change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random_params

from rdlm import exits
from rdlm.config import CachePolicy, ModelConfig
from rdlm.decode import generate
from rdlm.model.attention import HIDDEN, softmax_attention
from rdlm.model.cache import stored_width, write
from rdlm.model.kernels import after, attend_flat, updated_in_place

S, B, T, F, W = 3, 2, 4, 2, 5


@settings(max_examples=20)
@given(
    rows=st.lists(st.tuples(st.integers(0, B), st.integers(0, T)), min_size=W, max_size=W, unique=True),
    sets=st.lists(st.integers(0, S - 1), min_size=W, max_size=W),
)
def test_write_is_assignment_to_places_inside(rows, sets):
    row, position = jnp.array(rows).T
    for every in (False, True):
        target = np.arange(S * B * T * F, dtype=np.float32).reshape(S, B, T, F)
        new = -1 - np.arange((S if every else 1) * W * F, dtype=np.float32).reshape(-1, W, F)
        found = write(jnp.asarray(target), jnp.asarray(new if every else new[0]), row, position,
                      None if every else jnp.asarray(sets))  # fmt: skip
        for w in range(W):
            if row[w] < B and position[w] < T:
                where = slice(None) if every else sets[w]
                target[where, row[w], position[w]] = new[:, w] if every else new[0, w]
        np.testing.assert_array_equal(found, target)


@pytest.mark.parametrize(("H", "K", "V", "L"), [(4, 4, 2, 1), (4, 2, 2, 3), (6, 6, 1, 2), (3, 3, 3, 1)])
def test_attention_over_a_flat_cache_is_attention(H, K, V, L):
    keys = jax.random.split(jax.random.key(0), 5)
    B, T, Q = 3, 10, 8
    q, k, v, past_k, past_v = (
        jax.random.normal(key, (B, n, heads, Q))
        for key, n, heads in zip(keys, (L, L, L, T, T), (H, K, V, K, V), strict=True)
    )
    own = k, v, jnp.where(jnp.tril(jnp.ones((L, L), bool)), 0.0, HIDDEN)[None]
    seen = jnp.arange(T)[None, None] < jnp.array([3, 0, 7])[:, None, None]
    past = past_k, past_v, jnp.where(seen, 0.0, HIDDEN)
    right = softmax_attention(q, own, past)
    np.testing.assert_allclose(attend_flat(q, own, past), right, atol=1e-6)
    later = past_k, past_v, jnp.where(jnp.roll(seen, 1, axis=-1), 0.0, HIDDEN)
    assert np.abs(attend_flat(q, own, later) - right).max() > 1e-3, "what is seen must matter"


def test_columns_that_fill_tiles():
    assert [stored_width(w) for w in (1, 511, 512, 672, 1056, 5280, 5376)] == [1, 511, 512, 768, 1152, 5376, 5376]


def test_a_wider_cache_changes_nothing(monkeypatch):
    config = ModelConfig(
        vocab_size=48, embed_dim=16, num_heads=4, num_kv_heads=2, mlp_dim=24, prelude_layers=1, core_layers=2,
        coda_layers=1, max_length=32,
    )  # fmt: skip
    params, prompts = random_params(config), [[1, 2, 3, 4, 5], [7], [9, 8]]

    def tokens(**options):
        out = generate(params, config, prompts,
                       max_new_tokens=6, num_steps=8, **options)  # fmt: skip
        return [*out.tokens, *out.steps]

    cases = [{"exit_rule": exits.kl(0.01), "cache": CachePolicy(3)}, {"exit_rule": exits.latent_diff(0.2)}]
    plain = [tokens(**case) for case in cases]
    monkeypatch.setattr("rdlm.model.cache.stored_width", lambda width: width + 3)
    jax.clear_caches()
    for case, expected in zip(cases, plain, strict=True):
        for found, right in zip(tokens(**case), expected, strict=True):
            np.testing.assert_array_equal(found, right)
    jax.clear_caches()


def test_workarounds_change_no_values():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(jax.jit(updated_in_place)(x), x)
    mask = jnp.array([True, False])
    np.testing.assert_array_equal(jax.jit(after)(x, mask), mask)
