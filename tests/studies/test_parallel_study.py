"""Decoding several tokens at once, counted: agreement is with ordinary decoding after the same tokens."""

import types

import numpy as np
import pytest
from experiment_scripts import script
from oracle import random_params

from rdlm.config import InputError, ModelConfig, Parallel

STUDY = script("studies/parallel")
TINY = ModelConfig(
    vocab_size=24, embed_dim=16, num_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1, coda_layers=1,
    max_length=128, mean_recurrence=8, backprop_depth=2,
)  # fmt: skip


def test_counters_and_agreement():
    run = types.SimpleNamespace(params=random_params(TINY, 5), config=TINY)
    args = STUDY.Args(folder=None, depth=8, new_tokens=9)
    prompts = [np.array([3, 1, 4]), np.array([1, 5])]
    work = STUDY.Continued(run, prompts, args)
    tokens = work.generate(prompts, {}).tokens
    plain = work.counted({}, tokens)
    assert plain == {"passes": 8.0, "forward": 8.0, "agreement": 1.0, "free_running": 1.0}
    window = work.counted({"parallel": Parallel(window=3, inner=2, threshold=0.3)}, tokens)
    assert window["passes"] < 8 < window["forward"] + 8
    wrong = [np.where(np.arange(9) == 4, (row + 1) % 24, row) for row in tokens]
    assert work.agreement(tokens) == 1.0
    assert 1 - 5 / 8 <= work.agreement(wrong) <= 1 - 1 / 8  # the token itself, and those that follow another one


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--depth", "4"], "--depth = 4"), (["--prompts", "0"], "--prompts = 0"), (["--new-tokens", "1"], "--new-tokens")],
)
def test_refusals_are_one_line(words, says, monkeypatch):
    monkeypatch.setattr("sys.argv", ["parallel.py", "nowhere", *words])
    with pytest.raises(InputError, match=says):
        STUDY.main()
