"""Wrong arguments for every public function that decodes, and what becomes of them: `python wrong_arguments.py`.

Prints a line for each that is accepted, ends in another error than InputError, or says so in several lines. Run by
itself, because the checker of annotations that tests load would refuse many of them first.
"""

import dataclasses

import jax
import numpy as np

import rdlm
from rdlm import exits
from rdlm.config import PRESETS, CachePolicy, InputError, Parallel, Sampling, Speculative

NAN, INF = float("nan"), float("inf")
CONFIG = dataclasses.replace(PRESETS["nano"].model, max_length=64)
PARAMS = dict(rdlm.init_params(CONFIG, jax.random.key(0)))
TOKENS = np.array([[1, 2, 3], [4, 5, 6]])
RAGGED = [[1], [1, 2]]

KEYS = ["a", [1.5, 2.5], [-1, 0], [2**40, 1], object(), np.ones(2)]
RULES = [3, "kl", exits.KL, exits.kl([[0.1]])]
DEPTHS = ["a", 0, 2.5, True, [], 2**31, 2**32 + 2, 2**70, [2**32 + 2, 2], np.array([2.0, 2.0]), [2, 2, 2]]
COUNTS = [None, "a", 1.5, -1, True, 2**32, -(2**40), [1, 2, 3]]
SCALES = [None, "a", NAN, INF, 1e300, [1.0, 2.0, 3.0], [[1.0]]]
POLICIES = ["latest", None, {}]
SIZES = ["a", 2.5, True, [2], 2**40, 0]
SAMPLINGS = [
    *(Sampling(temperature=t) for t in ("hot", None, 1j, [], INF, NAN, 1e300, True, [[1.0], [2.0]], -1)),
    *(Sampling(top_k=k) for k in (2**31, 2**32 + 1, 1.5, "a", -1)),
    *(Sampling(top_p=p) for p in ("a", NAN, 0, 2)),
    *(Sampling(repetition_penalty=x) for x in (INF, NAN, 1e-40, 0, "a")),
    *(Sampling(stop_tokens=s) for s in ("abc", b"ab", {1}, 3, None, (216.7,), ("216",), (None,), (2**31,), (-1,))),
    *(Sampling(stop_tokens=s) for s in ((1, (2,)), ((1,), ((2,),)), ((1,), (2,), (3,)))),
    None, {}, "greedy",
]  # fmt: skip
PROMPTS = [
    None,
    5,
    "abc",
    (x for x in [[1]]),
    {1: 2},
    [],
    [None],
    ["ab"],
    [1, 2],
    [[True]],
    [[2**70]],
    [[1.0]],
]


def generate(**options):
    given = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": 2, "num_steps": 2, **options}
    return rdlm.generate(PARAMS, CONFIG, **given)


def new_engine(**options):
    return rdlm.Engine(PARAMS, CONFIG, **{"lanes": 2, "max_new_tokens": 4, "num_steps": 2, **options})


ENGINE = new_engine()


def submit(**options):
    return ENGINE.submit(**{"prompt": [1, 2], **options})


def forward(**options):
    return rdlm.forward(PARAMS, CONFIG, **{"tokens": TOKENS, "num_steps": 2, **options})


def forward_with_exits(**options):
    return forward(**{"exit_rule": exits.kl(), **options})


def prefill(**options):
    return rdlm.prefill(PARAMS, CONFIG, **{"tokens": TOKENS, "num_steps": 2, **options})


HELD = rdlm.prefill(PARAMS, CONFIG, TOKENS, 2)[1]


def decode_step(**options):
    given = {"cache": HELD, "token": np.array([1, 2]), "num_steps": 2, **options}
    return rdlm.decode_step(PARAMS, CONFIG, **given)


def quantize(**options):
    return rdlm.quantize(**{"params": PARAMS, "config": CONFIG, **options})


def swapped(function):
    return function()


