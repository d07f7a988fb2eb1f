"""GGUF files, the format of llama.cpp, as Hugging Face folders: models of Llama's type with their tokenizers.

The package `gguf` (extra of the same name) reads the file and dequantises. Quantised tensors become float32, in which
their values are exact; a file whose matrices are all bf16 or all f16 keeps that dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np

from rdlm.config import InputError, ModelConfig, RotaryScaling, local_path, one_line
from rdlm.hf import gguf_tokenizer, plain
from rdlm.hf.fields import Fields, Json, typed
from rdlm.hf.files import Planned, write_tensors
from rdlm.hf.names import table
from rdlm.model.blocks import rotary_frequencies
from rdlm.runtime.files import complete_folder, require_empty
from rdlm.runtime.progress import Progress

if TYPE_CHECKING:
    from gguf import ReaderField, ReaderTensor

MAGIC = b"GGUF"
FREQUENCIES = "rope_freqs.weight"
"""What each rotary frequency is divided by; derived from the scaling that config.json names."""

OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names in a Hugging Face folder -> in a GGUF file, outside and inside of layers."""

# Field of config.json -> (key behind "llama.", type).
SHAPE: dict[str, tuple[str, type]] = {
    "hidden_size": ("embedding_length", int),
    "num_attention_heads": ("attention.head_count", int),
    "intermediate_size": ("feed_forward_length", int),
    "num_hidden_layers": ("block_count", int),
    "max_position_embeddings": ("context_length", int),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", float),
}
KEYS = {
    *(key for key, _ in SHAPE.values()),
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "vocab_size",
}
"""Keys behind "llama." that are read. Others change what the model computes."""

HALVES = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class Contents(NamedTuple):
    """What a file holds: metadata by their keys, and tensors by their names (not yet read)."""

    file: Path
    metadata: Fields
    tensors: dict[str, ReaderTensor]


def is_gguf(path: Path) -> bool:
    """Whether `path` is, or is called, a GGUF file."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def require_gguf() -> ModuleType:
    """The package.

    Raises:
      InputError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InputError(f"GGUF files need the package gguf ({error}); run: pip install 'rdlm[gguf]'") from error
    return gguf


