"""Load and save Hugging Face folders of the public reference (seal-rg/recurrent-pretraining).

    params, config = load_huggingface(folder)
    save_huggingface(folder, params, config)

Both directions use one table of names and layouts (`rdlm.hf.names`) and keep every bit of every tensor. Neither torch
nor transformers is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from rdlm.config import InputError, ModelConfig, differences, local_path
from rdlm.hf import parcae
from rdlm.hf.config import FIXED, check_kind, is_reference, model_config, model_fields
from rdlm.hf.fields import Fields, read_fields
from rdlm.hf.files import (
    CODES,
    DTYPES,
    INDEX,
    SINGLE,
    Planned,
    Stored,
    read_tensor,
    stored_tensors,
    unsupported,
    write_tensors,
)
from rdlm.hf.names import ROTARY, Entry, bare, is_sandwich, rotary_buffer, table, to_ours, to_theirs
from rdlm.hf.plain import FAMILIES
from rdlm.model import Params, check_float, init_params
from rdlm.runtime import set_aside
from rdlm.runtime.files import is_scratch, scratch_folder

HEAD = "lm_head.weight"


def is_huggingface(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a config.json of the reference's kind (as opposed to a run folder's)."""
    try:
        fields = read_fields(local_path(folder))
    except InputError:
        return False
    return is_reference(fields)


def load_huggingface(folder: str | os.PathLike[str]) -> tuple[Params, ModelConfig]:
    """Parameters and config of a Hugging Face folder: config.json and model.safetensors, in one file or several.

    Tensors are read one at a time, so that peak memory is little more than one copy of the model. Values keep their
    stored dtype and bits; `param_dtype` is the embedding's dtype and `compute_dtype` stays None. The buffer freqs_cis
    is ignored. Names may have the prefixes of raw training checkpoints. If the embeddings are tied, a stored head must
    equal the embedding.

    Returns:
      params: nested dict of arrays in host memory, with the structure of `rdlm.model.init_params`.
      config: of the model.

    Raises:
      InputError: a corrupt, truncated, missing, additional or wrongly shaped tensor, or a config that rdlm cannot
        build (see `rdlm.hf.config`). The message names the file and the tensor or field.
    """
    model = open_huggingface(folder)
    with jax.default_device(_host()):
        return unflatten_dict({path: jnp.array(model.read(path)) for path in model.pieces}), model.config


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A Hugging Face folder whose tensors are checked but not read. `open_huggingface` makes one.

    pieces: by the path of each parameter, the tensors that it is made of, by name.
    """

    config: ModelConfig
    pieces: dict[tuple[str, ...], dict[str, tuple[Stored, Entry]]]

    @property
    def dtype(self) -> jnp.dtype:
        """The smallest dtype that holds the values of all tensors."""
        return jnp.result_type(*{DTYPES[stored.code] for parts in self.pieces.values() for stored, _ in parts.values()})

    def read(self, path: tuple[str, ...]) -> np.ndarray:
        """One parameter.

        Raises:
          InputError: as `load_huggingface`.
        """
        parts = self.pieces[path]
        with _naming(next(iter(parts.values()))[0].file):
            return _assembled(parts)

    def shapes(self) -> Params:
        """Shapes and dtypes of what `load_huggingface` returns."""
        whole = flatten_dict(jax.eval_shape(lambda: init_params(self.config, jax.random.key(0))))

        def one(path: tuple[str, ...]) -> jax.ShapeDtypeStruct:
            codes = {stored.code for stored, _ in self.pieces[path].values()}
            return jax.ShapeDtypeStruct(whole[path].shape, jnp.result_type(*(DTYPES[code] for code in codes)))

        return unflatten_dict({path: one(path) for path in self.pieces})

    def load(self, target: PyTree[jax.ShapeDtypeStruct]) -> Params:
        """The parameters in the dtypes and shardings of `target`: one at a time in host memory, then its shards.

        Raises:
          InputError: as `load_huggingface`.
        """

        def placed(path: tuple[str, ...], wanted: jax.ShapeDtypeStruct) -> jax.Array:
            x = self.read(path)
            return jax.make_array_from_callback(
                wanted.shape, wanted.sharding, lambda shard: np.asarray(x[shard], wanted.dtype)
            )

        return unflatten_dict({path: placed(path, wanted) for path, wanted in flatten_dict(target).items()})

    def digest(self) -> str:
        """sha256 (hex) of every tensor's name, dtype, shape and bits, wherever they are stored."""
        found = hashlib.sha256()
        for name, stored in sorted((name, piece[0]) for parts in self.pieces.values() for name, piece in parts.items()):
            with _naming(stored.file):
                found.update(f"{name} {stored.code} {stored.shape} ".encode())
                found.update(np.ascontiguousarray(read_tensor(name, stored)).data)
        return found.hexdigest()


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def open_huggingface(folder: str | os.PathLike[str]) -> StoredModel:
    """Check config.json and the headers of the tensors of a Hugging Face folder.

    Raises:
      InputError: as `load_huggingface`.
    """
    with _naming(folder):
        return _open(local_path(folder))


