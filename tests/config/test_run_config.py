"""Fields of a run's configuration that are set from Python."""

import dataclasses

import pytest

from rdlm.config import PRESETS, Block, InputError, Loop, RecurrenceConfig, TuneConfig
from rdlm.data import Reading, Recipe

NANO = PRESETS["nano"]
SECTIONS = [field.name for field in dataclasses.fields(NANO) if dataclasses.is_dataclass(getattr(NANO, field.name))]


@pytest.mark.parametrize("wrong", [None, b"bytes", [1], {"a": 1}, float("nan")], ids=repr)
@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_a_value_of_another_type_is_named_in_one_line(section, wrong):
    config, told = getattr(NANO, section) if section else NANO, 0
    for field in dataclasses.fields(config):
        if wrong is None and "None" in str(field.type):
            continue
        with pytest.raises(InputError, match=rf"{field.name} = .*: must") as caught:
            dataclasses.replace(config, **{field.name: wrong})
        assert "\n" not in str(caught.value)
        if section != "model":
            assert str(caught.value).startswith(f"{section}.{field.name}" if section else field.name)
        told += 1
    assert told


@pytest.mark.parametrize("wrong", [None, 1.5, "x", True])
def test_settings_of_preparation_are_checked_alike(wrong):
    with pytest.raises(InputError, match=r"sequence_length = .*: must be an integer"):
        Recipe(wrong)
    with pytest.raises(InputError, match=r"bad_documents = .*: must be one of \w+, \w+"):
        Reading(bad_documents=wrong)


@pytest.mark.parametrize(
    ("config", "field", "value", "words"),
    [
        (Block(), "activation", "gelu", "block.activation = 'gelu': must be one of silu, gelu_tanh, relu2"),
        (Block(), "attention_scale", "x", "block.attention_scale = 'x': must be a finite number or None"),
        (Loop(), "low_backprop", (1.5,), "loop.low_backprop = (1.5,): must be a tuple, each element an integer"),
        (NANO.model, "compute_dtype", "f8", "compute_dtype = 'f8': must be one of float32, bfloat16, float16 or None"),
        (NANO.model, "qk_bias", 1, "qk_bias = 1: must be true or false"),
    ],
)
def test_what_a_field_takes_is_said_in_words(config, field, value, words):
    with pytest.raises(InputError) as caught:
        dataclasses.replace(config, **{field: value})
    assert str(caught.value) == words


PLAIN = dataclasses.replace(
    NANO.model, prelude_layers=0, tie_embeddings=False, backprop_depth=4, loop=Loop("none", "embedding")
)
DRAWS = {
    "default": (
        PLAIN,
        RecurrenceConfig(),
        "recurrence.scheme = 'poisson-lognormal-filling': must be one without n > 0",
    ),
    "truncated": (
        dataclasses.replace(PLAIN, backprop_depth=1),
        RecurrenceConfig("fixed"),
        "model.backprop_depth = 1: must be model.mean_recurrence = 4, or embedding would get no gradient",
    ),
    "more at least": (PLAIN, RecurrenceConfig("full", least=3), "recurrence.least = 3: must be at most 1"),
    "a prelude": (
        dataclasses.replace(PLAIN, prelude_layers=1, tie_embeddings=True),
        RecurrenceConfig(),
        "recurrence.scheme = .* or prelude would get no gradient",
    ),
    "fixed": (PLAIN, RecurrenceConfig("fixed", least=4), ""),
    "growing": (PLAIN, RecurrenceConfig("fixed", curriculum_share=0.5), ""),
    "once": (dataclasses.replace(PLAIN, backprop_depth=1), RecurrenceConfig("non-recurrent"), ""),
    "the head trains it": (dataclasses.replace(PLAIN, tie_embeddings=True), RecurrenceConfig(), ""),
    "injected": (dataclasses.replace(PLAIN, loop=Loop()), RecurrenceConfig(), ""),
}


@pytest.mark.parametrize("name", DRAWS)
def test_an_embedding_that_is_read_once_needs_draws_that_train_it(name):
    model, draws, message = DRAWS[name]
    run = dataclasses.replace(NANO, model=model, recurrence=draws)
    dataclasses.replace(run, tune=TuneConfig(only=("core",))).check_draws()
    if not message:
        run.check_draws()
        return
    with pytest.raises(InputError, match=message):
        run.check_draws()
    if model.prelude_layers == 0:
        with pytest.raises(InputError, match=message):
            dataclasses.replace(run, tune=TuneConfig(only=("embedding",))).check_draws()


def test_presets_train_their_embedding():
    for run in PRESETS.values():
        run.check_draws()
