"""A request gets what the library gives, alone and among others that come, go and hang up."""

import concurrent.futures
import contextlib
import dataclasses

import httpx
import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rdlm import exits
from rdlm.config import Sampling

pytestmark = pytest.mark.slow

asks = st.fixed_dictionaries(
    {
        "prompt": st.text("abc eé", min_size=1, max_size=10),
        "temperature": st.sampled_from([0.0, 0.7, 1.3]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "top_k": st.sampled_from([0, 20]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "seed": st.integers(0, 2**31 - 1),
        "max_tokens": st.integers(1, 8),
        "num_steps": st.integers(1, 8),
        "exit": st.sampled_from(["kl", "latent_diff"]),
        "threshold": st.sampled_from([0.0, 0.003, 0.05, 0.2, 0.5]),
        "min_steps": st.integers(0, 3),
        "presence_penalty": st.sampled_from([0.0, 0.7, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 1.5]),
        "logit_bias": st.dictionaries(st.integers(90, 105).map(str), st.sampled_from([4.0, -100.0]), max_size=4),
    },
    optional={"stop": st.lists(st.text("abcde", min_size=1, max_size=2), min_size=1, max_size=3)},
)


def by_library(run, ask):
    rule = exits.named(ask["exit"], ask["threshold"])
    names = [field.name for field in dataclasses.fields(Sampling) if field.name in ask and field.name != "logit_bias"]
    biases = tuple((int(token), bias) for token, bias in ask["logit_bias"].items())
    return run.generate(
        ask["prompt"], max_new_tokens=8, num_steps=ask["num_steps"], exit_rule=rule, min_steps=ask["min_steps"],
        sampling=Sampling(**{name: ask[name] for name in names}, logit_bias=biases), key=jax.random.key(ask["seed"]),
        stop=ask.get("stop", ()), on_token=counter(ask["max_tokens"]),
    )  # fmt: skip


def counter(most):
    """Ends a prompt after so many tokens: another maximum would be another program."""
    seen = []

    def listen(i, token, steps):
        seen.append(token)
        return len(seen) >= most

    return listen


def hang_up(server, ask, lines):
    """Leave after so many lines of the answer."""
    stream = httpx.stream("POST", f"{server.url}/v1/completions", json=ask | {"stream": True}, timeout=60)
    with stream as response, contextlib.suppress(StopIteration):
        read = response.iter_lines()
        for _ in range(lines):
            next(read)


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(batch=st.lists(asks, min_size=32, max_size=32))
def test_a_request_gets_what_the_library_gives(server, batch):
    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        for i, ask in enumerate(batch[::2]):
            pool.submit(hang_up, server, ask, i % 5)
        extra = {"logprobs": 0, "return_token_ids": True}
        answers = list(pool.map(lambda ask: server.post("completions", **ask, **extra), batch))
    for ask, (status, answer) in zip(batch, answers, strict=True):
        assert status == 200, answer
        out, (choice,) = by_library(server.run, ask), answer["choices"]
        assert choice["token_ids"] == out.tokens[0].tolist()
        assert choice["steps"] == out.steps[0].tolist()
        assert choice["text"] == out.text
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(out.log_probs[0].tolist(), rel=1e-3, abs=1e-5)
