"""Requests too large for the memory that `ulimit -v` leaves, and what becomes of them: `python too_large.py`.

Prints, for each, the seconds it took and the error in one line.
"""

import dataclasses
import resource
import time

import jax
import numpy as np

import rdlm
from rdlm.analysis import capture, lens
from rdlm.config import PRESETS, CachePolicy, InputError

MAX_ADDRESSES = 6_000_000_000
CONFIG = dataclasses.replace(PRESETS["nano"].model, max_length=2**23)
TOKENS = np.ones((1, 64), int)


def requests(params):
    """Calls by name."""
    prompt, held = [[1, 2, 3]], rdlm.prefill(params, CONFIG, TOKENS[:, :4], 2, capacity=8)[1]
    return {
        "deep": lambda: rdlm.generate(params, CONFIG, prompt, max_new_tokens=2, num_steps=3_000_000),
        "long": lambda: rdlm.generate(params, CONFIG, prompt, max_new_tokens=2**22, num_steps=4),
        "many prompts": lambda: rdlm.generate(params, CONFIG, [[1] * 500] * 30_000, max_new_tokens=2, num_steps=4),
        "many samples": lambda: rdlm.generate(params, CONFIG, prompt, max_new_tokens=2, num_steps=4, samples=2**20),
        "kept sets": lambda: rdlm.generate(
            params, CONFIG, prompt, max_new_tokens=2, num_steps=2**21, cache=CachePolicy(recurrences=2**20)
        ),
        "lanes": lambda: rdlm.Engine(params, CONFIG, lanes=2**20, capacity=64),
        "capacity": lambda: rdlm.Engine(params, CONFIG, lanes=16),
        "deep engine": lambda: rdlm.Engine(params, CONFIG, num_steps=2**20, capacity=64),
        "prefill": lambda: rdlm.prefill(params, CONFIG, TOKENS, 4),
        "deep prefill": lambda: rdlm.prefill(params, CONFIG, TOKENS, 2**20, capacity=64),
        "a cache that grows": lambda: rdlm.decode_step(params, CONFIG, held, np.array([1]), 2**22),
        "logits": lambda: rdlm.forward(params, CONFIG, np.ones((2**12, 2**12), np.int32), 1),
        "trajectory": lambda: capture(params, CONFIG, TOKENS, 2_000_000),
        "layers of a trajectory": lambda: capture(params, CONFIG, TOKENS, 1_000_000, layers=True),
        "lens": lambda: lens(params, CONFIG, np.ones((2**9, 2**10), int), np.ones((2**9, 2**10), int), range(1, 200)),
    }


if __name__ == "__main__":
    made = dict(rdlm.init_params(CONFIG, jax.random.key(0)))
    calls = requests(made)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESSES, MAX_ADDRESSES))
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            call()
            outcome = "accepted"
        except InputError as error:
            outcome = str(error)
        print(f"{name}|{time.perf_counter() - start:.1f}|{outcome}", flush=True)
