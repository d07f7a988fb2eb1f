"""Fixtures for the tests of tpu_setup/."""

import pytest
from fake_place import Place


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


@pytest.fixture
def refused(place):
    """refused(words, "create.sh", ...): exit code not 0, the first line on stderr is an error with every word in it."""

    def check(words, script, *arguments, lines=1, **environment):
        code, out, err = place.run(script, *arguments, **environment)
        assert code in (1, 2), (code, out, err)
        assert err.startswith("error: "), err
        for word in words:
            assert word in err.splitlines()[0], err
        assert len(err.splitlines()) == lines, err
        return code, err

    return check
