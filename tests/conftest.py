"""What every test runs under: 8 CPU devices, quick compilation, no silent rank promotion, properties that repeat."""

import dataclasses
import gc
import importlib
import os
import pathlib
import random
import sys

import hypothesis
import jax
import pytest
from annotations import CHECKED
from compilation import QUICK, all_passes
from experiment_scripts import EXPERIMENTS, script
from jaxlib import xla_client
from jaxtyping import install_import_hook

install_import_hook(CHECKED, "annotations.check")  # checks only what is imported after it

from rdlm.config import PRESETS  # noqa: E402
from rdlm.runtime import run_command  # noqa: E402

os.environ.setdefault("RDLM_COMPILE_CACHE", "off")  # no test depends on what an earlier one left on disk

jax.config.update("jax_disable_most_optimizations", True)  # all_passes() and full_compile are the way back
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# XLA reads its flags once, here. The compiler for TPUs would read them again.
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK['XLA_FLAGS']}")
    xla_client.CompileOptions().executable_build_options.debug_options  # noqa: B018

gc.set_threshold(100_000, 20, 20)  # tracing makes many objects and few circles: looking for these took 8 % of the time

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("rdlm", derandomize=True, deadline=None)
hypothesis.settings.load_profile("rdlm")


TESTS = pathlib.Path(__file__).parent
SLOW = set((TESTS / "slow.txt").read_text().splitlines())

# Files of minutes come first, so that no process is left with one in the end. (xdist would begin with many tests.)
LONG = (
    "decode/test_tensor_parallel.py", "hf/test_families.py", "hf/test_capabilities.py", "test_docs.py",
    "train/test_survive.py", "tpu_setup/test_supervise.py", "decode/test_speculative.py",
    "decode/test_golden_decode.py", "decode/test_engine.py", "decode/test_generate.py", "test_sharding.py",
    "train/test_fit.py", "train/test_tpu_train.py", "experiments/test_fetch_model.py", "tpu_setup/test_workers.py",
    "decode/test_tpu_decode.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Mark the tests that slow.txt lists as slow, and order the files."""
    for item in items:
        if item.nodeid.partition("[")[0] in SLOW:
            item.add_marker(pytest.mark.slow)
    order = {TESTS / file: i for i, file in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(LONG)))


@pytest.fixture
def full_compile():
    with all_passes():
        yield


MAPPINGS = pathlib.Path("/proc/self/maps")
MOST_MAPPINGS = 20_000
compiled = []  # names of programs, since their mappings were last counted
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("/backend_compile_duration") else None
)


@pytest.fixture(autouse=True)
def few_programs_at_a_time():
    """Every compiled program holds memory mappings; a process may have 65,530 of them and dies without a word.

    To count them takes 20 ms, so most tests don't.
    """
    yield
    if not compiled or not MAPPINGS.exists():
        return
    compiled.clear()
    if MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def command(monkeypatch, capsys):
    """command("train", "nano", ...) -> (exit code, stdout, stderr) of experiments/train.py, as a process has them."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(EXPERIMENTS / f"{name}.py"), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_command(script(name).main)
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture(scope="session")
def nano_data(tmp_path_factory):
    """Where invented text lies prepared, for the preset nano."""
    from rdlm.data.prepare import prepare_embedded

    folder, invent, data = tmp_path_factory.mktemp("nano") / "data", random.Random(0), PRESETS["nano"].data
    words = ["".join(invent.choices("aeioubdglmnrst", k=invent.randint(2, 7))) for _ in range(99)]
    texts = [f"{i} " + " ".join(invent.choices(words, k=60)) for i in range(200)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("rdlm.data.prepare.embedded"), "_documents", lambda data: texts)
        prepare_embedded(dataclasses.replace(data, folder=str(folder), validation_fraction=0.1))
    return folder
