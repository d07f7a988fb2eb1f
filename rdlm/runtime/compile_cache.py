"""Compiled programs kept on disk, so that the same command after a preemption does not compile again."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

OFF = "off"


def keep_compiled_programs() -> str:
    """Turn JAX's persistent compilation cache on; returns its folder, or "off".

    The folder is, in this order: RDLM_COMPILE_CACHE ("off": none), JAX's own JAX_COMPILATION_CACHE_DIR, and
    ~/.cache/rdlm/compiled (below XDG_CACHE_HOME where that is set). It may be deleted at any time. Whoever can write to
    it can run code here, so it should not be shared with strangers. A folder that cannot be made turns it off.
    """
    import jax

    config: Any = jax.config
    chosen = os.environ.get("RDLM_COMPILE_CACHE") or config.jax_compilation_cache_dir
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdlm" / "compiled"
    folder = Path(chosen or default).expanduser()
    if chosen != OFF:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"compiled programs are not kept: {folder} cannot be made ({error.strerror})", file=sys.stderr)
            chosen = OFF
    config.update("jax_compilation_cache_dir", None if chosen == OFF else str(folder))
    return compiled_programs()


def compiled_programs() -> str:
    """The folder of compiled programs, or "off"."""
    import jax

    config: Any = jax.config
    return (config.jax_enable_compilation_cache and config.jax_compilation_cache_dir) or OFF