def _open(folder: Path) -> StoredModel:
    fields = read_fields(folder)
    where = str(folder / "config.json")
    if isinstance(fields.get("model"), dict):
        raise InputError(f"{folder}: a run folder, not a Hugging Face folder; rdlm.load and load_checkpoint read it")
    check_kind(fields, where)  # name another architecture before its tensors are missed
    files = stored_tensors(folder)
    stored = _bare_names(files)
    model_config(fields, where=where, tensors=stored)
    wte_name = _embedding(fields)
    wte = stored.get(bare(wte_name))
    if wte is None:
        raise InputError(f"{folder}: tensor {wte_name} is missing")
    if wte.code not in DTYPES or len(wte.shape) != 2:
        raise InputError(
            f"{wte.file}: tensor {wte_name}: expected a matrix of {', '.join(DTYPES)}, found {_shown(wte)}"
        )
    config = model_config(fields, wte.shape[0], DTYPES[wte.code].name, where, stored)
    shown = {bare(name): name for name in (*table(config), *files)}  # the file's names win
    stored = {shown[name]: tensor for name, tensor in stored.items()}
    entries = {shown[bare(name)]: entry for name, entry in table(config).items()}
    head = shown.get(HEAD, HEAD)
    spare = {shown.get(ROTARY, ROTARY)} | ({head} if config.tie_embeddings else set())
    spare |= {name for name in stored if name.endswith("rotary_emb.inv_freq")}  # a derived buffer of older files
    for name, entry in entries.items():
        if name not in stored:
            hint = " (tie_embeddings is false)" if name == head else ""
            raise InputError(f"{folder}: tensor {name} is missing{hint}")
        if stored[name].shape != entry.shape:
            raise InputError(
                f"{stored[name].file}: tensor {name}: shape {list(stored[name].shape)}, "
                f"but config.json asks for {list(entry.shape)}"
            )
        if stored[name].code not in DTYPES:
            raise InputError(f"{stored[name].file}: tensor {name}: {unsupported(stored[name])}")
    for name in stored:
        if name not in entries and name not in spare:
            raise InputError(f"{stored[name].file}: tensor {name} has no place in the model of config.json")
    if config.tie_embeddings and head in stored:
        _same_as_embedding(stored[head], wte, wte_name)
    pieces: dict[tuple[str, ...], dict[str, tuple[Stored, Entry]]] = {}
    for name, entry in entries.items():
        parts = pieces.setdefault(entry.path, {})
        parts[name] = stored[name], entry
        first = next(iter(parts))
        if stored[name].code != stored[first].code:
            raise InputError(
                f"{stored[name].file}: tensor {name}: dtype {stored[name].code}, but {first} has {stored[first].code}"
            )
    return StoredModel(config, pieces)


def _embedding(fields: Fields) -> str:
    """Name of the embedding's tensor."""
    return "model.embed_tokens.weight" if fields.get("model_type") in FAMILIES else "transformer.wte.weight"


