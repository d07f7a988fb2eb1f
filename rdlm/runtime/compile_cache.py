"""JAX's cache of compiled programs on disk: the same command after a preemption does not compile again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rdlm.config import local_path

OFF = "off"


def keep_compiled_programs() -> str:
    """Turn JAX's persistent compilation cache on; returns its folder, or "off".

    The folder is the first of: RDLM_COMPILE_CACHE ("off" turns the cache off), JAX's own JAX_COMPILATION_CACHE_DIR,
    rdlm/compiled in XDG_CACHE_HOME, and ~/.cache/rdlm/compiled. If it cannot be created the cache is off. It may be
    deleted at any time. Programs in it are executed, so only trusted users may have write access.

    Raises:
      InputError: not a local folder.
    """
    config = _jax_config()
    chosen = os.environ.get("RDLM_COMPILE_CACHE") or config.jax_compilation_cache_dir
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdlm" / "compiled"
    folder = local_path(chosen or default, "RDLM_COMPILE_CACHE")
    if chosen != OFF:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"compiled programs are not kept: {folder} cannot be created ({error.strerror})", file=sys.stderr)
            chosen = OFF
    config.update("jax_compilation_cache_dir", None if chosen == OFF else str(folder))
    return compiled_programs()


def compiled_programs() -> str:
    """The folder of compiled programs, or "off"."""
    config = _jax_config()
    return (config.jax_enable_compilation_cache and config.jax_compilation_cache_dir) or OFF


def _jax_config() -> Any:
    import jax

    return jax.config  # its options are not typed
