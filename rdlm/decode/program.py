"""Programs of decoding, on one device or on a mesh, rows and heads split over it (docs/decoding.md, Several chips)."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, cast

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import PyTree

from rdlm.config import InputError, ModelConfig
from rdlm.model import Params, init_params
from rdlm.model.cache import KeyValue
from rdlm.model.split import AXES, AXIS, DATA, share
from rdlm.model.tensor_parallel import parameter_parts

P = ParamSpec("P")
T = TypeVar("T")


def mesh_of(params: Params) -> Mesh | None:
    """The mesh on which `rdlm.tensor_parallel` has put parameters; None: they are on one device."""
    placed = _sharding(params)
    found = placed.mesh if isinstance(placed, NamedSharding) else None
    return found if isinstance(found, Mesh) and found.axis_names == AXES and found.size > 1 else None


def _sharding(params: Params) -> Sharding | None:
    """Where parameters, or what their shapes stand for, are; None: nobody knows yet, as while they are traced."""
    wte: Any = params["wte"]
    return None if isinstance(wte, jax.core.Tracer) else getattr(wte, "sharding", None)


def on_several_hosts(params: Params) -> bool:
    """Whether the mesh is that of several processes, all of which run every program in the same order."""
    placed = _sharding(params)
    return placed is not None and not placed.is_fully_addressable


def devices_of(params: Params) -> int:
    """How many devices hold the parameters, all copies of them together."""
    mesh = mesh_of(params)
    return 1 if mesh is None else mesh.size


def copies_of(params: Params) -> int:
    """How many copies of the parameters there are, each for its own rows."""
    mesh = mesh_of(params)
    return 1 if mesh is None else mesh.shape[DATA]


def local_config(params: Params, config: ModelConfig) -> ModelConfig:
    """What one device computes of the model: for its memory.

    Raises:
      InputError: the parameters are split, and of another config.
    """
    devices = devices_of(params) // copies_of(params)
    if devices > 1:
        _check_model(params, config)
    return share(config, devices)


class DecodingProgram(Generic[P, T]):
    """`jax.jit` for a function of (params, config, ...) whose `static` arguments, like config, are no arrays.

    Where `rdlm.tensor_parallel` has put the parameters on a mesh, every device runs it for `share(config)`, on its
    parts of the parameters and of all keys and values. Rows are divided among the copies of the model, and no copy
    knows of the others: the first axis of every array is one of rows, as is the third from last of keys and values;
    numbers without an axis are the same for all.
    """

    def __init__(self, run: Callable[P, T], static: tuple[str, ...], donate: str | None):
        self._run, self._static, self._signature = run, static, inspect.signature(run)
        functools.update_wrapper(self, run)

        @functools.wraps(run)
        def split(*args: P.args, **named: P.kwargs) -> T:
            return self._split(*args, **named)

        jitted: Any = jax.jit(split, static_argnames=static, donate_argnames=donate)
        self._jitted, self.clear_cache, self._cache_size = jitted, jitted.clear_cache, jitted._cache_size

    def __call__(self, *args: P.args, **named: P.kwargs) -> T:
        """Run it where the parameters are."""
        mesh = _place(args[0])
        if mesh is None:
            return self._jitted(*args, **named)
        with jax.set_mesh(mesh):
            return self._jitted(*(_moved(args, mesh) if mesh.size > 1 else args), **named)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """As that of `jax.jit`, for arrays or their shapes; those of parameters say where it runs."""
        mesh = _place(args[0])
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return self._jitted.lower(*args)

    def _split(self, *args: P.args, **named: P.kwargs) -> T:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.axis_names != AXES or mesh.size == 1 or mesh.manual_axes:
            return self._run(*args, **named)
        given: dict[str, Any] = self._signature.bind(*args, **named).arguments
        _check_model(given["params"], given["config"])
        fixed: dict[str, Any] = {name: given.pop(name) for name in self._static}
        local = fixed | {"config": share(fixed["config"], mesh.shape[AXIS])}
        run: Callable[..., T] = self._run
        parts = {name: _parts(x) for name, x in given.items()}
        parts["params"] = parameter_parts(fixed["config"], given["params"])
        made = _parts(jax.eval_shape(lambda given: run(**given, **fixed), given))

        def on_each(given: dict[str, Any]) -> T:
            return run(**given, **local)

        return jax.shard_map(on_each, in_specs=(parts,), out_specs=made, check_vma=False)(given)


def _place(params: Any) -> Mesh | None:
    """The mesh that a program runs on: that of split parameters, or that of the one TPU that holds them.

    None: another place, or arrays that are traced. Only by such a mesh does a program know that it has one device.
    """
    mesh, placed = mesh_of(params), _sharding(params)
    if mesh is not None or placed is None or len(placed.device_set) > 1:
        return mesh
    device: jax.Device = next(iter(placed.device_set))
    return Mesh(np.asarray([[device]]), AXES) if device.platform == "tpu" else None


def _moved(args: Any, mesh: Mesh) -> Any:
    """`args`, with what is bound to one device, such as a key of the caller's, on all of the mesh."""

    def one(x: Any) -> Any:
        bound = isinstance(x, jax.Array) and x.committed and len(x.sharding.device_set) == 1
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec())) if bound else x

    return jax.tree.map(one, args)


