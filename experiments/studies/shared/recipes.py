"""Problems that a small model learns on short instances and is tested on longer ones; one run of each, kept on disk."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.studies.shared.record import Json, processor_seconds
from experiments.studies.shared.training import small_run, train
from rdlm.checkpoint import Checkpoints, load_checkpoint, read_config, saved_steps, write_config
from rdlm.config import InputError, RunConfig, differences
from rdlm.model import Params
from rdlm.optim import optimizer
from rdlm.runtime import Progress, owned
from rdlm.tasks import Addition, Corridor, Expression, PointerChasing, Reachability, Task, WordProblem
from rdlm.train import init_state, train_step
from rdlm.train.metrics import MetricsWriter, read_metrics


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained on what, and tested where."""

    task: tuple[str, int]
    """Name in `rdlm.tasks.TASKS` and largest size of the training instances, for config.json."""
    train: tuple[Task, ...]
    """Training instances; several take turns."""
    tests: dict[str, tuple[Task, ...]]
    """Test instances by name; the first are of training's size."""
    steps: int = 1000
    learning_rate: float = 1e-3
    rope_base: float = 10_000.0
    attention_window: int | None = None
    """Tokens that a token sees, itself included."""
    mean_recurrence: int = 8
    """Mean r of training."""
    batch_size: int = 64
    depths: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    """Recurrences r to test at."""
    max_steps: int = 64
    """Recurrences of a token that no rule stops."""
    test_batches: int = 4
    """Batches of 64 instances."""

    def quick(self) -> Recipe:
        """A few steps, one test batch of the hardest test and few depths, to see that everything works."""
        hardest = dict(list(self.tests.items())[-1:])
        return dataclasses.replace(
            self, tests=hardest, steps=12, batch_size=8, depths=(1, 2, 8), max_steps=8, test_batches=1
        )


def words(group: Literal["Z2", "S3", "S5"], *lengths: int) -> dict[str, tuple[Task, ...]]:
    """Tests on words of these lengths."""
    return {f"length {T}": (WordProblem(group, T),) for T in lengths}


RECIPES = {
    "s3": Recipe(("s3", 16), (WordProblem("S3", 16),), words("S3", 16, 32, 64)),
    "parity": Recipe(("parity", 16), (WordProblem("Z2", 16),), words("Z2", 16, 32)),
    "s3_local": Recipe(("s3", 16), (WordProblem("S3", 16),), words("S3", 16, 32, 64), attention_window=5),
    "s5_local": Recipe(
        ("s5", 8),
        (WordProblem("S5", 8),),
        words("S5", 8, 16, 32),
        steps=1500,
        learning_rate=2e-3,
        attention_window=2,
    ),
    "parity_local": Recipe(("parity", 8), (WordProblem("Z2", 8),), words("Z2", 8, 16, 32), attention_window=2),
    "addition_local": Recipe(
        ("addition", 8),
        (Addition(3, 8, 0.5),),
        {
            "8 digits": (Addition(3, 8, 0.5),),
            "16 digits, one chain": (Addition(3, 16, 1.0),),
            "32 digits, one chain": (Addition(3, 32, 1.0),),
        },
        learning_rate=2e-3,
        mean_recurrence=4,
        attention_window=5,  # a column, and the `=` before it
    ),
    "chains_local": Recipe(
        ("chains", 8),
        (Expression(8, 3, nested=False),),
        {f"{n} operators": (Expression(n, 3, nested=False),) for n in (8, 16, 32)},
        steps=2000,
        learning_rate=2e-3,
        attention_window=5,
    ),
    "corridors_local": Recipe(
        ("corridors", 16),
        (Corridor(16),),
        {f"{n} squares": (Corridor(n),) for n in (16, 32, 64)},
        steps=600,
        learning_rate=2e-3,
        attention_window=2,
    ),
    "expressions": Recipe(
        ("expressions", 8),
        (Expression(8),),
        {f"{n} operators": (Expression(n),) for n in (8, 16, 24)},
        learning_rate=2e-3,
        batch_size=48,
    ),
    "pointers": Recipe(
        ("pointers", 4),
        (PointerChasing(4, 12),),
        {f"{h} hops": (PointerChasing(h, 12),) for h in (4, 8)},
        learning_rate=2e-3,
        batch_size=48,
    ),
    "reachability": Recipe(
        ("reachability", 6),
        (Reachability(2), Reachability(4), Reachability(6)),
        {f"distance {d}": (Reachability(d),) for d in (6, 12)},
        learning_rate=2e-3,
        batch_size=32,
    ),
}


def run_config(name: str, recipe: Recipe, seed: int, runs: Path) -> RunConfig:
    """The run of one seed; its folder is RUNS/NAME, or RUNS/NAME_seedN for N > 0."""
    run = small_run(
        f"depth_scaling_{name}",
        recipe.train,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        seed=seed,
        rope_base=recipe.rope_base,
        attention_window=recipe.attention_window,
        mean_recurrence=recipe.mean_recurrence,
    )
    task, size = recipe.task
    return dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, task=task, task_size=size),
        run_dir=str(runs / (name if seed == 0 else f"{name}_seed{seed}")),
    )


def trained(run: RunConfig, recipe: Recipe) -> tuple[Params, Json]:
    """(parameters, facts of training) of a run: from its folder if it is finished, else trained from scratch.

    Raises:
      InputError: the folder holds another run, or training diverged.
    """
    folder = Path(run.folder)
    if (folder / "config.json").exists():
        for name, (old, new) in differences(read_config(folder), run).items():
            raise InputError(
                f"run folder {folder}: holds a run with {name} = {old!r}, not {new!r}; choose other --runs"
            )
        if run.steps in saved_steps(folder):
            return load_checkpoint(folder)[0], read_metrics(folder)[-1]
    tx = optimizer(run.optimizer, run.steps)
    state = jax.jit(functools.partial(init_state, run, tx))()
    step: Any = jax.jit(functools.partial(train_step, run, tx), donate_argnums=0)
    progress, started = Progress(run.steps), processor_seconds()
    with owned(folder, "choose other --runs"), Checkpoints(folder, keep=1) as checkpoints:
        writer = MetricsWriter(folder, 0)

        def watch(i: int, values: dict[str, float]) -> None:
            spent = {"processor_seconds": round(processor_seconds() - started, 1), "programs": step._cache_size()}
            writer.write(i, values | spent)
            progress.update(i + 1, f"{folder}  loss {values['loss']:.4f}", last=i + 1 == run.steps)

        state = train(run, recipe.train, step, state, watch)
        writer.close()
        meta = {"config": dataclasses.asdict(run), "step": run.steps}
        checkpoints.save(run.steps, state.params, state.optimizer, meta)
    write_config(folder, run)  # last: a folder with a config is a finished run
    return state.params, read_metrics(folder)[-1]
