"""The checker that conftest.py puts behind every function of the rooms it lists."""

from beartype import BeartypeConf, beartype

# As type checkers have it, an int will do for a float.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """`function`, refusing arguments and results that are not what its annotations say.

    But for how dataclasses are made: JAX also builds them from shapes, shardings and placeholders, which are no arrays.
    """
    return function if function.__name__ == "__init__" else _checked(function)
