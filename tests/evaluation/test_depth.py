"""One unroll equals separate evaluations, exits are scored on the same labels, and every row says what it costs."""

import jax
import numpy as np
import pytest

import rdlm
from rdlm import exits
from rdlm.config import PRESETS, InputError, ModelConfig
from rdlm.evaluation.depth import depth_curve, exit_score
from rdlm.perf import flops
from rdlm.perf.flops import cost, sweep_flops
from rdlm.report import on_front

DEPTHS = (1, 2, 4, 8)
CONFIG = ModelConfig(
    vocab_size=23, embed_dim=16, num_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1, coda_layers=1, max_length=32,
    mean_recurrence=4, backprop_depth=2,
)  # fmt: skip
BYTES = np.arange(23) % 4 + 1


def batch(seed):
    """Two rows; the last quarter of the second is padding, and some labels are not scored."""
    tokens = np.random.default_rng(seed).integers(0, 23, (2, 17)).astype(np.int32)
    segments = np.ones((2, 16), np.int32)
    segments[1, 12:] = 0
    labels = np.where(np.random.default_rng(seed + 9).random((2, 16)) < 0.2, -100, tokens[:, 1:])
    return {"tokens": tokens[:, :-1], "labels": labels.astype(np.int32), "segment_ids": segments}


BATCHES = [batch(0), batch(1)]


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: jax.tree.map(lambda x: 2 * x, rdlm.init_params(CONFIG, key)))(jax.random.key(1))


@pytest.fixture(scope="module")
def separate(params):
    """{r: (sum of nats, right answers, scored labels)} from one call of `forward` per depth."""
    run = jax.jit(
        lambda b, r: jax.nn.log_softmax(
            rdlm.forward(params, CONFIG, b["tokens"], r, segment_ids=b["segment_ids"]).logits
        )
    )
    out = {}
    for r in range(1, 9):
        nats = right = count = 0
        for b in BATCHES:
            follows = np.concatenate([b["segment_ids"][:, 1:] == b["segment_ids"][:, :-1], np.ones((2, 1), bool)], 1)
            scored = (b["labels"] >= 0) & (b["segment_ids"] > 0) & follows
            p = np.asarray(run(b, r), np.float64)
            nats += -p[scored, b["labels"][scored]].sum()
            right += (p.argmax(-1) == b["labels"])[scored].sum()
            count += scored.sum()
        out[r] = nats, right, count
    return out


def test_one_unroll_gives_what_separate_evaluations_give(params, separate):
    found = depth_curve(params, CONFIG, BATCHES, DEPTHS, BYTES)
    for r, nats, accuracy in zip(DEPTHS, found.nats, found.accuracy, strict=True):
        total, right, count = separate[r]
        assert nats == pytest.approx(total / count, abs=1e-5)
        assert accuracy == right / count
        assert found.tokens == count
    for r, other in ((1, 2), (2, 3), (4, 3)):  # an off-by-one would show
        assert abs(separate[r][0] - separate[other][0]) / count > 1e-4


def test_depth_zero_is_refused(params):
    for depths in ((0, 1), (), (2, 1)):
        with pytest.raises(InputError, match="increasing recurrences, each at least 1"):
            depth_curve(params, CONFIG, BATCHES, depths, BYTES)
    with pytest.raises(InputError, match="max_steps = 0"):
        exit_score(params, CONFIG, BATCHES, exits.kl(), 0, BYTES)


def test_exits_are_scored_as_fixed_depths_are(params, separate):
    def score(rule, most=8):
        return exit_score(params, CONFIG, BATCHES, rule, most, BYTES)

    for r in (1, 3):
        found = score(exits.fixed(r))
        assert found.nats == pytest.approx(separate[r][0] / separate[r][2], abs=1e-5)
        assert (found.recurrences, found.max_steps, found.checks) == (
            r,
            r,
            0,
        )  # padding does not run, nor does it count
        assert found.tokens == separate[r][2]
    assert score(exits.fixed(9), 4).nats == pytest.approx(separate[4][0] / separate[4][2], abs=1e-5)
    never, always = score(exits.kl(0.0)), score(exits.kl(1e9))
    assert (never.recurrences, never.checks, always.recurrences, always.checks) == (8, 8, 1, 1)
    some = score(exits.kl(1e-2))
    assert 1 < some.recurrences == some.checks < 8
    tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in BATCHES]).size
    run = jax.jit(lambda b: rdlm.forward(params, CONFIG, b["tokens"], 8, segment_ids=b["segment_ids"], exit_rule=rule))
    rule = exits.kl(1e-2)
    assert some.recurrences == pytest.approx(sum(run(b).steps.sum() for b in BATCHES) / tokens)


def test_the_cost_of_a_token_is_counted_as_the_paper_counts_it():
    config = PRESETS["huginn_3p5b"].model
    plain = cost(config, 32, 4096)
    assert plain.flops_per_token == flops.forward_flops(config, 32, 4096)
    assert plain.equivalent_parameters == pytest.approx(3.565e9 + 31 * 1.5816e9, rel=1e-4)
    half = cost(config, 8.5, 4096, checks=8.5)
    assert half.equivalent_parameters == pytest.approx(3.565e9 + 7.5 * 1.5816e9, rel=1e-4)
    looks = 8.5 * flops.check_flops(config, 4096)
    assert half.flops_per_token == pytest.approx(flops.forward_flops(config, 8.5, 4096) + looks)
    # A whole curve to r = 64 costs 6 % more than its deepest point at 3.5B.
    over = sweep_flops(config, (1, 2, 4, 8, 16, 32, 64), 4096) / flops.forward_flops(config, 64, 4096)
    assert over == pytest.approx(1.06, abs=0.005)


def test_points_that_others_beat_are_not_on_the_front():
    assert on_front([1, 2, 2, 3, 3], [1, 2, 3, 5, 4]) == [True, True, False, False, True]
    assert on_front([1, 1], [2, 2]) == [True, True]
