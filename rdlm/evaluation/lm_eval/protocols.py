"""Protocols of the paper, and its published numbers."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything but model and depth that changes a score.

    tasks: lm-eval's names. fewshot: examples in the context; None: as the task says. chat: use the tokenizer's chat
    template, with one turn per example if `multiturn`. system: system prompt. bos: contexts begin with the begin token.
    dtype: parameters are cast to it; None: as stored. source: where this is documented. unknown: what is not.
    """

    tasks: tuple[str, ...] = ()
    fewshot: int | None = None
    chat: bool = False
    multiturn: bool = False
    system: str | None = None
    bos: bool = True
    dtype: str | None = None
    source: str = "chosen on the command line"
    unknown: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


TASKS = ("arc_easy", "arc_challenge", "hellaswag", "mmlu", "openbookqa", "piqa", "sciq", "winogrande")

PROTOCOLS = {
    "paper": Protocol(
        tasks=TASKS,
        fewshot=0,
        bos=False,
        dtype="bfloat16",
        source="the reference's README: lm-eval's `hf` model, bfloat16, --num_fewshot=0",
        unknown=(
            "the version of lm-eval; those of early 2025 put no begin token before a causal model's context by default",
            "which metric the paper's table shows; acc_norm is compared where a task has it, as the table's HellaSwag "
            "and ARC of Pythia and OLMo suggest",
        ),
    ),
    "gsm8k": Protocol(
        tasks=("gsm8k_cot",),
        fewshot=8,
        chat=True,
        multiturn=True,
        system="You are a helpful assistant that can assist users with mathematical reasoning.",
        bos=False,
        dtype="bfloat16",
        source="the reference's README: gsm8k_cot (8 fixed examples), chat template, examples as turns, system prompt",
        unknown=("the version of lm-eval, and with it the task's stop strings",),
    ),
}
"""The paper's protocols. In a chat, the template decides about the begin token."""

_ROWS = {
    "Huginn-0125, r = 4": (49.07, 27.99, 43.46, 23.39, 28.20, 64.96, 80.00, 55.24),
    "Huginn-0125, r = 8": (65.11, 35.15, 58.54, 25.29, 35.40, 73.45, 92.10, 55.64),
    "Huginn-0125, r = 16": (69.49, 37.71, 64.67, 31.25, 37.60, 75.79, 93.90, 57.77),
    "Huginn-0125, r = 32": (69.91, 38.23, 65.21, 31.38, 38.80, 76.22, 93.50, 59.43),
    "180B tokens, fixed depth": (46.42, 26.96, 37.34, 24.16, 29.60, 64.47, 73.20, 51.78),
    "180B tokens, recurrent, r = 32": (53.62, 29.18, 48.80, 25.59, 31.40, 68.88, 80.60, 52.88),
    "180B tokens, recurrent, r = 1": (34.01, 23.72, 29.19, 23.47, 25.60, 53.26, 54.10, 53.75),
    "Pythia-6.9b": (60.48, 34.64, 63.32, 25.74, 37.20, 75.79, 82.90, 61.40),
    "OLMo-7B": (68.81, 40.27, 75.52, 28.39, 42.20, 80.03, 88.50, 67.09),
}
_GSM8K = {
    "180B tokens, fixed depth": (1.82, 2.20),
    "180B tokens, recurrent": (9.02, 10.24),
    "Huginn-0125, r = 32": (34.80, 42.08),
    "Huginn-0125, weights averaged, r = 64": (38.59, 47.23),
}

PUBLISHED: dict[str, dict[str, float]] = {name: dict(zip(TASKS, values, strict=True)) for name, values in _ROWS.items()}
"""{model: {task or "task, filter": per cent}} as published (arXiv 2502.05171)."""
for _name, (_strict, _flexible) in _GSM8K.items():
    PUBLISHED.setdefault(_name, {}).update(
        {"gsm8k_cot, strict-match": _strict, "gsm8k_cot, flexible-extract": _flexible}
    )
