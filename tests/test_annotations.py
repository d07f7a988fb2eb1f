"""Annotations of the rooms that annotations.py lists are checked at every call of every test."""

import importlib
import inspect
import pkgutil
import typing

import jax
import jax.numpy as jnp
import pytest
from annotations import CHECKED
from jaxtyping import TypeCheckError

from rdlm import exits
from rdlm.config import ModelConfig
from rdlm.model import context, core_step, init_params

TINY = ModelConfig(
    vocab_size=24, embed_dim=16, num_heads=2, mlp_dim=24, prelude_layers=1, core_layers=1, coda_layers=1, max_length=32
)


def next_state(s, injected):
    """The shape of what a recurrence makes of a state of that shape."""

    def step(key, s, injected):
        return core_step(init_params(TINY, key), TINY, s, injected, context(TINY, jnp.arange(s.shape[1]), None))[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (s, injected)]
    return jax.eval_shape(step, jax.random.key(0), *shapes).shape


def test_a_letter_has_one_size_in_a_call():
    # NumPy's rules would stretch a state of one row over the two of the embedding, and nobody would notice.
    assert (jnp.ones((1, 5, 16)) + jnp.ones((2, 5, 16))).shape == (2, 5, 16)
    assert next_state((2, 5, 16), (2, 5, 16)) == (2, 5, 16)
    with pytest.raises(TypeCheckError, match="parameter 'injected'"):
        next_state((1, 5, 16), (2, 5, 16))


def test_dtypes_and_results_are_checked():
    log_p = jnp.log(jnp.full((3, 4), 0.25))
    assert exits.divergence(log_p, log_p).shape == (3,)
    with pytest.raises(TypeCheckError, match="parameter 'log_q'"):
        exits.divergence(log_p, log_p.astype(jnp.bfloat16))

    class Scalar(exits.Fixed):
        def update(self, previous, seen):
            return (), jnp.float32(1)

    with pytest.raises(TypeCheckError, match=r"return value.*exits\.update"):
        exits.update(Scalar(1), (), exits.Observation(jnp.ones((1, 2, 3)), None, jnp.int32(1)))


def modules():
    for room in CHECKED:
        module = importlib.import_module(room)
        yield module
        for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
            yield importlib.import_module(f"{room}.{found.name}")


@pytest.mark.parametrize("module", list(modules()), ids=lambda module: module.__name__)
def test_every_annotation_has_a_meaning(module):
    # One that has none (a misspelt name, an axis that cannot be read) would be taken for Any without a word.
    functions = [f for _, f in inspect.getmembers(module, callable) if f.__module__ == module.__name__]
    for function in functions:
        typing.get_type_hints(function)
    assert type(module.__spec__.loader).__name__ == "_JaxtypingLoader"
