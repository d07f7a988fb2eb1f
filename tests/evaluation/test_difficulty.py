"""Counting by depth and by exit against one plain forward pass per depth."""

import jax
import numpy as np
import pytest

from rdlm import exits
from rdlm.config import InputError, ModelConfig
from rdlm.evaluation.difficulty import by_depth, logits_by_depth, with_exits
from rdlm.model import forward, init_params
from rdlm.tasks import IGNORED, WordProblem, batch

TASK = WordProblem("S3", 5)
CONFIG = ModelConfig(
    vocab_size=7, embed_dim=16, num_heads=2, mlp_dim=16, prelude_layers=0, core_layers=1, coda_layers=0, max_length=16,
    mean_recurrence=2, backprop_depth=1,
)  # fmt: skip
DATA = [batch(TASK, 0, i, 8) for i in range(2)]
MOST, KEY = 6, jax.random.key(3)


@pytest.fixture(scope="module")
def params():
    made = jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(1))
    return jax.tree.map(lambda x: 3 * x, made)  # large: states move for a while


@pytest.fixture(scope="module")
def logits(params):
    """[MOST, B, L, V] of the first batch."""
    return np.asarray(logits_by_depth(params, CONFIG, DATA[0]["tokens"], tuple(range(1, MOST + 1)), KEY))


def test_one_unroll_equals_a_pass_per_depth(params, logits):
    one = jax.jit(lambda r: forward(params, CONFIG, DATA[0]["tokens"], r, key=KEY).logits)
    for r in (1, 4, 6):
        np.testing.assert_allclose(one(r), logits[r - 1], atol=3e-3)  # of up to 16; rounding grows with depth
    assert np.abs(logits[3] - logits[5]).max() > 1


def test_counts_by_difficulty(params, logits):
    found = by_depth(params, CONFIG, DATA[:1], (1, 3), KEY)
    right = logits.argmax(-1)[[0, 2]] == DATA[0]["labels"][None]
    for d in range(1, 6):
        np.testing.assert_array_equal(found.right[d], right[:, :, d].sum(1))  # in a word, position is difficulty
    assert found.count.tolist() == [0, 8, 8, 8, 8, 8]
    np.testing.assert_allclose(found.accuracy(2, 3), right[:, :, 2:4].mean((1, 2)))
    twice = by_depth(params, CONFIG, DATA, (1, 3), KEY)
    assert twice.count.sum() == 80
    assert (twice.right >= found.right).all()


def test_exits_after_a_fixed_depth_are_that_depth(params):
    found = with_exits(params, CONFIG, DATA, exits.fixed(3), MOST, KEY)
    np.testing.assert_array_equal(found.right, by_depth(params, CONFIG, DATA, (3,), KEY).right)
    assert found.mean_steps() == 3


def test_sequences_stop_when_their_least_settled_answer_has_settled(params, logits):
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    previous = np.concatenate([np.full_like(log_p[:1], -np.log(7)), log_p[:-1]])
    kl = (np.exp(previous) * (previous - log_p)).sum(-1)  # [MOST, B, L]
    middle = np.sort(kl[2, :, 1:].ravel())[10:30]
    gap = np.argmax(np.diff(np.log(middle)))
    threshold = float(np.sqrt(middle[gap] * middle[gap + 1]))  # no value is near it: rounding decides nothing
    found = with_exits(params, CONFIG, DATA[:1], exits.kl(threshold), MOST, KEY, per_sequence=True)
    labels, steps, right = DATA[0]["labels"], np.zeros(6), np.zeros(6)
    for b in range(8):
        for end in range(1, 6):
            settled = [r for r in range(MOST) if kl[r, b, 1 : end + 1].max() < threshold]
            last = settled[0] if settled else MOST - 1
            steps[end] += last + 1
            right[end] += logits[last, b, end].argmax() == labels[b, end]
    np.testing.assert_array_equal(found.steps, steps)
    np.testing.assert_array_equal(found.right[:, 0], right)
    assert len(set(steps[1:])) > 1
    assert (np.diff(steps) >= 0).all()  # a longer sequence never stops earlier


def test_refusals(params):
    nothing = {"tokens": DATA[0]["tokens"], "labels": np.full((8, 6), IGNORED), "difficulty": np.zeros((8, 6), int)}
    with pytest.raises(InputError, match="no answer to score"):
        by_depth(params, CONFIG, [nothing], (1, 3), KEY)
    with pytest.raises(InputError, match="latent_diff"):
        with_exits(params, CONFIG, DATA, exits.latent_diff(), MOST, per_sequence=True)
    with pytest.raises(InputError, match="depths"):
        by_depth(params, CONFIG, DATA, (3, 1), KEY)
