"""Comparing kinds of model that differ in nothing else: same instances in the same order, own learning rate, seeds.

A `Contestant` is a kind of model as three functions. `Trials` trains it from any seed with one compiled step and reads
it on instances nobody trained on; `compete` chooses a learning rate and runs all seeds, each remembered on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rdlm.config import RunConfig
from rdlm.metrics import Progress
from rdlm.optim import optimizer
from rdlm.tasks.depth import counted
from rdlm.tasks.instance import Task, batch
from rdlm.tasks.record import commit, interval, processor_seconds, remembered, rounded
from rdlm.tasks.training import TEST_STREAM, Diverged, train

TUNING_STREAM, TUNING_SEED = 2_000_000, 100
"""Test instances and training seed that decide between learning rates and nothing else."""
TEST_BATCH = 64
"""Test instances per batch."""
LEARNT = 0.95
"""Accuracy on instances of training's size below which a seed counts as failed."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A kind of model. The functions are pure and traced.

    init: key -> parameters. loss: (parameters, batch as `training_batch` makes it, step int32, seed int32) -> f32.
    answers: (parameters, tokens int [B, L]) -> int [R, B, L], at each of R depths or in R ways.
    """

    init: Callable[[Array], Any]
    loss: Callable[[Any, dict[str, Array], Array, Array], Array]
    answers: Callable[[Any, Array], Array]


class _State(NamedTuple):
    step: Array
    params: Any
    optimizer: Any


class Trials:
    """Trains and reads one contestant: `run(seed)`. Nothing is compiled twice."""

    def __init__(
        self, model: Contestant, run: RunConfig, tasks: Sequence[Task], tests: Mapping[str, Task], test_batches: int = 4
    ):
        """run: optimizer, batch and number of steps (its seed is not read). tests: {name: task to be read on}."""
        self.model, self.settings, self.tasks, self.tests = model, run, tasks, tests
        self.test_batches = test_batches
        self.tx = optimizer(run.optimizer, run.steps)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.start = jax.jit(self._start)
        self.answers = jax.jit(model.answers)

    def _start(self, seed: Array) -> _State:
        params = self.model.init(jax.random.key(seed))
        return _State(jnp.int32(0), params, self.tx.init(params))

    def _step(self, state: _State, batch: dict[str, Array], seed: Array) -> tuple[_State, dict[str, Array]]:
        value, grads = jax.value_and_grad(self.model.loss)(state.params, batch, state.step, seed)
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
            self.tasks,
            lambda state, batch: self.step(state, batch, number),
            self.start(number),
            watch,
        )
        return state.params, last["loss"]

    def read(self, params: Any, stream: int = TEST_STREAM) -> dict[str, dict[str, list[float]]]:
        """{test: {"mean": [R], "last_quarter": [R]}}: accuracy over all answers, and over the hardest quarter."""
        out = {}
        for name, task in self.tests.items():
            batches = [batch(task, stream, i, TEST_BATCH) for i in range(self.test_batches)]
            found = counted((b, self.answers(params, jnp.asarray(b["tokens"])), None) for b in batches)
            hardest = len(found.count) - 1
            out[name] = {
                "mean": rounded(found.accuracy()),
                "last_quarter": rounded(found.accuracy(hardest - hardest // 4 + 1)),
            }
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
    made_by: dict[str, Any],
) -> dict[str, Any]:
    """Choose a learning rate, then train every seed with it: {"learning_rate", "tuning": rows, "seeds": rows}.

    The rate whose run from TUNING_SEED is best on fresh instances of training's size (the first test, the last depth)
    wins; of several the lowest. With one rate nothing is tuned.

    Args:
      name: of the method; its files are FOLDER/NAME_lrRATE_seedN.json.
      trials: the contestant at a learning rate.
      rates, seeds: to try; to report.
      folder: where finished rows are kept; they are read and not made again.
      made_by: what determines a row beside learning rate and seed.

    Raises:
      InputError: a kept row was made by something else.
    """
    made: dict[float, Trials] = {}

    def row(rate: float, seed: int, stream: int) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            if rate not in made:
                made[rate] = trials(rate)
            return made[rate].run(seed, stream, f"{name}, learning rate {rate:g}")

        about = made_by | {"learning_rate": rate, "seed": seed, "stream": stream}
        return remembered(folder / f"{name}_lr{rate:g}_seed{seed}.json", about, make)

    tuning = [row(rate, TUNING_SEED, TUNING_STREAM) for rate in sorted(rates)] if len(rates) > 1 else []
    best = max(tuning, key=_score)["learning_rate"] if tuning else rates[0]
    return {"learning_rate": best, "tuning": tuning, "seeds": [row(best, seed, TEST_STREAM) for seed in seeds]}


def _score(row: dict[str, Any]) -> float:
    return next(iter(row["tests"].values()))["mean"][-1] if row["tests"] else -1.0


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows of a method: {"failed", "diverged": seeds, "tests": {name: {"mean", "last_quarter": [R pairs]}}}.

    Pairs are (mean, half the width of its interval) over the seeds that did not diverge, one per depth. Failed are
    those that diverged or stayed below LEARNT on the first test at every depth; the latter are part of the means.
    """
    good = [row for row in rows if row["tests"]]
    failed = [
        row["seed"] for row in rows if not row["tests"] or max(next(iter(row["tests"].values()))["mean"]) < LEARNT
    ]
    tests = {
        name: {
            part: [
                tuple(rounded(interval(at_r))) for at_r in zip(*(row["tests"][name][part] for row in good), strict=True)
            ]
            for part in ("mean", "last_quarter")
        }
        for name in (good[0]["tests"] if good else ())
    }
    return {"failed": failed, "diverged": [row["seed"] for row in rows if not row["tests"]], "tests": tests}
