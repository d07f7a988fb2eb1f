"""What does not fit into memory is refused at once, with figures and a way out; what fits is not."""

import pathlib
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from engine_cases import TINY, params

from rdlm.config import CachePolicy, InputError
from rdlm.decode import generate
from rdlm.decode.passes import CacheMemory
from rdlm.exits import Depth
from rdlm.model import tensor_parallel
from rdlm.model.cache import allocate, cache_bytes
from rdlm.runtime import memory

SCRIPT = pathlib.Path(__file__).parents[1] / "support" / "too_large.py"


def test_what_a_limited_process_cannot_hold_is_refused_within_seconds():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [line.split("|") for line in done.stdout.splitlines()]
    assert len(found) == 15
    for name, seconds, message in found:
        assert "GiB of memory" in message, (name, message)
        assert "are free; " in message
        assert float(seconds) < 20, name  # on a machine that does other things


def test_the_figure_is_what_is_allocated():
    for dtype, sets in (("float32", 3), ("bfloat16", 8)):
        cache = jax.eval_shape(lambda d=dtype, s=sets: allocate(TINY, CachePolicy(), s, 5, 64, jnp.dtype(d)))
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert cache_bytes(TINY, sets, 5, 64, dtype) == held
    small = jax.eval_shape(lambda: allocate(TINY, CachePolicy(dtype="int8"), 8, 5, 64, jnp.bfloat16))
    held8 = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(small))
    assert cache_bytes(TINY, 8, 5, 64, "int8") == held8
    counted = 5 * (64 + 1) * 4  # depths and lengths
    assert (held8 - counted) / (held - counted) == (TINY.head_dim + 2) / (2 * TINY.head_dim)


def test_the_figure_of_int8_is_smaller():
    need = {
        dtype: CacheMemory(params("bfloat16"), TINY, 64, 1, (64, 512), Depth(1), policy=CachePolicy(dtype=dtype)).bytes
        for dtype in (None, "int8")
    }
    assert need["int8"] == pytest.approx(need[None] * 6 / 8, rel=0.1)  # heads of 4: 6 bytes instead of 8


def test_the_figure_is_that_of_each_device():
    need = {n: CacheMemory(*tensor_parallel(params(), TINY, n), 4, 1, (64, 32), Depth(1)).bytes for n in (1, 2)}
    assert need[2] == pytest.approx(need[1] / 2, rel=0.1)  # keys and values, but not logits


def test_every_limit_of_the_host_counts(monkeypatch, tmp_path):
    plain = memory.free_memory()
    assert plain is not None
    assert 2**20 < plain < 2**50
    used = 2**30
    (tmp_path / "memory.max").write_text(f"{used + 2**21}\n")
    (tmp_path / "memory.current").write_text(f"{used + 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**20}\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_memory() == 2**21
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory() > 2**21
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**20, resource.RLIM_INFINITY))
    assert memory.free_memory() == 0


def test_an_accelerator_says_what_is_free(monkeypatch):
    class Device:
        def memory_stats(self):
            return stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    stats = {"bytes_limit": 100, "bytes_in_use": 30}
    assert memory.free_memory() == 70
    stats = {}
    assert memory.free_memory() is None


def test_small_things_are_never_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 0)
    with pytest.raises(InputError, match=r"things: needs 1\.0 GiB of memory, 0\.0 GiB are free; take fewer"):
        memory.require_memory("things", 2**30, "take fewer")
    generate(params(), TINY, [[1]], max_new_tokens=1, num_steps=1)
