"""The training loop: data and draws as functions of the step, metrics, checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rdlm import sharding
from rdlm.analysis.vitals import alarms, vitals
from rdlm.checkpoint import Checkpoints, SaveError, as_abstract, read_config, saved_steps, write_config
from rdlm.config import PRESETS, InputError, RunConfig, differences
from rdlm.data import open_data, prefetch
from rdlm.evaluation.depth import DepthCurve, depth_curve
from rdlm.model import Params
from rdlm.optim import optimizer, schedule
from rdlm.perf import flops
from rdlm.perf.flops import matmul_peak
from rdlm.runtime import (
    EXIT_ALARM,
    EXIT_DONE,
    EXIT_PREEMPTED,
    Progress,
    compiled_programs,
    complete_folder,
    exchange,
    is_first,
    together,
    write_atomically,
)
from rdlm.tokenizer import Tokenizer
from rdlm.train.faults import Faults, describe, modules, saved_faults
from rdlm.train.metrics import Meter, MetricsWriter
from rdlm.train.preemption import Preemption, Stop
from rdlm.train.step import TrainState, init_state, layout_of, state_shardings, train_step

GO_ON = "the same command goes on, with --alarms.action warn past the next one too"


class Trainer:
    """A run: its folder, data, devices and loop. `run()` returns the exit code."""

    def __init__(self, config: RunConfig, say: Callable[[str], None] | None = None):
        """Check everything that can be wrong before the first expensive thing happens.

        Raises:
          InputError: see the rooms below; nothing on disk is changed by a run that is refused.
        """
        self.config, self.folder = config, Path(config.folder)
        self.first = is_first()
        self.progress = Progress(config.steps, quiet=not self.first)
        self.say = say or self.progress.say
        self.mesh = sharding.make_mesh(config.mesh, config.model)
        sharding.check_batch(self.mesh, config.data.batch_size, config.data.microbatches)
        self.layout = layout_of(config, self.mesh)
        self.tx = optimizer(config.optimizer, config.steps)
        self.shapes, self.shardings = state_shardings(config, self.tx, self.mesh)
        self._check_folder()
        self._open_data()

    def _check_folder(self) -> None:
        if (self.folder / "config.json").exists():
            changed = differences(read_config(self.folder), self.config)
            # A run may go on for longer, under another name, or on a pod that wants other parts and holds less.
            free = ["steps", "tensorboard", "run_dir", "mesh.", "checkpoint.", "faults.", "evaluation.", "alarms."]
            free += ["recurrence.remat", "data.folder"]
            if self.config.recurrence.draw != "microbatch":  # where parts have depths of their own
                free += ["data.microbatches"]
            changed = {name: values for name, values in changed.items() if not name.startswith(tuple(free))}
            if changed:
                name, (old, new) = next(iter(changed.items()))
                raise InputError(
                    f"run folder {self.folder}: holds a run with {name} = {old!r}, not {new!r}; "
                    "choose another --run-dir"
                )
        elif self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise InputError(f"run folder {self.folder}: exists and is not a run folder; choose another --run-dir")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"run folder {self.folder}: cannot be made ({error.strerror})") from error

    def _open_data(self) -> None:
        data, saved = self.config.data, self.folder / "tokenizer"
        self.train, self.validation, self.tokenizer, prepared = open_data(
            data, seed=self.config.seed, process_index=jax.process_index(), process_count=jax.process_count()
        )
        if saved.exists() and Tokenizer.load(saved).hash != self.tokenizer.hash:
            raise InputError(
                f"{saved}: the run has another tokenizer than {prepared}; restore that data, or start a new run"
            )

    def place(self, batch: Any) -> Any:
        """This process's rows of a batch as its part of arrays split over all devices.

        Which device gets which row means nothing: the loss is a mean over all, and a row brings its own noise along.
        """
        split = sharding.batch_sharding(self.mesh)
        return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(split, rows), batch)

    def evaluate(self, params: Params, batches: int | None, stop: Callable[[], bool]) -> DepthCurve | None:
        """Loss by depth on `batches` validation batches (None: all); None when stopped."""
        return depth_curve(
            params, self.config.model, self.validation.batches(batches), self.config.evaluation.depths,
            self.tokenizer.token_bytes, self.place, stop, self.layout,
        )  # fmt: skip

    def examine(self, params: Params, done: int) -> tuple[dict[str, Any], list[str]]:
        """(vitals on the first validation batch, with the alarms among them; the alarms), after `done` steps.

        Of a large batch some 4,096 tokens per device are enough, and their states fit beside a large model.
        """
        (batch,) = self.validation.batches(1)
        rows = max(1, 4096 // self.config.data.sequence_length) * len(self.mesh.local_devices)
        batch = {name: x[:rows] for name, x in batch.items()}
        found = vitals(params, self.config.model, self.place(batch))
        quiet = done < max(self.config.alarms.start, self.config.optimizer.warmup_steps)
        lines = [] if quiet else alarms(found)
        return found | ({"alarms": lines} if lines else {}), lines

    def alarmed(self, done: int, lines: list[str]) -> bool:
        """Say the alarms; whether the run has to stop for them."""
        for line in lines:
            self.say(f"step {done}  ALARM  {line}")
        return bool(lines) and self.config.alarms.action == "stop"

    def start(self, checkpoints: Checkpoints, back: bool = False) -> tuple[TrainState, Faults]:
        """The newest saved state that is whole, or a fresh one, and what is known of skipped updates.

        Args:
          checkpoints: of this run.
          back: go back, to one that was saved while no updates were being skipped; the data stay where they are.

        Raises:
          InputError: see `Checkpoints.restore`; a later step than the last, another tokenizer, other data.
        """
        target = as_abstract(self.shapes, self.shardings)
        found = checkpoints.restore(
            target.params, target.optimizer, self.say, lambda meta: not (back and saved_faults(meta).streak)
        )
        if found is None:
            fresh = jax.jit(functools.partial(init_state, self.config, self.tx), out_shardings=self.shardings)
            return fresh(), Faults()
        step, params, opt, meta = found
        if step > self.config.steps:
            raise InputError(f"steps = {self.config.steps}: {self.folder} is already at step {step}; ask for more")
        if meta["tokenizer"] != self.tokenizer.hash:
            raise InputError(f"{self.folder}: checkpoint {step} belongs to another tokenizer than the prepared data")
        faults = saved_faults(meta)
        if not back:
            if "data" in meta:  # checkpoints of before it was kept are of the embedded corpus
                self.train.restore(step + faults.shift, meta["data"])
            self.say(f"resuming {self.folder} at step {step}")
            self._say_if_the_rate_rises(step, meta["config"]["steps"])
        return TrainState(jax.device_put(jnp.int32(step), self.shardings.step), params, opt), faults

    def _say_if_the_rate_rises(self, step: int, steps: int) -> None:
        before, now = (float(schedule(self.config.optimizer, n)(step - 1)) for n in (steps, self.config.steps))
        if now > 1.01 * before:
            self.say(
                f"the learning rate rises again, from {before:.3g} to {now:.3g}: with steps = {steps} the run had "
                f"begun to cool down, with steps = {self.config.steps} it does so later"
            )

    def run(self) -> int:
        """Train to the last step; returns 0, or 75 when SIGTERM came and the state is saved.

        Raises:
          SaveError: the disk is full; nothing that was saved is lost.
          InputError: losses or gradients are not finite, and going back once did not help.
        """
        preemption = Preemption()
        try:
            self._check_shared()
            # First of all what makes this a run folder: a run killed at any later moment resumes by the same command.
            if self.first and not (self.folder / "config.json").exists():
                write_config(self.folder, self.config)
            with Checkpoints(self.folder, self.config.checkpoint.keep) as checkpoints:
                if exchange(str(self._finished(checkpoints)))[0] == "True":
                    self.say(f"{self.folder} is finished: step {self.config.steps} is saved and evaluated")
                    return EXIT_DONE
                return self._run(checkpoints, preemption)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise SaveError(
                f"run folder {self.folder}: {error.strerror}; nothing saved is lost, the newest checkpoint is "
                f"{max(saved_steps(self.folder), default='none')}; make room, then run the same command again"
            ) from error
        finally:
            preemption.restore()

    def _check_shared(self) -> None:
        """Refuse a run folder that is another one on every host: each would save its part of the state alone."""
        if jax.process_count() == 1:
            return
        token = exchange(secrets.token_hex(8))
        note = self.folder / ".shared"
        if self.first:
            note.write_text(token[0])
        exchange("written")
        seen = exchange(str(note.exists() and note.read_text() == token[0]))
        if self.first:
            note.unlink()
        if "False" in seen:
            raise InputError(
                f"run folder {self.folder}: process {seen.index('False')} does not see what process 0 wrote there; "
                "use a folder that all hosts share (tpu_setup/mount.sh mounts a bucket as runs/)"
            )

    def _finished(self, checkpoints: Checkpoints) -> bool:
        """Whether the last step is saved, and its curve at the depths of the config was written after it."""
        curve = self.folder / "loss_by_depth.json"
        if checkpoints.latest != self.config.steps or not curve.is_file():
            return False
        try:
            depths = [int(r) for r in json.loads(curve.read_text())]
        except (ValueError, TypeError):
            return False
        newer = curve.stat().st_mtime >= checkpoints.saved_at(self.config.steps)
        return newer and depths == list(self.config.evaluation.depths)

    def _run(self, checkpoints: Checkpoints, preemption: Preemption) -> int:
        config = self.config
        state, faults = self.start(checkpoints)
        step = int(state.step)
        writer = self._open_folder(step) if self.first else None
        stop = Stop(lambda: preemption.requested, self.mesh)
        meta = {"config": dataclasses.asdict(config), "tokenizer": self.tokenizer.hash}
        self.say(f"{self._headline()}\ncompiled programs: {compiled_programs()}")
        # The state leaves a step as it entered it: left to the compiler, a mesh would compile a second program.
        step_fn = jax.jit(
            functools.partial(train_step, config, self.tx, layout=self.layout),
            donate_argnums=0,
            out_shardings=(self.shardings, None),
        )
        position = step + faults.shift
        batches = prefetch(self.train.batch, position)
        meter = Meter(config, matmul_peak() * self.mesh.size)
        names, patience = modules(self.shapes.params), config.faults.patience
        pending: tuple[int, dict[str, Any]] | None = None

        def report() -> None:
            nonlocal faults, pending
            if pending is None:
                return
            step, metrics = pending
            pending = None
            values = {k: v.item() for k, v in metrics.items()}
            values |= meter.measure(values["n"], values["k"])
            before, faults = faults, faults.after(step, values, patience, names)
            if faults.streak > before.streak:
                self.say(f"update skipped, {faults.streak} in a row: {describe(step, values, names)}")
            values = {k: v for k, v in values.items() if k != "first_bad"} | {"skipped": faults.skipped}
            if writer:
                writer.write(step, {k: v if math.isfinite(v) else None for k, v in values.items()})
            self.progress.update(step + 1, meter.line(step + 1, values), last=step + 1 == config.steps)

        def save(step: int) -> None:
            data = self.train.state(step + faults.shift)
            saved = meta | {"step": step, "data": data, "faults": faults._asdict()}
            checkpoints.save(step, state.params, state.optimizer, saved)
            if writer:
                writer.sync()

        try:
            while True:
                if faults.streak >= patience:
                    pending = None
                    del state  # its memory is needed for what is restored
                    state, faults, writer = self._go_back(checkpoints, faults, writer)
                    step = int(state.step)
                    for _ in range(step + faults.shift - position):
                        next(batches)
                    position = step + faults.shift
                if step == config.steps:
                    break
                state, metrics = step_fn(state, self.place(next(batches)))
                report()  # of the step before, while this one runs
                pending = step, metrics
                step, position = step + 1, position + 1
                last = step == config.steps
                if step % config.evaluation.every == 0 and not last and not stop():
                    report()
                    curve = self.evaluate(state.params, config.evaluation.batches, stop)
                    if curve is not None:
                        losses = zip(curve.depths, curve.nats, strict=True)
                        found, lines = self.examine(state.params, step)
                        if writer:
                            writer.write(step - 1, {f"validation_loss_r{r}": x for r, x in losses} | found)
                        self.progress.say(f"step {step}  validation loss  {as_text(curve)}")
                        if self.alarmed(step, lines):
                            save(step)
                            checkpoints.wait()
                            self.say(f"stopped by an alarm: saved step {step} in {self.folder}; " + GO_ON)
                            return EXIT_ALARM
                    meter.restart()
                due = step % config.checkpoint.every == 0
                stopping = stop()  # asked once: a signal from here on is for the next step to see
                if last or due or stopping:
                    report()  # before the save: a resumed run writes no row of a step that is saved
                    # What is saved while updates are being skipped is no good to go back to.
                    if stopping or (due and not faults.streak) or (last and faults.streak < patience):
                        save(step)
                if stopping:
                    checkpoints.wait()
                    self.say(f"preempted: saved step {step} in {self.folder}; run the same command to go on")
                    return EXIT_PREEMPTED
                checkpoints.check()
            curve = self.evaluate(state.params, None, stop)
            checkpoints.wait()  # the curve comes after the state it is about: see `_finished`
            if curve is None:
                self.say(f"preempted in the last evaluation: {self.folder} holds step {config.steps}")
                return EXIT_PREEMPTED
            found, lines = self.examine(state.params, config.steps)
            if writer and found:
                writer.write(config.steps - 1, found)
            self.alarmed(config.steps, lines)
            if self.first:
                write_curve(self.folder / "loss_by_depth.json", curve)
            return EXIT_DONE
        finally:
            batches.close()
            if writer:
                writer.close()

    def _go_back(
        self, checkpoints: Checkpoints, faults: Faults, writer: MetricsWriter | None
    ) -> tuple[TrainState, Faults, MetricsWriter | None]:
        """After too many skipped updates: the newest good checkpoint, or a fresh start, with the data behind the bad.

        Raises:
          InputError: it has been gone back to before.
        """
        checkpoints.wait()
        state, _ = self.start(checkpoints, back=True)
        step = int(state.step)
        if step == faults.origin:
            raise InputError(
                f"training has diverged: {faults.streak} updates in a row were not finite, again after going back to "
                f"step {step} and on with other data; the first was {faults.first}; lower the learning rate"
            )
        self.say(
            f"going back to step {step}: {faults.streak} updates in a row were not finite; going on with batch "
            f"{faults.next_batch} of the data, behind those"
        )
        if writer:
            writer.close()
            writer = MetricsWriter(self.folder, step, self.config.tensorboard)
        return state, faults.back_at(step), writer

    def _open_folder(self, step: int) -> MetricsWriter:
        """Make the run folder complete, to go on from `step`."""
        if not (self.folder / "tokenizer").exists():
            with complete_folder(self.folder / "tokenizer") as partial:
                self.tokenizer.save(partial)
        write_config(self.folder, self.config)
        return MetricsWriter(self.folder, step, self.config.tensorboard)

    def _headline(self) -> str:
        model, data = self.config.model, self.config.data
        base = PRESETS.get(self.config.preset)
        changed = {} if base is None else differences(base, self.config)
        lines = [
            f"{self.config.preset}: {flops.parameters(model):,} parameters, core {flops.core_parameters(model):,} "
            f"run {model.mean_recurrence} times on average; {data.batch_size} x {data.sequence_length} tokens a step "
            f"on {self.mesh.size} {jax.devices()[0].device_kind}; {self.train.steps_per_epoch} steps an epoch"
        ]
        lines += [f"  {name} = {new!r} (preset: {old!r})" for name, (old, new) in changed.items() if name != "run_dir"]
        return "\n".join(lines)


def as_text(curve: DepthCurve) -> str:
    """'r=1 5.123  r=2 4.987 ...'."""
    return "  ".join(f"r={r} {x:.3f}" for r, x in zip(curve.depths, curve.nats, strict=True))


def write_curve(path: Path, curve: DepthCurve) -> None:
    """Write {"1": nats, "2": nats, ...}."""
    nats = {str(r): x for r, x in zip(curve.depths, curve.nats, strict=True)}
    write_atomically(path, json.dumps(nats, indent=2) + "\n")


def train(config: RunConfig) -> int:
    """Train `config` in its run folder, from its newest checkpoint if there is one; returns the exit code."""
    sys.stderr.flush()
    return together(lambda: Trainer(config)).run()
