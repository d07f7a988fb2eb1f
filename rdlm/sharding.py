"""Devices as a mesh, where every array lives on it, and how parameters are gathered and gradients reduced.

Four axes: `data` (copies of the model), `fsdp` and `rest` (together what the configuration calls fsdp: parameters are
split along the model's width, and along their other dimension by the factor that does not divide the width), and
`tensor` (heads and MLP columns; left to the compiler, while the other three are spelled out in `rdlm.train.step`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import PyTree

from rdlm.config import Gather, InputError, MeshConfig, ModelConfig, TuneConfig
from rdlm.tune import divide, join, pick

T = TypeVar("T")
Params = dict[str, PyTree]
"""Some of the top-level entries of a model's parameters."""

AXES = ("data", "fsdp", "rest", "tensor")
SPLIT = ("data", "fsdp", "rest")
"""Axes over which the rows of a batch are split."""

RULES: dict[str, tuple[str, ...]] = {
    "vocab": ("rest", "tensor"),
    "embed": ("fsdp",),
    "heads": ("rest", "tensor"),
    "head": ("tensor",),
    "mlp": ("rest", "tensor"),
    "norm": (),
}
"""Mesh axes of each logical axis."""


def make_mesh(config: MeshConfig, model: ModelConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh with axes (data, fsdp, rest, tensor) over all devices.

    config.fsdp devices share one copy of the parameters: as many of them as divide the model's width along it, the
    rest along the other dimension of every matrix (for huginn_3p5b on 256: 32 x 8).

    Raises:
      InputError: the axis sizes do not multiply to the number of devices, or fsdp and tensor would split the same
        dimension.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = math.prod(n for n in sizes if n != -1)
        sizes = [len(devices) // known if n == -1 else n for n in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(
            f"mesh = data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}: does not fit {len(devices)} "
            f"devices; set mesh.data to -1 and mesh.fsdp to a divisor of {len(devices) // max(config.tensor, 1)}"
        )
    data, fsdp, tensor = sizes
    along = math.gcd(fsdp, model.embed_dim)
    if along < fsdp and tensor > 1:
        raise InputError(
            f"mesh.fsdp = {fsdp} with mesh.tensor = {tensor}: {fsdp} does not divide embed_dim = {model.embed_dim}, "
            f"and tensor takes the other dimension; use fsdp = {along}, tensor = 1, or the preset huginn_tpu"
        )
    shape = (data, along, fsdp // along, tensor)
    if devices[0].platform == "tpu" and len(devices) > 1:  # neighbours on the mesh are neighbours on the torus
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, split over all devices but those that share one row (tensor)."""
    return NamedSharding(mesh, PartitionSpec(SPLIT))


def per_device(mesh: Mesh) -> NamedSharding:
    """One element for every device."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same everywhere."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_specs(
    mesh: Mesh, axes: PyTree[PartitionSpec], shapes: PyTree[jax.ShapeDtypeStruct]
) -> PyTree[PartitionSpec]:
    """Mesh axes of every dimension of parameters of `shapes` whose logical axes are `axes` (`model.logical_axes`).

    Raises:
      InputError: a dimension does not divide by its mesh axes; names both, and sizes that would do.
    """

    def one(path: tuple, spec: PartitionSpec, shape: jax.ShapeDtypeStruct) -> PartitionSpec:
        names = [tuple(a for a in RULES[name] if mesh.shape[a] > 1) if name else () for name in spec]
        for name, found, size in zip(spec, names, shape.shape, strict=True):
            parts = math.prod(mesh.shape[a] for a in found)
            if size % parts:
                axis = "tensor" if "tensor" in found else "fsdp"
                raise InputError(
                    f"mesh.{axis} = {mesh.shape['tensor'] if axis == 'tensor' else parts}: does not divide "
                    f"{name} = {size} of parameter {jax.tree_util.keystr(path)}; use a divisor of {size}"
                )
        return PartitionSpec(*(found or None for found in names))

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=_is_spec)


def check_heads(mesh: Mesh, model: ModelConfig) -> None:
    """Refuse a tensor axis that would cut a head in two."""
    tensor = mesh.shape["tensor"]
    if model.kv_heads % tensor:
        name = "num_heads" if model.kv_heads == model.num_heads else "num_kv_heads"
        twin = ", or the preset huginn_tpu (40)" if model.num_heads == 55 else ""
        refused = f"mesh.tensor = {tensor}: does not divide {name} = {model.kv_heads}"
        raise InputError(f"{refused}; use a divisor of it{twin}")


def named(mesh: Mesh, specs: PyTree[PartitionSpec]) -> PyTree[NamedSharding]:
    """`specs` as shardings on `mesh`."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int = 1) -> None:
    """Refuse a batch whose rows do not split evenly over microbatches and the devices that take rows."""
    parts = math.prod(mesh.shape[a] for a in SPLIT) * microbatches
    if batch_size % parts:
        what = f"the {parts} devices" if microbatches == 1 else f"{parts} = devices x data.microbatches"
        raise InputError(
            f"data.batch_size = {batch_size}: must be a multiple of {what} (try {-(-batch_size // parts) * parts})"
        )


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity, so that programs may depend on one
class Layout:
    """How the parameters of one model are split over a mesh, and how they are assembled inside `jax.shard_map`.

    A shard is the part of a parameter that one device stores; full parameters are in the compute dtype.

    specs: of all parameters, by top-level entry. dtype: of full parameters. sum_dtype: in which gradients are summed,
    over recurrences and over devices; None: in `dtype`. gather: "once" gathers the core once for all recurrences and
    reduce-scatters its gradient once; "weights_once" reduce-scatters it after every recurrence, so that only the
    sharded gradient is accumulated; "each" gathers block by block at every use, forward and backward (plain FSDP).
    tune: which of them learn; the others are gathered without a derivative.
    """

    mesh: Mesh
    specs: dict[str, PyTree[PartitionSpec]]
    dtype: DTypeLike
    sum_dtype: DTypeLike | None = None
    gather: Gather = "once"
    tune: TuneConfig = dataclasses.field(default_factory=TuneConfig)

    @property
    def manual(self) -> frozenset[str]:
        """Axes spelled out here; the tensor axis is the compiler's when there is one."""
        return frozenset(SPLIT if self.mesh.shape["tensor"] > 1 else AXES)

    @property
    def flash(self) -> bool:
        """Whether attention inside `jax.shard_map` can use the fused kernel: on TPUs."""
        return self.mesh.devices.flat[0].platform == "tpu"

    @property
    def parameter_parts(self) -> PyTree[PartitionSpec]:
        """Of all parameters, `inside` their specs: how `jax.shard_map` takes them."""
        return jax.tree.map(self.inside, self.specs, is_leaf=_is_spec)

    def inside(self, spec: PartitionSpec) -> PartitionSpec:
        """`spec` as `jax.shard_map` wants it: without the compiler's axis."""
        keep = [tuple(a for a in _axes(part) if a in self.manual) for part in spec]
        return PartitionSpec(*(part or None for part in keep))

    def full(self, shards: Params) -> Params:
        """Assemble some entries of the parameters; the gradient of the result is reduce-scattered to `shards`."""
        learnt, frozen = divide(shards, self.tune)
        full = self._scattered(learnt, lax.stop_gradient(self.all_gather(learnt)))
        return join(full, self.all_gather(frozen))

    def for_recurrences(self, shards: Params) -> Callable[[], Params]:
        """A function that each recurrence calls for its weights (`model.core_names`), assembled as `gather` says.

        Every call returns arrays of the same values; what differs is where their gradients are summed.
        """
        if self.gather == "each":  # blocks are gathered where they run, see `block`
            rest = {name: x for name, x in shards.items() if not name.startswith(("core_", "low_"))}
            return lambda: shards | self.full(rest)
        learnt, frozen = divide(shards, self.tune)
        full, rest = lax.stop_gradient(self.all_gather(learnt)), self.all_gather(frozen)
        if self.gather == "weights_once":
            return lambda: join(self._scattered(learnt, full), rest)
        total = self._gradient_sum(learnt, full)
        return lambda: join(_with_sum(full, total), rest)

    def block(self, name: str, run: Callable[[Params, Array], T]) -> Callable[[Params, Array], T]:
        """`run(weights, x)`, a block, for the shards of its weights: gathered where it runs."""
        return lambda shards, x: run(self.full({name: shards})[name], x)

    def all_gather(self, shards: Params) -> Params:
        """Full entries of the parameters from their shards, without a derivative."""

        def one(x: Array, spec: PartitionSpec) -> Array:
            x, cuts = x.astype(self.dtype), _cuts(spec)
            if not cuts:
                return x
            # All axes at once, into a new leading dimension: parts of 165 rows fill no tiles, and gathered next to each
            # other they would make the compiler add up arrays of zeros instead.
            parts = lax.all_gather(x, tuple(axis for _, axis in cuts))
            sizes = [self.mesh.shape[axis] for _, axis in cuts]
            order = [i for dim in range(x.ndim) for i in (*_of(cuts, dim), len(cuts) + dim)]
            shape = [size * math.prod(sizes[i] for i in _of(cuts, dim)) for dim, size in enumerate(x.shape)]
            return parts.reshape(*sizes, *x.shape).transpose(order).reshape(shape)

        return self._in_turn(one, shards)

    def reduce_scatter(self, gradients: Params) -> Params:
        """Shards of the sum over devices of gradients of full entries.

        Parameters that every device stores in full are not summed: see `summed`.
        """

        def one(g: Array, spec: PartitionSpec) -> Array:
            g = g.astype(self.sum_dtype or g.dtype)
            # The few parts first: 165 rows of each of 32 fill no tiles, and moving them takes the compiler long.
            for dim, axis in sorted(_cuts(spec), key=lambda cut: self.mesh.shape[cut[1]]):
                for parts, groups in self._rounds(axis):
                    split = jnp.moveaxis(g.reshape(*g.shape[:dim], parts, -1, *g.shape[dim + 1 :]), dim, 0)
                    flat = split.reshape(parts, -1, split.shape[-1])  # of four dimensions TPUs make an all-reduce
                    g = lax.psum_scatter(flat, axis, axis_index_groups=groups).reshape(split.shape[1:])
            return g

        return self._in_turn(one, gradients)

    def _rounds(self, axis: str) -> list[tuple[int, list[list[int]] | None]]:
        """(parts, groups of devices) of each sum along an axis: never over all devices at once.

        Of such a sum the TPU compiler makes an all-reduce: twice the bytes of a reduce-scatter.
        """
        size = self.mesh.shape[axis]
        if size < self.mesh.size or size < 4 or size % 2:
            return [(size, None)]
        half = size // 2
        halves = [list(range(half)), list(range(half, size))]
        return [(2, [list(pair) for pair in zip(*halves, strict=True)]), (half, halves)]

    def _in_turn(self, move: Callable[[Array, PartitionSpec], Array], entries: Params) -> Params:
        """`move` every array, each after the one before: all at once, each would need memory of its own to be
        transposed in.
        """
        structure: jax.tree_util.PyTreeDef
        leaves, structure = jax.tree.flatten(entries)
        specs = structure.flatten_up_to(pick(self.specs, entries))
        moved: list[Array] = []
        for x, spec in zip(leaves, specs, strict=True):
            moved.append(move(lax.optimization_barrier((x, moved[-1]))[0] if moved else x, spec))
        return structure.unflatten(moved)

    def _scattered(self, shards: Params, full: Params) -> Params:
        """`full`, whose gradient is reduce-scattered and becomes that of `shards`."""

        @jax.custom_vjp
        def run(shards: Params, full: Params) -> Params:
            return full

        def backward(_: None, gradient: Params) -> tuple[Params, None]:
            return _as(self.reduce_scatter(gradient), shards), None

        run.defvjp(lambda shards, full: (full, None), backward)
        return run(shards, full)

    def _gradient_sum(self, shards: Params, full: Params) -> Params:
        """Zeros like `full` in `sum_dtype`, whose gradient is reduce-scattered and becomes that of `shards`.

        They are never stored: only their gradient is, see `_with_sum`.
        """

        @jax.custom_vjp
        def run(shards: Params) -> Params:
            return jax.tree.map(lambda x: jnp.zeros(x.shape, self.sum_dtype or x.dtype), full)

        run.defvjp(lambda shards: (run(shards), None), lambda _, g: (_as(self.reduce_scatter(g), shards),))
        return run(shards)

    def summed(self, gradients: Params) -> Params:
        """Sum gradients of stored parts over the devices that hold copies of them."""

        def one(g: Array, spec: PartitionSpec) -> Array:
            used = {a for part in spec for a in _axes(part)}
            return lax.psum(g, tuple(a for a in SPLIT if a not in used))

        return jax.tree.map(one, gradients, pick(self.specs, gradients))


def _with_sum(full: Params, total: Params) -> Params:
    """`full`, whose gradient becomes that of `total`, in its dtype: so a loop over `total` sums in that dtype."""

    @jax.custom_vjp
    def run(full: Params, total: Params) -> Params:
        return full

    run.defvjp(lambda full, total: (full, None), lambda _, gradient: (None, _as(gradient, total)))
    return run(full, total)


def _as(gradients: Params, like: Params) -> Params:
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, like)


def _cuts(spec: PartitionSpec) -> list[tuple[int, str]]:
    """(dimension, axis) of every split that a gather undoes, in order."""
    return [(dim, a) for dim, part in enumerate(spec) for a in _axes(part) if a in SPLIT]


def _of(cuts: list[tuple[int, str]], dim: int) -> list[int]:
    """Which of `cuts` are of dimension `dim`."""
    return [i for i, (cut, _) in enumerate(cuts) if cut == dim]


def _axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one dimension of a spec, which writes a single one without a tuple."""
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)


def _is_spec(x: object) -> bool:
    return isinstance(x, PartitionSpec)
