"""Saving and restoring a training run, in the background and among several processes."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from rdlm.checkpoint.integrity import as_mapping, bit_sum, reading, wrong_sum
from rdlm.checkpoint.run_folder import saved_steps, write_config
from rdlm.config import InputError, RunConfig, one_line
from rdlm.model import Params
from rdlm.runtime import RunError, exchange, is_first

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
        sums = {"params": int(bit_sum(params)), "optimizer": int(bit_sum(optimizer))}
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
                f"run folder {self.folder}: a checkpoint could not be saved ({one_line(error)}); nothing saved is "
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
                with reading():
                    found = self._read(step, params, optimizer)
            except Exception as error:  # whatever it is: all processes must hear of it
                problem = f"damaged or of another shape ({one_line(error)})"
            problem = next(filter(None, exchange(problem)), "")
            if found is not None and not problem:  # sums are over all processes: only once none of them has failed
                problem = wrong_sum(found.meta, params=found.params, optimizer=found.optimizer)
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
            meta = as_mapping(reader.restore(path / "meta"))
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
