"""The study of keys and values in 8 bits: its losses are those of one pass, and its rounding shows."""

import jax.numpy as jnp
import numpy as np
from engine_cases import TINY, params
from experiment_scripts import script

from rdlm.config import CachePolicy
from rdlm.losses import cross_entropy
from rdlm.model import forward

STUDY = script("studies/rounded_cache")


def test_the_losses_are_those_of_one_pass():
    rows, depths = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 11)), (1, 4)
    found = {p: STUDY.losses(params(), TINY, rows, p, depths, 4) for p in STUDY.POLICIES}
    for policy, ours in found.items():
        for r, loss in zip(depths, ours, strict=True):
            logits = forward(params(), TINY, jnp.asarray(rows[:, :-1]), r, cache=policy).logits
            assert abs(loss - float(cross_entropy(logits, jnp.asarray(rows[:, 1:])).mean())) < 2e-4
    plain, rounded = found[CachePolicy()], found[CachePolicy(dtype="int8")]
    assert 1e-3 < max(abs(a - b) for a, b in zip(plain, rounded, strict=True)) < 0.5
