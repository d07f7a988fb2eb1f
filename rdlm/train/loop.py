"""The training loop.

Batches and depth draws are functions of the step, so a run computes the same numbers however often it is interrupted.
How `Trainer.run` starts; the first case that applies:

1. The folder is new: fresh parameters, or those of `init`; step 0.
2. The last step is saved and evaluated: nothing to do.
3. There are checkpoints: the newest that can be read. Metrics, data and the count of skipped updates continue from it.
4. That checkpoint was saved while updates were being skipped, as many as `faults.patience` allows: as 3, then a
   rollback to an older checkpoint before the first step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import math
import sys
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rdlm import sharding
from rdlm.analysis.vitals import alarms, vitals
from rdlm.checkpoint import Checkpoints, SaveError, as_abstract, read_meta
from rdlm.config import PRESETS, InputError, RunConfig, differences, require
from rdlm.data import open_data, prefetch
from rdlm.evaluation.depth import DepthCurve, depth_curve
from rdlm.model import Params
from rdlm.optim import optimizer, schedule
from rdlm.perf import flops
from rdlm.runtime import (
    EXIT_ALARM,
    EXIT_DONE,
    EXIT_PREEMPTED,
    Progress,
    agree,
    compiled_programs,
    exchange,
    is_first,
    together,
)
from rdlm.train.faults import Faults, modules, saved_faults
from rdlm.train.fit import fitting
from rdlm.train.folder import RunFolder, write_curve
from rdlm.train.preemption import Preemption, Stop
from rdlm.train.reporter import Reporter
from rdlm.train.startup import StartUp
from rdlm.train.step import TrainState, init_state, layout_of, parameter_shardings, state_shardings, train_step
from rdlm.tune import combine, divide, join
from rdlm.weights import Weights, identified

Batch = dict[str, np.ndarray]

VITAL_TOKENS = 4096
"""Tokens per device that the vitals are measured on: enough for a mean, and their states fit beside a large model."""


class Trainer:
    """A run: its folder, data, devices and state. `run()` trains it and returns the exit code."""

    # Set by `run`.
    still_ours: Callable[[], None]
    checkpoints: Checkpoints
    stop: Stop
    reporter: Reporter
    batches: Generator[Batch, None, None]
    state: TrainState
    step: int
    frozen: Params
    """Parameters that stay those of `init`."""
    teacher: Params
    """{"teacher": all of them}, where they teach."""
    bad_batch: InputError | None = None

    def __init__(self, config: RunConfig, say: Callable[[str], None] | None = None, startup: StartUp | None = None):
        """Check everything that the user may have got wrong, before anything expensive happens.

        Raises:
          InputError: a field, the mesh, the run folder or the data. A run that is refused leaves its folder unchanged.
        """
        require(not config.data.task, "data.task", config.data.task, "must be empty: only studies train on tasks")
        require(
            config.model.param_dtype != "float16",
            "model.param_dtype",
            config.model.param_dtype,
            "its range is too small for gradients and moments; train in float32 or bfloat16, if you like with "
            "--model.compute-dtype float16",
        )
        field = "lora_rank" if config.tune.lora_rank else "only"
        require(
            bool(config.init) or not config.tune.freezes,
            f"tune.{field}",
            getattr(config.tune, field),
            "needs --init FOLDER, or what does not learn would stay random",
        )
        config.check_draws()
        self.weights = Weights(config) if config.init else None
        if self.weights is not None:
            config = identified(config, self.weights)
        self.config, self.startup, self.starting = config, startup or StartUp(), startup is not None
        self.frozen, self.teacher = {}, {}
        self.validated = -1, math.nan  # step and validation loss
        self.progress = Progress(config.steps, quiet=not is_first())
        self.say = say or self.progress.say
        self.mesh = sharding.make_mesh(config.mesh, config.model)
        sharding.check_batch(self.mesh, config.data.batch_size, config.data.microbatches)
        self.layout = layout_of(config, self.mesh)
        self.tx = optimizer(config.optimizer, config.steps)
        self.shapes, self.shardings = state_shardings(config, self.tx, self.mesh)
        self.folder = RunFolder(config)
        tokenizer = None if self.weights is None else self.folder.tokenizer or self.weights.tokenizer_folder
        with self.startup.part("data"):
            self.train, self.validation, self.tokenizer, prepared, self.data_identity = open_data(
                config.data,
                seed=config.seed,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                tokenizer_folder=tokenizer,
            )
        if self.weights is not None:
            self.data_identity["init"] = config.weights_digest
        self.folder.check_tokenizer(self.tokenizer, prepared)

    def run(self) -> int:
        """Train to the last step. The exit code: 0 done, 75 preempted and saved, 3 stopped by an alarm and saved.

        Raises:
          SaveError: the disk refuses; earlier checkpoints are intact.
          RunError: another process has taken the run folder over.
          InputError: losses or gradients are not finite, and one rollback did not help.
        """
        agree(self.data_identity)
        preemption, path = Preemption(), self.folder.path
        try:
            with (
                self.folder.begin(self.say) as self.still_ours,
                self._checkpoints() as self.checkpoints,
            ):
                if exchange(str(self.folder.is_finished(self.checkpoints)))[0] == "True":
                    meta = read_meta(path)
                    if "data" in meta:
                        self.train.check(meta["data"])
                    self.say(f"{path} is finished: step {self.config.steps} is saved and evaluated")
                    return EXIT_DONE
                self.stop = Stop(preemption, self.mesh)
                return self._run()
        except OSError as error:
            raise SaveError(path, "the run", error) from error
        except InputError as error:
            cause = error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise SaveError(path, "the run", cause) from error
        finally:
            preemption.restore()

    def _checkpoints(self) -> Checkpoints:
        kept = self.config.checkpoint
        return Checkpoints(self.folder.path, kept.keep, keep_every=kept.keep_every, keep_best=kept.keep_best)

    def _run(self) -> int:
        """Restore the state, open what the loop reads and writes, and run the loop."""
        with self.startup.part("parameters"):
            self.state, faults = self.restore()
            jax.block_until_ready(self.state)
        self.step = int(self.state.step)
        self.reporter = Reporter(
            self.config,
            devices=self.mesh.size,
            modules=modules(self.shapes.params),
            faults=faults,
            progress=self.progress,
            say=self.say,
        )
        with contextlib.closing(self.reporter):
            self.reporter.writer = self.folder.open(self.tokenizer, self.step, self.say)
            self.say(f"{self._headline()}\ncompiled programs: {compiled_programs()}")
            batches = prefetch(self.train.batch, self.step + faults.shift, on_error=self._stop_before)
            with contextlib.closing(batches) as self.batches:
                return self._loop()

    def _jitted(self, config: RunConfig) -> Any:
        """The training step. The new state is sharded as the old one, or the second call would compile again."""
        return jax.jit(
            functools.partial(train_step, config, self.tx, layout=self.layout),
            donate_argnums=0,
            out_shardings=(self.shardings, None),
        )

    def _loop(self) -> int:
        """Train from the restored step to the last one."""
        config, reporter = self.config, self.reporter
        step_fn = None if config.recurrence.remat == "auto" else self._jitted(config)
        while self.step < config.steps or reporter.diverged:
            if reporter.diverged:
                self._roll_back()
                continue
            try:
                batch = next(self.batches)
            except InputError as error:
                if jax.process_count() > 1 or not self.step or reporter.faults.streak:
                    raise
                self.bad_batch = error
                reporter.flush()
                self._save()
                return self._leave(EXIT_PREEMPTED)
            rows, frozen = self.place(batch), self.frozen | self.teacher
            if step_fn is None:
                step_fn = fitting(config, self._jitted, ((self.state, rows), {"frozen": frozen}), self.say)
            self.state, metrics = step_fn(self.state, rows, frozen=frozen)
            if self.starting:
                with self.startup.part("running it"):
                    jax.block_until_ready(metrics)
                self.say(self.startup.line())
                self.starting = False
            reporter.report(self.step, metrics)
            self.step += 1
            last = self.step == config.steps
            if self.step % config.evaluation.every == 0 and not last and not self.stop():
                reporter.flush()
                if self._validate():
                    return self._leave(EXIT_ALARM)
                reporter.meter.restart()
            due = self.step % config.checkpoint.every == 0
            stopping = self.stop()  # read once: a later signal is for the next step
            if last or due or stopping:
                reporter.flush()  # before saving: a resumed run does not report the steps before its checkpoint
                # A checkpoint to roll back to must not come from the middle of skipped updates.
                if stopping or (due and not reporter.faults.streak) or (last and not reporter.diverged):
                    self._save()
            if stopping:
                return self._leave(EXIT_PREEMPTED)
            self.checkpoints.check()
            self.still_ours()
        return self._finish()

    def _validate(self) -> bool:
        """Write and show the loss by depth and the vitals; whether an alarm stops the run."""
        curve = self.evaluate(self.params, self.config.evaluation.batches)
        if curve is None:
            return False
        found, lines = self.examine(self.params)
        usual = min(range(len(curve.depths)), key=lambda i: abs(curve.depths[i] - self.config.model.mean_recurrence))
        self.validated = self.step, curve.nats[usual]
        losses = zip(curve.depths, curve.nats, strict=True)
        self.reporter.write(self.step - 1, {f"validation_loss_r{r}": x for r, x in losses} | found)
        self.progress.say(f"step {self.step}  validation loss  {as_text(curve)}")
        self._alarm(lines)
        if lines and self.config.alarms.action == "stop":
            self._save()
            return True
        return False

    @property
    def params(self) -> Params:
        """All parameters as the model takes them now."""
        return combine(self.state.params, self.frozen, self.config.tune)

    def _save(self) -> None:
        """Save the state in the background, with all that a resumed run needs."""
        self.still_ours()
        faults = self.reporter.faults
        meta = {
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.tokenizer.hash,
            "step": self.step,
            "data": self.train.state(self.step + faults.shift),
            "faults": faults._asdict(),
        }
        if self.config.init:
            meta["source"] = self.config.init
        at, nats = self.validated
        known = nats if at == self.step and math.isfinite(nats) else None
        self.checkpoints.save(self.step, self.state.params, self.state.optimizer, meta, known)
        self.reporter.sync()

    def _stop_before(self, step: int, error: Exception) -> None:
        """A batch could not be read. Several processes agree on a step before it, at which all can save."""
        last = self.config.steps + self.reporter.faults.shift
        if jax.process_count() > 1 and step < last and isinstance(error, InputError):
            self.bad_batch = error
            self.stop.preemption.requested = True

    def _leave(self, code: int) -> int:
        """Wait for the checkpoint, say why the run ends early, and return `code`.

        Raises:
          InputError: a batch could not be read.
        """
        self.checkpoints.wait()
        saved = f"saved step {self.step} in {self.folder.path}"
        if self.bad_batch is not None:
            raise InputError(f"{self.bad_batch}; {saved}") from self.bad_batch
        if code == EXIT_ALARM:
            self.say(
                f"stopped by an alarm: {saved}; the same command continues, with --alarms.action warn also past the "
                "next alarm"
            )
        else:
            self.say(f"preempted: {saved}; run the same command to continue")
        return code

    def _finish(self) -> int:
        """The last evaluation, over all validation batches."""
        curve = self.evaluate(self.params, None)
        self.checkpoints.wait()  # `RunFolder.is_finished`: the curve is newer than the checkpoint
        if curve is None:
            self.say(f"preempted in the last evaluation: {self.folder.path} holds step {self.config.steps}")
            return EXIT_PREEMPTED
        found, lines = self.examine(self.params)
        if found:
            self.reporter.write(self.config.steps - 1, found)
        self._alarm(lines)
        if is_first():
            write_curve(self.folder.path / "loss_by_depth.json", curve)
        return EXIT_DONE

    def _roll_back(self) -> None:
        """Continue from an older checkpoint, or from the start, with the data after the batches that were skipped.

        Raises:
          InputError: there was a rollback to that step before.
        """
        reporter, faults, batch = self.reporter, self.reporter.faults, self.step + self.reporter.faults.shift
        self.checkpoints.wait()
        del self.state  # makes room for the restored one
        self.state, _ = self.restore(rollback=True)
        self.step = int(self.state.step)
        if self.step == faults.origin:
            raise InputError(
                f"training has diverged: {faults.streak} updates in a row were not finite, again after a rollback to "
                f"step {self.step} and with other data; the first was {faults.first}; lower the learning rate"
            )
        self.say(
            f"rollback to step {self.step}: {faults.streak} updates in a row were not finite; training continues with "
            f"batch {faults.next_batch} of the data, the first after those"
        )
        for _ in range(faults.next_batch - batch):
            next(self.batches)
        reporter.close()
        reporter.writer = self.folder.open(self.tokenizer, self.step, self.say)
        reporter.faults = faults.after_rollback(self.step)

    def restore(self, rollback: bool = False) -> tuple[TrainState, Faults]:
        """The newest checkpoint that can be read, or fresh parameters, and what is known of skipped updates.

        Args:
          rollback: skip checkpoints that were saved while updates were being skipped, and leave the data where it is.

        Raises:
          InputError: see `Checkpoints.restore`; a step after the last one, another tokenizer, other data.
        """
        target, path = as_abstract(self.shapes, self.shardings), self.folder.path
        found = self.checkpoints.restore(
            target.params, target.optimizer, self.say, lambda meta: not (rollback and saved_faults(meta).streak)
        )
        if found is None:
            return self._first_state(), Faults()
        step, params, opt, meta = found
        if step > self.config.steps:
            raise InputError(f"steps = {self.config.steps}: {path} is already at step {step}; ask for more")
        if meta["tokenizer"] != self.tokenizer.hash:
            raise InputError(f"{path}: checkpoint {step} belongs to another tokenizer than the prepared data")
        if self.weights is not None and (self.config.tune.freezes or self._taught) and not rollback:
            loaded = self._loaded(self.weights)
            self.frozen = divide(loaded, self.config.tune)[1]
            self.teacher = {"teacher": loaded} if self._taught else {}
        faults = saved_faults(meta)
        if not rollback:
            if "data" in meta:  # older checkpoints, which are of the embedded corpus, have no such entry
                self.train.restore(step + faults.shift, meta["data"])
            self.say(f"resuming {path} at step {step}")
            self._warn_if_the_rate_rises(step, meta["config"]["steps"])
        return TrainState(jax.device_put(jnp.int32(step), self.shardings.step), params, opt), faults

    def _first_state(self) -> TrainState:
        """Step 0: random parameters, or those of `init`; a fresh optimizer."""

        def begin(learn: Params, rest: Params) -> TrainState:
            return init_state(self.config, self.tx, join(learn, rest))

        if self.weights is None:
            return jax.jit(functools.partial(init_state, self.config, self.tx), out_shardings=self.shardings)()
        learn, self.frozen = divide(self._loaded(self.weights), self.config.tune)
        if self._taught:  # what learns moves on, so the teacher has copies of it
            copies = jax.jit(lambda params: jax.tree.map(jnp.copy, params))(learn)
            self.teacher = {"teacher": join(copies, self.frozen)}
        return jax.jit(begin, donate_argnums=0, out_shardings=self.shardings)(learn, self.frozen)

    @property
    def _taught(self) -> bool:
        return self.config.loss.teacher == "start"

    def _loaded(self, weights: Weights) -> Params:
        """The parameters of `init` on the mesh."""
        target = as_abstract(*parameter_shardings(self.config, self.mesh))
        params = weights.load(target, self.config.weights_digest)
        role = "training beside" if self.config.tune.freezes else "taught by" if self._taught else "starting with"
        self.say(f"{role} the parameters of {weights}")
        return params

    def _warn_if_the_rate_rises(self, step: int, steps: int) -> None:
        """After a change of `steps`, which were `steps` before."""
        before, now = (float(schedule(self.config.optimizer, n)(step - 1)) for n in (steps, self.config.steps))
        if now > 1.01 * before:
            self.say(
                f"the learning rate rises again, from {before:.3g} to {now:.3g}: with steps = {steps} the run had "
                f"begun to cool down, with steps = {self.config.steps} it does so later"
            )

    def place(self, batch: Batch) -> dict[str, Array]:
        """This process's rows of a batch, as its part of arrays split over all devices.

        It does not matter which device gets which row: the loss is a mean over all rows, and a row's noise depends on
        its sequence id alone.
        """
        split = sharding.batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(split, rows) for name, rows in batch.items()}

    def evaluate(self, params: Params, batches: int | None) -> DepthCurve | None:
        """Loss by depth on `batches` validation batches (None: all); None if the run is to stop meanwhile."""
        return depth_curve(
            params,
            self.config.model,
            self.validation.batches(batches),
            self.config.evaluation.depths,
            self.tokenizer.token_bytes,
            self.place,
            self.stop,
            self.layout,
        )

    def examine(self, params: Params) -> tuple[dict[str, object], list[str]]:
        """(vitals on the first validation batch, its alarms among them; the alarms as lines)."""
        (batch,) = self.validation.batches(1)
        rows = max(1, VITAL_TOKENS // self.config.data.sequence_length) * len(self.mesh.local_devices)
        found = vitals(params, self.config.model, self.place({name: x[:rows] for name, x in batch.items()}))
        quiet = self.step < max(self.config.alarms.start, self.config.optimizer.warmup_steps)
        lines = [] if quiet else alarms(found)
        return found | ({"alarms": lines} if lines else {}), lines

    def _alarm(self, lines: list[str]) -> None:
        for line in lines:
            self.say(f"step {self.step}  ALARM  {line}")

    def _headline(self) -> str:
        """Size of the model, of a step and of the mesh; fields that differ from the preset."""
        model, data = self.config.model, self.config.data
        preset = PRESETS.get(self.config.preset)
        changed = {} if preset is None else differences(preset, self.config)
        hidden = ("run_dir", *(("model.", "weights_digest") if self.config.init else ()))
        lines = [
            f"{self.config.preset}: {flops.parameters(model):,} parameters, core {flops.core_parameters(model):,} "
            f"run {model.mean_recurrence} times on average; {data.batch_size} x {data.sequence_length} tokens a step "
            f"on {self.mesh.size} {jax.devices()[0].device_kind}; {self.train.steps_per_epoch} steps an epoch"
        ]
        if self.config.tune.freezes:
            learn = sum(x.size for x in jax.tree.leaves(self.state.params))
            lines.append(f"  {learn:,} numbers learn; the parameters of {self.config.init} stay as they are")
        if self.weights is not None and self.weights.settled is None:
            for name, (old, new) in differences(self.weights.model, model).items():
                lines.append(f"  model.{name} = {new!r} (folder: {old!r})")
        lines += [
            f"  {name} = {new!r} (preset: {old!r})"
            for name, (old, new) in changed.items()
            if not name.startswith(hidden)
        ]
        return "\n".join(lines)


def as_text(curve: DepthCurve) -> str:
    """'r=1 5.123  r=2 4.987 ...'."""
    return "  ".join(f"r={r} {x:.3f}" for r, x in zip(curve.depths, curve.nats, strict=True))


def train(config: RunConfig) -> int:
    """Train `config` in its run folder, from its newest checkpoint if there is one; returns the exit code."""
    sys.stderr.flush()
    with StartUp() as startup:
        return together(lambda: Trainer(config, startup=startup)).run()
