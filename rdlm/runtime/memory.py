"""What memory is left, so that what cannot fit is refused in one line.

JAX on a CPU waits for ever, or aborts, when memory runs out.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from rdlm.config import InputError

_CGROUP = Path("/sys/fs/cgroup")
_SMALL = 2**26  # bytes, below which nobody looks


def free_memory() -> int | None:
    """Bytes that this process may still take on its first device; None where nobody says."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None:
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    return min(_host_limits(), default=None)


def _host_limits() -> Iterator[int]:
    """Bytes left to this process under each limit of the host."""
    try:
        pages = [int(word) * resource.getpagesize() for word in Path("/proc/self/statm").read_text().split()]
        for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            allowed = resource.getrlimit(limit)[0]
            if allowed != resource.RLIM_INFINITY:
                yield max(allowed - used, 0)
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {name: int(size) << 10 for name, size, *_ in lines}
        yield sizes["MemAvailable:"] + sizes.get("SwapFree:", 0)
        allowed_text = (_CGROUP / "memory.max").read_text().strip()
        if allowed_text != "max":
            stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            used = int((_CGROUP / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            yield max(int(allowed_text) - used, 0)
    except (OSError, KeyError, ValueError):
        return  # not Linux, or not its usual files


def require_memory(what: str, needed: int, fix: str, hosts: bool = False) -> None:
    """Refuse to begin what needs more bytes than are left.

    Args:
      what: names the arrays and their sizes.
      needed: bytes, temporary ones included.
      fix: how to need less.
      hosts: all processes call this together, and refuse what does not fit one of them.

    Raises:
      InputError: there are fewer.
    """
    free: float | None = None if needed < _SMALL else free_memory()
    if hosts and needed >= _SMALL:
        each = multihost_utils.process_allgather(np.float32(np.inf if free is None else free))
        free = float(np.min(each))
    if free is not None and needed > free:
        raise InputError(f"{what}: needs {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} GiB are free; {fix}")
