"""The loss of a training step: in parts, it is the loss in one piece."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rdlm import losses
from rdlm.config import preset
from rdlm.losses import head_losses
from rdlm.model import init_params


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
