"""What Prometheus reads adds up."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import until

from rdlm.serve.metrics import LaneGauges, _bucket

pytestmark = pytest.mark.slow

NAMES = re.compile(r"rdlm:\w+")


def read(server):
    """Every sample by name and labels."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name.removeprefix("rdlm:"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_are_those_of_the_answers(server):
    server.settle()
    before = read(server)
    body = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 6, "seed": 1, "exit": "latent_diff", "threshold": 0.4}
    answer = server.post("completions", **body)[1]
    server.post("completions", prompt="a", temperature=9)
    server.settle()
    after = read(server)

    def grown(*key):
        return after.get(key, 0) - before.get(key, 0)

    new = answer["usage"]["completion_tokens"]
    assert grown("prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert grown("generation_tokens_total") == new
    assert grown("recurrences_per_token_count", "latent_diff") == new
    assert grown("recurrences_per_token_sum", "latent_diff") == sum(sum(c["steps"]) for c in answer["choices"])
    assert grown("time_to_first_token_seconds_count") == grown("e2e_request_latency_seconds_count") == 4
    assert grown("inter_token_latency_seconds_count") == new - 4
    assert grown("request_generation_tokens_sum") == new
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    for reason in ("stop", "length"):
        assert grown("request_success_total", reason) == reasons.count(reason)
    assert grown("http_requests_total", "/v1/completions", "200") == 1
    assert grown("http_requests_total", "/v1/completions", "400") == 1
    assert (after[("num_requests_running",)], after[("num_requests_waiting",)]) == (0, 0)
    assert after[("kv_cache_usage_perc",)] == 0


def test_the_prompt_cache_shows_in_usage_and_counters(server):
    before, letters = read(server), [*"abcdefgh"] * 3
    long = server.run.tokenizer.encode("".join(letters))[:20].tolist()
    body = {"prompt": long, "max_tokens": 2, "n": 2, "seed": 3, "num_steps": 3, "return_token_ids": True}
    first, second = (server.post("completions", **body)[1] for _ in range(2))
    other = server.post("completions", **body | {"seed": 4})[1]  # control: initial states of its own
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second, other)]
    assert cached == [0, 16, 0]  # two chunks of 8 of the first sample; the others have keys of their own
    assert [c["token_ids"] for c in first["choices"]] == [c["token_ids"] for c in second["choices"]]
    server.settle()
    after = read(server)
    names = [(f"prefix_cache_{name}_total",) for name in ("hits", "queries")]
    grown = [after[name] - before[name] for name in names]
    assert grown == [32, 3 * 2 * 20]


def test_streams_are_counted_by_how_they_end(server, rounds, monkeypatch):
    url, body = f"{server.url}/v1/completions", {"prompt": "ab", "stream": True}
    before = read(server)
    with httpx.stream("POST", url, json=body) as response:
        assert response.status_code == 200  # then the client leaves
    until(lambda: not server.requests)
    monkeypatch.setattr(server.service, "options", dataclasses.replace(server.service.options, request_timeout=0.1))
    assert "timeout" in httpx.post(url, json=body).text
    until(lambda: not server.requests)
    after = read(server)
    grown = {key: after[key] - before.get(key, 0) for key in after}
    ended = [grown.get(("http_requests_total", "/v1/completions", status), 0) for status in ("200", "499", "504")]
    assert ended == [0, 1, 1]
    assert grown[("request_failure_total", "timeout")] == 1


def test_the_dashboard_asks_for_what_is_there(server):
    server.post("completions", prompt="ab", max_tokens=2)
    text = httpx.get(f"{server.url}/metrics").text
    there = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    there |= {f"{family.name}_total" for family in text_string_to_metric_families(text) if family.type == "counter"}
    dashboard = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    asked = {name for panel in dashboard["panels"] for t in panel["targets"] for name in NAMES.findall(t["expr"])}
    assert len(asked) > 10
    assert asked <= there


def lanes(server):
    """Busy lanes by engine and depth, but for those that are none; and all lanes by engine."""
    now = read(server)
    busy = {key[1:]: int(value) for key, value in now.items() if key[0] == "lanes_busy" and value}
    return busy, {key[1]: int(value) for key, value in now.items() if key[0] == "lanes"}


def test_lanes_are_counted_by_the_recurrences_of_their_tokens(server, rounds):
    def ask(stack, **fields):
        body = {"stream": True, "max_tokens": 8, "ignore_eos": True, "seed": 1} | fields
        stack.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=body))

    assert lanes(server) == ({}, {"kl": 4, "latent_diff": 4})
    known = {key[1:] for key in read(server) if key[0] == "lanes_busy"}
    depths = ("prompt", "1", "2", "3-4", "5-8")
    assert known == {(engine, depth) for engine in ("kl", "latent_diff") for depth in depths}
    with contextlib.ExitStack() as stack:
        ask(stack, prompt="ab", n=2, exit="none", num_steps=3)  # in the first engine
        ask(stack, prompt=[1] * 20, num_steps=2)  # in chunks of 8
        ask(stack, prompt="c", exit="latent_diff", threshold=0, num_steps=8)
        assert lanes(server)[0] == {}  # they wait
        expected = {("kl", "3-4"): 2, ("kl", "prompt"): 1, ("latent_diff", "5-8"): 1}
        rounds.release(2)  # one of the first request alone
        until(lambda: len(lanes(server)[0]) == len(expected))
        assert lanes(server) == (expected, {"kl": 4, "latent_diff": 4})
        engines = server.service.worker.engines
        held = {kind: sum(s is not None for s in engine._schedule.serving) for kind, engine in engines.items()}
        assert held == {"kl": 2, "latent_diff": 1}  # and the lane that is kept for the long prompt
        rounds.release(1000)
        until(lambda: lanes(server)[0] == {})


@pytest.mark.parametrize(("steps", "label"), [(0, "prompt"), (1, "1"), (2, "2"), (3, "3-4"), (4, "3-4"), (33, "33-64")])
def test_depths_are_named_by_powers_of_two(steps, label):
    assert _bucket(steps) == label
    (_, busy, _) = LaneGauges(4, 40, lambda: {"kl": [steps, steps]}, lambda: 0).collect()
    assert [s.labels["recurrences"] for s in busy.samples if s.value] == [label]
    assert sum(s.value for s in busy.samples) == 2


def test_gauges_show_what_is_in_flight(server, rounds):
    with httpx.stream("POST", f"{server.url}/v1/completions", json={"prompt": "ab", "n": 2, "stream": True}):
        assert read(server)[("num_requests_waiting",)] == 2
        rounds.release(1)
        for _ in range(2000):
            if (now := read(server))[("num_requests_running",)] == 2:
                break
        assert now[("num_requests_waiting",)] == 0
        assert 0 < now[("kv_cache_usage_perc",)] < 1
