"""The processes of a run: how they find each other, agree before they start, and talk without devices."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rdlm.config import InputError
from rdlm.runtime.compile_cache import keep_compiled_programs
from rdlm.runtime.lifelines import Peer, leave, relay, watch

T = TypeVar("T")


class RunError(Exception):
    """What keeps a run from going on, in one line. Trying again may help, so the exit code is 1, not 2."""


class StartError(RunError):
    """The processes of a run did not come together."""


def client() -> Any:
    """JAX's connection to the other processes; None for a process that is alone."""
    if "jax" not in sys.modules:
        return None
    from jax._src.distributed import global_state  # public functions on top of it need devices, and hang with them

    return global_state.client


def is_first() -> bool:
    """Whether this process speaks for all: writes metrics, shows progress."""
    import jax

    return jax.process_index() == 0


def start(agree_on: str = "") -> None:
    """Join the other processes of this run, if there are any. Call it before anything touches a device.

    On Cloud TPU VMs JAX knows the others. Elsewhere the environment says who takes part, on every host the same but
    for the last: RDLM_COORDINATOR=HOST:PORT (of process 0), RDLM_PROCESSES=2, RDLM_PROCESS_ID=0. Without any of that
    this process is alone, and nothing happens. RDLM_START_TIMEOUT: seconds to wait for everyone (300).
    RDLM_COMPILE_CACHE: folder of compiled programs (see `keep_compiled_programs`).
    RDLM_PROFILER_PORT: where the first process lets itself be profiled (tpu_setup/profile.sh); 0 or empty: nowhere.

    Args:
      agree_on: what must be the same on all processes besides the code, for example the configuration.

    Raises:
      StartError: a process is missing, or the devices do not come up; names which.
      InputError: wrong environment variables, or processes that run other code or another configuration.
    """
    keep_compiled_programs()
    timeout = _number("RDLM_START_TIMEOUT", 300)
    place = _from_environment() or _from_tpu(timeout)
    if place is not None:
        _join(*place, agree_on, timeout)
    port = _number("RDLM_PROFILER_PORT", 0)
    if port and is_first():
        import jax

        jax.profiler.start_server(port)


def _join(address: str, count: int, index: int, agree_on: str, timeout: int) -> None:
    import jax

    mine = {"process": index, "host": socket.gethostname(), "code": _code_hash(), "agreed": _hash(agree_on)}
    if count > 1:
        lines = (_lead if index == 0 else _follow)(address, count, mine, timeout)
        watch(index, lines)
        if index:
            address = relay(address)
    # SIGTERM is ours: the run says itself when it stops (rdlm.train). JAX's own listener would only take it away.
    jax.config.update("jax_enable_preemption_service", False)
    if os.environ.get("RDLM_COORDINATOR"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index, initialization_timeout=timeout)
    with _deadline(timeout, f"error: process {index}: JAX found no devices within {timeout} s; is another process "
                            "using them (tpu_setup/status.sh), or is a worker unhealthy?"):  # fmt: skip
        found = jax.process_count()
    if found != count:
        raise StartError(f"JAX counts {found} processes, the run has {count}; is every worker part of the same slice?")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(f"{name} = {text!r}: must be a whole number")
    return int(text)


