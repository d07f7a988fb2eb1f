"""Comparing kinds of model that differ in nothing else: same instances in the same order, own learning rate, seeds.

A `Contestant` is a kind of model as three functions. `Trials` trains it from any seed with one compiled step and reads
it on instances nobody trained on; `compete` chooses a learning rate and runs all seeds, each remembered on disk.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.studies.shared.record import interval, processor_seconds, remembered, rounded
from experiments.studies.shared.training import Diverged, train
from rdlm import losses
from rdlm.config import ModelConfig, RunConfig, Scheme
from rdlm.evaluation.difficulty import counted, logits_by_depth
from rdlm.model import Params, forward, init_params
from rdlm.optim import optimizer
from rdlm.perf import flops
from rdlm.recurrence import max_gradient_steps, sample_steps
from rdlm.report.results import command, commit
from rdlm.runtime.progress import Progress
from rdlm.tasks.instance import TEST_STREAM, Task, batch
from rdlm.tasks.words import WordProblem

TUNING_STREAM, TUNING_SEED = 2_000_000, 100
"""Test instances and training seed that decide between learning rates and nothing else."""
TEST_BATCH = 64
"""Test instances per batch."""
LEARNT = 0.95
"""Accuracy on instances of training's size below which a seed counts as failed."""


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What every contestant is trained on and read on."""

    train: Task
    tests: Mapping[str, Task]
    """By name; the first is of training's size."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 32, 64)
    """Recurrences to read at."""
    steps: int = 1000
    """Of training."""
    test_batches: int = 4
    """Of 64 instances."""

    def quick(self) -> Protocol:
        """A few steps, read once at few depths, to see that everything works."""
        first = dict(list(self.tests.items())[:1])
        return dataclasses.replace(self, tests=first, depths=(1, 4, 16), steps=4, test_batches=1)


