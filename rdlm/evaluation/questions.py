"""Accuracy on questions at every depth, with intervals and baselines."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rdlm.config import InputError, ModelConfig, require
from rdlm.evaluation.question_files import LETTERS, Choice, Cloze, Questions, Style
from rdlm.evaluation.scoring import Pair, cut_pair, is_cut, score, split
from rdlm.exits import ExitRule
from rdlm.model import Params
from rdlm.tokenizer import Tokenizer


class Answers(NamedTuple):
    """Answers to N questions at R depths (R = 1 with an exit rule).

    right: bool [R, N] for each way to choose. Multiple choice: "sum", the likeliest choice (lm-eval's acc);
    "per_character", the likeliest after division by its length in characters (acc_norm). Cloze: "greedy", every token
    of the answer is the likeliest. nats f64 [R, N]: minus the log-likelihood of the right answer. recurrences f64 [R],
    checks: means over all input tokens. length: mean over input tokens of the length of their sequence. steps: with an
    exit rule, the recurrences of the tokens of every prompt, int32 [n] per question. cut: questions of which the model
    could not read all.
    """

    right: dict[str, np.ndarray]
    nats: np.ndarray
    recurrences: np.ndarray
    checks: float
    length: float
    steps: list[np.ndarray] | None
    cut: int = 0


def answer(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    questions: Questions,
    depths: Sequence[int],
    *,
    style: Style = "text",
    exit_rule: ExitRule | None = None,
    **options: Any,
) -> Answers:
    """Answer every question, at all depths from one unroll.

    Args:
      params, config, tokenizer: the model.
      questions: all of one kind.
      depths: increasing recurrences; with an exit rule one number, the maximum of a token.
      style: form of multiple-choice questions, see `Choice.texts`.
      exit_rule: stops every token on its own.
      options: init_scale, tokens_per_batch and progress, as `score` takes them.

    Raises:
      InputError: as `score`.
    """
    asked = as_pairs(tokenizer, config, questions, style)
    pairs = list(itertools.chain.from_iterable(asked))
    readable = [cut_pair(pair, config, tokenizer.bos_id) for pair in pairs]
    found = score(params, config, readable, depths, exit_rule=exit_rule, **options)
    first = np.cumsum([0, *map(len, asked)])
    R, N = len(found.log_likelihood), len(questions)
    nats = np.zeros((R, N))
    right: dict[str, np.ndarray] = {}
    for i, question in enumerate(questions):
        log_p, greedy = (x[:, first[i] : first[i + 1]] for x in (found.log_likelihood, found.greedy))
        if isinstance(question, Cloze):
            true, chosen = 0, {"greedy": np.where(greedy[:, 0], 0, -1)}
        else:
            assert isinstance(question, Choice)  # the two kinds are not mixed
            true, sizes = question.answer, [len(choice) for choice in question.choices]
            chosen = {"sum": log_p.argmax(1), "per_character": (log_p / sizes).argmax(1)}
        nats[:, i] = -log_p[:, true]
        for way, choice in chosen.items():
            right.setdefault(way, np.zeros((R, N), bool))[:, i] = choice == true
    if isinstance(questions[0], Choice) and style == "letters":
        del right["per_character"]  # all letters have one length
    steps = None
    if found.steps is not None:
        # Attention is causal, so the prompt's tokens stop at the same recurrences before every choice.
        steps = [found.steps[j][: found.length[j] - len(pairs[j][1]) + 1] for j in first[:-1].tolist()]
    weight = found.length / found.length.sum()
    length = float((found.length * weight).sum())
    cut = sum(any(is_cut(pair, config) for pair in pairs[a:b]) for a, b in itertools.pairwise(first.tolist()))
    return Answers(right, nats, found.recurrences @ weight, float(found.checks @ weight), length, steps, cut)


def as_pairs(
    tokenizer: Tokenizer, config: ModelConfig, questions: Questions, style: Style = "text"
) -> list[list[Pair]]:
    """What `score` is asked for each question.

    Raises:
      InputError: an answer that the model cannot read or that has no token of its own; named with file and line.
    """
    found: list[list[Pair]] = []
    for question in questions:
        before, rest = _texts(question, style)
        try:
            found.append([split(tokenizer.encode, tokenizer.bos_id, before, after) for after in rest])
            size = max(len(after) for _, after in found[-1])
            fix = f"must be at most max_length = {config.max_length}; shorten it"
            require(size <= config.max_length, "tokens of an answer", size, fix)
        except InputError as error:
            raise InputError(f"{question.where or repr(question)[:80]}: {error}") from error
    return found


def _texts(question: Choice | Cloze, style: Style) -> tuple[str, list[str]]:
    return (question.prompt, [question.answer]) if isinstance(question, Cloze) else question.texts(style)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for the share behind `right` successes in `count` trials; it also holds near 0 and 1."""
    from scipy.stats import binomtest  # takes a second to import

    interval = binomtest(right, count).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_mean(groups: Sequence[np.ndarray], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean over all values with its 95 % interval, from a bootstrap over groups (the tokens of a question)."""
    sums, sizes = np.array([g.sum() for g in groups], float), np.array([g.size for g in groups])
    drawn = np.random.default_rng(seed).integers(len(groups), size=(draws, len(groups)))
    means = sums[drawn].sum(1) / np.maximum(sizes[drawn].sum(1), 1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(sums.sum() / sizes.sum()), float(low), float(high)


def baselines(questions: Sequence[Choice]) -> dict[str, float]:
    """Accuracy without reading a question.

    "chance": a random choice; "majority": always the position that is right most often; "longest", "shortest": always
    that choice, in characters (choices of equal length share the point).
    """
    places = np.bincount([q.answer for q in questions], minlength=len(LETTERS))

    def by_length(pick: Callable[[list[int]], int]) -> float:
        shares = []
        for q in questions:
            sizes = [len(choice) for choice in q.choices]
            picked = pick(sizes)
            shares.append((sizes[q.answer] == picked) / sizes.count(picked))
        return float(np.mean(shares))

    return {
        "chance": float(np.mean([1 / len(q.choices) for q in questions])),
        "majority": float(places.max() / len(questions)),
        "longest": by_length(max),
        "shortest": by_length(min),
    }
