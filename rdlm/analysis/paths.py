"""How a token's path through latent space ends: at a fixed point, in an orbit, or drifting. NumPy on captured states.

`classify` tests the second half of a path (the tail) for these kinds, in this order:

  fixed point  the tail stays within SETTLED of its mean, relative to the length of the state; or its steps still
               shrink: their mean over the last quarter of the path is below SHRINKS of that over the quarter before
  drift        a straight line at constant speed explains at least STRAIGHT of the tail's variance (a "slider" in
               arXiv 2502.05171)
  orbit        without its drift, the tail returns to where it was p recurrences earlier, to within RETURNS of its
               variance, after having moved away; p is the period
  unsettled    none of these

A period is found if the tail holds two turns, so a path of 128 recurrences shows periods from 2 to 32. A period need
not be a whole number, but a turn of fewer than five recurrences returns closely only after several turns: 3.5 is
reported as 7.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

from rdlm.config import InputError

SETTLED = 0.01
SHRINKS = 0.8
STRAIGHT = 0.5
RETURNS = 0.2
SHORTEST = 16
"""Minimum number of recurrences of a path that can be classified."""

Kind = Literal["fixed point", "orbit", "drift", "unsettled"]
KINDS: tuple[Kind, ...] = ("fixed point", "orbit", "drift", "unsettled")


class Classified(NamedTuple):
    """How a path ends.

    spread: root mean square distance of the tail's points to their mean, over the mean length of the state. shrink:
    mean step of the path's last quarter over that of the quarter before. straight: share of the tail's variance that a
    drift at constant speed explains. returns, period: mean squared distance between points of the drift-free tail that
    are one period apart, over twice its variance (0: the same place; 1: unrelated), and that period in recurrences;
    None where the tail never returns. rate: see `rate`.
    """

    kind: Kind
    spread: float
    shrink: float
    straight: float
    returns: float | None
    period: float | None
    rate: float | None


def distances(states: Float[np.ndarray, "depths *tokens D"]) -> Float64[np.ndarray, "depths *tokens"]:
    """||s_i - s_R|| / ||s_R||; the last is 0 by definition."""
    states = np.asarray(states, np.float64)
    return np.linalg.norm(states - states[-1], axis=-1) / np.maximum(np.linalg.norm(states[-1], axis=-1), 1e-30)


def settled_after(distance: Float[np.ndarray, "depths *tokens"], within: float = SETTLED) -> Int[np.ndarray, "*tokens"]:
    """First recurrence from which `distance` stays below `within`, R + 1 where it never does."""
    outside = np.asarray(distance) >= within
    last = outside.shape[0] - 1 - np.argmax(outside[::-1], axis=0)
    return np.where(outside.any(0), last + 1, 0)


def rate(distance: Float[np.ndarray, "depths"]) -> float | None:
    """Factor per recurrence by which a distance falls, from a fit of its logarithm; None if it does not fall.

    The fit starts where the distance is a tenth of that at r = 1, because a token may depend on others that settle
    first. It ends at 1e-5, where f32 rounding begins, or at the middle of the path, because the end of the path is the
    limit from which distances are measured. A distance that never falls to a tenth is fitted from r = 1.
    """
    distance = np.asarray(distance, np.float64)
    reach = distance[1 : len(distance) // 2 + 1]
    near = np.flatnonzero(reach <= 0.1 * reach[0])
    part = reach[near[0] if len(near) else 0 :]
    low = np.flatnonzero(part < 1e-5)
    part = part[: low[0]] if len(low) else part
    if len(part) < 3 or part[-1] > 0.5 * part[0]:
        return None
    slope = np.polyfit(np.arange(len(part)), np.log(part), 1)[0]
    return float(np.exp(slope))


def pca(
    path: Float[np.ndarray, "N D"], components: int = 3
) -> tuple[Float64[np.ndarray, "N C"], Float64[np.ndarray, "C"]]:
    """A path in its own principal axes: (coordinates, share of the variance that each explains)."""
    path = np.asarray(path, np.float64)
    centred = path - path.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    share = s**2 / max(float((s**2).sum()), 1e-300)
    return (u * s)[:, :components], share[:components]


def recurrence_distance(tail: Float[np.ndarray, "N D"]) -> Float64[np.ndarray, "N//2+1"]:
    """D(p) for lags p = 0 .. N // 2 of points: mean ||x_{i+p} - x_i||^2 over twice their variance."""
    variance = max(float(((tail - tail.mean(0)) ** 2).sum(-1).mean()), 1e-300)
    lags = range(len(tail) // 2 + 1)
    return np.array([((tail[p:] - tail[: len(tail) - p]) ** 2).sum(-1).mean() / (2 * variance) for p in lags])


def classify(path: Float[np.ndarray, "depths D"]) -> Classified:
    """The class of a path s_0 .. s_R, with R at least SHORTEST.

    Raises:
      InputError: too few recurrences, or states that are not finite.
    """
    path = np.asarray(path, np.float64)
    R = len(path) - 1
    if R < SHORTEST:
        raise InputError(f"a path of {R} recurrences: {SHORTEST} or more are needed to tell how it ends")
    if not np.isfinite(path).all():
        raise InputError("a path holds values that are not finite: the model diverges at this depth")
    tail = path[R // 2 :]
    centred = tail - tail.mean(0)
    variance = float((centred**2).sum(-1).mean())
    spread = variance**0.5 / max(float(np.linalg.norm(tail, axis=-1).mean()), 1e-30)
    steps = np.linalg.norm(np.diff(path, axis=0), axis=-1)
    quarter = R // 4
    shrink = float(steps[-quarter:].mean() / max(steps[-2 * quarter : -quarter].mean(), 1e-30))
    time = np.arange(len(tail)) - (len(tail) - 1) / 2
    drift = time[:, None] * (time @ centred)[None] / (time @ time)
    straight = float((drift**2).sum() / max((centred**2).sum(), 1e-300))
    lag = recurrence_distance(centred - drift)
    period, returns = _period(lag)
    kind: Kind = "unsettled"
    if spread < SETTLED or shrink < SHRINKS:
        kind = "fixed point"
    elif straight >= STRAIGHT:
        kind = "drift"
    elif period is not None:
        kind = "orbit"
    return Classified(kind, spread, shrink, straight, returns, period, rate(distances(path)))


def _period(lag: np.ndarray) -> tuple[float | None, float | None]:
    """(period, D there) of the first return below RETURNS; a parabola through three lags gives fractional periods."""
    for p in range(2, len(lag) - 1):
        left, here, right = lag[p - 1 : p + 2]
        if here < min(RETURNS, left) and here <= right and lag[1:p].max() > 2 * here:
            return float(p + 0.5 * (left - right) / max(left - 2 * here + right, 1e-30)), float(here)
    return None, None
