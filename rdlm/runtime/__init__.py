"""Start and end of a process: command lines, exit codes, other processes, files, downloads, progress."""

from rdlm.runtime.allocator import reuse_freed_memory
from rdlm.runtime.cli import (
    EXIT_ALARM,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_WRONG_INPUT,
    leaving_on_signals,
    parse_arguments,
    run_command,
    stop_signals,
)
from rdlm.runtime.compile_cache import compiled_programs, keep_compiled_programs
from rdlm.runtime.errors import RunError, StartError
from rdlm.runtime.files import (
    complete_folder,
    free_name,
    require_empty,
    set_aside,
    write_atomically,
    write_output,
)
from rdlm.runtime.owner import owned
from rdlm.runtime.processes import agree, exchange, is_alone, is_first, on_tpu, start, together
from rdlm.runtime.progress import Progress, drop_lost_output, duration, to_stderr
from rdlm.runtime.versions import versions
from rdlm.runtime.wheels import Wheel, download_wheel

__all__ = [
    "EXIT_ALARM",
    "EXIT_DONE",
    "EXIT_FAILED",
    "EXIT_PREEMPTED",
    "EXIT_WRONG_INPUT",
    "Progress",
    "RunError",
    "StartError",
    "Wheel",
    "agree",
    "compiled_programs",
    "complete_folder",
    "download_wheel",
    "drop_lost_output",
    "duration",
    "exchange",
    "free_name",
    "is_alone",
    "is_first",
    "keep_compiled_programs",
    "leaving_on_signals",
    "on_tpu",
    "owned",
    "parse_arguments",
    "require_empty",
    "reuse_freed_memory",
    "run_command",
    "set_aside",
    "start",
    "stop_signals",
    "to_stderr",
    "together",
    "versions",
    "write_atomically",
    "write_output",
]
