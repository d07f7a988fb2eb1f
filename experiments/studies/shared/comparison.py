"""Comparing kinds of model that differ in nothing else: same instances in the same order, own learning rate, seeds.

A `Contestant` is a kind of model as three functions. `Trials` trains it from any seed with one compiled step and tests
it on new instances; `compete` chooses a learning rate and runs all seeds, and keeps every finished one on disk.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from experiments.studies.shared.record import Json, interval, processor_seconds, remembered, rounded
from experiments.studies.shared.training import Diverged, check_seeds, train
from rdlm import losses
from rdlm.config import ModelConfig, RunConfig, Scheme, require
from rdlm.evaluation.difficulty import counted, logits_by_depth
from rdlm.model import Params, forward, init_params
from rdlm.optim import optimizer
from rdlm.perf import flops
from rdlm.recurrence import max_gradient_steps, sample_steps
from rdlm.report.results import command, commit
from rdlm.runtime import Progress
from rdlm.tasks.instance import TEST_STREAM, Task, batch
from rdlm.tasks.words import WordProblem
from rdlm.train import TrainState, apply_gradients, draw_depth, step_keys

TUNING_STREAM, TUNING_SEED = 2_000_000, 100
"""Test instances and training seed that choose the learning rate, and are used for nothing else."""
TEST_BATCH = 64
"""Test instances per batch."""
LEARNT = 0.95
"""Accuracy on instances of training's size below which a seed counts as failed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What every comparison's command line offers. A study adds its `methods`."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of initialisation, data, depths and initial states."""
    runs: Path = Path("runs")
    """Folder for finished runs, a small file each."""
    results: Path = Path("experiments/studies/results")
    """Folder for the study's .json and .png."""
    quick: bool = False
    """A few steps and instances, to see that everything works; writes only under RUNS/quick."""