def _from_environment() -> tuple[str, int, int] | None:
    """(address of process 0, number of processes, index of this one) if RDLM_COORDINATOR is set."""
    names = ("RDLM_COORDINATOR", "RDLM_PROCESSES", "RDLM_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if not given:
        return None
    if len(given) < len(names):
        missing = next(name for name in names if name not in given)
        raise InputError(f"{missing} is not set, but {given[0]} is; several processes need {', '.join(names)}")
    address, count, index = os.environ[names[0]], _number(names[1], 1), _number(names[2], 0)
    if not re.fullmatch(r".+:\d+", address):
        raise InputError(f"RDLM_COORDINATOR = {address!r}: must be HOST:PORT of process 0")
    if not index < count:
        raise InputError(f"RDLM_PROCESS_ID = {index}: must be less than RDLM_PROCESSES = {count}")
    return address, count, index


def on_tpu() -> bool:
    """Whether this process will run on TPUs, as far as can be told before JAX starts."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] in ("", "tpu")


def _from_tpu(timeout: int) -> tuple[str, int, int] | None:
    """The same on a Cloud TPU VM or a GKE node with TPUs; None elsewhere."""
    if not on_tpu():
        return None
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize() itself asks

    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
    return None if address is None or count is None or index is None else (address, count, index)


def _lead(address: str, count: int, mine: dict[str, Any], timeout: int) -> dict[socket.socket, Peer]:
    """Process 0 before JAX starts: wait for the others, compare, tell everyone the verdict. Returns the connections.

    JAX would wait as well, but abort with a stack trace that does not say who is missing.
    """
    port, deadline = int(address.rpartition(":")[2]), time.monotonic() + timeout
    arrived, lines = {0: mine}, {}
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise StartError(f"port {port} cannot be opened ({error.strerror}); is another run active here?") from error
    with server, contextlib.ExitStack() as stack:
        while len(arrived) < count and time.monotonic() < deadline:
            server.settimeout(max(0.05, deadline - time.monotonic()))
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # whoever else knocks at this port
                line = stack.enter_context(server.accept()[0])
                line.settimeout(5)
                other = json.loads(_read_line(line))
                if 0 < other["process"] < count:
                    arrived[other["process"]], lines[other["process"]] = other, line
        verdict = _verdict(arrived, count, address, timeout)
        for line in lines.values():
            with contextlib.suppress(OSError):
                line.sendall((json.dumps({"verdict": verdict, "host": mine["host"]}) + "\n").encode())
        _obey(verdict)
        stack.pop_all()
    return {line: Peer(i, arrived[i]["host"]) for i, line in lines.items()}


def _follow(address: str, count: int, mine: dict[str, Any], timeout: int) -> dict[socket.socket, Peer]:
    """Every other process: report to process 0, wait for its verdict. Returns the connection to it."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout + 10  # process 0 gives up first, and says why
    while time.monotonic() < deadline:
        with contextlib.ExitStack() as stack:
            answer = None
            with contextlib.suppress(OSError, ValueError):
                line = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
                line.sendall((json.dumps(mine) + "\n").encode())
                line.settimeout(max(0.05, deadline - time.monotonic()))
                answer = json.loads(_read_line(line))
            if answer is not None:
                _obey(answer["verdict"])
                stack.pop_all()
                return {line: Peer(0, answer["host"])}
        time.sleep(0.2)
    raise StartError(
        f"process {mine['process']} of {count}: no answer from process 0 at {address} within {timeout} s; "
        "is the same command running there, and the port open?"
    )


def _read_line(line: socket.socket) -> bytes:
    """One line, and nothing of what comes after it."""
    text = b""
    while not text.endswith(b"\n"):
        byte = line.recv(1)
        if not byte:
            raise ValueError("it ended early")
        text += byte
    return text


def _verdict(arrived: dict[int, dict[str, Any]], count: int, address: str, timeout: int) -> list[str]:
    """[] when all is well, else [kind of error, message]."""
    missing = [str(i) for i in range(count) if i not in arrived]
    if missing:
        return ["start", f"process {', '.join(missing)} of {count} did not come to {address} within {timeout} s; "
                "is the same command running on every worker (tpu_setup/status.sh)?"]  # fmt: skip
    for what, fix in (("code", "copy it again (tpu_setup/setup.sh)"), ("agreed", "give all the same arguments")):
        for i in range(1, count):
            if arrived[i][what] != arrived[0][what]:
                name = "code" if what == "code" else "configuration"
                return ["input", f"process {i} ({arrived[i]['host']}) has another {name} than process 0 "
                        f"({arrived[0]['host']}): {fix}"]  # fmt: skip
    return []


def _obey(verdict: list[str]) -> None:
    if verdict:
        kind, message = verdict
        raise (InputError if kind == "input" else StartError)(message)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _code_hash() -> str:
    """Of every module of rdlm, and of JAX's version."""
    root = Path(__file__).parent
    modules = sorted(root.rglob("*.py"))
    code = "".join(f"{path.relative_to(root)}\n{path.read_text(encoding='utf-8')}" for path in modules)
    return _hash(importlib.metadata.version("jax") + code)


@contextlib.contextmanager
def _deadline(seconds: float, message: str) -> Iterator[None]:
    """Say `message` and end the process if the block takes longer: there is no other way out of a hanging runtime."""

    def give_up() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_exchanges = itertools.count()


def exchange(text: str, timeout: int = 3600) -> list[str]:
    """`text` of every process, by process. Waits until all of them have called it, in the same order of calls.

    Raises:
      StartError: a process did not come within `timeout` seconds; names it.
    """
    others = client()
    if others is None:
        return [text]
    import jax

    number, texts = next(_exchanges), []
    others.key_value_set(f"rdlm/{number}/{jax.process_index()}", f"={text}")
    for i in range(jax.process_count()):
        try:
            texts.append(others.blocking_key_value_get(f"rdlm/{number}/{i}", timeout * 1000)[1:])
        except Exception as error:
            raise StartError(f"process {i} of {jax.process_count()} did not answer within {timeout} s") from error
    return texts


def together(make: Callable[[], T]) -> T:
    """make() on every process; when one of them refuses, all do, instead of waiting for it.

    Raises:
      InputError: the message of this process, or that of the first other one which refused.
    """
    try:
        result, problem = make(), ""
    except InputError as error:
        if client() is None:
            raise
        problem = str(error)
    problems = exchange(problem)
    for i, said in enumerate([problem, *problems]):
        if said:
            leave()  # the others know
            raise InputError(said if i == 0 else f"process {i - 1}: {said}")
    return result
