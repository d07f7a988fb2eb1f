"""The training loop: one compiled step for every depth, data and draws as functions of the step, exact resume."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from rdlm import flops, sharding
from rdlm.checkpoint import Checkpoints, as_abstract, read_config, write_config
from rdlm.config import PRESETS, InputError, RunConfig, differences
from rdlm.data import PackedData, prefetch, prepare
from rdlm.evaluate import DepthCurve, depth_curve
from rdlm.losses import loss
from rdlm.metrics import MetricsWriter, Progress, duration
from rdlm.model import Params, init_params, logical_axes
from rdlm.optim import optimizer, schedule
from rdlm.recurrence import max_gradient_steps, sample_steps
from rdlm.runtime import EXIT_DONE, EXIT_PREEMPTED
from rdlm.tokenizer import Tokenizer


class TrainState(NamedTuple):
    """What a step changes. step: int32 scalar, optimizer steps done; also the position in the data."""

    step: Array
    params: Params
    optimizer: Any


def step_keys(seed: int, step: Array) -> tuple[Array, Array]:
    """(key of the depth draw, key of the initial states) of a step: functions of (seed, step) on every host."""
    depth, state = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
    return depth, state


def draw_depth(run: RunConfig, step: Array) -> tuple[Array, Array]:
    """(n, k) of training step `step` (from 0), the same on all devices."""
    rec, model = run.recurrence, run.model
    progress = None if not rec.curriculum_steps else (step + 1) / rec.curriculum_steps
    return sample_steps(
        step_keys(run.seed, step)[0], model.mean_recurrence, model.backprop_depth, rec.scheme, progress
    )  # fmt: skip


def train_step(run: RunConfig, tx: optax.GradientTransformation, state: TrainState, batch: dict[str, Array]):
    """One optimizer step: (new state, metrics of it as scalars)."""
    n, k = draw_depth(run, state.step)
    _, state_key = step_keys(run.seed, state.step)
    value, grads = jax.value_and_grad(loss)(
        state.params,
        run.model,
        batch,
        steps=(n, k),
        key=state_key,
        max_k=max_gradient_steps(run.model.backprop_depth, run.recurrence.scheme),
        remat=run.recurrence.remat == "iteration",
    )
    updates, opt = tx.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": value,
        "n": n,
        "k": k,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(run.optimizer, run.steps)(state.step),
    }
    return TrainState(state.step + 1, params, opt), metrics


def init_state(run: RunConfig, tx: optax.GradientTransformation) -> TrainState:
    """Fresh parameters and optimizer state, a function of the seed."""
    params = init_params(run.model, jax.random.key(run.seed))
    return TrainState(jnp.int32(0), params, tx.init(params))


def state_shardings(run: RunConfig, tx: optax.GradientTransformation, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(shapes, shardings) of the train state: optimizer moments live where their parameters do."""
    shapes = jax.eval_shape(lambda: init_state(run, tx))
    params = sharding.parameter_sharding(mesh, logical_axes(run.model), shapes.params)
    everywhere: Any = sharding.replicated(mesh)
    opt = optax.tree.map_params(
        tx, lambda _, s: s, shapes.optimizer, params, transform_non_params=lambda _: everywhere
    )  # fmt: skip
    return shapes, TrainState(everywhere, params, opt)


class Preemption:
    """SIGTERM sets a flag instead of killing; the loop polls it, saves, and exits with code 75."""

    def __init__(self):
        self.requested = False
        self.previous = signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.requested = True

    def restore(self) -> None:
        """Put the previous handler back."""
        signal.signal(signal.SIGTERM, self.previous)


def matmul_peak() -> float:
    """FLOP/s of one device at its best: the datasheet's for known TPUs, a measured 1024^3 f32 product otherwise."""
    known = flops.PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if known:
        return known
    a = jnp.ones((1024, 1024))
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