S3 = Protocol(WordProblem("S3", 16), {f"length {T}": WordProblem("S3", T) for T in (16, 32)})


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A kind of model. The functions are pure and traced.

    init: key -> parameters.
    loss: (parameters, batch as `training_batch` makes it, key of the depth draw, key of the initial states) -> f32;
      the keys are those of `rdlm.train.step_keys`, so equal models draw equal depths and states.
    answers: (parameters, tokens int [B, L]) -> int [R, B, L], at each of R depths.
    facts: None, or (parameters, tokens, labels) -> {name: f32 scalar} to be known of every test.
    staged: the loss changes while training goes on, and takes `step`, int32, too.
    """

    init: Callable[[Array], Params]
    loss: Callable[..., Array]
    answers: Callable[[Params, Array], Array]
    facts: Callable[[Params, Array, Array], dict[str, Array]] | None = None
    staged: bool = False


def recurrent(model: ModelConfig, depths: tuple[int, ...], scheme: Scheme = "poisson-lognormal-filling") -> Contestant:
    """The recurrent-depth model itself, trained as `rdlm.train` does."""
    slots = max_gradient_steps(model.backprop_depth, scheme)

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        steps = sample_steps(depth_key, model.mean_recurrence, model.backprop_depth, scheme)
        return losses.loss(params, model, batch, steps=steps, key=state_key, max_k=slots)

    return Contestant(lambda key: init_params(model, key), loss, answers_by_depth(model, depths))


def fixed_depth(model: ModelConfig) -> Contestant:
    """The same layers, each run once, from the zero state."""

    def zeros(tokens: Array) -> Array:
        return jnp.zeros((*tokens.shape, model.embed_dim))

    def loss(params: Params, batch: dict[str, Array], depth_key: Array, state_key: Array) -> Array:
        return losses.loss(params, model, batch, steps=(0, 1), state=zeros(batch["tokens"]))

    def answers(params: Params, tokens: Array) -> Array:
        return jnp.argmax(forward(params, model, tokens, 1, state=zeros(tokens)).logits, -1)[None]

    return Contestant(lambda key: init_params(model, key), loss, answers)


def training_flops(run: RunConfig, once: bool = False) -> float:
    """FLOPs of a whole training, forward and backward: with the depths that seed 0 draws, or every layer run once."""
    model = run.model
    n, k = 0.0, 1.0  # mean recurrences without and with gradient
    if not once:

        def draw(i: Array) -> tuple[Array, Array]:
            key = jax.random.split(jax.random.fold_in(jax.random.key(0), i))[0]  # as rdlm.train.step_keys
            return sample_steps(key, model.mean_recurrence, model.backprop_depth, run.recurrence.scheme)

        free, with_gradient = jax.vmap(draw)(jnp.arange(run.steps))
        n, k = float(free.mean()), float(with_gradient.mean())
    L = run.data.sequence_length
    return flops.training_flops(model, n, k, L) * run.steps * run.data.batch_size * L


def answers_by_depth(model: ModelConfig, depths: tuple[int, ...]) -> Callable[[Params, Array], Array]:
    """(parameters, tokens int [B, L]) -> the likeliest answers int [R, B, L] after each of the depths."""
    return lambda params, tokens: jnp.argmax(logits_by_depth(params, model, tokens, depths, jax.random.key(0)), -1)


class _State(NamedTuple):
    step: Array
    params: Any
    optimizer: Any


class Trials:
    """Trains and reads one contestant: `run(seed)`. Nothing is compiled twice."""

    def __init__(self, model: Contestant, run: RunConfig, protocol: Protocol):
        """run: optimizer, batch and number of steps; its seed is not read."""
        self.model, self.settings, self.protocol = model, run, protocol
        self.tx = optimizer(run.optimizer, run.steps)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.start = jax.jit(self._start)
        self.answers = jax.jit(model.answers)
        self.facts = jax.jit(model.facts) if model.facts else None

    def _start(self, seed: Array) -> _State:
        params = self.model.init(jax.random.key(seed))
        return _State(jnp.int32(0), params, self.tx.init(params))

    def _step(self, state: _State, batch: dict[str, Array], seed: Array) -> tuple[_State, dict[str, Array]]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))  # as rdlm.train.step_keys
        told = {"step": state.step} if self.model.staged else {}
        value, grads = jax.value_and_grad(self.model.loss)(state.params, batch, keys[0], keys[1], **told)
        updates, opt = self.tx.update(grads, state.optimizer, state.params)
        return _State(state.step + 1, optax.apply_updates(state.params, updates), opt), {"loss": value}

    def trained(self, seed: int, name: str = "") -> tuple[Any, float]:
        """(parameters, last loss) after training from `seed`; `name` is shown. Raises Diverged."""
        number = jnp.int32(seed)
        last, progress = {}, Progress(self.settings.steps)

        def watch(i: int, values: dict[str, float]) -> None:
            last.update(values)
            done = i + 1
            progress.update(done, f"{name}, seed {seed}: loss {values['loss']:.4f}", last=done == self.settings.steps)

        state = train(
            dataclasses.replace(self.settings, seed=seed),
            [self.protocol.train],
            lambda state, batch: self.step(state, batch, number),
            self.start(number),
            watch,
        )
        return state.params, last["loss"]

    def read(self, params: Any, stream: int = TEST_STREAM) -> dict[str, dict[str, Any]]:
        """{test: {"mean", "last_quarter", "hardest": [R] each, facts}}: accuracy over all answers, over the hardest
        quarter of difficulties, and over the highest difficulty alone."""
        out = {}
        for name, task in self.protocol.tests.items():
            batches = [batch(task, stream, i, TEST_BATCH) for i in range(self.protocol.test_batches)]
            found = counted((b, self.answers(params, jnp.asarray(b["tokens"])), None) for b in batches)
            hardest = len(found.count) - 1
            out[name] = {
                "mean": rounded(found.accuracy()),
                "last_quarter": rounded(found.accuracy(hardest - hardest // 4 + 1)),
                "hardest": rounded(found.accuracy(hardest)),
            }
            if self.facts:
                facts = [self.facts(params, jnp.asarray(b["tokens"]), jnp.asarray(b["labels"])) for b in batches]
                out[name] |= {fact: round(float(sum(x[fact] for x in facts)) / len(facts), 5) for fact in facts[0]}
        return out

    def run(self, seed: int, stream: int = TEST_STREAM, name: str = "") -> dict[str, Any]:
        """A row: seed, learning_rate, commit, loss, tests (see `read`), processor_seconds, programs.

        One that diverged has loss None and no tests. processor_seconds include what had to be compiled.
        """
        started = processor_seconds()
        rate = self.settings.optimizer.learning_rate
        row: dict[str, Any] = {"seed": seed, "learning_rate": rate, "commit": commit()}
        try:
            params, loss = self.trained(seed, name)
            row |= {"loss": loss, "tests": self.read(params, stream)}
        except Diverged:
            row |= {"loss": None, "tests": {}}
        return row | {
            "processor_seconds": round(processor_seconds() - started, 1),
            "programs": self.step._cache_size(),  # type: ignore[attr-defined]
        }


def compete(
    name: str,
    trials: Callable[[float], Trials],
    rates: Sequence[float],
    seeds: Sequence[int],
    folder: Path,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Choose a learning rate, then train every seed with it: {"learning_rate", "tuning": rows, "seeds": rows}.

    The rate whose run from TUNING_SEED is best on fresh instances of training's size (the first test, the last depth)
    wins; of several the lowest. With one rate nothing is tuned.

    Args:
      name: of the method; its files are FOLDER/NAME_lrRATE_seedN.json.
      trials: the contestant at a learning rate.
      rates, seeds: to try; to report.
      folder: where finished rows are kept; they are read and not made again.
      options: what determines the contestant beside its run and its name.

    Raises:
      InputError: a kept row was made by something else.
    """
    at: dict[float, Trials] = {}

    def row(rate: float, seed: int, stream: int) -> dict[str, Any]:
        if rate not in at:
            at[rate] = trials(rate)
        run, protocol = at[rate].settings, at[rate].protocol
        about = {
            "model": dataclasses.asdict(run.model), "steps": run.steps, "batches": protocol.test_batches,
            "depths": protocol.depths, "learning_rate": rate, "seed": seed, "stream": stream, **options,
        }  # fmt: skip

        def make() -> dict[str, Any]:
            return at[rate].run(seed, stream, f"{name}, learning rate {rate:g}")

        return remembered(folder / f"{name}_lr{rate:g}_seed{seed}.json", about, make)

    tuning = [row(rate, TUNING_SEED, TUNING_STREAM) for rate in sorted(rates)] if len(rates) > 1 else []
    best = max(tuning, key=_score)["learning_rate"] if tuning else rates[0]
    return {"learning_rate": best, "tuning": tuning, "seeds": [row(best, seed, TEST_STREAM) for seed in seeds]}


