"""What every test runs under: 8 virtual CPU devices, no silent rank promotion, property tests that repeat exactly."""

import gc
import os
import pathlib

import hypothesis
import jax
import pytest

os.environ.setdefault("RDLM_COMPILE_CACHE", "off")  # no test depends on what an earlier one left on disk

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("rdlm", derandomize=True, deadline=None)
hypothesis.settings.load_profile("rdlm")


@pytest.fixture
def quick_compile():
    """For tests that compile more than they run: without the compiler's expensive passes, half of their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


MAPPINGS = pathlib.Path("/proc/self/maps")
MOST_MAPPINGS = 20_000


@pytest.fixture(autouse=True)
def few_programs_at_a_time():
    """Every compiled program holds memory mappings; a process may have 65,530 of them and dies without a word."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
