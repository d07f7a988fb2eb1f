"""The rooms whose annotations conftest.py has checked at every call, and the checker."""

from beartype import BeartypeConf, beartype

CHECKED = (
    "rdlm.remat",
    "rdlm.model.attention",
    "rdlm.recurrence",
    "experiments.studies.shared.equilibrium",
    "rdlm.exits",
    "experiments.studies.shared.rules",
    "rdlm.model.cache",
    "rdlm.perf.flops",
    "rdlm.model.blocks",
    "rdlm.model",
    "rdlm.losses",
    "rdlm.tasks.mazes",
    "rdlm.tasks.sudoku",
    "rdlm.optim",
    "rdlm.analysis.vitals",
    "rdlm.analysis.capture",
    "rdlm.analysis.contraction",
    "rdlm.analysis.independence",
    "rdlm.analysis.lens",
    "rdlm.analysis.paths",
    "rdlm.decode.passes",
    "rdlm.decode.sampling",
    "rdlm.decode.loop",
    "rdlm.decode.lanes",
    "rdlm.decode.speculative",
    "rdlm.decode.parallel",
)
"""Rooms whose every call is checked against its annotations: dtypes, shapes, one size for each axis letter.

Not here: rooms without arrays, rooms whose annotations do not say shapes yet, and those that refuse what a user typed
in words of their own (decode's generate, engine and requests), which the checker would forestall.
"""

# As type checkers have it, an int will do for a float.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function):
    """`function`, refusing arguments and results that are not what its annotations say.

    But for how dataclasses are made: JAX also builds them from shapes, shardings and placeholders, which are no arrays.
    """
    return function if function.__name__ == "__init__" else _checked(function)
