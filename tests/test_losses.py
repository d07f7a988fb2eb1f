"""The loss of a training step: in parts, it is the loss in one piece."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdlm
from rdlm import losses
from rdlm.analysis import contraction
from rdlm.config import InputError, LossConfig, preset
from rdlm.losses import head_losses
from rdlm.model import blocks, context, core_step, embed, head, init_params, inject, readout
from rdlm.model.kernels import attend_flash
from rdlm.recurrence import initial_state, spectral_radius, trajectory


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_likeliest_token_of_logits_that_are_not_finite(bad):
    """One NaN is enough, and a logit of -inf is none: padding may have it."""
    logits = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    logits[3, 5], logits[:, 127] = bad, -np.inf
    expected = logits.argmax(-1)
    expected[3] = -1
    np.testing.assert_array_equal(losses.likeliest(jnp.asarray(logits)), expected)


def test_loss_in_parts_never_holds_all_logits(monkeypatch):
    """Losses and gradients do not depend on how many logits are held at once; the largest array does."""
    config = dataclasses.replace(preset("nano").model, vocab_size=611)
    whole = init_params(config, jax.random.key(0))
    y = jax.random.normal(jax.random.key(1), (3, 50, config.embed_dim))
    labels = jax.random.randint(jax.random.key(2), (3, 50), -1, 611)
    labels = jnp.where(labels < 0, -100, labels)

    def total(params, y):
        return jnp.sin(head_losses(params, config, y, labels)).sum()

    runs = []
    for most in (10**9, 40_000, 7 * 611):
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", most)
        program = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
        sizes = [int(np.prod(x.aval.shape)) for eqn in jaxpr_of(total, whole, y) for x in eqn.outvars]
        runs.append((jax.tree.leaves(program(whole, y)), max(sizes)))
    for found, largest in runs[1:]:
        for ours, theirs in zip(found, runs[0][0], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        assert largest <= 40_000
    assert runs[0][1] >= 150 * 611, "control: in one piece they are all there"


@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.1), (1e-2, 0.0), (1e-2, 0.3)])
def test_z_loss_and_label_smoothing_are_their_formulas(z_loss, smoothing, monkeypatch):
    config = dataclasses.replace(preset("nano").model, vocab_size=11, padded_vocab_size=13)
    params = init_params(config, jax.random.key(0))
    y = 3 * jax.random.normal(jax.random.key(1), (2, 5, config.embed_dim))
    labels = np.array([[1, 2, -100, 4, 0], [10, -100, 3, 3, 5]])
    logits = np.asarray(head(params, config, y), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    q = np.zeros_like(logits)
    np.put_along_axis(q, np.maximum(labels, 0)[..., None], 1 - smoothing, -1)
    q[..., :11] += smoothing / 11  # not over padding rows
    expected = np.where(labels == -100, 0, -(q * log_p).sum(-1) + z_loss * log_z**2)
    terms = LossConfig(z_loss, smoothing)
    for most in (10**9, 40):  # in one piece and in parts
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", most)
        np.testing.assert_allclose(head_losses(params, config, y, jnp.asarray(labels), terms), expected, rtol=2e-5)


def test_they_change_nothing_when_they_are_off():
    config = preset("nano").model
    params, rows = init_params(config, jax.random.key(0)), np.arange(14).reshape(2, 7)

    def text(**options):
        return str(jax.make_jaxpr(lambda p: rdlm.loss(p, config, rows, steps=(1, 1), **options))(params))

    assert text() == text(terms=LossConfig()) != text(terms=LossConfig(z_loss=1e-4))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"z_loss": -1.0}, "loss.z_loss = -1.0: must not be negative"),
        ({"z_loss": math.nan}, "loss.z_loss = nan"),
        ({"label_smoothing": 1.0}, r"loss.label_smoothing = 1.0: must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, "loss.label_smoothing = -0.1"),
        ({"label_smoothing": math.nan}, "loss.label_smoothing = nan"),
        ({"depths": (2, 1)}, "must be increasing recurrences"),
        ({"depths": (0, 1)}, "must be increasing recurrences"),
        ({"depths": (1, 2), "depth_weights": (1.0,)}, "a positive number for each of loss.depths"),
        ({"depth_weights": (1.0,)}, "must be empty, or"),
        ({"depths": (1, 2), "depth_weights": (1.0, 0.0)}, "a positive number"),
        ({"depths": (1,), "teacher": "first"}, "needs two loss.depths"),
        ({"depths": (1, 2), "teacher": "first", "teacher_share": 0.0}, "must be in"),
        ({"temperature": 0.0}, "loss.temperature = 0.0: must be positive"),
        ({"teacher": "start", "teacher_depth": 0}, "loss.teacher_depth = 0"),
        ({"teacher": "start", "gate": "exit"}, "must be 'none' with loss.gate"),
        ({"stability": 1.0}, r"loss.stability = 1.0: must be in \[0, 1\)"),
        ({"depths": (1, 2), "gate": "exit"}, "must be empty with loss.gate"),
    ],
)
def test_impossible_terms_are_refused(values, says):
    with pytest.raises(InputError, match=says):
        LossConfig(**values)


# Several depths of one unroll

NANO = dataclasses.replace(preset("nano").model, mean_recurrence=3, backprop_depth=3)
ROWS = np.random.default_rng(0).integers(0, NANO.vocab_size, (2, 9))


def objective(params, terms, hold=jax.lax.stop_gradient):
    """The loss of `terms`, written out: one recurrence after the other, with softmaxes of all logits."""
    tokens, labels = jnp.asarray(ROWS[:, :-1]), jnp.asarray(ROWS[:, 1:])
    positions = jnp.arange(tokens.shape[1])
    ctx = context(NANO, positions, None)
    injected = inject(params, NANO, embed(params, NANO, tokens, ctx)[0])
    s = jnp.broadcast_to(initial_state(jax.random.key(0), positions, NANO.embed_dim), (*tokens.shape, NANO.embed_dim))
    logits = {}
    for r in range(1, 4):
        s, _ = core_step(params, NANO, s, injected, ctx)
        logits[r] = readout(params, NANO, s, ctx)[0]
    at = {"none": None, "first": terms.depths[0], "deepest": terms.depths[-1]}[terms.teacher]
    weights, T = terms.depth_weights or [1] * len(terms.depths), terms.temperature
    total = 0.0
    for r, weight in zip(terms.depths, weights, strict=True):
        value = -jnp.take_along_axis(jax.nn.log_softmax(logits[r]), labels[..., None], -1).mean()
        if at not in (None, r):
            p, q = jax.nn.softmax(hold(logits[at]) / T), jax.nn.softmax(logits[r] / T)
            value = (1 - terms.teacher_share) * value + terms.teacher_share * T**2 * (p * jnp.log(p / q)).sum(-1).mean()
        total = total + weight * value
    return total / sum(weights)


SEVERAL = {
    "equal": LossConfig(depths=(1, 3)),
    "weighted": LossConfig(depths=(1, 2, 3), depth_weights=(0.1, 0.3, 2.0)),
    "by the deepest": LossConfig(depths=(1, 2, 3), teacher="deepest", teacher_share=0.75, temperature=2.0),
    "by the first": LossConfig(depths=(1, 3), teacher="first", teacher_share=1.0),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_the_loss_at_several_depths(name):
    """Values and gradients are those of the formula; a teacher that learns is noticed."""
    terms, params = SEVERAL[name], init_params(NANO, jax.random.key(3))

    def ours(params):
        return rdlm.loss(params, NANO, ROWS, steps=(0, 3), terms=terms)

    value, grads = jax.jit(jax.value_and_grad(ours))(params)
    expected, wanted = jax.jit(jax.value_and_grad(functools.partial(objective, terms=terms)))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert apart(grads, wanted) < 1e-5
    if terms.teacher != "none":
        learning = jax.jit(jax.grad(functools.partial(objective, terms=terms, hold=lambda x: x)))(params)
        assert apart(learning, wanted) > 1e-3


def apart(found, wanted):
    gap = jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True)))
    return float(gap / jnp.sqrt(sum(jnp.sum(b**2) for b in jax.tree.leaves(wanted))))


@pytest.mark.parametrize("depths", [(), (2, 3)])
def test_the_weights_of_the_start_teach_every_depth(depths):
    params, start = (init_params(NANO, jax.random.key(i)) for i in (3, 4))
    terms = LossConfig(depths=depths, teacher="start", teacher_depth=2, teacher_share=0.75, temperature=2.0)

    def logits(params, depths):
        bound = rdlm.bind(params, NANO, ROWS[:, :-1], key=jax.random.key(0))
        return [np.asarray(bound.read(s)[0], np.float64) for s in trajectory(bound.step, bound.s0, 3)[np.array(depths)]]

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    (guide,), expected = logits(start, [2]), []
    log_p = log_softmax(guide / 2)
    for student in logits(params, depths or [3]):
        nll = -np.take_along_axis(log_softmax(student), ROWS[:, 1:, None], -1).mean()
        kl = (np.exp(log_p) * (log_p - log_softmax(student / 2))).sum(-1).mean()
        expected.append(0.25 * nll + 0.75 * 4 * kl)
    value, grads = jax.jit(jax.value_and_grad(lambda params: rdlm.loss(params, NANO, ROWS, steps=(0, 3), terms=terms)))(
        params | {"teacher": start}
    )
    assert float(value) == pytest.approx(np.mean(expected), rel=1e-4)
    assert not any(np.any(g) for g in jax.tree.leaves(grads.pop("teacher"))), "the teacher stays as it is"
    assert all(np.any(g) for g in jax.tree.leaves(grads))
    with pytest.raises(InputError, match=r"needs params\['teacher'\]"):
        rdlm.loss(params, NANO, ROWS, steps=(0, 3), terms=terms)


def test_what_several_depths_need():
    params = init_params(NANO, jax.random.key(3))
    for steps in ((1, 2), (0, 2)):
        with pytest.raises(InputError, match="all with gradient"):
            rdlm.loss(params, NANO, ROWS, steps=steps, terms=LossConfig(depths=(1, 3)))
    nano = preset("nano")
    fixed = dataclasses.replace(nano.recurrence, scheme="fixed")
    with pytest.raises(InputError, match=r"loss\.depths = \(1, 3\): needs recurrence.scheme = 'fixed'"):
        dataclasses.replace(nano, model=NANO, loss=LossConfig(depths=(1, 3)))
    with pytest.raises(InputError, match=r"must end with model\.mean_recurrence = 3"):
        dataclasses.replace(nano, model=NANO, recurrence=fixed, loss=LossConfig(depths=(1, 2)))
    deeper = dataclasses.replace(fixed, least=4)
    with pytest.raises(InputError, match=r"no larger recurrence\.least"):
        dataclasses.replace(nano, model=NANO, recurrence=deeper, loss=LossConfig(depths=(1, 3)))
    dataclasses.replace(nano, model=NANO, recurrence=fixed, loss=LossConfig(depths=(1, 3)))


# Stability


def test_the_penalty_is_the_radius_and_reaches_core_and_adapter_alone():
    params = init_params(NANO, jax.random.key(3))
    off, on = LossConfig(), LossConfig(stability=0.25)

    @functools.partial(jax.jit, static_argnums=1)
    def at(params, terms):
        return jax.value_and_grad(lambda p: rdlm.loss(p, NANO, ROWS, steps=(0, 3), terms=terms))(params)

    (value, grads), (without, plain) = at(params, on), at(params, off)
    bound = rdlm.bind(params, NANO, ROWS[:, :-1], key=jax.random.key(0))
    s = trajectory(bound.step, bound.s0, 3)[-1]
    radius = spectral_radius(lambda s: bound.step(s, 0), s, losses.RADIUS_ROUNDS)
    assert float(value) == pytest.approx(0.75 * float(without) + 0.25 * float(radius.mean()), rel=1e-4)
    for name in params:
        gap = apart(grads[name], jax.tree.map(lambda g: 0.75 * g, plain[name]))
        assert (gap > 1e-3) if name.startswith(("core", "adapter")) else (gap < 1e-5), name


def test_training_with_the_penalty_contracts():
    """Of two runs of a few steps the one with the penalty ends with the smaller radius."""

    def trained(terms):
        params, step = (
            init_params(NANO, jax.random.key(3)),
            jax.jit(
                lambda p: jax.tree.map(
                    lambda w, g: w - 0.05 * g, p, jax.grad(rdlm.loss)(p, NANO, ROWS, steps=(0, 3), terms=terms)
                )
            ),
        )
        for _ in range(10):
            params = step(params)
        bound = rdlm.bind(params, NANO, ROWS[:1, :-1], key=jax.random.key(0))
        s = trajectory(bound.step, bound.s0, 3)[-1]
        return contraction(params, NANO, ROWS[:1, :-1], s, rounds=8, basis=8).radius[0]

    assert trained(LossConfig(stability=0.5)) < 0.95 * trained(LossConfig())


def jaxpr_of(f, *args):
    """All equations of the gradient of f, those of inner programs too."""
    todo, found = [jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(*args).jaxpr], []
    while todo:
        for eqn in todo.pop().eqns:
            found.append(eqn)
            for value in eqn.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        todo.append(inner)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["in blocks", "fused"])
@pytest.mark.parametrize("tables", [(), (0,)])
def test_what_stands_at_padding_reaches_no_loss_and_no_gradient(kernel, tables, monkeypatch):
    """NaN in the embedding of the padding token and in the state there: losses and gradients are as without."""
    sizes = {"vocab_size": 12, "embed_dim": 64, "num_heads": 1, "tie_embeddings": False}
    config = dataclasses.replace(preset("nano").model, **sizes, value_tables=tables)
    if kernel == "fused":  # on TPUs; interpreted
        monkeypatch.setattr(losses, "context", functools.partial(context, flash=True))
        monkeypatch.setattr(blocks, "attend_flash", functools.partial(attend_flash, interpret=True))
    clean = init_params(config, jax.random.key(0))
    L = 128
    tokens = jax.random.randint(jax.random.key(1), (1, L), 0, 11).at[0, 90:].set(11)
    segments = jnp.where(jnp.arange(L) < 40, 1, jnp.where(jnp.arange(L) < 90, 2, 0))[None]
    batch = {"tokens": tokens, "labels": jnp.roll(tokens, -1, axis=1), "segment_ids": segments}
    state = jax.random.normal(jax.random.key(2), (1, L, config.embed_dim))

    @jax.jit
    def both(params, state, batch):
        return jax.value_and_grad(lambda p, s: rdlm.loss(p, config, batch, steps=(1, 2), state=s), (0, 1))(
            params, state
        )

    def broken(where):
        """NaN for token 11, and in the state from `where` on."""
        params = {**clean, "wte": clean["wte"].at[11].set(jnp.nan)}
        for name in [f"values_prelude_{i}" for i in tables]:
            params[name] = {**clean[name], "table": clean[name]["table"].at[11].set(jnp.nan)}
        return both(params, state.at[0, where:].set(jnp.nan), batch)

    expected = both(clean, state, batch)
    found = broken(90)
    assert math.isfinite(expected[0])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert math.isnan(broken(80)[0])  # control: where something is scored, it shows
