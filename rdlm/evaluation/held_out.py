"""Held-out examples of a run: its validation text, or new instances of the task it was trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rdlm.checkpoint import load_tokenizer, read_config, read_meta
from rdlm.config import DataConfig, InputError, RunConfig, local_path
from rdlm.data import Chain, open_validation
from rdlm.tasks import IGNORED, Expression, PointerChasing, Reachability, Task, WordProblem, batch, named
from rdlm.tasks.instance import TEST_STREAM
from rdlm.tokenizer import Tokenizer

INSTANCES = 64
"""Per batch."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Labelled examples that the run was not trained on.

    what: description. batches(n): the first n batches (None: all), dicts as `rdlm.losses.as_batch` takes them. total:
    number of batches. length: L of their rows. token_bytes: int [V], bytes of text of each token; zeros for a task.
    pieces(ids) -> a readable name of each token. tokenizer: None for a task.
    """

    what: str
    batches: Callable[[int | None], Iterator[dict[str, np.ndarray]]]
    total: int
    length: int
    token_bytes: np.ndarray
    pieces: Callable[[Any], list[str]]
    tokenizer: Tokenizer | None

    @property
    def is_task(self) -> bool:
        """Whether labels are answers of a task; otherwise they are the next tokens of a text."""
        return self.tokenizer is None


def held_out(
    run_dir: str | Path, step: int | None = None, size: int | None = None, prepared: Sequence[str] = ()
) -> HeldOut:
    """Held-out examples of the run in a folder.

    Args:
      run_dir: run folder.
      step: checkpoint whose tokenizer must match; None: the newest.
      size: of a task's instances (letters, operators, hops, distance); None: the size of training.
      prepared: where the run's prepared data lie now; empty: where its config says.

    Raises:
      InputError: not a run folder, no checkpoint, a task that is not known, no validation data, a size for a text.
    """
    folder = local_path(run_dir)
    run = read_config(folder)
    read_meta(folder, step)  # raises if there is no such checkpoint
    if run.data.task:
        return _instances(run, named(run.data.task, run.data.task_size if size is None else size))
    if size is not None:
        raise InputError(f"--size {size}: {folder} was trained on text, which has no size; leave it out")
    tokenizer = load_tokenizer(folder, step)
    data = validation(folder, step, run.data, tokenizer, prepared)
    return HeldOut(
        what="validation text",
        batches=data.batches,
        total=data.steps_per_epoch,
        length=run.data.sequence_length,
        token_bytes=tokenizer.token_bytes,
        pieces=functools.partial(pieces, tokenizer),
        tokenizer=tokenizer,
    )


def pieces(tokenizer: Tokenizer, ids: Any) -> list[str]:
    """The text of each token within a text, special ones by name."""
    return [tokenizer.decode([i], skip_special=False, after=[tokenizer.bos_id]) for i in np.asarray(ids).tolist()]


def validation(
    run_dir: Path, step: int | None, config: DataConfig, tokenizer: Tokenizer, prepared: Sequence[str] = ()
) -> Chain:
    """The run's validation data, refused unless it was made with the run's tokenizer.

    prepared: folders in place of those that the run's config names, refused unless they hold the same data.
    """
    meta = read_meta(run_dir, step)
    if prepared:
        config = dataclasses.replace(config, prepared=tuple(prepared), weights=(), stream=())
        if "data" not in meta:
            raise InputError(f"{run_dir}: does not say on what it was trained, so other data cannot be compared")
        return open_validation(config, tokenizer, state=meta["data"])
    for folder in config.prepared:
        if "://" not in folder and not (Path(folder).expanduser() / "manifest.json").exists():
            raise InputError(f"{run_dir}: its prepared data are not in {folder}; give their place with --prepared")
    # A model that came from elsewhere has its own tokenizer, and data for it are prepared on first use. A run trained
    # here needs the data it was trained on; if they are gone, `prepare_embedded` makes the same bytes again.
    return open_validation(config, tokenizer, make_with_it="source" in meta)


def _instances(run: RunConfig, task: Task) -> HeldOut:
    names = token_names(task)

    def batches(count: int | None) -> Iterator[dict[str, np.ndarray]]:
        for i in range(total if count is None else count):
            made = batch(task, TEST_STREAM, i, INSTANCES)
            scored = made["labels"] != IGNORED
            last = scored.shape[1] - 1 - np.argmax(scored[:, ::-1], axis=1)
            # Rows are padded after their last answer.
            inside = np.arange(scored.shape[1])[None] <= last[:, None]
            yield {"tokens": made["tokens"], "labels": made["labels"], "segment_ids": inside.astype(np.int32)}

    total, length = 4, len(task.instance(TEST_STREAM, 0).tokens)
    return HeldOut(
        what=f"new instances of {task}",
        batches=batches,
        total=total,
        length=length,
        token_bytes=np.zeros(run.model.rows, np.int32),
        pieces=lambda ids: [names[i] if i < len(names) else str(i) for i in np.asarray(ids).tolist()],
        tokenizer=None,
    )


def token_names(task: Task) -> list[str]:
    """A readable name of every token of a task; a permutation is named by the images of 0 1 2 ..."""
    from rdlm.tasks.words import elements

    if isinstance(task, WordProblem):
        return ["".join(map(str, p)) for p in elements(task.group)] + ["BOS"]
    digits = [str(i) for i in range(task.vocab_size)]
    if isinstance(task, Expression):
        return [*digits[:-6], "+", "-", "*", "(", ")", "BOS"]
    if isinstance(task, PointerChasing):
        return [*digits[:-2], ">", "BOS"]
    if isinstance(task, Reachability):
        return [*digits[:-4], "no", "yes", "?", "BOS"]
    return digits
