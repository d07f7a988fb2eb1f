"""How deep a request thinks that does not say."""

import pytest

from rdlm.serve.options import ServeOptions
from rdlm.serve.service import Service


@pytest.mark.parametrize(
    ("given", "expected"),  # of a model trained with 4 recurrences
    [
        ({"steps": 6}, {"kl": 6, "latent_diff": 6, "none": 6}),
        ({"steps": 2, "max_steps": 3}, {"kl": 2, "latent_diff": 2, "none": 2}),
        ({}, {"kl": 8, "latent_diff": 8, "none": 4}),
        ({"max_steps": 3}, {"kl": 3, "latent_diff": 3, "none": 3}),
        ({"steps": 6, "exit": ("none", "kl")}, {"none": 6, "kl": 6}),
        ({"exit": ("none", "kl")}, {"none": 4, "kl": 8}),
    ],
)
def test_steps_of_the_server_are_the_default_of_every_exit(toy_run, given, expected):
    depths = Service(toy_run, ServeOptions(**{"exit": ("kl", "latent_diff")} | given)).depths
    chosen = {exit: depths.choose(None, exit, None, None) for exit in expected}
    assert {exit: choice.num_steps for exit, choice in chosen.items()} == expected
    assert depths.choose(None, None, None, None) == chosen[depths.offered[0]]
    assert {exit: depths.choose(1, exit, None, None).num_steps for exit in expected} == dict.fromkeys(expected, 1)
