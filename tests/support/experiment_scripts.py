"""The scripts of experiments/ as modules."""

import functools
import importlib.util
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@functools.cache
def script(name):
    """experiments/NAME.py ("train", "studies/baselines"), imported under a name that no package has."""
    spec = importlib.util.spec_from_file_location(f"experiments_{name.replace('/', '_')}", EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
