"""Vitals of a recurrent-depth model: does every token keep a state of its own, does depth help, does it settle?

The paper (arXiv 2502.05171) lost two large runs before the third: in the first, the states of all tokens became one
(token correlation 1); in the second the model learnt to ignore its state, and was as good at r = 1 as at the mean r.
Both losses kept falling for a while. `vitals` are the numbers that would have revealed it, `alarms` the limits.

    vital_token_correlation   mean cosine similarity of the states of two tokens of a row, at the mean r
    vital_state_rms_r1        root mean square of the state after 1 recurrence
    vital_state_rms           ... after the mean r
    vital_state_drift         the latter over that after half of the mean r: 1 if its size is independent of r
    vital_residual            |s_r - s_{r-1}| / |s_{r-1}| at the mean r: how much the last recurrence still changes
    vital_contraction         the latter over the same after half of the mean r: below 1 where iterating settles
    vital_loss_r1, vital_loss loss after 1 recurrence and after the mean r
    vital_gain                the share of it that depth saves: (loss_r1 - loss) / loss_r1
    vital_adapter_state       the map of the state in the injection: Frobenius norm over sqrt(D), 1 for the identity
    vital_adapter_input       the map of the embedded input
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Float32

from rdlm.config import ModelConfig
from rdlm.losses import IGNORED, as_batch, bind_batch, head_losses
from rdlm.model import Params, coda
from rdlm.model.network import ADAPTER, diagonal
from rdlm.tune import merge

COLLAPSED = 0.9
"""Token correlation: 0.02 to 0.64 in healthy runs, above 0.98 in collapsed ones."""
WORTHLESS = 0.005
"""Gain: 0.06 and more in runs that learnt, at most 0.003 in those that ignored their state."""
DRIFTING = 1.25
"""Drift, or one over it: 0.99 to 1.01 in healthy runs, 2.0 where every recurrence adds to the state."""
UNSETTLED, SMALL = 0.8, 0.05
"""Contraction: 0.01 to 0.54 in healthy runs, 0.85 and more in orbits; none counts whose residual is below SMALL."""


class Course(NamedTuple):
    """What an unroll to the mean r passes through, f32.

    correlation, rms, residual: [r], after each recurrence, as above. losses: [2], after the first and the last.
    adapter: [2], Frobenius norms over sqrt(D) of what maps the state and the embedded input.
    """

    correlation: Array
    rms: Array
    residual: Array
    losses: Array
    adapter: Array


@functools.partial(jax.jit, static_argnames="config")
def course(params: Params, config: ModelConfig, batch: Any, key: Array) -> Course:
    """The course of one unroll to config.mean_recurrence; holds two states at a time, for any r.

    Args:
      params, config: the model.
      batch: as for `rdlm.loss`. Padding (segment 0) takes no part.
      key: of the initial states.
    """
    labelled = as_batch(batch)
    bound = bind_batch(params, config, labelled, key)
    s = bound.s0
    here = jnp.ones(labelled.tokens.shape, bool) if labelled.segment_ids is None else labelled.segment_ids != 0

    def body(carry: tuple[Array, Array], i: Array) -> Any:
        s, first = carry
        new = bound.step(s, i)
        seen = token_correlation(new, here), _rms(new, here), _rms(new - s, here) / _rms(s, here)
        return (new, jnp.where(i == 0, new, first)), seen

    def loss(s: Array) -> Array:
        (y, _), _ = coda(params, config, s, bound.text.context)
        return head_losses(params, config, y, labelled.labels).sum()

    (last, first), (correlation, rms, residual) = lax.scan(body, (s, s), jnp.arange(config.mean_recurrence))
    scored = jnp.maximum((labelled.labels != IGNORED).sum(), 1)
    halves = jnp.stack([jnp.square(x.astype(jnp.float32)).sum() for x in _maps(params, config)]) / config.embed_dim
    losses = lax.map(loss, jnp.stack([first, last])) / scored
    return Course(correlation, rms, residual, losses, jnp.sqrt(halves))


def _maps(params: Params, config: ModelConfig) -> tuple[Array, Array]:
    """What maps the state and the embedded input; a diagonal as a vector, and zeros where the core reads s alone."""
    kind, D = config.loop.injection, config.embed_dim
    params = merge({name: params[name] for name in ADAPTER if name in params})
    if kind == "linear":
        return params["adapter"][0], params["adapter"][1]
    if kind == "diagonal":
        decay, gain = diagonal(params)
        return decay, params["adapter"]["B"] * gain[None]
    return (jnp.full(D, float(kind == "add")),) * 2


def token_correlation(s: Float[Array, "B L D"], here: Bool[Array, "B L"]) -> Float32[Array, ""]:
    """Mean cosine similarity over all pairs of different tokens of a row.

    s: states; here: which of them count. By the norm of the sum of unit vectors, not by pairs.
    """
    wide = jnp.where(here[..., None], s.astype(jnp.float32), 0.0)
    unit = wide * lax.rsqrt(jnp.maximum(jnp.sum(wide * wide, -1, keepdims=True), 1e-30))
    count = here.sum(-1).astype(jnp.float32)
    pairs = jnp.square(unit.sum(-2)).sum(-1) - count
    return pairs.sum() / jnp.maximum((count * (count - 1)).sum(), 1.0)


def _rms(s: Array, here: Array) -> Array:
    wide = jnp.where(here[..., None], s.astype(jnp.float32), 0.0)
    return jnp.sqrt(jnp.sum(wide * wide) / (jnp.maximum(here.sum(), 1) * s.shape[-1]))


def vitals(params: Params, config: ModelConfig, batch: Any, key: Array | None = None) -> dict[str, float]:
    """The vitals above on one batch, compiled once for a run. Arguments as for `course`; no key is key 0.

    Empty for a model with mean_recurrence 1, which is not recurrent.
    """
    if config.mean_recurrence == 1:
        return {}
    found = jax.device_get(course(params, config, batch, jax.random.key(0) if key is None else key))
    half, (first, last) = config.mean_recurrence // 2 - 1, found.losses
    values = {
        "token_correlation": found.correlation[-1],
        "state_rms_r1": found.rms[0],
        "state_rms": found.rms[-1],
        "state_drift": found.rms[-1] / max(found.rms[half], 1e-30),
        "residual": found.residual[-1],
        "contraction": found.residual[-1] / max(found.residual[half], 1e-30),
        "loss_r1": first,
        "loss": last,
        "gain": (first - last) / max(first, 1e-30),
        "adapter_state": found.adapter[0],
        "adapter_input": found.adapter[1],
    }
    return {f"vital_{name}": float(value) for name, value in values.items()}


def alarms(values: dict[str, float]) -> list[str]:
    """One line for each vital that is out of its limit: the alarm, the vital, its value, its limit, where to look.

    `values`: from `vitals`; empty: no alarms.
    """
    if not values:
        return []
    correlation, gain, drift = (values[f"vital_{name}"] for name in ("token_correlation", "gain", "state_drift"))
    residual, contraction = values["vital_residual"], values["vital_contraction"]
    lines = []
    if correlation > COLLAPSED:
        lines.append(
            f"hidden-state collapse: vital_token_correlation = {correlation:.3f}, limit {COLLAPSED}: the tokens of a "
            "row share one state; lower optimizer.learning_rate, look at grad_norm and update_norm of the core"
        )
    if gain < WORTHLESS:
        lines.append(
            f"recurrence ignored: vital_gain = {gain:.4f}, limit {WORTHLESS}: the loss at r = 1 "
            f"({values['vital_loss_r1']:.3f}) equals that at the mean r ({values['vital_loss']:.3f}); look at "
            "vital_adapter_state against vital_adapter_input, and at vital_state_rms"
        )
    if not 1 / DRIFTING <= drift <= DRIFTING:
        lines.append(
            f"state-norm drift: vital_state_drift = {drift:.3f}, limits {1 / DRIFTING:.2f} and {DRIFTING}: the state's "
            "size depends on r; look at vital_state_rms and at the weights of the core's norms"
        )
    if contraction > UNSETTLED and residual > SMALL:
        lines.append(
            f"residual not contracting: vital_contraction = {contraction:.3f}, limit {UNSETTLED}, at vital_residual = "
            f"{residual:.3f}: more recurrences do not settle the state; lower optimizer.learning_rate, look at "
            "vital_adapter_state"
        )
    return lines
