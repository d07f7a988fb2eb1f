"""Save and restore a training run, in the background and on several processes."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
import orbax.checkpoint.checkpoint_managers as policies
from jaxtyping import PyTree

from rdlm.checkpoint.integrity import Meta, as_mapping, bit_sum, reader_alone, reading, wrong_sum
from rdlm.checkpoint.run_folder import saved_steps, write_config
from rdlm.config import InputError, RunConfig, local_path, one_line
from rdlm.model import Params
from rdlm.runtime import RunError, exchange, free_name, is_first, owned

_PARTIAL = ".orbax-checkpoint-tmp"


class SaveError(RunError):
    """A run could not be saved. Once the reason is gone the same command continues, so the exit code is 1."""

    def __init__(self, folder: Path, what: str, error: BaseException):
        """One line: `what` could not be saved in the run `folder`, why, what is saved, and how to go on."""
        reason = one_line(error)
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror + (f": {error.filename}" if error.filename else "")
        fix = "make room, then run" if _is_full(error) else "when that is mended, run"
        super().__init__(
            f"run folder {folder}: {what} could not be saved ({reason}); nothing saved is lost, the newest checkpoint "
            f"is {max(saved_steps(folder), default='none')}; {fix} the same command again"
        )


def _is_full(error: BaseException | None) -> bool:
    """Whether the disk, or the user's share of it, is full. The array library only has the text of the reason."""
    while error is not None:
        reasons = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) in reasons or any(os.strerror(number) in str(error) for number in reasons):
            return True
        error = error.__cause__ or error.__context__
    return False


def _validation_loss(metrics: Mapping[str, float]) -> float:
    return metrics["validation_loss"]


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    params: Params
    optimizer: PyTree
    meta: Meta


