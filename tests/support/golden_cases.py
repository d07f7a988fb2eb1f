"""The golden vectors in tests/golden (see its README): models, cases and their tolerances."""

import functools
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from rdlm.hf import load_huggingface

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("A", "A2", "G_gqa")

LOGITS = {"atol": 3e-4, "rtol": 1e-4}
ACTIVATIONS = {"atol": 5e-5, "rtol": 0}
LOSS = 1e-5
GRADIENTS = 1e-4  # of the norm of each tensor


@functools.cache
def model(name):
    """(params, config) of a golden model."""
    return load_huggingface(GOLDEN / name)


@functools.cache
def cases(name):
    """{case: metadata}, with the case's arrays under "arrays"."""
    metadata = json.loads((GOLDEN / name / "cases.json").read_text())["cases"]
    tensors = load_file(GOLDEN / name / "cases.safetensors")
    for case, entry in metadata.items():
        entry["arrays"] = {key: tensors[f"{case}/{key}"] for key in entry.get("tensors", [])}
    return metadata


def of_kind(*kinds, models=MODELS):
    """[(model name, case name)] for the cases of these kinds that have arrays."""
    return [(m, c) for m in models for c, entry in cases(m).items() if entry["kind"] in kinds and entry["arrays"]]


def deviation(ours, reference):
    """Largest absolute difference."""
    return float(np.abs(np.asarray(ours, np.float64) - np.asarray(reference, np.float64)).max())
