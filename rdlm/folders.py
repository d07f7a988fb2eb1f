"""Model folders of both kinds, run folders and Hugging Face folders: read, and written with their tokenizer files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp

from rdlm.checkpoint import save_parameters
from rdlm.config import DataConfig, InputError, ModelConfig, RunConfig, local_path, one_line
from rdlm.hf import is_huggingface, load_huggingface, save_huggingface
from rdlm.model import Params, cast, quantization
from rdlm.runtime import complete_folder, require_empty, set_aside
from rdlm.tokenizer import Tokenizer
from rdlm.weights import read_run

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def local_folder(name: str) -> Path:
    """The folder called `name`, or a local copy of the hub's model of that name.

    Raises:
      InputError: neither a folder nor a model on the hub, or huggingface_hub is not installed.
    """
    folder = local_path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or folder.exists():
        raise InputError(f"{name}: no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise InputError(
            f"{name}: no such folder; to fetch a model of that name install huggingface_hub (pip install 'rdlm[hf]')"
        ) from error
    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # its own errors, and those of the HTTP library beneath it
        raise InputError(f"{name}: no such folder, and the hub does not provide it ({one_line(error)})") from error


def check_model_folder(folder: Path) -> None:
    """Raise InputError if `folder` is of neither kind."""
    if not is_huggingface(folder) and not (folder / "checkpoints").is_dir():
        raise InputError(
            f"{folder}: neither a Hugging Face model folder (config.json with model_type) nor a run folder"
        )


def read_model(folder: Path, step: int | None = None) -> tuple[Params, ModelConfig]:
    """(params, config) of either kind of folder; what a run learnt is merged with its base."""
    return load_huggingface(folder) if is_huggingface(folder) else read_run(folder, step)


def describe(params: Params) -> str:
    """'75 tensors, 0.16 M parameters, float32'."""
    leaves = jax.tree.leaves(params)
    dtypes = "/".join(sorted({str(x.dtype) for x in leaves}))
    return f"{len(leaves)} tensors, {sum(x.size for x in leaves) / 1e6:,.2f} M parameters, {dtypes}"


def broken(params: Params) -> list[str]:
    """A line for the human if values are not finite: such a model computes nothing."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = [jax.tree_util.keystr(where) for where, x in leaves if not jnp.isfinite(x).all()]
    return [f"note: NaN or infinity in {len(found)} of {len(leaves)} tensors, first {found[0]}"] if found else []


def one_dtype(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig, list[str]]:
    """Params in the smallest dtype that holds all of their values, since a run folder has one; config; notes."""
    found = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
    if len(found) == 1:
        return params, config, []
    wide = str(jnp.result_type(*found))
    note = f"note: the tensors are of {' and '.join(found)}; the run folder holds {wide}, in which no value changes"
    return cast(params, wide), dataclasses.replace(config, param_dtype=wide), [note]  # type: ignore[arg-type]


def write_run(
    folder: Path, params: Params, config: ModelConfig, source: Path, data: DataConfig | None = None
) -> list[str]:
    """Write a new run folder with parameters only, and the tokenizer of the folder `source`.

    data: what the model is evaluated on; None: the embedded corpus.

    Returns:
      Lines for the human: what became of the tokenizer.

    Raises:
      InputError: `folder` is not empty or cannot be written, or the tokenizer does not fit the model.
    """
    require_empty(folder)
    with complete_folder(folder.resolve(), alike=False) as partial:
        copy_tokenizer(_tokenizer_folder(source), partial / "tokenizer")
        tokenizer, notes = _fitting(partial / "tokenizer", config, source)
        size = config.vocab_size if tokenizer is None else tokenizer.vocab_size
        data = data or DataConfig(tokenizer_size=size, sequence_length=min(256, config.max_length))
        run = RunConfig(model=config, data=data, steps=1, run_dir=str(folder))
        identity = None if tokenizer is None else tokenizer.hash
        meta = {"config": dataclasses.asdict(run), "tokenizer": identity, "step": 0, "source": str(source)}
        meta |= {"quantized": found._asdict()} if (found := quantization(params)) else {}
        save_parameters(partial, params, run, json.loads(json.dumps(meta)))
    return notes


def write_huggingface(folder: Path, params: Params, config: ModelConfig, source: Path) -> None:
    """Write a Hugging Face folder, and the tokenizer files of the folder `source` beside the weights.

    Raises:
      InputError: see `save_huggingface`; or the tokenizer has more entries than the model.
    """
    tokenizer = _tokenizer_folder(source)
    if not is_huggingface(source) and (tokenizer / "tokenizer.json").exists():
        Tokenizer.load(tokenizer).check_fits(config.vocab_size, source)
    save_huggingface(folder, params, config)
    copy_tokenizer(tokenizer, folder)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files that `source` has; others of these names in `target` are set aside."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            continue
        content = (source / name).read_bytes()
        if os.path.lexists(target / name):
            if (target / name).is_file() and (target / name).read_bytes() == content:
                continue
            set_aside(target / name)
        (target / name).write_bytes(content)


def _tokenizer_folder(source: Path) -> Path:
    return source if is_huggingface(source) else source / "tokenizer"


def _fitting(folder: Path, config: ModelConfig, source: Path) -> tuple[Tokenizer | None, list[str]]:
    """A copied tokenizer and what to say of it; None if there is none, or none that rdlm can use.

    Raises:
      InputError: it has more entries than the model.
    """
    try:
        found = Tokenizer.load(folder)
    except InputError as error:
        return None, [f"note: no tokenizer that rdlm can use was copied ({str(error).partition(': ')[2]})"]
    found.check_fits(config.vocab_size, source)
    if found.vocab_size == config.vocab_size:
        return found, []
    rest = f"note: the tokenizer has {found.vocab_size} entries, the model {config.vocab_size}: the rest is masked"
    return found, [rest]
