"""`--recurrence.remat auto`: as little recomputation as memory allows, found by compiling the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from rdlm.config import InputError, RunConfig
from rdlm.perf import hlo
from rdlm.remat import LADDER
from rdlm.runtime import exchange
from rdlm.runtime.memory import free_memory


def fitting(run: RunConfig, step: Callable[[RunConfig], Any], arguments: Any, say: Callable[[str], None]) -> Any:
    """The compiled step of the first of `LADDER` that fits the devices; all processes take the same.

    Args:
      run: with recurrence.remat "auto".
      step: the jitted training step of a run; called with `arguments`, which are on the devices already.
      arguments: positional ones, then keywords as a dict.
      say: is told what was found.

    Raises:
      InputError: not even the last one fits.
    """
    positional, named = arguments
    for remat in LADDER:
        tried = dataclasses.replace(run, recurrence=dataclasses.replace(run.recurrence, remat=remat))
        try:
            compiled = step(tried).lower(*positional, **named).compile()
            program, free = hlo.Program.of(compiled), free_memory()
            needed = int(1.05 * (program.peak - program.arguments))  # the arguments are there; free memory has gaps
            problem = f"needs {needed / 2**30:.2f} GiB beside the state, {(free or 0) / 2**30:.2f} are free"
            fits = free is None or needed <= free
        except jax.errors.JaxRuntimeError as error:
            sizes, said = hlo.out_of_memory(str(error)), str(error).partition("\n")[0]
            if sizes is None and not any(words in said for words in ("RESOURCE_EXHAUSTED", "enough memory")):
                raise
            fits, problem = False, f"needs {sizes[0]:.2f} GiB of {sizes[1]:.2f}" if sizes else f"does not fit: {said}"
        fits = all(answer == "True" for answer in exchange(str(fits)))
        if fits:
            say(f"remat auto: {remat} fits; --recurrence.remat {remat} saves the search")
            return compiled
        say(f"remat auto: {remat} {problem}")
    raise InputError(
        "recurrence.remat = 'auto': the step fits with none of them; use fewer rows per microbatch "
        "(--data.microbatches), or more devices"
    )
