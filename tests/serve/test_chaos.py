"""Everything at once: right requests, wrong ones, clients that leave; and whatever the OpenAPI document allows."""

import httpx
import pytest
import schemathesis
from chaos import STAY, attack
from hypothesis import HealthCheck, given, settings

pytestmark = pytest.mark.slow


def test_a_crowd_with_a_fifth_that_hangs_up(server):
    server.settle()
    seen = attack(server.url, 150)
    server.settle()
    assert seen["leave"] == 30
    assert min(seen[what] for what in STAY) > 10
    assert server.service.running == server.service.waiting == 0


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
