"""`tensor_parallel`: place a model on several devices, each with some of its heads, MLP columns and vocabulary rows; or
several copies of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from rdlm.config import InputError, ModelConfig, require
from rdlm.model.inputs import check_type
from rdlm.model.network import Params, init_params, logical_axes
from rdlm.model.quantize import quantization, quantized_specs
from rdlm.model.split import AXES, AXIS
from rdlm.tune import LORA_A, SCALE

PARTS = {"vocab": AXIS, "heads": AXIS, "head": AXIS, "mlp": AXIS}
"""Logical axes of parameters that are split."""


def tensor_parallel(params: Params, config: ModelConfig, devices: int, data: int = 1) -> tuple[Params, ModelConfig]:
    """(params, config) for decoding on `data` x `devices`; `generate`, `Engine` and what is made of them run there.

    There are `data` copies of the model, among which rows and lanes are divided. Every device of a copy holds its share
    of the matrices and of the keys and values, and a layer costs two sums over them, none over copies
    (docs/decoding.md, Several chips). Where the key heads do not divide, heads that give 0 are added, so the config
    may have more of them. In float32 tokens and recurrences are those of one device, up to roundings in other places.

    Args:
      params, config: the model, also quantized.
      devices: that share a copy.
      data: copies. They are on the first of `jax.local_devices()`; one copy on one device is what was given. Where
        several processes have joined (`rdlm.runtime.start`), all call this, for all devices of all of them.

    Raises:
      InputError: fewer devices than that, or dimensions that do not divide.
    """
    check_type("config", config, ModelConfig)
    mesh = tensor_mesh(devices, data)
    if mesh.size == 1:
        return params, config
    for name in params:
        require(LORA_A not in name and not _has_pairs(params[name]), "params", name, "has low-rank pairs; merge them")
    return load_split(config, mesh, params, functools.partial(_put, params))


def _put(params: Params, places: PyTree[NamedSharding]) -> Params:
    if all(place.is_fully_addressable for place in jax.tree.leaves(places)):
        return jax.device_put(params, places)

    def part(x: Array, place: NamedSharding) -> Array:
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return jax.tree.map(part, params, places)


def load_split(
    config: ModelConfig, mesh: Mesh, shapes: Params, load: Callable[[PyTree[NamedSharding]], Params]
) -> tuple[Params, ModelConfig]:
    """As `tensor_parallel`, of parameters of `shapes` that `load` puts where its argument says.

    Raises:
      InputError: as `tensor_parallel`, before anything is loaded; or what `load` raises.
    """
    wider = with_heads(config, mesh.shape[AXIS])
    return widened(load(placement(config, mesh, shapes)), config, mesh), wider


def tensor_mesh(devices: int, data: int = 1, there: list[jax.Device] | None = None) -> Mesh:
    """The first `data` x `devices` for `tensor_parallel`, of those that are there or, with None, of all processes.

    Raises:
      InputError: not numbers from 1 to that of devices, or not all devices of several processes.
    """
    ours = there is None
    there = jax.devices() if there is None else there
    for name, number, most in (("tensor", devices, len(there)), ("data", data, None)):
        most = len(there) // devices if most is None else most
        whole = isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= most
        what = "of devices" if name == "tensor" else f"of copies on {devices} of {len(there)} devices each"
        require(whole, name, number, f"must be a number {what}, from 1 to {most}")
    shape, count = (data, devices), data * devices
    if ours and jax.process_count() > 1 and count != len(there):
        raise InputError(
            f"data = {data} x tensor = {devices}: must be all {len(there)} devices of the {jax.process_count()} hosts"
        )
    neighbours = there[0].platform == "tpu" and count == len(there)
    grid = mesh_utils.create_device_mesh(shape, there) if neighbours else np.asarray(there[:count]).reshape(shape)
    return Mesh(grid, AXES)


def with_heads(config: ModelConfig, devices: int) -> ModelConfig:
    """The shape of a model on so many devices: with heads added until they divide.

    Raises:
      InputError: dimensions that do not divide, or norms over all heads, which more heads would change.
    """
    for name, size in (("mlp_dim", config.mlp_dim), ("vocabulary", config.rows), ("embed_dim", config.embed_dim)):
        require(size % devices == 0, "tensor", devices, f"does not divide {name} = {size}; use a divisor of it")
    heads = -(-config.kv_heads // devices) * devices
    if heads == config.kv_heads:
        return config
    if config.block.qk_norm == "width":
        raise InputError(
            f"tensor = {devices}: does not divide {config.kv_heads} key heads, and the norms of this model are over "
            "all heads, so none can be added; use a divisor"
        )
    group = config.num_heads // config.kv_heads
    return dataclasses.replace(config, num_heads=heads * group, num_kv_heads=heads, head_width=config.head_dim)


def parameter_parts(config: ModelConfig, params: Params) -> PyTree[PartitionSpec]:
    """How the parameters of a model are split, and the scales of quantized ones."""
    axes = logical_axes(config)
    whole = jax.tree.map(lambda names: PartitionSpec(*map(PARTS.get, names)), axes, is_leaf=_is_spec)
    kind = quantization(params)
    return whole if kind is None else quantized_specs(whole, kind.embeddings)


def placement(config: ModelConfig, mesh: Mesh, params: Params) -> PyTree[NamedSharding]:
    """Where parameters of `config` go before `widened`: in parts where a dimension divides, else whole."""

    def one(spec: PartitionSpec, x: Array | jax.ShapeDtypeStruct) -> NamedSharding:
        names = [name if size % mesh.shape[AXIS] == 0 else None for name, size in zip(spec, x.shape, strict=False)]
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(one, parameter_parts(config, params), params, is_leaf=_is_spec)


def widened(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Parameters of `config`, placed, as those of `with_heads`."""
    wider = with_heads(config, mesh.shape[AXIS])
    if wider == config:
        return params
    shapes = jax.eval_shape(lambda: init_params(wider, jax.random.key(0)))

    def padded(path: tuple[Any, ...], x: Array) -> Array:
        names = [key.key for key in path]
        scale = names[-1].endswith(SCALE)
        shape = functools.reduce(lambda tree, name: tree[name.removesuffix(SCALE)], names, shapes).shape
        return jnp.pad(x, [(0, 0 if scale and n == 1 else size - n) for size, n in zip(shape, x.shape, strict=True)])

    parts = jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_parts(wider, params), is_leaf=_is_spec)
    return jax.jit(lambda x: jax.tree_util.tree_map_with_path(padded, x), out_shardings=parts)(params)


def _has_pairs(entry: Any) -> bool:
    return isinstance(entry, dict) and any(LORA_A in name or _has_pairs(x) for name, x in entry.items())


def _is_spec(x: object) -> bool:
    return isinstance(x, PartitionSpec)
