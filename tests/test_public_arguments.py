"""Wrong arguments to public functions: `InputError`, or a result; never another exception, and never an endless one."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jaxtyping
import numpy as np
import pytest

import rdlm
from rdlm.config import InputError, ModelConfig
from rdlm.evaluation import calibration, read_questions, score
from rdlm.evaluation.calibration import loosest, min_rows, p_value, thresholds

SHAPE = {
    "vocab_size": 17, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24, "prelude_layers": 0, "core_layers": 1,
    "coda_layers": 1, "max_length": 16, "mean_recurrence": 2, "backprop_depth": 1,
}  # fmt: skip
TINY = ModelConfig(**SHAPE)

WRONG = st.one_of(
    st.sampled_from([None, "", "a", "1", b"1", (), [], {}, {"a": 1}, {1}, [None], ["a"], [[1], [2]], (1, (2,)), ...]),
    st.sampled_from(
        [object, object(), len, True, False, 1j, range(0), slice(3), NotImplemented, 2**31, 2**32 + 2, 2**63]
    ),
    st.sampled_from([-1, -1.5, 0, 0.0, 1e-300, 1e300, 1.5, 10**30, *map(float, ("nan", "inf", "-inf")), -(2**63)]),
    st.sampled_from(
        [np.int8(-1), np.uint8(255), np.int64(2**40), np.float16("nan"), np.float32("inf"), np.bool_(True)]
    ),
    st.sampled_from([np.zeros(0), np.zeros(0, np.int32), np.zeros((2, 2, 2)), np.array([np.nan]), np.array(["a"])]),
    st.sampled_from([np.array([None]), np.str_("a"), np.datetime64("2020-01-01")]),
    st.integers(-(2**70), -1),
    st.floats(max_value=-1e-9),
    st.text(max_size=3),
)
"""Values of the wrong type, sign, size, shape or kind. Large counts that an int32 holds are left out: they are right,
and take for ever."""


@pytest.fixture(scope="module")
def params():
    return rdlm.init_params(TINY, jax.random.key(0))


def refused(call, right, names, examples=60):
    """Whatever stands in place of one right argument is refused by an InputError of one line, or does."""
    call(**right)

    @hypothesis.settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @hypothesis.given(st.sampled_from(names), WRONG)
    def check(name, value):
        message = ""
        try:
            call(**right | {name: value})
        except InputError as error:
            message = str(error)
        except jaxtyping.TypeCheckError:  # of the tests' own checker, which comes before
            pass
        assert "\n" not in message

    check()


def test_configs():
    refused(ModelConfig, SHAPE, [field.name for field in dataclasses.fields(ModelConfig)], 400)
    refused(rdlm.CachePolicy, {}, ["recurrences", "lookup", "dtype"])
    refused(rdlm.Speculative, {"draft_steps": 1, "lookahead": 1}, ["draft_steps", "lookahead", "threshold"], 100)


def test_forward(params):
    right = {"params": params, "config": TINY, "tokens": [[1, 2, 3]], "num_steps": 2}
    names = ["tokens", "num_steps", "key", "segment_ids", "positions", "exit_rule", "min_steps", "check_every", "state"]
    refused(rdlm.forward, right, names, 40)


def test_generate(params):
    right = {"params": params, "config": TINY, "prompts": [[1, 2, 3]], "max_new_tokens": 2, "num_steps": 2}
    names = [
        "prompts", "max_new_tokens", "num_steps", "exit_rule", "prefill_exit", "min_steps", "check_every", "cache",
        "sampling", "warm_start", "speculative", "init_scale", "key",
    ]  # fmt: skip
    refused(rdlm.generate, right, names, 40)


def test_sampling(params):
    def call(**fields):
        return rdlm.generate(
            params,
            TINY,
            [[1, 2, 3]],
            max_new_tokens=2,
            num_steps=1,
            key=jax.random.key(0),
            sampling=rdlm.Sampling(**fields),
        )

    refused(call, {}, [field.name for field in dataclasses.fields(rdlm.Sampling)], 40)


def test_engine(params):
    right = {"lanes": 1, "max_new_tokens": 2, "num_steps": 1}
    names = ["lanes", "max_new_tokens", "num_steps", "capacity", "exit_rule", "init_scale", "max_queue"]
    refused(lambda **options: rdlm.Engine(params, TINY, **options), right, names, 40)
    engine = rdlm.Engine(params, TINY, **right)

    def submit(**request):
        engine.submit(**request).cancel()

    names = ["prompt", "max_new_tokens", "num_steps", "exit_rule", "min_steps", "sampling", "key"]
    refused(submit, {"prompt": [1, 2], "max_new_tokens": 2}, names, 40)


def test_scores(params):
    right = {"params": params, "config": TINY, "pairs": [([1, 2], [3])], "depths": (1,)}
    refused(score, right, ["pairs", "depths", "exit_rule", "init_scale", "tokens_per_batch"], 60)


def test_calibration():
    refused(thresholds, {"rule": "kl", "num_steps": 4}, ["rule", "num_steps"])
    refused(min_rows, {"epsilon": 0.1, "delta": 0.1}, ["epsilon", "delta"])
    refused(p_value, {"loss": np.zeros(3), "epsilon": 0.1}, ["loss"])
    refused(loosest, {"tried": [], "epsilon": 0.1, "delta": 0.1}, ["epsilon", "delta"])
    refused(calibration.check_risk, {"epsilon": 0.1, "delta": 0.1}, ["epsilon", "delta"])


def test_folders(tmp_path, params):
    """What cannot be a path is Python's own TypeError, as for every function that takes one."""
    names = ["", ".", "..", "/", "~", "~nobody/x", "\0", "a\0b", "gs://", "x" * 300, "/proc/x"]
    texts = st.one_of(st.text(max_size=6), st.sampled_from(names))

    @hypothesis.settings(max_examples=80, derandomize=True, deadline=None, database=None)
    @hypothesis.given(st.sampled_from([rdlm.load, rdlm.load_huggingface, rdlm.load_checkpoint, read_questions]), texts)
    def check(load, text):
        with pytest.raises(InputError) as error:
            load(text)
        assert "\n" not in str(error.value).replace(text, "")

    check()
    for name in ("\0", "x" * 300, "/proc/x"):
        with pytest.raises(InputError):
            rdlm.save_huggingface(name, params, TINY)
