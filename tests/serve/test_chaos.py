"""Everything at once: right requests, wrong ones, clients that leave; and whatever the OpenAPI document allows."""

import concurrent.futures
import contextlib
import random

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.slow

KINDS = [
    {"exit": "kl"}, {"exit": "kl", "threshold": 0.3}, {"exit": "latent_diff", "threshold": 0.4}, {"exit": "none"},
    {"exit": "none", "num_steps": 2}, {"exit": "latent_diff", "min_steps": 3},
]  # fmt: skip
WRONG = [{"temperature": 7}, {"prompt": []}, {"max_tokens": 99}, {"exit": "soon"}, {"model": "other"}, {"n": 0}]


def test_a_crowd_with_a_fifth_that_hangs_up(server):
    chance, url = random.Random(0), f"{server.url}/v1/completions"
    server.settle()
    statuses = []
    right = [{"prompt": "ab" * (1 + i % 4), "seed": i, "max_tokens": 1 + i % 9, **KINDS[i % 6]} for i in range(24)]
    expected = [server.post("completions", **body)[1]["choices"] for body in right]

    def hang_up(client, body):
        with client.stream("POST", url, json=body | {"stream": True}) as response:
            lines = response.iter_lines()
            with contextlib.suppress(StopIteration):
                for _ in range(chance.randrange(4)):
                    next(lines)

    def one(i):
        body = right[i % len(right)]
        with httpx.Client(timeout=120) as client:
            if i % 5 == 0:
                hang_up(client, body)
            elif i % 7 == 0:
                statuses.append(client.post(url, json=body | WRONG[i % len(WRONG)]).status_code)
            else:
                response = client.post(url, json=body)
                while response.status_code == 429:
                    response = client.post(url, json=body)
                assert response.json()["choices"] == expected[i % len(right)]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        list(pool.map(one, range(240)))
    server.settle()
    assert set(statuses) == {400, 404}
    assert server.service.running == server.service.waiting == 0
    assert server.post("completions", **right[0])[1]["choices"] == expected[0]


def test_nothing_that_the_document_allows_ends_in_a_failure(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == "/metrics":
            continue

        @settings(
            max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
        )
        @given(case=operation.as_strategy())
        def ask(case):
            response = case.call(base_url=server.url, timeout=60)
            assert response.status_code < 500, response.text
            assert response.status_code != 422
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        ask()
    server.settle()
    assert httpx.get(f"{server.url}/health").status_code == 200