def convert_gguf(file: Path, folder: Path, name: str | None = None) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors, tokenizer, generation_config.json.

    The folder is complete or absent. Tensors are read and written one at a time.

    Args:
      file: to read.
      folder: to write; must not exist, or be empty.
      name: of the model, for config.json; None: the one in the file.

    Raises:
      InputError: the package gguf is missing, a model of another architecture, a damaged file, a tokenizer that rdlm
        cannot rebuild, or a folder that is not empty or cannot be written.
    """
    file, folder = local_path(file), local_path(folder)
    require_empty(folder)
    contents = _read(file)
    dtype = _dtype(contents)
    config = _config(contents, dtype.name)
    planned = _plan(contents, config, dtype)
    tokenizer = gguf_tokenizer.rebuild(contents.metadata, config, str(file))
    fields = plain.model_fields(config, dtype.name) | tokenizer.ids
    fields["_name_or_path"] = name or str(contents.metadata.get("general.name", file.name))
    files = {"config.json": fields, "tokenizer_config.json": tokenizer.config, "generation_config.json": tokenizer.ids}
    with complete_folder(folder) as partial:
        with Progress(sum(p.nbytes for p in planned.values()), f"Converting {file.name}", unit="bytes") as progress:
            write_tensors(partial, {name: _counted(p, progress) for name, p in planned.items()}, 5_000_000_000)
        for file_name, tree in files.items():
            text = json.dumps(dict(sorted(tree.items())), indent=2, ensure_ascii=False) + "\n"
            (partial / file_name).write_text(text, encoding="utf-8")
        (partial / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")


def _read(file: Path) -> Contents:
    gguf = require_gguf()
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    if magic != MAGIC:
        raise InputError(f"{file}: not a GGUF file (it begins with {magic!r}, not {MAGIC!r})")
    try:
        reader = gguf.GGUFReader(file)
        metadata = {key: _value(field) for key, field in reader.fields.items()}
    except (ValueError, LookupError, ArithmeticError, TypeError, MemoryError) as error:  # whatever the bytes lead to
        size = file.stat().st_size
        raise InputError(f"{file}: cut off or damaged, {size:,} bytes ({one_line(error)}); copy it again") from error
    if reader.byte_order != "I":
        raise InputError(f"{file}: written for the other byte order; convert it with gguf-convert-endian")
    kind = metadata.get("general.architecture")
    if kind != "llama":
        raise InputError(f"{file}: general.architecture = {kind!r}: rdlm reads GGUF files of type 'llama' only")
    if typed(metadata, "split.count", int, 1, str(file)) > 1:
        raise InputError(f"{file}: one of {metadata['split.count']} parts; join them with llama-gguf-split --merge")
    return Contents(file, metadata, {tensor.name: tensor for tensor in reader.tensors})


def _value(field: ReaderField) -> Json:
    """Of a metadata field; a float32 as the shortest decimal fraction that rounds to it."""
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _dtype(contents: Contents) -> np.dtype:
    """Of the folder: that of all matrices if they are bf16 or f16, otherwise float32."""
    kinds = {tensor.tensor_type.name for tensor in contents.tensors.values() if len(tensor.shape) > 1}
    return HALVES.get(kinds.pop(), np.dtype(np.float32)) if len(kinds) == 1 else np.dtype(np.float32)


def _config(contents: Contents, dtype: str) -> ModelConfig:
    """The ModelConfig, checked as that of a Hugging Face folder.

    Raises:
      InputError: a key is missing, wrong, or not known.
    """
    file, metadata, tensors = contents
    given = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    where = f"{file}: llama"
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{file}: tensor token_embd.weight is missing, or no matrix")
    rows = int(embedding.shape[1])
    fields: Fields = {"model_type": "llama", "tie_word_embeddings": "output.weight" not in tensors}
    for name, (key, kind) in SHAPE.items():
        if key not in given:
            raise InputError(f"{file}: llama.{key} is missing")
        fields[name] = typed(given, key, kind, None, where)
    heads, D = fields["num_attention_heads"], fields["hidden_size"]
    width = typed(given, "attention.key_length", int, D // max(heads, 1), where)
    for key, wanted in {
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.scaling.type": "none",
        "rope.scaling.factor": given.get("rope.scaling.factor") if given.get("rope.scaling.type") == "none" else 1.0,
        "vocab_size": rows,
        **{key: 0 for key in given if key not in KEYS and not key.startswith("rope.scaling.")},
    }.items():
        if given.get(key, wanted) not in (wanted, None):
            raise InputError(f"{where}.{key} = {str(given[key])[:40]}: rdlm builds only {wanted!r}")
    fields |= {
        "vocab_size": rows,
        "head_dim": width,
        "num_key_value_heads": typed(given, "attention.head_count_kv", int, heads, where),
        "rope_theta": typed(given, "rope.freq_base", float, 10000.0, where),
    }
    config = plain.model_config(fields, rows, dtype, f"{file}: as config.json")
    return config if FREQUENCIES not in tensors else _scaled(config, contents)


def _scaled(config: ModelConfig, contents: Contents) -> ModelConfig:
    """`config` with Llama 3's scaling of rotary frequencies, of which the file holds only the result.

    Raises:
      InputError: a result that no scaling of Llama 3's kind has.
    """
    found = _dequantised(contents, FREQUENCIES).ravel()
    for length in (2**i for i in range(4, 24)):
        scaling = RotaryScaling(float(found.max()), 1.0, 4.0, length)  # all published models have 1 and 4
        scaled = dataclasses.replace(config, rope_scaling=scaling)
        expected = rotary_frequencies(config) / rotary_frequencies(scaled)
        if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4):
            return scaled
    raise InputError(f"{contents.file}: tensor {FREQUENCIES}: not a scaling as in Llama 3")


def _plan(contents: Contents, config: ModelConfig, dtype: np.dtype) -> dict[str, Planned]:
    """The tensors to write, by their names in a Hugging Face folder.

    Raises:
      InputError: one is missing, left over, or of another shape.
    """
    file, _, tensors = contents
    planned, used = {}, {FREQUENCIES}
    for theirs, entry in table(config).items():
        name = _name(theirs)
        used.add(name)
        if name not in tensors:
            raise InputError(f"{file}: tensor {name} is missing")
        shape = tuple(int(n) for n in reversed(tensors[name].shape))
        if shape != entry.shape:
            raise InputError(
                f"{file}: tensor {name}: shape {list(shape)}, but the metadata ask for {list(entry.shape)}"
            )
        heads = {"attn_q": config.num_heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
        kept = dtype
        if len(shape) == 1:  # norms are float32 in every file
            values = _dequantised(contents, name)
            kept = dtype if np.array_equal(values.astype(dtype), values) else values.dtype
        planned[theirs] = Planned(kept, shape, functools.partial(_tensor, contents, name, heads, kept))
    left = [name for name in tensors if name not in used]
    if left:
        raise InputError(f"{file}: tensor {left[0]} has no place in a model of type 'llama'")
    return planned


def _name(theirs: str) -> str:
    """'blk.3.attn_q.weight' for 'model.layers.3.self_attn.q_proj.weight'."""
    name = theirs.removesuffix(".weight")
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name):
        return f"blk.{layer[1]}.{INNER[layer[2]]}.weight"
    return f"{OUTER[name]}.weight"


def _tensor(contents: Contents, name: str, heads: int | None, dtype: np.dtype) -> np.ndarray:
    """Values of a tensor as a Hugging Face folder holds them. heads: of queries or keys, whose rows are reordered."""
    x = _dequantised(contents, name)
    if heads is not None:
        # Rotary turns neighbours (2i, 2i+1) here, and (i, i + Q/2) there.
        x = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
    return np.ascontiguousarray(x.astype(dtype))


def _dequantised(contents: Contents, name: str) -> np.ndarray:
    """Values of a tensor, float32."""
    tensor = contents.tensors[name]
    try:
        return require_gguf().dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        kind = tensor.tensor_type.name
        raise InputError(f"{contents.file}: tensor {name}: the package gguf does not dequantise {kind}") from error


def _counted(planned: Planned, progress: Progress) -> Planned:
    def make() -> np.ndarray:
        progress.advance(math.prod(planned.shape) * planned.dtype.itemsize)
        return planned.make()

    return planned._replace(make=make)
