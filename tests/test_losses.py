"""The loss of a training step: in parts, it is the loss in one piece."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdlm
from rdlm import losses
from rdlm.config import InputError, LossConfig, preset
from rdlm.losses import head_losses
from rdlm.model import head, init_params


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
    ],
)
def test_impossible_terms_are_refused(values, says):
    with pytest.raises(InputError, match=says):
        LossConfig(**values)


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