def check_comparison(args: Options, methods: Sequence[str]) -> tuple[Path, Path]:
    """(folder of finished runs, folder of results).

    Raises:
      InputError: no method or one twice, or seeds that `check_seeds` refuses.
    """
    require(len(set(methods)) == len(methods) > 0, "--methods", methods, "must be different methods")
    check_seeds(args.seeds)
    return (args.runs / "quick", args.runs / "quick") if args.quick else (args.runs, args.results)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What every contestant is trained and tested on."""

    train: Task
    tests: Mapping[str, Task]
    """By name; the first is of training's size."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 32, 64)
    """Recurrences r to test at."""
    steps: int = 1000
    """Training steps."""
    test_batches: int = 4
    """Batches of 64 instances."""

    def quick(self) -> Protocol:
        """A few steps, one test batch and few depths, to see that everything works."""
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
    facts: None, or (parameters, tokens, labels) -> {name: f32 scalar}, measured on every test.
    staged: the loss changes over training and also takes `step`, int32.
    """

    init: Callable[[Array], Params]
    loss: Callable[..., Array]
    answers: Callable[[Params, Array], Array]
    facts: Callable[[Params, Array, Array], dict[str, Array]] | None = None
    staged: bool = False


def recurrent(model: ModelConfig, depths: tuple[int, ...], scheme: Scheme = "poisson-lognormal-filling") -> Contestant:
    """The recurrent-depth model itself, trained as by `rdlm.train`."""
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
    """FLOPs of a whole training, forward and backward: at the depths seed 0 draws, or with every layer run once."""
    n, k = 0.0, 1.0  # mean recurrences without and with gradient
    if not once:
        draws = jax.vmap(functools.partial(draw_depth, dataclasses.replace(run, seed=0)))(jnp.arange(run.steps))
        n, k = (float(x.mean()) for x in draws)
    L = run.data.sequence_length
    return flops.training_flops(run.model, n, k, L) * run.steps * run.data.batch_size * L


def answers_by_depth(model: ModelConfig, depths: tuple[int, ...]) -> Callable[[Params, Array], Array]:
    """(parameters, tokens int [B, L]) -> the most likely answers int [R, B, L] at each of the depths."""
    return lambda params, tokens: jnp.argmax(logits_by_depth(params, model, tokens, depths, jax.random.key(0)), -1)


class Trials:
    """Trains and tests one contestant: `run(seed)`. All seeds share the compiled programs."""

    def __init__(self, model: Contestant, run: RunConfig, protocol: Protocol):
        """`run`: optimizer, batch size and number of steps; its seed is not used."""
        self.model, self.settings, self.protocol = model, run, protocol
        self.tx = optimizer(run.optimizer, run.steps)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.start = jax.jit(self._start)
        self.answers = jax.jit(model.answers)
        self.facts = jax.jit(model.facts) if model.facts else None

    def _start(self, seed: Array) -> TrainState:
        params = self.model.init(jax.random.key(seed))
        return TrainState(jnp.int32(0), params, self.tx.init(params))

    def _step(self, state: TrainState, batch: dict[str, Array], seed: Array) -> tuple[TrainState, dict[str, Array]]:
        """As `rdlm.train.train_step`, with the contestant's loss, and with a seed that is not compiled in."""
        stage = {"step": state.step} if self.model.staged else {}
        loss = jax.value_and_grad(self.model.loss)
        value, grads = loss(state.params, batch, *step_keys(seed, state.step), **stage)
        return apply_gradients(self.settings, self.tx, state, value, grads)[0], {"loss": value}

    def trained(self, seed: int, name: str = "") -> tuple[Params, float]:
        """(parameters, last loss) after training from `seed`; `name` is for display. Raises Diverged."""
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

    def read(self, params: Params, stream: int = TEST_STREAM) -> dict[str, Json]:
        """{test: {"mean", "last_quarter", "hardest": [R] each, facts}}: accuracy over all answers, over the hardest
        quarter of difficulties, and over the highest difficulty alone."""
        out = {}
        for name, task in self.protocol.tests.items():
            batches = [batch(task, stream, i, TEST_BATCH) for i in range(self.protocol.test_batches)]
            found = counted((b, self.answers(params, jnp.asarray(b["tokens"])), None) for b in batches)
            hardest = len(found.count) - 1
            out[name] = {
                "mean": rounded(found.accuracy()),
                "last_quarter": rounded(found.accuracy(min(hardest, hardest - hardest // 4 + 1))),
                "hardest": rounded(found.accuracy(hardest)),
            }
            if self.facts:
                facts = [self.facts(params, jnp.asarray(b["tokens"]), jnp.asarray(b["labels"])) for b in batches]
                out[name] |= {fact: round(float(sum(x[fact] for x in facts)) / len(facts), 5) for fact in facts[0]}
        return out

    def run(self, seed: int, stream: int = TEST_STREAM, name: str = "") -> Json:
        """A row: seed, learning_rate, commit, loss, tests (see `read`), processor_seconds, programs.

        If training diverges, loss is None and tests is empty. processor_seconds include compilation.
        """
        started = processor_seconds()
        rate = self.settings.optimizer.learning_rate
        row: Json = {"seed": seed, "learning_rate": rate, "commit": commit()}
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
    options: Mapping[str, object],
) -> Json:
    """Choose a learning rate, then train every seed with it: {"learning_rate", "tuning": rows, "seeds": rows}.

    The rate whose run from TUNING_SEED is best on new instances of training's size (the first test, the last depth)
    wins, the lowest of equally good ones. With one rate there is no tuning.

    Args:
      name: of the method; its files are FOLDER/NAME_lrRATE_seedN.json.
      trials: the contestant at a learning rate.
      rates: learning rates to try.
      seeds: seeds to report.
      folder: for finished rows; those in it are read instead of computed.
      options: settings of the contestant beside its run and its name.

    Raises:
      InputError: a row in `folder` was made by something else.
    """
    at: dict[float, Trials] = {}

    def row(rate: float, seed: int, stream: int) -> Json:
        if rate not in at:
            at[rate] = trials(rate)
        run, protocol = at[rate].settings, at[rate].protocol
        about = {
            "model": dataclasses.asdict(run.model),
            "steps": run.steps,
            "batches": protocol.test_batches,
            "depths": protocol.depths,
            "learning_rate": rate,
            "seed": seed,
            "stream": stream,
            **options,
        }
        make = functools.partial(at[rate].run, seed, stream, f"{name}, learning rate {rate:g}")
        return remembered(folder / f"{name}_lr{rate:g}_seed{seed}.json", about, make)

    tuning = [row(rate, TUNING_SEED, TUNING_STREAM) for rate in sorted(rates)] if len(rates) > 1 else []
    best = max(tuning, key=_score)["learning_rate"] if tuning else rates[0]
    return {"learning_rate": best, "tuning": tuning, "seeds": [row(best, seed, TEST_STREAM) for seed in seeds]}


def _score(row: Json) -> float:
    return next(iter(row["tests"].values()))["mean"][-1] if row["tests"] else -1.0


def summary(rows: Sequence[Json]) -> Json:
    """A method's rows in short: {"failed", "diverged": seeds, "tests": {name: as in `read`, with pairs for numbers}}.

    Pairs are (mean, half the width of its interval) over the seeds that did not diverge. Entries that some rows lack
    are left out. A seed failed if it diverged, or stayed below LEARNT on the first test at every depth; the latter are
    part of the means.
    """
    good = [row for row in rows if row["tests"]]
    failed = [
        row["seed"] for row in rows if not row["tests"] or max(next(iter(row["tests"].values()))["mean"]) < LEARNT
    ]

    def over_seeds(name: str, part: str) -> list[tuple[float, ...]] | tuple[float, ...]:
        values = [row["tests"][name][part] for row in good]
        if isinstance(values[0], list):
            return [tuple(rounded(interval(at_r))) for at_r in zip(*values, strict=True)]
        return tuple(rounded(interval(values)))

    tests = {
        name: {part: over_seeds(name, part) for part in found if all(part in row["tests"][name] for row in good)}
        for name, found in (good[0]["tests"].items() if good else ())
    }
    return {"failed": failed, "diverged": [row["seed"] for row in rows if not row["tests"]], "tests": tests}


def beside_earlier(path: Path, found: Mapping[str, Json], order: Sequence[str]) -> Json:
    """{method: result} in `order`: the new ones with their command and commit, the others from the file at `path`.

    So the methods of a study can be run one at a time."""
    made = {"command": command(), "commit": commit()}
    earlier = json.loads(path.read_text())["methods"] if path.exists() else {}
    both = earlier | {name: {**made, **result} for name, result in found.items()}
    return {name: both[name] for name in order if name in both}