class Trainer:
    """A run: its folder, data, devices and loop. `run()` returns the exit code."""

    def __init__(self, config: RunConfig, say: Callable[[str], None] | None = None):
        """Check everything that can be wrong before the first expensive thing happens.

        Raises:
          InputError: see the rooms below; nothing on disk is changed by a run that is refused.
        """
        self.config, self.folder = config, Path(config.folder)
        self.progress = Progress(config.steps)
        self.say = say or self.progress.say
        self.mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(self.mesh, config.data.batch_size)
        self.tx = optimizer(config.optimizer, config.steps)
        self.shapes, self.shardings = state_shardings(config, self.tx, self.mesh)
        self._check_folder()
        self._open_data()

    def _check_folder(self) -> None:
        if (self.folder / "config.json").exists():
            changed = differences(read_config(self.folder), self.config)
            for name in ("steps", "tensorboard", "run_dir"):  # a run may go on for longer, or under another name
                changed.pop(name, None)
            changed = {k: v for k, v in changed.items() if not k.startswith(("mesh.", "checkpoint.", "evaluation."))}
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
        prepared = prepare(data)
        self.tokenizer = Tokenizer.load(prepared / "tokenizer")
        if saved.exists() and Tokenizer.load(saved).hash != self.tokenizer.hash:
            raise InputError(
                f"{saved}: the run has another tokenizer than {prepared}; restore that data, or start a new run"
            )
        options: Any = {
            "sequence_length": data.sequence_length,
            "tokenizer_hash": self.tokenizer.hash,
            "seed": self.config.seed,
        }
        self.train = PackedData(prepared, "train", batch_size=data.batch_size, **options)
        self.validation = PackedData(prepared, "validation", batch_size=data.batch_size, shuffle=False, **options)

    def place(self, batch: Any) -> Any:
        """A host batch as arrays split over the devices."""
        return jax.device_put(batch, sharding.batch_sharding(self.mesh))

    def evaluate(self, params: Params, batches: int | None, stop: Callable[[], bool]) -> DepthCurve | None:
        """Loss by depth on `batches` validation batches (None: all); None when stopped."""
        return depth_curve(
            params, self.config.model, self.validation.batches(batches), self.config.evaluation.depths,
            self.tokenizer.token_bytes, self.place, stop,
        )  # fmt: skip

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
        self.say(f"resuming {self.folder} at step {latest}")
        return TrainState(jax.device_put(jnp.int32(latest), self.shardings.step), params, opt)

    def run(self) -> int:
        """Train to the last step; returns 0, or 75 when SIGTERM came and the state is saved."""
        preemption = Preemption()
        try:
            # First of all what makes this a run folder: a run killed at any later moment resumes by the same command.
            if not (self.folder / "config.json").exists():
                write_config(self.folder, self.config)
            with Checkpoints(self.folder, self.config.checkpoint.keep) as checkpoints:
                if self._finished(checkpoints):
                    self.say(f"{self.folder} is finished: step {self.config.steps} is saved and evaluated")
                    return EXIT_DONE
                return self._run(checkpoints, preemption)
        finally:
            preemption.restore()

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
        if not (self.folder / "tokenizer").exists():
            partial = self.folder / "tokenizer.partial"
            self.tokenizer.save(partial)
            partial.rename(self.folder / "tokenizer")
        write_config(self.folder, config)
        first = int(state.step)
        writer = MetricsWriter(self.folder, first, config.tensorboard)
        meta = {"config": dataclasses.asdict(config), "tokenizer": self.tokenizer.hash}
        self.say(self._headline())
        # The state leaves a step as it entered it: left to the compiler, a mesh would compile a second program.
        step_fn = jax.jit(
            functools.partial(train_step, config, self.tx), donate_argnums=0, out_shardings=(self.shardings, None)
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
            writer.write(step, values)
            self.progress.update(step + 1, meter.line(step + 1, values), last=step + 1 == config.steps)

        def save(step: int) -> None:
            checkpoints.save(step, state.params, state.optimizer, meta | {"step": step})

        try:
            for step in range(first, config.steps):
                state, metrics = step_fn(state, self.place(next(batches)))
                report(pending)  # of the step before, while this one runs
                pending = step, metrics
                done, last = step + 1, step + 1 == config.steps
                if done % config.evaluation.every == 0 and not last and not preemption.requested:
                    report(pending)
                    pending = None
                    curve = self.evaluate(state.params, config.evaluation.batches, lambda: preemption.requested)
                    if curve is not None:
                        writer.write(
                            step, {f"validation_loss_r{r}": x for r, x in zip(curve.depths, curve.nats, strict=True)}
                        )
                        self.progress.say(f"step {done}  validation loss  {as_text(curve)}")
                    meter.restart()
                stop = preemption.requested  # read once: a signal from here on is for the next step to see
                if last or done % config.checkpoint.every == 0 or stop:
                    report(pending)  # before the save: a resumed run writes no row of a step that is saved
                    pending = None
                    save(done)
                if stop:
                    self.say(f"preempted: saved step {done} in {self.folder}; run the same command to go on")
                    return EXIT_PREEMPTED
            curve = self.evaluate(state.params, None, lambda: preemption.requested)
            if curve is None:
                self.say(f"preempted in the last evaluation: {self.folder} holds step {config.steps}")
                return EXIT_PREEMPTED
            checkpoints.wait()  # the curve comes after the state it is about: see `_finished`
            write_curve(self.folder / "loss_by_depth.json", curve)
            return EXIT_DONE
        finally:
            batches.close()
            writer.close()

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


class Meter:
    """Speed of the recent steps, compilation and evaluation left out."""

    def __init__(self, config: RunConfig, peak: float):
        """`peak`: FLOP/s of all devices."""
        self.config, self.peak = config, peak
        self.tokens = config.data.batch_size * config.data.sequence_length
        self.start = time.monotonic()
        self.last: float | None = None
        self.step_seconds: float | None = None
        self.utilisation = 0.0

    def restart(self) -> None:
        """Do not count the time since the last step."""
        self.last = None

    def measure(self, n: int, k: int) -> dict[str, float]:
        """Speed of the step that just ended and ran (n, k)."""
        now = time.monotonic()
        seconds, self.last = (None if self.last is None else now - self.last), now
        if seconds is None:
            return {"seconds": round(now - self.start, 3)}
        work = flops.training_flops(self.config.model, n, k, self.config.data.sequence_length) * self.tokens
        mfu = work / seconds / self.peak
        keep = 0.0 if self.step_seconds is None else 0.95
        self.step_seconds = keep * (self.step_seconds or 0.0) + (1 - keep) * seconds
        self.utilisation = keep * self.utilisation + (1 - keep) * mfu
        return {"tokens_per_second": self.tokens / seconds, "mfu": mfu, "seconds": round(now - self.start, 3)}

    def line(self, step: int, values: dict[str, Any]) -> str:
        """What the progress line says."""
        text = f"loss {values['loss']:.3f}  r {values['n']}+{values['k']}"
        if self.step_seconds:
            left = duration((self.config.steps - step) * self.step_seconds)
            text += f"  {self.tokens / self.step_seconds:,.0f} tok/s  MFU {self.utilisation:.0%}  ETA {left}"
        return text


def as_text(curve: DepthCurve) -> str:
    """'r=1 5.123  r=2 4.987 ...'."""
    return "  ".join(f"r={r} {x:.3f}" for r, x in zip(curve.depths, curve.nats, strict=True))


def write_curve(path: Path, curve: DepthCurve) -> None:
    """Write {"1": nats, "2": nats, ...}."""
    path.write_text(json.dumps({str(r): x for r, x in zip(curve.depths, curve.nats, strict=True)}, indent=2) + "\n")


def train(config: RunConfig) -> int:
    """Train `config` in its run folder, from its newest checkpoint if there is one; returns the exit code."""
    sys.stderr.flush()
    return Trainer(config).run()
