"""Decoding on a mesh: copies of the model along `DATA`, each with heads, MLP columns and vocabulary rows along `AXIS`.

Rows of a batch, lanes of an engine and pages of its cache are divided among the copies, which never need each other.
Inside a program that `rdlm.decode.program` splits, every device runs the same code on its own heads and columns
(`share`), and these functions join the results: two sums per layer, and one gather of what the adapter makes. Anywhere
else they return what they are given. Training splits the same axis in another way (docs/pods.md).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, Shaped

from rdlm.config import ModelConfig

AXIS = "tensor"
DATA = "data"
AXES = (DATA, AXIS)


def parts() -> int:
    """Devices that share a copy of the model, each for its own heads; 1 outside of a split program."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.manual_axes else 1


def share(config: ModelConfig, devices: int) -> ModelConfig:
    """The model that one of the devices runs: its heads and columns, the whole width."""
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // devices,
        num_kv_heads=config.kv_heads // devices,
        head_width=config.head_dim,
        mlp_dim=config.mlp_dim // devices,
    )


def summed(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The sum over the devices of a copy."""
    return lax.psum(x, AXIS) if parts() > 1 else x


def gathered(x: Shaped[Array, "*shape _"]) -> Shaped[Array, "*shape _"]:
    """The columns of all devices of a copy side by side."""
    return lax.all_gather(x, AXIS, axis=x.ndim - 1, tiled=True) if parts() > 1 else x


def own(x: Shaped[Array, "*shape _"]) -> Shaped[Array, "*shape _"]:
    """The columns of this device, of all."""
    if parts() == 1:
        return x
    width = x.shape[-1] // parts()
    return lax.dynamic_slice_in_dim(x, lax.axis_index(AXIS) * width, width, axis=-1)


def rows(table: Shaped[Array, "V D"], tokens: Int[Array | np.ndarray, "*tokens"]) -> Shaped[Array, "*tokens D"]:
    """table[tokens], where every device has some of the rows."""
    if parts() == 1:
        return table[tokens]
    here = tokens - lax.axis_index(AXIS) * len(table)
    mine = (here >= 0) & (here < len(table))
    found = jnp.where(mine[..., None], table[jnp.clip(here, 0, len(table) - 1)], 0)
    return lax.psum(found, AXIS)
