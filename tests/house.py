"""The shape of the code, counted: `python tests/house.py` prints every figure and fails when one is above its limit.

Rooms are the files and folders of rdlm/, floors the layers of pyproject.toml. A circle is a set of files of rdlm/ that
import each other, directly or not. A wide function takes more than 8 parameters, `self` not
counted, and is not one of the public doors listed here. A
bare Any is an annotation of rdlm/ that is `Any` and nothing else.
"""

from __future__ import annotations

import ast
import functools
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_PARAMETERS = 8
LIMITS = {"rooms": 26, "floors": 10, "circles": 0, "wide functions": 0, "fmt: skip": 40, "bare Any": 120}


def files(*folders: str) -> list[Path]:
    """Every Python file below these folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text())


def rooms() -> list[str]:
    """The names of the files and folders of rdlm/."""
    found = [p for p in (ROOT / "rdlm").iterdir() if p.is_dir() or p.suffix == ".py"]
    return sorted(p.stem for p in found if not p.stem.startswith("__"))


def floors() -> list[str]:
    """The layers of the import contract, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(contract["layers"] for contract in contracts if contract["type"] == "layers")


def module_name(path: Path) -> str:
    """rdlm/a/b.py -> rdlm.a.b."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def module_imports(tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of `known` that this one imports, anywhere: inside functions and under `TYPE_CHECKING` too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & known or {node.module}
    return found & known


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for name in graph[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        return seen

    reached = {name: reach(name) for name in graph}
    groups = {frozenset({a} | {b for b in reached[a] if a in reached[b]}) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def import_graph() -> dict[str, set[str]]:
    """Which files of rdlm/ import which; an `__init__` that only shows names of its own room is left out."""
    trees = {module_name(path): tree_of(path) for path in files("rdlm") if path.name != "__init__.py"}
    return {name: module_imports(tree, set(trees)) for name, tree in trees.items()}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All parameters but `self` and `cls`."""
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [a for a in every if a.arg not in ("self", "cls")]


PUBLIC = {  # doors that users call with keywords; most are fixed by docs/semantics.md, argument by argument
    "rdlm/model/forward.py": {"forward"},
    "rdlm/decode/generate.py": {"generate"},
    "rdlm/decode/passes.py": {"prefill", "decode_step"},
    "rdlm/decode/engine.py": {"__init__", "submit"},
    "rdlm/losses.py": {"loss"},
    "rdlm/optim.py": {"ellis_adam"},
    "rdlm/run.py": {"generate"},
    "rdlm/data/loader.py": {"__init__"},
    "rdlm/evaluation/lm_eval/model.py": {"__init__"},
}


def wide_functions() -> list[str]:
    """Functions with too many parameters that are not public doors."""
    found = []
    for path in files("rdlm", "experiments"):
        where = str(path.relative_to(ROOT))
        for function in functions(tree_of(path)):
            count = len(parameters(function))
            if count > MAX_PARAMETERS and function.name not in PUBLIC.get(where, ()):
                found.append(f"{where}:{function.lineno} {function.name} takes {count}")
    return found


def bare_any() -> list[str]:
    """Annotations of rdlm/ that are `Any`."""
    found = []
    for path in files("rdlm"):
        tree = tree_of(path)
        annotations: list[ast.expr | None] = [n.annotation for n in ast.walk(tree) if isinstance(n, ast.AnnAssign)]
        for function in functions(tree):
            extra = [a for a in (function.args.vararg, function.args.kwarg) if a]
            annotations += [a.annotation for a in [*parameters(function), *extra]] + [function.returns]
        hits = [a.lineno for a in annotations if isinstance(a, ast.Name) and a.id == "Any"]
        found += [f"{path.relative_to(ROOT)}:{line}" for line in sorted(hits)]
    return found


def skipped_formatting() -> list[str]:
    """Lines of rdlm/ and experiments/ that silence the formatter."""
    mark = "# fmt: " + "skip"
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files("rdlm", "experiments")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if mark in line
    ]


@functools.cache
def measure() -> dict[str, list[str]]:
    """Every counted thing by name."""
    return {
        "rooms": rooms(),
        "floors": floors(),
        "circles": [" <-> ".join(group) for group in circles(import_graph())],
        "wide functions": wide_functions(),
        "fmt: skip": skipped_formatting(),
        "bare Any": bare_any(),
    }


def main() -> int:
    """Print the figures; 1 if one is above its limit."""
    failed = False
    for name, found in measure().items():
        over = len(found) > LIMITS[name]
        failed |= over
        print(f"{name:<16}{len(found):>4}  (at most {LIMITS[name]}){'  TOO MANY' if over else ''}")
        if over or "-v" in sys.argv[1:]:
            print("".join(f"    {line}\n" for line in found), end="")
    lines = sum(len(path.read_text().splitlines()) for path in files("rdlm"))
    print(f"{'lines of rdlm/':<16}{lines:>6}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
