"""`quantize`: the matrices of all blocks in 8 bits, with one scale per output channel (docs/quantize.md).

The scales of a matrix NAME [.., D, F] lie beside it as NAME_scale, f32 [.., 1, F], as low-rank pairs do, and
`rdlm.model.blocks.linear` computes (x NAME) NAME_scale. Norms, biases and the adapter keep their dtype, and so do
embeddings and head unless asked otherwise; these have one scale per token, f32 [V, 1].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from rdlm.config import InputError, ModelConfig, Small, require
from rdlm.model.inputs import check_type
from rdlm.model.network import Params
from rdlm.tune import SCALE, Path, target_of

MATRICES = ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")
"""What is quantized, in every block."""
EMBEDDINGS = ("wte", "head")


class Quantization(NamedTuple):
    """How parameters are quantized: the arguments of `quantize`."""

    dtype: Small
    embeddings: bool


def quantize(params: Params, config: ModelConfig, dtype: Small = "int8", embeddings: bool = False) -> Params:
    """Parameters whose matrices hold values of `dtype`, with scales beside them.

    In int8 a value is off by at most half of its channel's scale, which is the largest magnitude there / 127. Forward,
    loss, generation, the engine and run folders take the result in the place of `params`; nothing in it can learn.

    Args:
      params, config: the model.
      dtype: "int8", or "float8_e4m3fn", which has 3 bits of mantissa.
      embeddings: quantize embeddings and head too. The model computes in `config.param_dtype` then, unless
        `config.compute_dtype` says otherwise.

    Raises:
      InputError: another dtype, a matrix that is not finite, or parameters that are none or quantized already.
    """
    check_type("config", config, ModelConfig)
    known = isinstance(params, dict) and "wte" in params
    require(known, "params", type(params).__name__, "must be parameters, as rdlm.load_checkpoint returns them")
    require(isinstance(embeddings, bool), "embeddings", embeddings, "must be True or False")
    require(dtype in get_args(Small), "dtype", dtype, f"must be one of {', '.join(get_args(Small))}")
    check_float(params, "quantize")

    def one(path: Path, w: Array) -> tuple[Array, Array]:
        small, scale, finite = _quantized(w, dtype, _inputs(path))
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise InputError(f"params {'/'.join(path)}: has values that are not finite, which no scale fits")
        return small, scale

    return _beside(params, embeddings, one)


def rounded(params: Params, dtype: Small) -> Params:
    """`params`, or a part of them, with the values that `quantize` keeps of the matrices, in the matrices' own dtype.

    A matrix that is not finite becomes NaN.
    """

    def one(path: Any, w: Array) -> Array:
        if target_of(tuple(key.key for key in path)) not in MATRICES:
            return w
        small, scale, finite = _quantized(w, dtype, -2)
        return jnp.where(finite, small.astype(jnp.float32) * scale, jnp.nan).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def quantized_specs(specs: PyTree[PartitionSpec], embeddings: bool = False) -> PyTree[PartitionSpec]:
    """Those of quantized parameters, from those of all parameters: scales are split as the outputs are."""

    def one(path: Path, spec: PartitionSpec) -> tuple[PartitionSpec, PartitionSpec]:
        parts = list(spec)
        parts[_inputs(path)] = None
        return spec, PartitionSpec(*parts)

    return _beside(specs, embeddings, one)


def quantization(params: Params) -> Quantization | None:
    """How `params` are quantized; None if they are not."""
    for name, x in params.items():
        found = quantization(x) if isinstance(x, dict) else None
        if found or name + SCALE in params:
            dtype: Any = found.dtype if found else str(x.dtype)
            return Quantization(dtype, "wte" + SCALE in params)
    return None


def check_float(params: Params, what: str) -> None:
    """Refuse quantized parameters where `what` needs the matrices themselves."""
    if found := quantization(params):
        raise InputError(f"{what}: the matrices are quantized ({found.dtype}); give the parameters they were made from")


def _inputs(path: Path) -> int:
    """The axis that a product sums over, and with it a scale is shared along."""
    return -1 if path[-1] in EMBEDDINGS else -2


@functools.partial(jax.jit, static_argnames=("dtype", "axis"))
def _quantized(w: Array, dtype: Small, axis: int) -> tuple[Array, Array, Array]:
    """(Values, scales, whether all of `w` is finite: on CPUs a maximum may pass over NaN)."""
    wide = w.astype(jnp.float32)
    largest = 127.0 if dtype == "int8" else float(jnp.finfo(dtype).max)
    scale = jnp.maximum(jnp.max(jnp.abs(wide), axis, keepdims=True), 1e-30) / largest  # a channel of zeros stays one
    scaled = wide / scale
    return (jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype), scale, jnp.isfinite(wide).all()


def _beside(tree: Params, embeddings: bool, make: Callable[[Path, Any], tuple[Any, Any]], path: Path = ()) -> Params:
    """`tree` with what `make` returns in the place of everything that is quantized, and beside it."""
    made: Params = {}
    for name, x in tree.items():
        here = (*path, name)
        if isinstance(x, dict):
            made[name] = _beside(x, embeddings, make, here)
        elif target_of(here) in (MATRICES + EMBEDDINGS if embeddings else MATRICES):
            made[name], made[name + SCALE] = make(here, x)
        else:
            made[name] = x
    return made
