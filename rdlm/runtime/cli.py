"""Command lines and exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rdlm.config import InputError, local_path, one_line
from rdlm.runtime.errors import RunError
from rdlm.runtime.processes import is_alone, leave

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_ALARM, EXIT_PREEMPTED = 0, 1, 2, 3, 75

C = TypeVar("C")
_EMPTY = Path("\0")  # an empty word where a path belongs


def parse_arguments(
    cls: type[C],
    *,
    prog: str,
    description: str | None,
    args: Sequence[str] | None = None,
    default: C | None = None,
    config: Sequence[object] = (),
) -> C:
    """The command line as an instance of the dataclass `cls`, by tyro.

    Args:
      cls: dataclass; every field becomes a flag, documented by the docstring below it.
      prog: name of the program in messages, for example "train.py nano".
      description: the first lines of --help.
      args: words of the command line; None: those of the process.
      default: values of fields that are not given.
      config: tyro's markers.

    Raises:
      InputError: raised by `cls` itself for an impossible value; a `Path` that is not a local one; a flag that is given
        twice, of which tyro would take the last.
      SystemExit: with code 0 after --help, with code 2 after tyro's message about an unknown flag, a missing value or
        one of the wrong type.
    """
    import tyro  # here, so that importing this room costs nothing

    paths = tyro.constructors.ConstructorRegistry()

    @paths.primitive_rule
    def _(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: Path(words[0]) if words[0] else _EMPTY,  # Path("") is the current folder
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda path: [str(path)],
        )

    words = sys.argv[1:] if args is None else args
    flags = Counter(word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    for flag, count in flags.items():
        if count > 1:
            raise InputError(f"{flag}: given {count} times; give it once, with all its values")
    given = tyro.MISSING_NONPROP if default is None else default
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), paths:
            parsed = tyro.cli(cls, prog=prog, description=description, args=args, config=config, default=given)
    except SystemExit as stop:
        error = stop.__context__
        while error is not None and not isinstance(error, InputError):
            error = error.__context__
        if error is not None:  # tyro puts a box around it
            raise error from None
        sys.stderr.write(message.getvalue())
        raise
    return _with_local_paths(parsed)


def _with_local_paths(parsed: C) -> C:
    """Every field that is a `Path` as `local_path` gives it."""
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}  # type: ignore[arg-type]
    paths = {
        name: local_path("" if value == _EMPTY else value, name)
        for name, value in values.items()
        if isinstance(value, Path)
    }
    return dataclasses.replace(parsed, **paths)  # type: ignore[type-var]


def run_command(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 done, 75 preempted and saved, 3 stopped by an alarm and saved.

    2: wrong input, with one line on stderr. 1: with one line, another process is missing, or the disk or memory is
    full, and the same command may succeed later; with a traceback, a bug. Of several processes, those that JAX aborts
    because another one is lost end with 134.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what a terminal's encoding lacks
    try:
        code = main()
    except (InputError, RunError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        wrong = isinstance(error, InputError)
        # After a failed save, threads may still wait for a part of it that will never come.
        leave(EXIT_WRONG_INPUT if wrong else EXIT_FAILED, at_once=not wrong)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone (`| head`)
        sys.exit(141)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            print(f"error: out of memory ({one_line(error)}); ask for less at a time", file=sys.stderr)
            leave(EXIT_FAILED, at_once=True)  # threads may still wait for what could not be allocated
        if is_alone():
            raise
        traceback.print_exc()
        print(
            "error: this process failed, perhaps because another one is gone; the same command on all of them resumes "
            "from the newest checkpoint",
            file=sys.stderr,
        )
        leave(EXIT_FAILED)
    sys.exit(code or EXIT_DONE)


def stop_signals() -> list[signal.Signals]:
    """What asks a run to save and stop: SIGTERM, Ctrl-C and a hang-up; without those that it shall ignore (nohup)."""
    asks = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    return [number for number in asks if signal.getsignal(number) not in (signal.SIG_IGN, None)]


@contextlib.contextmanager
def leaving_on_signals() -> Iterator[None]:
    """Until a run has something to save: a stop signal ends the process at once, with the code of a preempted run."""

    def end(*_: object) -> None:
        with contextlib.suppress(OSError):  # after a hang-up the terminal is gone
            # sys.stderr may be redirected, or in use, when the signal comes.
            os.write(2, b"preempted before training began; run the same command to continue\n")
        os._exit(EXIT_PREEMPTED)

    previous = {number: signal.signal(number, end) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
