"""Fields of a run's configuration that are set from Python."""

import dataclasses

import pytest

from rdlm.config import PRESETS, InputError
from rdlm.data import Reading, Recipe

NANO = PRESETS["nano"]
SECTIONS = [field.name for field in dataclasses.fields(NANO) if dataclasses.is_dataclass(getattr(NANO, field.name))]


@pytest.mark.parametrize("wrong", [None, object(), [1], {"a": 1}, float("nan")], ids=repr)
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
    with pytest.raises(InputError, match=r"sequence_length = .*: must be of type int"):
        Recipe(wrong)
    with pytest.raises(InputError, match=r"bad_documents = .*: must be of type Literal"):
        Reading(bad_documents=wrong)
