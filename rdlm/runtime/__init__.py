"""Process start and end: command lines, exit codes, the other processes of a run, versions."""

from rdlm.runtime.commands import (
    EXIT_ALARM,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_WRONG_INPUT,
    parse_arguments,
    run_command,
)
from rdlm.runtime.processes import StartError, exchange, is_first, start, together
from rdlm.runtime.versions import versions

__all__ = [
    "EXIT_ALARM",
    "EXIT_DONE",
    "EXIT_FAILED",
    "EXIT_PREEMPTED",
    "EXIT_WRONG_INPUT",
    "StartError",
    "exchange",
    "is_first",
    "parse_arguments",
    "run_command",
    "start",
    "together",
    "versions",
]
