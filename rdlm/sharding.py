"""Devices as a mesh, and where every array lives on it."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rdlm.config import InputError, MeshConfig

RULES = {"vocab": None, "embed": "fsdp", "heads": None, "mlp": None, "norm": None}
"""Mesh axis of each logical axis: under FSDP every matrix is split along the model's width."""


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """Mesh with axes (data, fsdp) over all devices.

    Raises:
      InputError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp]
    if -1 in sizes:
        known = math.prod(n for n in sizes if n != -1)
        sizes = [len(devices) // known if n == -1 else n for n in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh = data {config.data} x fsdp {config.fsdp}: does not fit {len(devices)} devices; "
            f"set mesh.data to -1 and mesh.fsdp to a divisor of {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(sizes), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings for parameters of `shapes` whose logical axes are `axes` (from `rdlm.model.logical_axes`).

    Raises:
      InputError: a dimension does not divide by its mesh axis; names both.
    """

    def one(path: Any, spec: PartitionSpec, shape: Any) -> NamedSharding:
        mesh_axes = [RULES[name] if name else None for name in spec]
        for name, axis, size in zip(spec, mesh_axes, shape.shape, strict=True):
            if axis and size % mesh.shape[axis]:
                raise InputError(
                    f"mesh.{axis} = {mesh.shape[axis]}: does not divide {name} = {size} of parameter "
                    f"{jax.tree_util.keystr(path)}; use a divisor of {size}"
                )
        return NamedSharding(mesh, PartitionSpec(*mesh_axes))

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Refuse a batch that does not split evenly over the devices."""
    if batch_size % mesh.size:
        raise InputError(
            f"data.batch_size = {batch_size}: must be a multiple of the {mesh.size} devices "
            f"(try {-(-batch_size // mesh.size) * mesh.size})"
        )
