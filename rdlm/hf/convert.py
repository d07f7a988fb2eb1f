"""Hugging Face folders of the public reference (seal-rg/recurrent-pretraining): load and save, tensor by tensor.

    params, config = load_huggingface(folder)
    save_huggingface(folder, params, config)

Both directions go through one table of names and layouts (`rdlm.hf.names`) and keep every bit of every tensor. Needs
neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rdlm.config import InputError, ModelConfig
from rdlm.hf.config import model_config, read_fields, reference_fields
from rdlm.hf.files import CODES, DTYPES, Planned, Stored, read_tensor, stored_tensors, write_tensors
from rdlm.hf.names import ROTARY, Entry, bare, rotary_buffer, table, to_ours, to_theirs
from rdlm.model import Params

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


def is_huggingface(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a config.json of the reference's kind (as opposed to a run folder's)."""
    try:
        fields = read_fields(Path(folder))
    except InputError:
        return False
    return "model_type" in fields or "n_embd" in fields


def load_huggingface(folder: str | os.PathLike[str]) -> tuple[Params, ModelConfig]:
    """Parameters and config of a Hugging Face folder: config.json and model.safetensors, single or sharded.

    Tensor by tensor, so that the peak is little more than one copy of the model. Values keep the dtype and the bits
    they are stored with; `param_dtype` is the embedding's dtype and `compute_dtype` stays None. The buffer freqs_cis
    is ignored. Names may carry the prefixes of raw training checkpoints.

    Returns:
      params: nested dict of arrays in host memory, of the structure `rdlm.model.init_params` makes.
      config: a stored head makes no difference when tied, but must then equal the embedding.

    Raises:
      InputError: one line naming the file and the tensor or field: a corrupt, cut-off, missing, additional or
        wrongly shaped tensor; a config that rdlm does not build (see `rdlm.hf.config`).
    """
    try:
        return _load(Path(folder))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error


def _load(folder: Path) -> tuple[Params, ModelConfig]:
    fields = read_fields(folder)
    where = str(folder / "config.json")
    model_config(fields, where=where)  # another architecture is better named than its tensors' absence
    stored = _bare_names(stored_tensors(folder))
    wte = stored.get(WTE)
    if wte is None:
        raise InputError(f"{folder}: tensor {WTE} is missing")
    if wte.code not in DTYPES or len(wte.shape) != 2:
        raise InputError(f"{wte.file}: tensor {WTE}: expected a matrix of {', '.join(DTYPES)}, found {_shown(wte)}")
    config = model_config(fields, wte.shape[0], DTYPES[wte.code].name, where)
    entries = table(config)
    spare = {ROTARY} | ({HEAD} if config.tie_embeddings else set())
    for name, entry in entries.items():
        if name not in stored:
            hint = " (tie_embeddings is false)" if name == HEAD else ""
            raise InputError(f"{folder}: tensor {name} is missing{hint}")
        if stored[name].shape != entry.shape:
            raise InputError(
                f"{stored[name].file}: tensor {name}: shape {list(stored[name].shape)}, "
                f"but config.json asks for {list(entry.shape)}"
            )
    for name in stored:
        if name not in entries and name not in spare:
            raise InputError(f"{stored[name].file}: tensor {name} has no place in the model of config.json")
    if config.tie_embeddings and HEAD in stored:
        _same_as_embedding(stored[HEAD], wte)
    params: dict[str, Any] = {}
    with jax.default_device(_host()):
        for name, entry in entries.items():
            values = to_ours(read_tensor(name, stored[name]), entry).view(DTYPES[stored[name].code])
            _put(params, entry.path, jnp.array(values))
    return params, config


def save_huggingface(
    folder: str | os.PathLike[str], params: Params, config: ModelConfig, *, shard_bytes: int = 5_000_000_000
) -> None:
    """Write a folder that the reference's own loader accepts: config.json and model.safetensors, sharded when large.

    Any tree of the structure of the parameters may be written, gradients too; each tensor in its own dtype, streamed.
    The folder appears whole or not at all. An earlier model folder is replaced, keeping its other files (tokenizer,
    code); a non-empty folder of another kind is refused.

    Args:
      folder: where to; parents are made.
      params: nested dict of arrays f32, bf16 or f16.
      config: of the model.
      shard_bytes: most bytes per file.

    Raises:
      InputError: a tree that does not fit `config`, naming the array; a folder that is something else, or that
        cannot be written.
    """
    target = Path(os.path.abspath(folder))
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file, expected a folder")
    if target.is_dir() and any(target.iterdir()) and not is_huggingface(target):
        raise InputError(f"{target}: is not empty and not a model folder; choose another or empty it")
    planned = _plan(params, config)
    dtype = planned[WTE].dtype.name
    fresh = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        write_tensors(fresh, planned, shard_bytes)
        (fresh / "config.json").write_text(json.dumps(reference_fields(config, dtype), indent=2) + "\n")
        _swap(fresh, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _plan(params: Params, config: ModelConfig) -> dict[str, Planned]:
    """What to write, by the reference's names; checks that the tree fits."""
    arrays = {tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    planned = {}
    for name, entry in table(config).items():
        label = _label(entry.path)
        x = arrays.pop(entry.path, None)
        if x is None:
            raise InputError(f"{label}: missing; the config asks for shape {entry.ours}")
        if tuple(x.shape) != entry.ours:
            raise InputError(f"{label}: shape {tuple(x.shape)}, but the config asks for {entry.ours}")
        if np.dtype(x.dtype) not in CODES:
            raise InputError(f"{label}: dtype {x.dtype}: must be one of {', '.join(d.name for d in CODES)}")
        planned[name] = Planned(np.dtype(x.dtype), entry.shape, _maker(x, entry))
    for path in arrays:
        raise InputError(f"{_label(path)}: has no place in a model of this config")
    buffer = rotary_buffer(config)
    planned[ROTARY] = Planned(buffer.dtype, buffer.shape, lambda: buffer)
    return dict(sorted(planned.items()))


def _label(path: tuple[str, ...]) -> str:
    return "params" + "".join(f"[{part!r}]" for part in path)


def _maker(x: Any, entry: Entry):
    def make() -> np.ndarray:
        values = np.asarray(x)
        return to_theirs(np.ascontiguousarray(values).view(f"u{values.itemsize}"), entry)

    return make


def _swap(fresh: Path, target: Path) -> None:
    """Put `fresh` where `target` is; files of `target` that no model is made of move over."""
    if not target.exists() or not any(target.iterdir()):
        fresh.rename(target)  # replaces an empty folder
        return
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    target.rename(old)
    fresh.rename(target)
    for path in old.iterdir():
        if path.name != "config.json" and ".safetensors" not in path.name:
            path.rename(target / path.name)
    shutil.rmtree(old)


def _bare_names(stored: dict[str, Stored]) -> dict[str, Stored]:
    named: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if bare(name) in named:
            raise InputError(f"{tensor.file}: tensor {bare(name)} is stored twice, with and without a prefix")
        named[bare(name)] = tensor
    return named


def _same_as_embedding(head: Stored, wte: Stored) -> None:
    if head[1:3] != wte[1:3] or not np.array_equal(read_tensor(HEAD, head), read_tensor(WTE, wte)):
        raise InputError(f"{head.file}: tensor {HEAD} differs from {WTE}, though tie_embeddings is true")


def _shown(tensor: Stored) -> str:
    return f"{tensor.code} {list(tensor.shape)}"


def _host() -> Any:
    """The CPU, where there is one beside the accelerator: a checkpoint may be larger than one accelerator's memory."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
