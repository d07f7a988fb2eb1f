"""Command lines and exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from rdlm.config import InputError
from rdlm.runtime.errors import RunError
from rdlm.runtime.processes import is_alone, leave

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_ALARM, EXIT_PREEMPTED = 0, 1, 2, 3, 75

C = TypeVar("C")


def parse_arguments(
    cls: type[C],
    *,
    prog: str,
    description: str | None,
    args: Sequence[str] | None = None,
    default: C | None = None,
    config: Sequence[Any] = (),
) -> C:
    """The command line as an instance of the dataclass `cls`, by tyro; its boxes of errors become one line.

    Args:
      cls: dataclass; every field becomes a flag, documented by the docstring below it.
      prog: name of the program in messages, for example "train.py nano".
      description: what --help says first.
      args: words of the command line; None: those of the process.
      default: values of fields that are not given.
      config: tyro's markers.

    Raises:
      InputError: an unknown flag (the message suggests the closest), a missing or impossible value.
      SystemExit: with code 0, after --help.
    """
    import tyro  # here, so that importing this room costs nothing

    options: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, unknown = tyro.cli(
                cls, prog=prog, description=description, args=args, config=tuple(config), return_unknown_args=True,
                **options,
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_one_line(said.getvalue(), prog)) from None
    if unknown:
        raise InputError(_unknown(unknown[0], list(_flags(cls)), prog))
    return parsed


def _one_line(box: str, prog: str) -> str:
    """What tyro says in a box, its body up to the first rule, as one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [line.strip().strip("│").strip() for line in plain.splitlines()]
    body: list[str] = []
    for row in rows[1:]:  # the first is the title
        if not row.strip("─╭╮╰╯ "):
            break
        body.append(row)
    text = " ".join(body) or " ".join(rows)
    config = re.match(r"Error parsing [\w.]+: ", text)
    if config:  # raised by one of our own classes: names field, value and fix
        return text[config.end() :]
    return f"{text.removeprefix('Error parsing ').removesuffix('.')} (see {prog} --help)"


def _unknown(word: str, flags: Sequence[str], prog: str) -> str:
    if not word.startswith("-"):
        return f"{word!r}: one argument too many (see {prog} --help)"
    flag = "--" + word.lstrip("-").partition("=")[0].replace("_", "-")
    # `--learning-rate` for `--optimizer.learning-rate` is the commonest slip, so the last part counts as well.
    inner = {known.rpartition(".")[2].removeprefix("--"): known for known in reversed(flags)}
    close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.75)
    close += [inner[name] for name in difflib.get_close_matches(flag.removeprefix("--"), inner, n=1, cutoff=0.75)]
    hint = f"Did you mean {close[0]}?" if close else f"All fields: {prog} --help"
    return f"unknown field {word}. {hint}"


def _flags(cls: Any, prefix: str = "--") -> Iterator[str]:
    """Every flag that a dataclass becomes, fields of nested ones included."""
    import tyro

    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            yield from _flags(hint, name + ".")
        elif tyro.conf.Positional not in getattr(hint, "__metadata__", ()):
            yield name


def run_command(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: 0 done, 75 preempted and saved, 3 stopped by an alarm and saved.

    2: wrong input, with one line on stderr. 1: with one line, another process is missing or the disk is full, and the
    same command may succeed later; with a traceback, a bug. Of several processes, those that JAX aborts because
    another one is lost end with 134.
    """
    try:
        code = main()
    except (InputError, RunError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        leave(EXIT_WRONG_INPUT if isinstance(error, InputError) else EXIT_FAILED)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone (`| head`)
        sys.exit(141)
    except Exception:
        if is_alone():
            raise
        traceback.print_exc()
        print(
            "error: this process failed, perhaps because another one is gone; the same command on all of them goes on "
            "from the newest checkpoint",
            file=sys.stderr,
        )
        leave(EXIT_FAILED)
    sys.exit(code or EXIT_DONE)


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Until a run has something to save: SIGTERM ends the process at once, with the exit code of a preempted run."""

    def end(*_: object) -> None:
        # sys.stderr may be redirected, or in use, when the signal comes.
        os.write(2, b"preempted before training began; run the same command to go on\n")
        os._exit(EXIT_PREEMPTED)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
