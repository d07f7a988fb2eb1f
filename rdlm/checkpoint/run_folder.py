"""Read run folders, as all commands but training do: configuration, steps, parameters, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from rdlm.checkpoint.integrity import Meta, as_mapping, naming, wrong_sum
from rdlm.config import InputError, ModelConfig, RunConfig, from_json, local_path, to_json
from rdlm.model import Params, init_params
from rdlm.optim import AverageState, average_of, optimizer
from rdlm.runtime import write_atomically
from rdlm.tokenizer import Tokenizer


def write_config(folder: Path, run: RunConfig) -> None:
    """Write `folder`/config.json."""
    write_atomically(folder / "config.json", to_json(run))


def read_config(folder: Path) -> RunConfig:
    """The RunConfig of a run folder.

    Raises:
      InputError: no such folder, not a run folder, or a config that is not valid.
    """
    folder = local_path(folder)
    if folder.is_file():
        raise InputError(f"run folder {folder}: is a file; give the folder that holds it, {_run_around(folder)}")
    if not folder.is_dir():
        raise InputError(f"run folder {folder}: does not exist; train a model there first")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"run folder {folder}: has no config.json, so it is not (yet) a run folder{_hint(folder)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); put the run's own config.json back") from error
    if _is_huggingface_config(text):
        raise InputError(f"{folder}: a Hugging Face folder; convert it first (experiments/convert_huggingface.py)")
    return from_json(RunConfig, text, str(path))


def _run_around(path: Path) -> Path:
    """The run folder that `path` lies in, or else the folder that it lies in."""
    around = list(path.absolute().parents)[:3]  # checkpoints/STEP/params is the deepest that somebody may give
    return next((folder for folder in around if (folder / "checkpoints").is_dir()), path.parent)


def _hint(folder: Path) -> str:
    """What a folder is that was given for a run folder."""
    inside = sorted(config.parent.name for config in folder.glob("*/config.json"))
    if (_run_around(folder) / "config.json").is_file():
        return f"; it is a part of {_run_around(folder)}: give that"
    if inside:
        return f"; it holds {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}: give one of them"
    kinds = {"manifest.json": "prepared data", "adapter_config.json": "an adapter", "tokenizer.json": "a tokenizer"}
    return next((f"; it holds {kind}" for name, kind in kinds.items() if (folder / name).is_file()), "")


def _is_huggingface_config(text: str) -> bool:
    """Whether a config.json is that of a Hugging Face folder."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and "model_type" in tree


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a run folder, ascending."""
    path = local_path(folder) / "checkpoints"
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists())


def load_checkpoint(run_folder: str | Path, step: int | None = None, ema: bool = False) -> tuple[Params, ModelConfig]:
    """(params, config) of a run folder, on any number of devices.

    Args:
      run_folder: made by training, or by converting a model.
      step: which checkpoint; None: the newest. If that is damaged, no other is used in its place.
      ema: load the moving average of the parameters, if the run kept one (optimizer.ema_decay).

    Raises:
      InputError: not a run folder, no complete checkpoint, no such step, no average, or damaged files (the message
        names another step that can be loaded).
    """
    run = read_config(local_path(run_folder))
    if ema:
        return _load_average(run, run_folder, step), run.model
    config = run.model
    path, meta = _checkpoint(run_folder, step), read_meta(run_folder, step)
    way_out = _way_out(run_folder, int(path.name))
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with naming(path, way_out), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path / "params", target)
        if problem := wrong_sum(meta, params=params):
            raise ValueError(problem)
        return params, config


def _load_average(run: RunConfig, run_folder: str | Path, step: int | None) -> Params:
    """The averaged parameters of a checkpoint, without the rest of its optimizer state."""
    if not run.optimizer.ema_decay:
        raise InputError(
            f"run folder {run_folder}: kept no moving average of its weights (optimizer.ema_decay = 0.0); leave out "
            "ema, or train a run with --optimizer.ema-decay 0.999"
        )
    path = _checkpoint(run_folder, step)
    sharding, dtype = SingleDeviceSharding(jax.local_devices()[0]), jnp.dtype(run.model.param_dtype)

    def wanted(x: PyTree) -> PyTree:
        if not isinstance(x, AverageState):
            return ocp.PLACEHOLDER
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=sharding), x.average)
        return AverageState(ocp.PLACEHOLDER, shapes)

    def fresh(key: jax.Array) -> PyTree:
        return optimizer(run.optimizer, run.steps).init(init_params(run.model, key))

    state = jax.eval_shape(fresh, jax.random.key(0))
    target = jax.tree.map(wanted, state, is_leaf=lambda x: isinstance(x, AverageState))
    arguments = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    way_out = _way_out(run_folder, int(path.name))
    with naming(path, way_out), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return average_of(checkpointer.restore(path / "optimizer", args=arguments))


def read_meta(run_folder: str | Path, step: int | None = None) -> Meta:
    """The JSON saved beside the arrays of a checkpoint.

    Raises:
      InputError: no complete checkpoint, no such step, or a file that is damaged.
    """
    path = _checkpoint(run_folder, step)
    way_out = _way_out(run_folder, int(path.name))
    with naming(path, way_out), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return as_mapping(checkpointer.restore(path / "meta"))


def load_tokenizer(run_folder: str | Path, step: int | None = None) -> Tokenizer:
    """The tokenizer of a run folder, checked to be the one that its checkpoint was trained with.

    Raises:
      InputError: no checkpoint, no tokenizer, or one that does not match the checkpoint.
    """
    trained = read_meta(run_folder, step).get("tokenizer")
    folder = local_path(run_folder) / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    if trained is not None and trained != tokenizer.hash:  # None: a model that was converted without one
        raise InputError(
            f"{folder}: this tokenizer ({tokenizer.hash[:8]}) is not the one the checkpoint was trained with "
            f"({trained[:8]}); put that one back"
        )
    return tokenizer


def _checkpoint(run_folder: str | Path, step: int | None) -> Path:
    folder, steps = local_path(run_folder), saved_steps(local_path(run_folder))
    if not steps:
        raise InputError(f"run folder {folder}: has no complete checkpoint yet; train until one is saved")
    if step is not None and step not in steps:
        raise InputError(f"step = {step}: not saved in {folder}; there are {', '.join(map(str, steps))}")
    return (folder / "checkpoints" / str(steps[-1] if step is None else step)).absolute()


def _way_out(run_folder: str | Path, damaged: int) -> str:
    others = [step for step in saved_steps(local_path(run_folder)) if step != damaged]
    before = max((step for step in others if step < damaged), default=max(others, default=None))
    if before is None:
        return "there is no other: restore it from a copy, or train again in another folder"
    return f"ask for step {before}, or resume training, which renames this one"