class Checkpoints:
    """Saves and restores the state of a training run. Saving runs in the background. Use as a context manager."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        handlers: dict[str, ocp.CheckpointHandler] | None = None,
        *,
        keep_every: int = 0,
        keep_best: int = 0,
    ):
        """Open `folder`/checkpoints and delete unfinished checkpoints in it.

        Args:
          folder: the run folder.
          keep: how many of the newest checkpoints to keep; others are deleted.
          handlers: how to save an item, where the default of Orbax does not fit.
          keep_every: also keep those of steps that are multiples of this; 0: none.
          keep_best: also keep this many of those with the lowest `validation_loss`.

        Raises:
          InputError: the folder cannot be made or written.
        """
        self.folder, path = folder, (folder / "checkpoints").absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink(missing_ok=True)  # another process may have deleted it
        except OSError as error:
            raise InputError(f"run folder {folder}: cannot be written ({error.strerror})") from error
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        if keep_best:
            lowest = policies.BestN(
                get_metric_fn=_validation_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
            )
            kept.append(lowest)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=_validation_loss if keep_best else None,  # otherwise Orbax saves no metrics
            best_mode="min",
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            # Otherwise, when a folder cannot be made, Orbax's threads wait five minutes for it.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self.manager = ocp.CheckpointManager(path, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except SaveError:
            if kind is None:
                raise
        finally:
            with contextlib.suppress(Exception):  # reported by `wait` already
                self.manager.close()

    def wait(self) -> None:
        """Return when all checkpoints saved so far are complete on disk.

        Raises:
          SaveError: one of them could not be written.
        """
        with self.saving():
            self.manager.wait_until_finished()

    def check(self) -> None:
        """Raise now, not at the next save, if the last checkpoint failed in the background. Takes no time.

        Raises:
          SaveError: it could not be written.
        """
        if not self.manager.is_saving_in_progress():
            self.wait()

    def saved_at(self, step: int) -> float:
        """Modification time of the checkpoint of `step`, in seconds."""
        return Path(self.manager.directory / str(step)).stat().st_mtime

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(
        self, step: int, params: Params, optimizer: PyTree, meta: Meta, validation_loss: float | None = None
    ) -> None:
        """Save a checkpoint; returns when the arrays are copied, while they are written in the background.

        Args:
          step: of training.
          params, optimizer: arrays.
          meta: JSON beside them.
          validation_loss: of these parameters, if it is known, for `keep_best`.

        Raises:
          SaveError: this checkpoint, or the one before, could not be written.
        """
        if step == self.latest:
            return
        sums = {"params": int(bit_sum(params)), "optimizer": int(bit_sum(optimizer))}
        with self.saving():
            begun = self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    optimizer=ocp.args.StandardSave(optimizer),
                    meta=ocp.args.JsonSave(meta | {"sums": sums}),
                ),
                metrics=None if validation_loss is None else {"validation_loss": validation_loss},
            )
        if not begun:
            raise RuntimeError(f"checkpoint {step} was not saved: {self.latest} is newer")

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Turn whatever fails in the block into a SaveError, and remove what is half written."""
        try:
            yield
        except Exception as error:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the same failure for every other array
            directory = Path(self.manager.directory)
            for partial in directory.glob("*" + _PARTIAL):  # the disk may be full
                shutil.rmtree(partial, ignore_errors=True)
            raise SaveError(self.folder, "a checkpoint", error) from error

    def restore(
        self, params: PyTree, optimizer: PyTree, say: Callable[[str], None], good: Callable[[Meta], bool]
    ) -> Restored | None:
        """The newest checkpoint that is undamaged on all processes and `good`; None if there is none.

        Newer checkpoints are renamed to STEP.damaged or STEP.abandoned, so that they are not mistaken for the newest
        and new ones can take their place; one line is printed for each. All processes must call this together, and use
        the same step.

        Args:
          params, optimizer: shapes, dtypes and shardings.
          say: prints a line.
          good: given a checkpoint's meta, whether training may resume from it.

        Raises:
          InputError: the folder holds weights alone, or none of the checkpoints can be read; nothing is renamed then.
        """
        aside: list[tuple[int, str, str]] = []
        steps = json.loads(exchange(json.dumps(sorted(self.manager.all_steps(), reverse=True)))[0])
        paths = [Path(self.manager.directory) / str(step) for step in steps]
        if steps and all((path / "meta").exists() and not (path / "optimizer").exists() for path in paths):
            raise InputError(
                f"run folder {self.folder}: holds weights alone, no state of an optimizer, so no run can go on there; "
                f"begin one from these weights: --init {self.folder} --run-dir ANOTHER"
            )
        for step in steps:
            found, problem = None, ""
            try:
                with reading():
                    found = self._read(step, params, optimizer)
            except Exception as error:  # of any kind: all processes must know
                problem = f"damaged or of another shape ({one_line(error)})"
            problem = next(filter(None, exchange(problem)), "")
            if found is not None and not problem:  # the checksum needs all processes, so all must have read it
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
                "used: put an undamaged one back, or choose another --run-dir"
            )
        self._set_aside(aside, say, "a fresh start")
        return None

    def _read(self, step: int, params: PyTree, optimizer: PyTree) -> Restored:
        """This process's part of a checkpoint."""
        path = Path(self.manager.directory) / str(step)
        with reader_alone(ocp.StandardCheckpointHandler) as reader:
            restored = [
                reader.restore(path / name, args=ocp.args.StandardRestore(target))
                for name, target in (("params", params), ("optimizer", optimizer))
            ]
        with reader_alone(ocp.JsonCheckpointHandler) as reader:
            meta = as_mapping(reader.restore(path / "meta"))
        return Restored(step, restored[0], restored[1], meta)

    def _set_aside(self, rejected: list[tuple[int, str, str]], say: Callable[[str], None], instead: str) -> None:
        """Rename checkpoints, given as (step, suffix, reason)."""
        for step, suffix, why in rejected:
            path = Path(self.manager.directory) / str(step)
            name = path.rename(free_name(path, suffix)).name if is_first() else ""
            name = exchange(name)[0]
            while path.exists():  # in a mounted bucket other hosts see the new name late
                time.sleep(0.5)
            say(f"checkpoint {step}: {why}; it is now {name}, and {instead} is used")
        if rejected:
            self.manager.reload()


def save_parameters(run_folder: str | Path, params: Params, run: RunConfig, meta: Meta, step: int = 0) -> None:
    """Write a run folder with parameters only (a converted model). `load_checkpoint` reads it, training does not.

    Few arrays are written at a time, so that peak memory is little above that of the parameters.

    Raises:
      InputError: the folder already holds checkpoints, is used by another process, or cannot be written.
      SaveError: the disk refuses while they are written.
    """
    folder = local_path(run_folder)
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    handlers: dict[str, ocp.CheckpointHandler] = {
        "params": ocp.StandardCheckpointHandler(save_concurrent_gb=max(1, -(-largest // 10**9))),
        "meta": ocp.JsonCheckpointHandler(),
    }
    items = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
    with owned(folder, "choose another"):
        if saved_steps(folder):
            raise InputError(f"run folder {folder}: already holds checkpoints; choose another")
        with Checkpoints(folder, keep=1, handlers=handlers) as checkpoints, checkpoints.saving():
            checkpoints.manager.save(step, args=items)
        write_config(folder, run)