def _assembled(parts: dict[str, tuple[Stored, Entry]]) -> np.ndarray:
    """One array of ours from the tensors that it is made of."""
    made = None
    for name, (tensor, entry) in parts.items():
        part = to_ours(read_tensor(name, tensor), entry).view(DTYPES[tensor.code])
        if entry.whole is None:
            return part
        made = np.empty(entry.whole, part.dtype) if made is None else made
        made[entry.at] = part
    assert made is not None
    return made


def save_huggingface(
    folder: str | os.PathLike[str], params: Params, config: ModelConfig, *, shard_bytes: int = 5_000_000_000
) -> None:
    """Write a folder that the reference's own loader accepts: config.json and model.safetensors, sharded if large.

    Any tree with the structure of the parameters can be written, for example gradients; each tensor keeps its dtype.
    A new folder is complete or absent. In a folder that holds a model of this kind, config.json and the weights that
    belong to it are replaced and every other file stays. What is there and was not written by this function is renamed
    to NAME.replaced instead of being deleted. A non-empty folder of another kind is refused. Links are followed.

    Args:
      folder: where to write; its parents are created.
      params: nested dict of arrays, f32, bf16 or f16.
      config: of the model.
      shard_bytes: maximum bytes per file.

    Raises:
      InputError: an array that does not fit `config`, or a folder that holds something else or cannot be written.
    """
    target = Path(os.path.realpath(local_path(folder)))
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file, expected a folder")
    there = target.is_dir()
    try:
        if there and not all(is_scratch(x, target.name) for x in target.iterdir()) and not _is_export(target):
            raise InputError(f"{target}: is not empty and holds no earlier export; choose another folder")
    except OSError as error:
        raise InputError(f"{target}: cannot be read ({error.strerror or error})") from error
    check_float(params, "export")
    check_format(config)
    planned = _plan(params, config)
    dtype = np.dtype(params["wte"].dtype).name
    try:
        with scratch_folder(target if there else target.parent, target.name) as fresh:
            write_tensors(fresh, planned, shard_bytes)
            (fresh / "config.json").write_text(_config_text(config, dtype))
            if there:
                _replace(fresh, target)
            else:
                fresh.rename(target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error


TRAINING = ("param_dtype", "compute_dtype", "backprop_depth", "initial_output", "loop.low_backprop")
"""Fields of ModelConfig that not every folder holds, or not in these words, beside those that only say where plain
layers are cut."""


def check_format(config: ModelConfig) -> None:
    """Refuse a config that its folder could not give back, so that no other model is exported without a word.

    Raises:
      InputError: the first field that a public format does not hold.
    """
    names = table(config)
    fields = model_fields(config, "float32")
    try:
        again = model_config(fields, config.rows, config.param_dtype, "config", names)
    except InputError as error:
        raise InputError(f"no public format holds this model ({error}); see docs/families.md") from error
    ignored: tuple[str, ...] = TRAINING
    if config.loop.injection == "none":
        ignored += ("prelude_layers", "core_layers", "coda_layers", "vocab_size", "padded_vocab_size")
    for field, (ours, theirs) in differences(config, again).items():
        same = isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-9)
        if field not in ignored and not same:
            raise InputError(f"{field} = {ours!r}: no public format holds this, see docs/families.md")


def is_exportable(config: ModelConfig) -> bool:
    """Whether `save_huggingface` can write a model of this config."""
    try:
        check_format(config)
    except InputError:
        return False
    return True