def _check_model(params: Params, config: ModelConfig) -> None:
    """Refuse split parameters with another config, such as that from before heads were added."""
    shapes = _core_shapes(config)
    for part, name in (("attn", "qkv"), ("mlp", "fc")):
        found, wanted = params["core_0"][part][name].shape, shapes[part][name].shape
        if found != wanted:
            raise InputError(
                f"params: core_0/{part}/{name} has shape {list(found)}, but the config says {list(wanted)}; use the "
                "config that tensor_parallel returned with them"
            )


@functools.cache
def _core_shapes(config: ModelConfig) -> Params:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))["core_0"]


def host(value: ArrayLike | Sequence[int], dtype: DTypeLike | None = None) -> Array:
    """`value` as a program takes it, left on the host: a call copies many small arrays faster than JAX one by one."""
    return cast(Array, np.asarray(value, dtype))


def fetched(arrays: PyTree[Array]) -> PyTree[np.ndarray]:
    """Arrays that a program made, as NumPy. On several hosts all ask for them, and all get the whole."""
    apart = [x for x in jax.tree.leaves(arrays) if not (x.is_fully_addressable or x.is_fully_replicated)]
    return jax.device_get(_whole(apart[0].sharding.mesh)(arrays) if apart else arrays)


@functools.cache
def _whole(mesh: Mesh) -> Callable[[PyTree[Array]], PyTree[Array]]:
    return jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, PartitionSpec()))


def for_copy(params: Params, number: int, copy: int, beyond: int) -> Array:
    """int32 [copies]: `number`, such as a lane, for one copy of the model, and for others one that does not exist."""
    made = np.full(copies_of(params), beyond, np.int32)
    made[copy] = number
    return host(made)


def program(*static: str, donate: str | None = None) -> Callable[[Callable[P, T]], DecodingProgram[P, T]]:
    """Make a function a `DecodingProgram`."""
    return lambda run: DecodingProgram(run, static, donate)


def _parts(tree: PyTree) -> PyTree[PartitionSpec]:
    """How arrays are split: by rows, and keys and values also by heads, which lie in their last axis."""

    def one(x: Any) -> PyTree[PartitionSpec]:
        if not isinstance(x, KeyValue):
            return PartitionSpec(DATA) if getattr(x, "ndim", 0) else PartitionSpec()
        return jax.tree.map(lambda y: PartitionSpec(*[None] * (y.ndim - 3), DATA, None, AXIS), x)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, KeyValue))


def shapes_on(mesh: Mesh, local: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes of the arrays of which every device of a mesh has those of `local`."""

    def one(x: Any, part: PartitionSpec) -> jax.ShapeDtypeStruct:
        names = [*part, *[None] * (x.ndim - len(part))]
        shape = tuple(size * (mesh.shape[name] if name else 1) for size, name in zip(x.shape, names, strict=True))
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, part))

    return jax.tree.map(one, local, _parts(local))
