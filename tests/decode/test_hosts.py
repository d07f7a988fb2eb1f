"""A model on two hosts, which are two processes here: everybody gets what `generate` gives on one device."""

import pytest
from engine_cases import TINY, params
from test_pages import expected
from two_hosts import PROMPTS, SEED, run_both

import rdlm


def wrong(served):
    """Requests that did not get what `generate` makes of them; those that left may have less of it."""
    found = 0
    for (tokens, steps, _, left), (right, depths, _) in zip(served, expected(SEED), strict=True):
        n = len(tokens) if left else None
        found += (tokens, steps) != (right[:n], depths[:n])
    return found


@pytest.mark.slow
def test_two_hosts_serve_and_generate_what_one_device_does(tmp_path):
    codes, said, (first, other) = run_both(tmp_path)
    assert codes == [0, 0], said
    assert wrong(first["served"]) == 0
    assert any(left and tokens for tokens, *_, left in first["served"])
    assert first["preempted"] > 0
    assert first["ticks"] > 0
    assert wrong(first["control"]) > 0  # the other host hears of other prompts
    out = rdlm.generate(params(), TINY, PROMPTS, max_new_tokens=5, num_steps=4)
    for found in (first, other):
        assert found["generated"] == [[x.tolist() for x in part] for part in (out.tokens, out.steps)]
        assert found["memory"] == "cache: needs 0.1 GiB of memory, 0.0 GiB are free; use less"  # on the other host
        differ = found["differ"]
        assert differ["prompts"].startswith("process 1: prompts = ")
        assert differ["longer"].startswith("process 1: prompts = ")
        assert differ["exit_rule"].startswith("process 1: options = ")
        said = "process 1: {} = {}, but on process 0 {} = {}; give all of them the same"
        assert differ["on_token"] == said.format("on_token", "true", "on_token", "false")
        assert differ["lanes"] == said.format("Engine: lanes", 3, "Engine: lanes", 2)
        assert "prompts[0]: must be a non-empty" in differ["wrong"]
        assert found["devices"] == "data = 2 x tensor = 2: must be all 8 devices of the 2 hosts"
    assert other["submit"].startswith("Engine: this is process 1 of 2; submit requests on process 0")
    assert first["constraint"].startswith("constraint: an engine on several hosts serves none")
    assert first["closed"].startswith("Engine: was closed")
