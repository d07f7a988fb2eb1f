"""The training loop: data and draws as functions of the step, metrics, checkpoints, exact resume."""

from __future__ import annotations

import dataclasses
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

from rdlm import flops, sharding
from rdlm.checkpoint import Checkpoints, as_abstract, read_config, write_config
from rdlm.config import PRESETS, InputError, RunConfig, differences
from rdlm.data import open_data, prefetch
from rdlm.evaluate import DepthCurve, depth_curve
from rdlm.metrics import Meter, MetricsWriter, Progress, matmul_peak
from rdlm.model import Params
from rdlm.optim import optimizer
from rdlm.runtime import EXIT_ALARM, EXIT_DONE, EXIT_PREEMPTED, exchange, is_first, together
from rdlm.tokenizer import Tokenizer
from rdlm.train.step import TrainState, init_state, layout_of, state_shardings, train_step
from rdlm.train.stopping import Preemption, Stop
from rdlm.vitals import alarms, vitals

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
            for name in ("steps", "tensorboard", "run_dir"):  # a run may go on for longer, or under another name
                changed.pop(name, None)
            changed = {
                k: v for k, v in changed.items() if not k.startswith(("mesh.", "checkpoint.", "evaluation.", "alarms."))
            }
            if changed:
                name, (old, new) = next(iter(changed.items()))
                raise InputError(
                    f"run folder {self.folder}: holds a run with {name} = {old!r}, not {new!r}; "
                    "choose another --run-dir, or delete the folder"
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
            self.tokenizer.token_bytes, self.place, stop,
        )  # fmt: skip

    def examine(self, params: Params, done: int) -> tuple[dict[str, Any], list[str]]:
        """(vitals on the first validation batch, with the alarms among them; the alarms), after `done` steps."""
        (batch,) = self.validation.batches(1)
        found = vitals(params, self.config.model, self.place(batch))
        quiet = done < max(self.config.alarms.start, self.config.optimizer.warmup_steps)
        lines = [] if quiet else alarms(found)
        return found | ({"alarms": lines} if lines else {}), lines

    def alarmed(self, done: int, lines: list[str]) -> bool:
        """Say the alarms; whether the run has to stop for them."""
        for line in lines:
            self.say(f"step {done}  ALARM  {line}")
        return bool(lines) and self.config.alarms.action == "stop"

    def start(self, checkpoints: Checkpoints) -> TrainState:
        """The newest saved state, or a fresh one."""
        latest = checkpoints.latest
        if latest is None:
            fresh = jax.jit(functools.partial(init_state, self.config, self.tx), out_shardings=self.shardings)
            return fresh()
        if latest > self.config.steps:
            raise InputError(f"steps = {self.config.steps}: {self.folder} is already at step {latest}; ask for more")
        target = as_abstract(self.shapes, self.shardings)
        params, opt, meta = checkpoints.restore(latest, target.params, target.optimizer)
        if meta["tokenizer"] != self.tokenizer.hash:
            raise InputError(f"{self.folder}: checkpoint {latest} belongs to another tokenizer than the prepared data")
        if "data" in meta:  # checkpoints of before it was kept are of the embedded corpus
            self.train.restore(latest, meta["data"])
        self.say(f"resuming {self.folder} at step {latest}")
        return TrainState(jax.device_put(jnp.int32(latest), self.shardings.step), params, opt)

    def run(self) -> int:
        """Train to the last step; returns 0, or 75 when SIGTERM came and the state is saved."""
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
        state = self.start(checkpoints)
        first = int(state.step)
        writer = self._open_folder(first) if self.first else None
        stop = Stop(lambda: preemption.requested, self.mesh)
        meta = {"config": dataclasses.asdict(config), "tokenizer": self.tokenizer.hash}
        self.say(self._headline())
        # The state leaves a step as it entered it: left to the compiler, a mesh would compile a second program.
        step_fn = jax.jit(
            functools.partial(train_step, config, self.tx, layout=self.layout),
            donate_argnums=0,
            out_shardings=(self.shardings, None),
        )
        batches = prefetch(self.train.batch, first)
        meter = Meter(config, matmul_peak() * self.mesh.size)
        pending: tuple[int, dict[str, Any]] | None = None

        def report(done: tuple[int, dict[str, Any]] | None) -> None:
            if done is None:
                return
            step, metrics = done
            values = {k: v.item() for k, v in metrics.items()}
            values |= meter.measure(values["n"], values["k"])
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise InputError(
                    f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: training has diverged; "
                    f"nothing of it was saved, the newest checkpoint is {checkpoints.latest}; lower the learning rate"
                )
            if writer:
                writer.write(step, values)
            self.progress.update(step + 1, meter.line(step + 1, values), last=step + 1 == config.steps)

        def save(step: int) -> None:
            checkpoints.save(step, state.params, state.optimizer, meta | {"step": step, "data": self.train.state(step)})
            if writer:
                writer.sync()

        try:
            for step in range(first, config.steps):
                state, metrics = step_fn(state, self.place(next(batches)))
                report(pending)  # of the step before, while this one runs
                pending = step, metrics
                done, last = step + 1, step + 1 == config.steps
                if done % config.evaluation.every == 0 and not last and not stop():
                    report(pending)
                    pending = None
                    curve = self.evaluate(state.params, config.evaluation.batches, stop)
                    if curve is not None:
                        losses = zip(curve.depths, curve.nats, strict=True)
                        found, lines = self.examine(state.params, done)
                        if writer:
                            writer.write(step, {f"validation_loss_r{r}": x for r, x in losses} | found)
                        self.progress.say(f"step {done}  validation loss  {as_text(curve)}")
                        if self.alarmed(done, lines):
                            save(done)
                            self.say(f"stopped by an alarm: saved step {done} in {self.folder}; " + GO_ON)
                            return EXIT_ALARM
                    meter.restart()
                stopping = stop()  # asked once: a signal from here on is for the next step to see
                if last or done % config.checkpoint.every == 0 or stopping:
                    report(pending)  # before the save: a resumed run writes no row of a step that is saved
                    pending = None
                    save(done)
                if stopping:
                    self.say(f"preempted: saved step {done} in {self.folder}; run the same command to go on")
                    return EXIT_PREEMPTED
            curve = self.evaluate(state.params, None, stop)
            if curve is None:
                self.say(f"preempted in the last evaluation: {self.folder} holds step {config.steps}")
                return EXIT_PREEMPTED
            found, lines = self.examine(state.params, config.steps)
            if writer and found:
                writer.write(config.steps - 1, found)
            self.alarmed(config.steps, lines)
            checkpoints.wait()  # the curve comes after the state it is about: see `_finished`
            if self.first:
                write_curve(self.folder / "loss_by_depth.json", curve)
            return EXIT_DONE
        finally:
            batches.close()
            if writer:
                writer.close()

    def _open_folder(self, step: int) -> MetricsWriter:
        """Make the run folder complete, to go on from `step`."""
        if not (self.folder / "tokenizer").exists():
            partial = self.folder / "tokenizer.partial"
            self.tokenizer.save(partial)
            partial.rename(self.folder / "tokenizer")
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
    path.write_text(json.dumps({str(r): x for r, x in zip(curve.depths, curve.nats, strict=True)}, indent=2) + "\n")


def train(config: RunConfig) -> int:
    """Train `config` in its run folder, from its newest checkpoint if there is one; returns the exit code."""
    sys.stderr.flush()
    return together(lambda: Trainer(config)).run()
