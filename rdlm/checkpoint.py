"""Run folders: what a training run leaves behind and everything else starts from. The only room that imports orbax.

    config.json   metrics.jsonl   tokenizer/   checkpoints/STEP/{params,optimizer,meta}   loss_by_depth.json

`meta` is JSON: the full config, the tokenizer's hash, the step, the state of the data, and sums of all stored bits.
Every reader adds the bits up again: a flipped bit is as much damage as a file cut short.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import SingleDeviceSharding

from rdlm.config import InputError, ModelConfig, RunConfig, from_json, to_json
from rdlm.model import Params, init_params
from rdlm.optim import AverageState, average_of, optimizer
from rdlm.runtime import RunError, exchange, is_first
from rdlm.tokenizer import Tokenizer

# Orbax tells every detail of every save at level INFO and WARNING, and at ERROR the traceback of what it raises anyway.
logging.getLogger("absl").setLevel(logging.CRITICAL)
_PARTIAL = ".orbax-checkpoint-tmp"


class SaveError(RunError):
    """A checkpoint could not be written. One line; with room made the same command goes on, so the exit code is 1."""


class Restored(NamedTuple):
    """What was read back of a checkpoint."""

    step: int
    params: Params
    optimizer: Any
    meta: dict[str, Any]


class Checkpoints:
    """Saves and restores a training run's state, in the background. Use as a context manager."""

    def __init__(self, folder: Path, keep: int, handlers: dict[str, ocp.CheckpointHandler] | None = None):
        """Open `folder`/checkpoints, keeping the newest `keep`. `handlers`: other than orbax's own, per item.

        What an earlier process did not finish writing is removed.

        Raises:
          InputError: the folder cannot be made or written.
        """
        self.folder, path = folder, (folder / "checkpoints").absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # other processes do the same
        except OSError as error:
            raise InputError(f"run folder {folder}: cannot be written ({error.strerror})") from error
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        try:
            self.wait()
        except SaveError:
            if kind is None:
                raise
        finally:
            with contextlib.suppress(Exception):  # what went wrong has been said
                self.manager.close()

    def wait(self) -> None:
        """Return when everything saved so far is complete on disk.

        Raises:
          SaveError: it could not be written.
        """
        with self._saving():
            self.manager.wait_until_finished()

    def check(self) -> None:
        """Say at once, not at the next save, that the last one failed in the background. Costs nothing.

        Raises:
          SaveError: it could not be written.
        """
        if not self.manager.is_saving_in_progress():
            self.wait()

    def saved_at(self, step: int) -> float:
        """When `step` was completed, in seconds as files tell it."""
        return Path(self.manager.directory / str(step)).stat().st_mtime

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, params: Params, optimizer: Any, meta: dict[str, Any]) -> None:
        """Save under `step`; returns when the arrays are copied, and writes in the background.

        Raises:
          SaveError: the one before, or the beginning of this one, could not be written.
        """
        if step == self.latest:
            return
        sums = {"params": int(_sum(params)), "optimizer": int(_sum(optimizer))}
        with self._saving():
            begun = self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    optimizer=ocp.args.StandardSave(optimizer),
                    meta=ocp.args.JsonSave(meta | {"sums": sums}),
                ),
            )
        if not begun:
            raise RuntimeError(f"checkpoint {step} was not saved: {self.latest} is newer")

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # where all the other arrays' failures would go
            directory = Path(self.manager.directory)
            for partial in directory.glob("*" + _PARTIAL):  # it is of no use, and the disk may be full of it
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(
                f"run folder {self.folder}: a checkpoint could not be saved ({_first_line(error)}); nothing saved is "
                f"lost, the newest is {max(saved_steps(self.folder), default='none')}; make room, then run the same "
                "command again"
            ) from error

    def restore(
        self, params: Any, optimizer: Any, say: Callable[[str], None], good: Callable[[dict[str, Any]], bool]
    ) -> Restored | None:
        """The newest checkpoint that is whole on all processes and `good`; None when nothing is saved.

        Newer ones are set aside as STEP.damaged or STEP.abandoned and said, one line each: they neither shadow what
        is used nor stand in the way of its successors. All processes must call this together; they use the same step.

        Args:
          params, optimizer: shapes, dtypes and shardings.
          say: gets the lines.
          good: of a checkpoint's meta: whether to go on from it.

        Raises:
          InputError: none of them can be read; nothing is set aside then.
        """
        aside: list[tuple[int, str, str]] = []
        steps = json.loads(exchange(json.dumps(sorted(self.manager.all_steps(), reverse=True)))[0])
        for step in steps:
            found, problem = None, ""
            try:
                with _reading():
                    found = self._read(step, params, optimizer)
            except Exception as error:  # whatever it is: all processes must hear of it
                problem = f"damaged or of another shape ({_first_line(error)})"
            problem = next(filter(None, exchange(problem)), "")
            if found is not None and not problem:  # sums are over all processes: only once none of them has failed
                problem = _wrong_sum(found.meta, params=found.params, optimizer=found.optimizer)
            if problem or found is None:
                aside.append((step, "damaged", problem))
            elif not good(found.meta):
                aside.append((step, "abandoned", "saved while updates were being skipped"))
            else:
                self._set_aside(aside, say, f"step {step}")
                return found
        if any(suffix == "damaged" for _, suffix, _ in aside):
            raise InputError(
                f"checkpoint {self.manager.directory}/{aside[0][0]}: {aside[0][2]}; none of {sorted(steps)} can be "
                "used: put a whole one back, or choose another --run-dir"
            )
        self._set_aside(aside, say, "a fresh start")
        return None

    def _read(self, step: int, params: Any, optimizer: Any) -> Restored:
        """This process's part of a checkpoint, without waiting for the others: one may find it damaged, one not."""
        path, index = Path(self.manager.directory) / str(step), jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
        arrays = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(arrays, multiprocessing_options=alone) as reader:
            restored = [
                reader.restore(path / name, args=ocp.args.StandardRestore(target))
                for name, target in (("params", params), ("optimizer", optimizer))
            ]
        text = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(text, multiprocessing_options=alone) as reader:
            meta = _mapping(reader.restore(path / "meta"))
        return Restored(step, restored[0], restored[1], meta)

    def _set_aside(self, those: list[tuple[int, str, str]], say: Callable[[str], None], instead: str) -> None:
        """Rename checkpoints (step, suffix, why)."""
        for step, suffix, why in those:
            path, number = Path(self.manager.directory) / str(step), 1
            name = f"{step}.{suffix}"
            if is_first():
                while path.with_name(name).exists():
                    number += 1
                    name = f"{step}.{suffix}{number}"
                path.rename(path.with_name(name))
            name = exchange(name)[0]
            while path.exists():  # a mounted bucket shows it late on other hosts
                time.sleep(0.5)
            say(f"checkpoint {step}: {why}; it is now {name}, and {instead} is used")
        if those:
            self.manager.reload()


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
      step: which checkpoint; None is the newest, and nothing else is taken silently if that one is damaged.
      ema: the moving average of the parameters, which the run kept (optimizer.ema_decay), in their place.

    Raises:
      InputError: not a run folder, no complete checkpoint, no such step, no average, or files that are damaged (the
        message says which step is there instead).
    """
    run = read_config(Path(run_folder))
    if ema:
        return _load_average(run, run_folder, step), run.model
    config = run.model
    path, meta = _checkpoint(run_folder, step), read_meta(run_folder, step)
    way_out = _way_out(run_folder, int(path.name))
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
    with _damaged(path, way_out), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(path / "params", target)
        if problem := _wrong_sum(meta, params=params):
            raise ValueError(problem)
        return params, config


def _load_average(run: RunConfig, run_folder: str | Path, step: int | None) -> Params:
    """The averaged parameters of a checkpoint; the rest of its optimizer state is left on disk."""
    if not run.optimizer.ema_decay:
        raise InputError(
            f"run folder {run_folder}: kept no moving average of its weights (optimizer.ema_decay = 0.0); leave out "
            "ema, or train a run with --optimizer.ema-decay 0.999"
        )
    path = _checkpoint(run_folder, step)
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
    way_out = _way_out(run_folder, int(path.name))
    with _damaged(path, way_out), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return average_of(checkpointer.restore(path / "optimizer", args=arguments))


def read_meta(run_folder: str | Path, step: int | None = None) -> dict[str, Any]:
    """What was saved beside the arrays of a checkpoint: `config`, `tokenizer` (its hash), `step`, perhaps `source`.

    Raises:
      InputError: no complete checkpoint, no such step, or a file that is damaged.
    """
    path = _checkpoint(run_folder, step)
    way_out = _way_out(run_folder, int(path.name))
    with _damaged(path, way_out), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return _mapping(checkpointer.restore(path / "meta"))


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


def _way_out(run_folder: str | Path, damaged: int) -> str:
    others = [step for step in saved_steps(Path(run_folder)) if step != damaged]
    before = max((step for step in others if step < damaged), default=max(others, default=None))
    if before is None:
        return "there is no other one: restore it from a copy, or delete it and train again"
    return f"ask for step {before}, or let training go on: it sets this one aside"


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
def _damaged(path: Any, way_out: str) -> Iterator[None]:
    """Name the checkpoint, and the way out, in whatever goes wrong while reading it."""
    try:
        with _reading():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"checkpoint {path}: damaged or of another shape ({_first_line(error)}); {way_out}") from error


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """After the first failure, reads still under way report to an event loop that is gone: nothing to tell anyone."""
    previous = sys.unraisablehook
    sys.unraisablehook = lambda late: None if "Event loop is closed" in str(late.exc_value) else previous(late)
    yield
    sys.unraisablehook = previous  # not after an exception: they come later


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _mapping(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise ValueError(f"an object was saved, this is a {type(meta).__name__}")
    return meta


@jax.jit
def _sum(tree: Any) -> Array:
    """All bits of all arrays as unsigned words, added up modulo 2^32: the same on any mesh, in any order of adding."""
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    sums = [
        jnp.sum(jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]), dtype=jnp.uint32)
        for x in jax.tree.leaves(tree)
    ]
    return jnp.sum(jnp.stack(sums), dtype=jnp.uint32)


def _wrong_sum(meta: dict[str, Any], **trees: Any) -> str:
    """Which of the trees is not what was saved; "" when all are, or when it was saved before sums were kept."""
    for name, tree in trees.items():
        if "sums" in meta and int(_sum(tree)) != meta["sums"][name]:
            return f"damaged (other bits in {name} than were saved)"
    return ""


def as_abstract(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of `tree` with `shardings`, as restore targets."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s), tree, shardings)
