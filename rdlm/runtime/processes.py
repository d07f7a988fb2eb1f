"""The processes of a run: how they find each other, compare code and configuration, and exchange text.

A roll call comes first (see `roll_call`). From then on JAX's heartbeat watches: when a process is lost, JAX aborts the
others within half a minute.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rdlm.config import InputError
from rdlm.runtime.compile_cache import keep_compiled_programs
from rdlm.runtime.errors import StartError
from rdlm.runtime.roll_call import greeting, roll_call

T = TypeVar("T")

HEARTBEAT_SECONDS = 30
"""After this long without a sign of life a process counts as lost."""


def connection() -> Any:
    """JAX's connection to the other processes. Its public functions need devices, and hang when those do."""
    from jax._src.distributed import global_state

    return global_state


def is_alone() -> bool:
    """Whether this process has not joined others."""
    return "jax" not in sys.modules or connection().client is None


def is_first() -> bool:
    """Whether this process speaks for all: writes metrics, shows progress."""
    import jax

    return jax.process_index() == 0


def start(agree_on: str = "") -> None:
    """Join the other processes of this run, if there are any. Call it before anything touches a device.

    On Cloud TPU VMs JAX knows the others. Elsewhere the environment names them: RDLM_COORDINATOR=HOST:PORT (of process
    0), RDLM_PROCESSES=2 and RDLM_PROCESS_ID=0, where only the last differs between hosts. Without these variables this
    process is alone. RDLM_START_TIMEOUT: seconds to wait for everyone (300). RDLM_COMPILE_CACHE: folder of compiled
    programs (see `keep_compiled_programs`). RDLM_PROFILER_PORT: port on which the first process can be profiled
    (tpu_setup/profile.sh); 0 or empty: none.

    Args:
      agree_on: text that must be equal on all processes, besides the code; for example the configuration.

    Raises:
      StartError: a process is missing (the message names it), or the devices do not come up.
      InputError: wrong environment variables, or processes with different code or configurations.
    """
    keep_compiled_programs()
    timeout = _number("RDLM_START_TIMEOUT", 300)
    place = _from_environment() or _from_tpu(timeout)
    if place is not None:
        _join(*place, agree_on, timeout)
    port = _number("RDLM_PROFILER_PORT", 0)
    _check_port("RDLM_PROFILER_PORT", port, port)
    if port and is_first():
        import jax

        jax.profiler.start_server(port)


def _join(address: str, count: int, index: int, agree_on: str, timeout: int) -> None:
    import jax

    if count > 1:
        roll_call(address, count, index, greeting(agree_on), timeout)
    # The run handles SIGTERM itself (rdlm.train); JAX's own listener would take the signal away.
    jax.config.update("jax_enable_preemption_service", False)
    if os.environ.get("RDLM_COORDINATOR"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address, count, index, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
    )

    def give_up() -> None:
        print(
            f"error: process {index}: JAX found no devices within {timeout} s; is another process using them "
            "(tpu_setup/status.sh), or is a worker unhealthy?",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # nothing else ends a hanging runtime

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        found = jax.process_count()
    finally:
        timer.cancel()
    if found != count:
        raise StartError(f"JAX counts {found} processes, the run has {count}; is every worker part of the same slice?")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or len(text) > 9:
        raise InputError(f"{name} = {text[:40]!r}: must be a whole number of at most 9 digits")
    return int(text)


def _check_port(name: str, value: str | int, port: int) -> None:
    if port > 65535:
        raise InputError(f"{name} = {value!r}: a port is at most 65535")


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
    if not re.fullmatch(r".+:0*[1-9][0-9]{0,5}", address):
        raise InputError(f"RDLM_COORDINATOR = {address!r}: must be HOST:PORT of process 0")
    _check_port(names[0], address, int(address.rpartition(":")[2]))
    if not index < count:
        raise InputError(f"RDLM_PROCESS_ID = {index}: must be less than RDLM_PROCESSES = {count}")
    return address, count, index


def on_tpu() -> bool:
    """Whether this process will run on TPUs; a guess made before JAX starts."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] in ("", "tpu")


def _from_tpu(timeout: int) -> tuple[str, int, int] | None:
    """The same on a Cloud TPU VM or a GKE node with TPUs; None elsewhere."""
    if not on_tpu():
        return None
    from jax._src.clusters import ClusterEnv  # no public function tells who takes part

    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, timeout)
    return None if address is None or count is None or index is None else (address, count, index)


_exchanges = itertools.count()


def exchange(text: str, timeout: int = 3600) -> list[str]:
    """`text` of every process, by process. Returns when all have called it; all must call it in the same order.

    Raises:
      StartError: a process did not come within `timeout` seconds; names it.
    """
    if is_alone():
        return [text]
    joined, number, texts = connection(), next(_exchanges), []
    joined.client.key_value_set(f"rdlm/{number}/{joined.process_id}", f"={text}")
    for i in range(joined.num_processes):
        try:
            texts.append(joined.client.blocking_key_value_get(f"rdlm/{number}/{i}", timeout * 1000)[1:])
        except Exception as error:
            raise StartError(f"process {i} of {joined.num_processes} did not answer within {timeout} s") from error
    return texts


def together(make: Callable[[], T]) -> T:
    """make() on every process. If one of them refuses, all do, instead of waiting for it.

    Raises:
      InputError: the message of this process, or that of the first other one which refused.
    """
    try:
        result, problem = make(), ""
    except InputError as error:
        if is_alone():
            raise
        problem = str(error)
    problems = exchange(problem)
    if problem:
        raise InputError(problem)
    for i, said in enumerate(problems):
        if said:
            raise InputError(f"process {i}: {said}")
    return result


def agree(things: dict[str, object]) -> None:
    """Compare named things between processes. All must call it together.

    Raises:
      InputError: on all of them, naming the first process whose things differ from those of process 0, and the thing.
    """
    items = list(things.items())
    digests = exchange(hashlib.sha256(json.dumps(items).encode()).hexdigest())
    while len({*digests}) > 1:  # the service takes short messages, so a long list goes in parts
        part, items = items[:1000], items[1000:]
        parts: list[list[object]] = [json.loads(text) for text in exchange(json.dumps(part))]
        for i, found in enumerate(parts):
            for ours, theirs in itertools.zip_longest(parts[0], found):
                if ours != theirs:
                    raise InputError(
                        f"process {i}: {_pair(theirs)}, but on process 0 {_pair(ours)}; give all of them the same"
                    )


def _pair(item: Any) -> str:
    return "nothing" if item is None else f"{item[0]} = {json.dumps(item[1])}"


def leave(code: int, at_once: bool = False) -> NoReturn:
    """End the process after an error, at once also if there are others: JAX's own way out waits minutes for them."""
    if at_once or not is_alone():
        sys.stdout.flush()
        sys.stderr.flush()
        if not is_alone() and connection().process_id == 0:
            time.sleep(1)  # JAX aborts the others when this process ends, and they may have a message of their own
        os._exit(code)
    sys.exit(code)
