"""Exit rules that only studies use: confidence, and learnt rules that read a head {"w": f32 [D], "bias": f32}."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32

from rdlm import exits
from rdlm.exits import ExitRule, Observation, Reached, Threshold

Head = dict[str, Array]
"""{"w": f32 [D], "bias": f32 scalar}, as `experiments.studies.shared.halting` learns them."""


class Margin(Reached):
    """Confidence: the most likely token is more probable than the next one by `threshold` or more (CALM)."""

    threshold: Threshold = 0.9
    kind = "margin"
    needs_logits = True

    def init(self, s0: Array, vocab: int) -> tuple[()]:
        """Nothing to remember."""
        return ()

    def update(self, previous: tuple[()], seen: Observation) -> tuple[tuple[()], Array]:
        """The difference of the two largest probabilities."""
        best = jax.lax.top_k(jax.nn.softmax(exits.read_logits(seen)), 2)[0]
        return (), best[..., 0] - best[..., 1]


class Learnt(Reached):
    """A rule that reads a head. Its `weights` are those learnt or, after `by_row`, one set per row."""

    weights: Head
    threshold: Threshold = 0.5

    def thresholds(self) -> list[Threshold]:
        """All but the weights."""
        return [self.threshold]

    def by_row(self, rows: int) -> ExitRule:
        """Weights [rows, ...] too: every row has its own."""
        weights = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *jnp.shape(x))), self.weights)
        return dataclasses.replace(self, weights=weights, threshold=exits.spread(self.threshold, rows))


class Classifier(Learnt):
    """sigmoid(w . s + bias) reaches `threshold`; costs 2 D FLOPs a check."""

    kind = "classifier"

    def init(self, s0: Array, vocab: int) -> tuple[()]:
        """Nothing to remember."""
        return ()

    def update(self, previous: tuple[()], seen: Observation) -> tuple[tuple[()], Array]:
        """The probability that the token may stop."""
        return (), jax.nn.sigmoid(unit(self.weights, seen.state))


class Halting(Learnt):
    """The probability of having halted by now reaches `threshold` (PonderNet, Banino et al., 2021).

    A check halts with probability sigmoid(w . s + bias).
    """

    kind = "halting"

    def init(self, s0: Array, vocab: int) -> Array:
        """Log of the probability of still running."""
        return jnp.zeros(s0.shape[:-1], jnp.float32)

    def update(self, running: Array, seen: Observation) -> tuple[Array, Array]:
        """That log, and the probability of having halted."""
        running = running - jax.nn.softplus(unit(self.weights, seen.state))  # log(1 - sigmoid(x)) = -softplus(x)
        return running, -jnp.expm1(running)


def unit(weights: Head, state: Float[Array, "*tokens D"]) -> Float32[Array, "*tokens"]:
    """w . s + bias of states [..., B, L, D]; weights as they were learnt, or one set per row."""
    w, bias = (jnp.asarray(weights[name], jnp.float32) for name in ("w", "bias"))
    by_row = w.ndim == 2
    w, bias = (w[:, None], bias[:, None]) if by_row else (jnp.expand_dims(w, range(state.ndim - 1)), bias)
    return jnp.sum(state.astype(jnp.float32) * w, axis=-1) + bias


margin = Margin
classifier = Classifier
halting = Halting