def _score(row: dict[str, Any]) -> float:
    return next(iter(row["tests"].values()))["mean"][-1] if row["tests"] else -1.0


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of a method's rows: {"failed", "diverged": seeds, "tests": {name: as in `read`, with pairs for numbers}}.

    Pairs are (mean, half the width of its interval) over the seeds that did not diverge; what earlier rows lack is
    left out. Failed are those that diverged or stayed below LEARNT on the first test at every depth; the latter are
    part of the means.
    """
    good = [row for row in rows if row["tests"]]
    failed = [
        row["seed"] for row in rows if not row["tests"] or max(next(iter(row["tests"].values()))["mean"]) < LEARNT
    ]

    def over_seeds(name: str, part: str) -> Any:
        values = [row["tests"][name][part] for row in good]
        if isinstance(values[0], list):
            return [tuple(rounded(interval(at_r))) for at_r in zip(*values, strict=True)]
        return tuple(rounded(interval(values)))

    tests = {
        name: {part: over_seeds(name, part) for part in found if all(part in row["tests"][name] for row in good)}
        for name, found in (good[0]["tests"].items() if good else ())
    }
    return {"failed": failed, "diverged": [row["seed"] for row in rows if not row["tests"]], "tests": tests}


def beside_earlier(path: Path, found: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """{method: result} in `order`: those just `found`, with the command and commit that found them, and the others of
    an earlier result file at `path`, so that methods can be run one by one."""
    made = {"command": command(), "commit": commit()}
    earlier = json.loads(path.read_text())["methods"] if path.exists() else {}
    both = earlier | {name: {**made, **result} for name, result in found.items()}
    return {name: both[name] for name in order if name in both}
