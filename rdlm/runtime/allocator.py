"""Settings of glibc's malloc."""

from __future__ import annotations

import ctypes
import sys


def reuse_freed_memory() -> None:
    """Make the C library keep freed memory for the next step instead of returning it; Linux with glibc only.

    A CPU step frees and asks again for its activations, gigabytes at a time, and every page of them would be cleared
    by the kernel once more. Call it before JAX starts its threads. For processes that repeat one step, not for those
    whose peak memory matters.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # names of <malloc.h>, without their M_
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never
