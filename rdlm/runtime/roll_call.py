"""The roll call of processes before JAX connects them: one line that names the missing, or the one that differs.

`jax.distributed.initialize` waits as well, but when a process is missing it aborts the others without saying which, and
its key-value store aborts whoever uses it before all are there (jax 0.10.2). So this comes first, over a socket of its
own, at the port where JAX's service opens afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import socket
import time
from pathlib import Path

from rdlm.config import InputError
from rdlm.runtime.errors import StartError

Greeting = dict[str, str]
"""What a process tells about itself: host, and hashes of its code and configuration."""


def greeting(agree_on: str) -> Greeting:
    """Of this process; `agree_on` is its configuration."""
    return {"host": socket.gethostname(), "code": _code_hash(), "configuration": _hash(agree_on)}


def roll_call(address: str, count: int, index: int, mine: Greeting, timeout: int) -> None:
    """Return when all `count` processes have called this and run the same.

    Args:
      address: host and port of process 0.
      count: number of processes.
      index: of this one.
      mine: what this one tells about itself.
      timeout: seconds to wait for everyone.

    Raises:
      StartError: a process is missing; names it, on all that are there.
      InputError: a process has other code or another configuration; names it, on all of them.
    """
    if index == 0:
        kind, message = _lead(address, count, mine, timeout)
    else:
        kind, message = _follow(address, count, index, mine, timeout)
    if message:
        raise (InputError if kind == "input" else StartError)(message)


def _lead(address: str, count: int, mine: Greeting, timeout: int) -> list[str]:
    """Process 0: collect the greetings of the others, answer each with the verdict, and return it."""
    port, deadline = int(address.rpartition(":")[2]), time.monotonic() + timeout
    arrived, lines = {0: mine}, []
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise StartError(f"port {port} cannot be opened ({error.strerror}); is another run active here?") from error
        while len(arrived) < count and time.monotonic() < deadline:
            server.settimeout(max(0.05, deadline - time.monotonic()))
            with contextlib.suppress(OSError, ValueError, TypeError):  # anybody may connect to this port
                line = stack.enter_context(server.accept()[0])
                line.settimeout(5)
                index, greeting = json.loads(line.makefile().readline())
                if index in range(1, count) and isinstance(greeting, dict) and greeting.keys() == mine.keys():
                    arrived[index] = greeting
                    lines.append(line)
        verdict = _verdict(arrived, count, address, timeout)
        for line in lines:
            with contextlib.suppress(OSError):
                line.sendall((json.dumps(verdict) + "\n").encode())
    return verdict


def _follow(address: str, count: int, index: int, mine: Greeting, timeout: int) -> list[str]:
    """Every other process: send the greeting to process 0 and return its verdict."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout + 10  # process 0 gives up first, and says why
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError, ValueError, TypeError),  # another program may answer at this port
            socket.create_connection((host, int(port)), timeout=5) as line,
        ):
            line.sendall((json.dumps([index, mine]) + "\n").encode())
            line.settimeout(max(0.05, deadline - time.monotonic()))
            kind, message = json.loads(line.makefile().readline())
            return [kind, message]
        time.sleep(0.2)
    raise StartError(
        f"process {index} of {count}: no answer from process 0 at {address} within {timeout} s; "
        "is the same command running there, and the port open?"
    )


def _verdict(arrived: dict[int, Greeting], count: int, address: str, timeout: int) -> list[str]:
    """[kind of error, message]; the message is empty if all processes are there and equal."""
    missing = [str(i) for i in range(count) if i not in arrived]
    if missing:
        message = (
            f"process {', '.join(missing)} of {count} did not come to {address} within {timeout} s; "
            "is the same command running on every worker (tpu_setup/status.sh)?"
        )
        return ["start", message]
    fixes = {"code": "copy it again (tpu_setup/setup.sh)", "configuration": "give all the same arguments"}
    for what, fix in fixes.items():
        for i in range(1, count):
            if arrived[i][what] != arrived[0][what]:
                pair = f"process {i} ({arrived[i]['host']}) has another {what} than process 0 ({arrived[0]['host']})"
                return ["input", f"{pair}: {fix}"]
    return ["", ""]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _code_hash() -> str:
    """Of every module of rdlm, and of JAX's version."""
    root = Path(__file__).parents[1]
    modules = sorted(root.rglob("*.py"))
    code = "".join(f"{path.relative_to(root)}\n{path.read_text(encoding='utf-8')}" for path in modules)
    return _hash(importlib.metadata.version("jax") + code)
