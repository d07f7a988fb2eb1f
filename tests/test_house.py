"""The counts of tests/house.py stay below their limits, and each count sees what it is for."""

import ast

import house
import pytest


@pytest.mark.parametrize("name", house.LIMITS)
def test_below_the_limit(name):
    found = house.measure()[name]
    assert len(found) <= house.LIMITS[name], found


def test_circles_are_found_over_several_files():
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_imports_inside_functions_count():
    tree = ast.parse("from rdlm import exits\ndef f():\n    from rdlm.model.forward import forward\n")
    known = {"rdlm.exits", "rdlm.model.forward"}
    assert house.module_imports(tree, known) == known


def test_parameters_leave_self_out():
    (function,) = house.functions(ast.parse("def f(self, a, /, b, *, c): ..."))
    assert [p.arg for p in house.parameters(function)] == ["a", "b", "c"]
