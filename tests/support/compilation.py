"""How tests compile: quickly. They compile more than they run."""

import contextlib

import jax

# The CPU's other code generator needs less than half of the time for the same programs; one file of code each suffices.
_XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": _XLA_FLAGS}
"""Environment of processes that compile for the CPU: a tenth of the time. The compiler for TPUs ends a process with
such XLA_FLAGS.
"""


@contextlib.contextmanager
def all_passes():
    """As users compile: for tests of what the compiler makes, and for what runs longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