def _plan(params: Params, config: ModelConfig) -> dict[str, Planned]:
    """The tensors to write, by the reference's names; checks that `params` fits `config`."""
    arrays = flatten_dict(params)
    planned = {}
    entries = table(config)
    for name, entry in entries.items():
        label, shape = _label(entry.path), entry.whole or entry.ours
        x = arrays.get(entry.path)
        if x is None:
            raise InputError(f"{label}: missing; the config asks for shape {shape}")
        if tuple(x.shape) != shape:
            raise InputError(f"{label}: shape {tuple(x.shape)}, but the config asks for {shape}")
        if np.dtype(x.dtype) not in CODES:
            raise InputError(f"{label}: dtype {x.dtype}: must be one of {', '.join(d.name for d in CODES)}")
        planned[name] = Planned(np.dtype(x.dtype), entry.shape, functools.partial(_theirs, x, entry))
    for path in arrays.keys() - {entry.path for entry in entries.values()}:
        raise InputError(f"{_label(path)}: has no place in a model of this config")
    if parcae.holds(config) and config.tie_embeddings:
        planned[HEAD] = planned["transformer.wte.weight"]
    if parcae.holds(config) or (config.loop.injection == "linear" and is_sandwich(config)):
        buffer = rotary_buffer(config)
        planned[ROTARY] = Planned(buffer.dtype, buffer.shape, lambda: buffer)
    return dict(sorted(planned.items()))


def _label(path: tuple[str, ...]) -> str:
    return "params" + "".join(f"[{part!r}]" for part in path)


def _theirs(x: jax.Array, entry: Entry) -> np.ndarray:
    values = np.ascontiguousarray(np.asarray(x) if entry.at is None else np.asarray(x)[entry.at])
    return to_theirs(values.view(f"u{values.itemsize}"), entry)


def _config_text(config: ModelConfig, dtype: str) -> str:
    return json.dumps(model_fields(config, dtype), indent=2) + "\n"


def _is_export(folder: Path) -> bool:
    """Whether `folder` holds a model that may be replaced: one of the paper's kind, or one that was written here."""
    try:
        return read_fields(folder).get("model_type") == FIXED["model_type"] or bool(_own(folder))
    except InputError:
        return False


def _own(folder: Path) -> set[str]:
    """Names of the files that `save_huggingface` wrote: all of a model whose config.json it would write just so."""
    try:
        fields = read_fields(folder)
        weights = stored_tensors(folder)
        config = model_config(fields, fields.get("padded_vocab_size"), tensors=weights)
        if (folder / "config.json").read_text() != _config_text(config, str(fields.get("torch_dtype"))):
            return set()
    except (InputError, OSError):
        return set()
    files = {tensor.file.name for tensor in weights.values()}
    return {"config.json", *files, *([] if SINGLE in files else [INDEX])}


def _replace(fresh: Path, target: Path) -> None:
    """Put the files of `fresh` in the place of an earlier model in `target`.

    The file that a loader begins with goes first and comes last, so that no moment shows a mixture of two models.
    """
    own, new = _own(target), sorted(path.name for path in fresh.iterdir())
    start = INDEX if INDEX in new else SINGLE
    for name in sorted({SINGLE, INDEX, *own, *new}, key=lambda name: name not in (SINGLE, INDEX)):
        path = target / name
        if name in own and not path.is_symlink():
            if name != "config.json":  # there is always one, as that says what the folder is
                path.unlink()
        elif os.path.lexists(path):
            set_aside(path)
    for name in sorted(new, key=lambda name: (name == start, name)):
        (fresh / name).replace(target / name)


def _bare_names(stored: dict[str, Stored]) -> dict[str, Stored]:
    named: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if bare(name) in named:
            raise InputError(f"{tensor.file}: tensor {bare(name)} is stored twice, with and without a prefix")
        named[bare(name)] = tensor
    return named


def _same_as_embedding(head: Stored, wte: Stored, name: str) -> None:
    tied = "tie_embeddings" if name.startswith("transformer.") else "tie_word_embeddings"
    if head[1:3] != wte[1:3] or not np.array_equal(read_tensor(HEAD, head), read_tensor(name, wte)):
        raise InputError(f"{head.file}: tensor {HEAD} differs from {name}, though {tied} is true")


def _shown(tensor: Stored) -> str:
    return f"{tensor.code} {list(tensor.shape)}"


def _host() -> jax.Device | None:
    """The CPU: a checkpoint may be larger than the memory of one accelerator. None: the default device."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