ANY_DEPTH = {"min_steps": COUNTS, "check_every": [*COUNTS, 0]}
WRONG = {
    generate: {
        "prompts": PROMPTS, "max_new_tokens": [None, "3", *SIZES, np.uint8(200)], "num_steps": DEPTHS,
        "exit_rule": RULES, "prefill_exit": [None, 3, [1], "no"], "cache": POLICIES, "sampling": SAMPLINGS,
        "warm_start": [1, None, [], "cold"], "speculative": [{}, (1, 2), 3], "parallel": [{}, 32, "on"],
        "init_scale": SCALES, "key": KEYS,
        "on_token": [3, "print"], "samples": [None, *SIZES], "prefix": [None, "a", 2, True, [True], RAGGED],
        **ANY_DEPTH,
    },
    new_engine: {
        "capacity": SIZES, "lanes": [None, *SIZES], "max_new_tokens": SIZES, "num_steps": DEPTHS, "max_queue": SIZES,
        "ticks_per_step": SIZES, "flush_every": SIZES, "cache": POLICIES, "exit_rule": RULES, "init_scale": SCALES,
        "check_every": [*COUNTS, 0], "warm_start": ["x", 1], "prefill_exit": [None, "no"],
    },
    submit: {
        "prompt": [None, 5, "ab", [], [2**40], RAGGED, [1.0]], "max_new_tokens": ["a", 2.5, True, 9], "key": KEYS,
        "num_steps": DEPTHS, "min_steps": COUNTS, "sampling": SAMPLINGS, "exit_rule": RULES, "on_token": [4],
        "prefix": [True, [True, False]],
    },
    forward: {
        "tokens": [None, "ab", RAGGED, [[2**40]], [[1.5]], [1, 2]], "state": ["a", np.zeros((2, 3, 1)), RAGGED],
        "num_steps": ["a", 2.0, (1, 2, 3), (), 2**40, (2**31 - 1, 1), [[2]], np.array([2, 2, 2])], "key": KEYS,
        "segment_ids": ["a", RAGGED, np.array([[1, 1, 2**32 + 1]] * 2)], "positions": ["a", np.array([0, 1, 2**40])],
        "exit_rule": RULES, "cache": POLICIES, "prefix": [2, "a"], **ANY_DEPTH,
    },
    forward_with_exits: {
        "num_steps": [*DEPTHS, (1, 2)], "min_steps": [[[1, 2]], np.ones((3, 3), int)], "cache": POLICIES,
    },
    prefill: {
        "capacity": SIZES, "max_steps": SIZES, "cache": POLICIES, "init_scale": SCALES, "num_steps": DEPTHS,
        "lengths": [[2.7, 1], ["a", "b"], [0, 1], [2**32 + 1, 1], 3], "prefill_exit": [None], "key": KEYS, **ANY_DEPTH,
    },
    decode_step: {
        "cache": [None, {}], "token": [None, "a", [1.5, 2], [1], RAGGED, [2**40, 1]], "num_steps": DEPTHS,
        "state": ["a", np.zeros(2)], "init_scale": SCALES, "exit_rule": RULES, **ANY_DEPTH,
    },
    quantize: {
        "params": [None, 5, {}, CONFIG, rdlm.quantize(PARAMS, CONFIG)], "config": [None, {}, PARAMS],
        "dtype": [None, "int4", "bfloat16", 8, ["int8"], np.int8], "embeddings": [None, "yes", 2],
    },
    swapped: {
        "function": [
            lambda: rdlm.generate(CONFIG, PARAMS, [[1]], max_new_tokens=1),
            lambda: rdlm.forward(CONFIG, PARAMS, TOKENS),
            lambda: rdlm.Engine(CONFIG, PARAMS),
        ],
    },
    Speculative: {
        "draft_steps": SIZES, "lookahead": SIZES, "threshold": [None, "a", NAN, 0, 2],
    },
    Parallel: {
        "window": SIZES, "inner": SIZES, "headway": [*SIZES, 33], "threshold": ["a", NAN, -1], "rule": ["kl", 3],
        "freeze": ["first", None], "noise": ["a", NAN, -1, 1], "schedule": [None, "sqrt"], "ema": ["a", NAN, -1, 1],
    },
    CachePolicy: {"recurrences": SIZES, "lookup": ["last", None], "dtype": ["bfloat16", 8]},
    exits.named: {"name": ["klx", "np", "twice", None, 3], "threshold": [NAN, INF, "a", -1]},
    exits.kl: {"threshold": [None, "a", {}, ["a"], RAGGED, NAN, -1, 1j, True]},
    exits.fixed: {"r": [None, "a", NAN, 0, 1j]},
    exits.min_p_kl: {"min_p": [2.0, "a", NAN, -1, None]},
    exits.twice: {"rule": ["kl", None, exits.KL]},
}  # fmt: skip
ALWAYS = {Speculative: {"draft_steps": 1, "lookahead": 1}, exits.named: {"name": "argmax_stability"}}


def main() -> int:
    count = 0
    for function, arguments in WRONG.items():
        for name, values in arguments.items():
            for value in values:
                count += 1
                called = f"{function.__name__}({name} = {str(value)[:60]!r})"
                try:
                    function(**ALWAYS.get(function, {}) | {name: value})
                except InputError as error:
                    if "\n" in str(error):
                        print(f"{called}: several lines: {error}")
                except Exception as error:
                    print(f"{called}: {type(error).__name__}: {error}")
                else:
                    print(f"{called}: accepted")
    return count


if __name__ == "__main__":
    print(main(), "wrong arguments")
