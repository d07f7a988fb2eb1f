"""The seconds of a start: every one of them is counted once, and only while somebody listens."""

import itertools
import time

import jax
import jax.numpy as jnp
import pytest

from rdlm.train import startup
from rdlm.train.startup import StartUp, process_age


def compile_something(n):
    jax.jit(lambda x: jnp.sin(x) * n)(jnp.arange(n, dtype=jnp.float32)).block_until_ready()


def test_no_second_is_counted_twice():
    with StartUp() as found:
        begun, before = time.monotonic(), sum(found.seconds.values())
        with found.part("data"):
            time.sleep(0.2)
            with found.part("parameters"):
                compile_something(71)
        passed = time.monotonic() - begun
        assert sum(found.seconds.values()) - before == pytest.approx(passed, abs=0.05)
        assert found.seconds["data"] == pytest.approx(0.2, abs=0.1)
        assert min(found.seconds[name] for name in ("tracing", "lowering", "compilation")) > 0
    heard = dict(found.seconds)
    compile_something(72)
    assert found.seconds == heard, "it still listens"


def test_the_line_names_the_longest_part_first(monkeypatch):
    monkeypatch.setattr(startup, "_starts", itertools.count())
    monkeypatch.setattr(startup, "_IMPORTS", 2.0)
    found = StartUp()
    monkeypatch.setattr(startup.time, "monotonic", lambda: found.begun + 7.0)
    found.seconds |= {"data": 0.04, "compilation": 4.0}
    assert found.line() == "first step after 9.0 s: compilation 4.0, imports 2.0, the rest 3.0"


def test_a_second_start_of_a_process_counts_from_itself(monkeypatch):
    monkeypatch.setattr(startup, "_starts", itertools.count())
    monkeypatch.setattr(startup, "_IMPORTS", 2.0)
    StartUp()
    again = StartUp()
    monkeypatch.setattr(startup.time, "monotonic", lambda: again.begun + 7.0)
    again.seconds["compilation"] += 6.0
    assert again.line() == "first step after 7.0 s: compilation 6.0, the rest 1.0"


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux tells when a process began")
def test_imports_begin_with_the_process():
    assert 0.1 < startup._IMPORTS < process_age()
