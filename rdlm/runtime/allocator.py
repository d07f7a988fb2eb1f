"""Settings of glibc's malloc."""

from __future__ import annotations

import ctypes
import sys


def reuse_freed_memory() -> None:
    """Make the C library keep freed memory instead of returning it to the kernel. Does nothing but on Linux with glibc.

    A training step on CPU frees and allocates gigabytes of activations, and the kernel would clear every page again.
    Call it before JAX starts its threads. Not for processes whose peak memory matters.
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
