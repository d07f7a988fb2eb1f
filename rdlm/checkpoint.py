"""Run folders: what a training run leaves behind and everything else starts from. The only room that imports orbax.

    config.json   metrics.jsonl   tokenizer/   checkpoints/STEP/{params,optimizer,meta}   loss_by_depth.json

`meta` is JSON: the full config, the tokenizer's hash, and the step, which is also the position in the data.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from rdlm.config import InputError, ModelConfig, RunConfig, from_json, to_json
from rdlm.model import Params, init_params
from rdlm.optim import AverageState, average_of, optimizer
from rdlm.tokenizer import Tokenizer

logging.getLogger("absl").setLevel(logging.ERROR)  # orbax tells every detail of every save at level INFO and WARNING


class Checkpoints:
    """Saves and restores a training run's state, in the background. Use as a context manager."""

    def __init__(self, folder: Path, keep: int, handlers: dict[str, ocp.CheckpointHandler] | None = None):
        """Open `folder`/checkpoints, keeping the newest `keep`. `handlers`: other than orbax's own, per item.

        Raises:
          InputError: the folder cannot be made or written.
        """
        path = (folder / "checkpoints").absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # other processes do the same
        except OSError as error:
            raise InputError(f"run folder {folder}: cannot be written ({error.strerror})") from error
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.wait()
        self.manager.close()

    def wait(self) -> None:
        """Return when everything saved so far is complete on disk."""
        self.manager.wait_until_finished()

    def saved_at(self, step: int) -> float:
        """When `step` was completed, in seconds as files tell it."""
        return Path(self.manager.directory / str(step)).stat().st_mtime

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, params: Params, optimizer: Any, meta: dict[str, Any]) -> None:
        """Save under `step`; returns when the arrays are copied, and writes in the background."""
        if step == self.latest:
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Params, Any, dict[str, Any]]:
        """(params, optimizer state, meta) of `step`; the first two arguments give shapes, dtypes and shardings.

        Raises:
          InputError: files are damaged, or of another shape.
        """
        with _damaged(self.manager.directory / str(step)):
            found = self.manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    optimizer=ocp.args.StandardRestore(optimizer),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        return found["params"], found["optimizer"], found["meta"]


def write_config(folder: Path, run: RunConfig) -> None:
    """Write `folder`/config.json, whole or not at all."""
    partial = folder / "config.json.partial"
    partial.write_text(to_json(run))
    partial.replace(folder / "config.json")


def read_config(folder: Path) -> RunConfig:
    """The RunConfig of a run folder.

    Raises:
      InputError: no such folder, not a run folder, or a config that is not valid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"run folder {folder}: does not exist; train one with `python experiments/train.py PRESET`")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"run folder {folder}: has no config.json, so it is not (yet) a run folder")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); put the run's own config.json back") from error
    return from_json(RunConfig, text, str(path))


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a run folder, ascending."""
    path = Path(folder) / "checkpoints"
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit() and (p / "_CHECKPOINT_METADATA").exists())


def load_checkpoint(
    run_folder: str | Path, step: int | None = None, ema: bool = False
) -> tuple[Params, ModelConfig]:  # fmt: skip
    """(params, config) from a run folder alone, on whatever devices there are.

    Args:
      run_folder: made by `experiments/train.py` or `experiments/convert_huggingface.py`.
      step: which checkpoint; None is the newest.
      ema: the moving average of the parameters, which the run kept (optimizer.ema_decay), in their place.

    Raises:
      InputError: not a run folder, no complete checkpoint, no such step, no average, or files that are damaged.
    """
    run = read_config(Path(run_folder))
    if ema:
        return _load_average(run, run_folder, step), run.model
    config = run.model
    path = _checkpoint(run_folder, step) / "params"
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with _damaged(path), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target), config


