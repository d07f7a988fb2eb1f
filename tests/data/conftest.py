"""Corpora for the data tests: the real one, prepared once, and a tiny invented one for whatever is rebuilt often."""

import contextlib
import importlib
import random

import pytest

from rdlm.config import DataConfig, InputError
from rdlm.data.prepare import prepare_embedded


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return DataConfig(folder=str(folder), tokenizer_size=1024, sequence_length=128, batch_size=4)


@pytest.fixture(scope="session")
def real_folder(real_data):
    """The World Factbook, prepared."""
    return prepare_embedded(real_data)


@pytest.fixture(scope="session")
def tiny_texts():
    """60 short documents of invented words, each opening with its number and two characters of several bytes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdglmnrst", k=draw.randint(2, 7))) for _ in range(60)]
    return [f"{i} é🙂 " + " ".join(draw.choices(words, k=draw.randint(1, 60))) for i in range(60)]


@pytest.fixture
def tiny_data(tmp_path, monkeypatch, tiny_texts):
    """A DataConfig whose corpus is `tiny_texts`: prepared in milliseconds."""
    monkeypatch.setattr(importlib.import_module("rdlm.data.prepare.embedded"), "_documents", lambda data: tiny_texts)
    return DataConfig(
        folder=str(tmp_path / "data"), tokenizer_size=320, sequence_length=16, batch_size=4, validation_fraction=0.2
    )


@pytest.fixture
def one_line():
    """Context manager: the block must raise an InputError whose single line matches."""

    @contextlib.contextmanager
    def expect(match):
        with pytest.raises(InputError, match=match) as caught:
            yield caught
        assert "\n" not in str(caught.value)

    return expect
