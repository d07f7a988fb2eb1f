"""Process start and end: command lines, exit codes, the other processes of a run, versions."""

from rdlm.runtime.commands import (
    EXIT_ALARM,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_WRONG_INPUT,
    leaving_on_sigterm,
    parse_arguments,
    run_command,
)
from rdlm.runtime.compiled import compiled_programs, keep_compiled_programs
from rdlm.runtime.files import write_whole
from rdlm.runtime.processes import RunError, StartError, exchange, is_first, on_tpu, start, together
from rdlm.runtime.versions import versions

__all__ = [
    "EXIT_ALARM",
    "EXIT_DONE",
    "EXIT_FAILED",
    "EXIT_PREEMPTED",
    "EXIT_WRONG_INPUT",
    "RunError",
    "StartError",
    "compiled_programs",
    "exchange",
    "is_first",
    "keep_compiled_programs",
    "leaving_on_sigterm",
    "on_tpu",
    "parse_arguments",
    "run_command",
    "start",
    "together",
    "versions",
    "write_whole",
]