def _load_average(run: RunConfig, run_folder: str | Path, step: int | None) -> Params:
    """The averaged parameters of a checkpoint; the rest of its optimizer state is left on disk."""
    if not run.optimizer.ema_decay:
        raise InputError(
            f"run folder {run_folder}: kept no moving average of its weights (optimizer.ema_decay = 0.0); leave out "
            "ema, or train a run with --optimizer.ema-decay 0.999"
        )
    path = _checkpoint(run_folder, step) / "optimizer"
    sharding, dtype = SingleDeviceSharding(jax.local_devices()[0]), jnp.dtype(run.model.param_dtype)

    def wanted(x: Any) -> Any:
        if not isinstance(x, AverageState):
            return ocp.PLACEHOLDER
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=sharding), x.average)
        return AverageState(ocp.PLACEHOLDER, shapes)

    def fresh(key: jax.Array) -> Any:
        return optimizer(run.optimizer, run.steps).init(init_params(run.model, key))

    state = jax.eval_shape(fresh, jax.random.key(0))
    target = jax.tree.map(wanted, state, is_leaf=lambda x: isinstance(x, AverageState))
    arguments = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))
    with _damaged(path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return average_of(checkpointer.restore(path, args=arguments))


def read_meta(run_folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """What was saved beside the arrays of a checkpoint: `config`, `tokenizer` (its hash), `step`, perhaps `source`.

    Raises:
      InputError: no complete checkpoint, no such step, or a file that is damaged.
    """
    path = _checkpoint(run_folder, step) / "meta"
    with _damaged(path), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        meta = checkpointer.restore(path)
        if not isinstance(meta, dict):
            raise ValueError(f"an object was saved, this is a {type(meta).__name__}")
        return meta


def load_tokenizer(run_folder: str | Path, step: int | None = None) -> Tokenizer:
    """The tokenizer of a run folder, known to be the one its checkpoint was trained with.

    Raises:
      InputError: no checkpoint, no tokenizer, or one that does not match the checkpoint.
    """
    trained = read_meta(run_folder, step).get("tokenizer")
    folder = Path(run_folder) / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    if trained is not None and trained != tokenizer.hash:  # a converted model may have come without one
        raise InputError(
            f"{folder}: this tokenizer ({tokenizer.hash[:8]}) is not the one the checkpoint was trained with "
            f"({trained[:8]}); put that one back"
        )
    return tokenizer


def _checkpoint(run_folder: str | Path, step: int | None) -> Path:
    folder, steps = Path(run_folder), saved_steps(Path(run_folder))
    if not steps:
        raise InputError(
            f"run folder {folder}: has no complete checkpoint yet; run its training until it has saved one"
        )
    if step is not None and step not in steps:
        raise InputError(f"step = {step}: not saved in {folder}; there are {', '.join(map(str, steps))}")
    return (folder / "checkpoints" / str(steps[-1] if step is None else step)).absolute()


def save_parameters(
    run_folder: str | Path, params: Params, run: RunConfig, meta: dict[str, Any], step: int = 0
) -> None:
    """Write a run folder that holds parameters only (a converted model): load_checkpoint reads it, training does not.

    Writes few arrays at a time, so that memory peaks little above the parameters themselves.

    Raises:
      InputError: the folder already holds checkpoints, or cannot be written.
    """
    folder = Path(run_folder)
    if saved_steps(folder):
        raise InputError(f"run folder {folder}: already holds checkpoints; choose another")
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    handlers: dict[str, ocp.CheckpointHandler] = {
        "params": ocp.StandardCheckpointHandler(save_concurrent_gb=max(1, -(-largest // 10**9))),
        "meta": ocp.JsonCheckpointHandler(),
    }
    with Checkpoints(folder, keep=1, handlers=handlers) as checkpoints:
        checkpoints.manager.save(
            step, args=ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
        )
    write_config(folder, run)


@contextlib.contextmanager
def _damaged(path: Any) -> Iterator[None]:
    """Name the checkpoint, and the way out, in whatever goes wrong while reading it."""
    previous = sys.unraisablehook
    # After the first failure, reads still under way report to an event loop that is gone: nothing to tell anyone.
    sys.unraisablehook = lambda late: None if "Event loop is closed" in str(late.exc_value) else previous(late)
    try:
        yield
    except InputError:
        sys.unraisablehook = previous
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"checkpoint {path}: damaged or of another shape ({first[:200]}); use another step, or delete this one"
        ) from error
    else:
        sys.unraisablehook = previous


def as_abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with `shardings`, as restore targets."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s), tree, shardings)
