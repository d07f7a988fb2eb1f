"""Every answer of every task against a slow solver that reads the tokens alone."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from rdlm.config import InputError
from rdlm.tasks import (
    IGNORED,
    TASKS,
    Addition,
    Corridor,
    Expression,
    Maze,
    PointerChasing,
    Reachability,
    Sudoku,
    WordProblem,
    batch,
    named,
)
from rdlm.tasks.mazes import BOS, GOAL, NEWLINE, START, WALL, YES
from rdlm.tasks.sudoku import grids

streams = st.integers(0, 2**40)
numbers = st.integers(0, 2**40)


def asked(instance):
    """[(position, label, difficulty)] of the answers asked for."""
    where = np.flatnonzero(instance.labels != IGNORED)
    return [(int(i), int(instance.labels[i]), int(instance.difficulty[i])) for i in where]


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(2, 20), st.data(), streams, numbers)
def test_hops_follow_the_arrows(nodes, data, seed, index):
    hops = data.draw(st.integers(1, nodes - 1))
    made = PointerChasing(hops, nodes).instance(seed, index)
    tokens = made.tokens.tolist()
    arrows = dict(zip(tokens[1 : 2 * nodes + 1 : 2], tokens[2 : 2 * nodes + 2 : 2], strict=True))
    assert set(arrows) == set(arrows.values()) == set(range(nodes))
    here = tokens[2 * nodes + 1]
    for h, (position, label, difficulty) in enumerate(asked(made), start=1):
        here = arrows[here]
        assert (tokens[position], label, difficulty) == (nodes, here, h)
    assert h == hops


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(1, 12), streams, numbers)
def test_reachable_is_what_a_search_finds(distance, seed, index):
    task = Reachability(distance)
    made = task.instance(seed, index)
    tokens, no = made.tokens.tolist(), task.names
    arcs = list(zip(tokens[1 : 4 * distance + 1 : 2], tokens[2 : 4 * distance + 2 : 2], strict=True))
    reached = {tokens[4 * distance + 1]}
    while more := {b for a, b in arcs if a in reached} - reached:
        reached |= more
    before = {b: a for a, b in arcs}
    per_answer = []
    for position, label, difficulty in asked(made):
        node, far = tokens[position - 1], 0
        assert label - no == (node in reached)
        while node in before:
            node, far = before[node], far + 1
        assert far == difficulty
        per_answer.append((difficulty, label - no))
    assert sorted(per_answer) == sorted(itertools.product(range(1, distance + 1), (0, 1)))


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(1, 20), st.integers(2, 10), streams, numbers)
def test_every_parenthesis_has_the_value_python_gives_it(operators, modulus, seed, index):
    made = Expression(operators, modulus).instance(seed, index)
    text = [*map(str, range(modulus)), *"+-*()"]
    words = ["", *(text[t] for t in made.tokens[1:])]
    answers = asked(made)
    assert len(answers) == operators
    for position, label, difficulty in answers:
        depth, start = 1, position
        while depth:
            start -= 1
            depth += (words[start] == ")") - (words[start] == "(")
        inside = words[start : position + 1]
        assert label == eval("".join(inside)) % modulus
        assert difficulty == max(itertools.accumulate((w == "(") - (w == ")") for w in inside))


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(1, 20), st.integers(2, 10), streams, numbers)
def test_a_chain_is_evaluated_from_left_to_right(operators, modulus, seed, index):
    made = Expression(operators, modulus, nested=False).instance(seed, index)
    text = [*map(str, range(modulus)), *"+-*()"]
    words = [text[t] for t in made.tokens[1:]]
    assert "*0" not in "".join(words)
    answers = asked(made)
    assert [difficulty for *_, difficulty in answers] == list(range(1, operators + 1))
    for position, label, difficulty in answers:
        said = (
            "(" * difficulty
            + words[0]
            + "".join(f"{o}{d})" for o, d in zip(words[1:position:2], words[2:position:2], strict=True))
        )
        assert label == eval(said) % modulus


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(4, 40), streams, numbers)
def test_a_corridor_is_walked_from_its_starts(length, seed, index):
    made = Corridor(length).instance(seed, index)
    squares = "".join(".#S"[t] for t in made.tokens[1:])
    reached = {i for start, x in enumerate(squares) if x == "S" for i in range(start, length)
               if "#" not in squares[start:i + 1]}  # fmt: skip
    found = {position - 1: (label, far) for position, label, far in asked(made)}
    assert set(found) == {i for i, x in enumerate(squares) if x == "."}
    for i, (label, far) in found.items():
        assert label == 3 + (i in reached)
        assert set(squares[i - far + 1 : i + 1]) == {"."}
        assert i == far - 1 or squares[i - far] in "#S"


@hypothesis.settings(max_examples=50)
@hypothesis.given(st.integers(2, 9), st.integers(1, 12), st.sampled_from([0.0, 0.6, 1.0]), streams, numbers)
def test_sums_are_sums(operands, digits, passing, seed, index):
    made = Addition(operands, digits, passing).instance(seed, index)
    columns = made.tokens[1:].reshape(digits + 1, operands + 1)
    assert (columns[:, -1] == 10).all()
    total = sum(int("".join(map(str, columns[::-1, j]))) for j in range(operands))
    said = [label for _, label, _ in asked(made)]
    assert int("".join(map(str, said[::-1]))) == total


def test_columns_that_pass_a_carry_on_make_chains():
    def chains(passing):
        return [far for i in range(20) for *_, far in asked(Addition(3, 12, passing).instance(0, i))]

    assert chains(1.0) == 20 * list(range(1, 14))
    assert np.mean(chains(0.0)) < 1.5 < np.mean(chains(0.5)) < 3
    columns = Addition(3, 12, 1.0).instance(0, 7).tokens[1:].reshape(13, 4)[:, :3]
    assert len(np.unique(columns[:-1])) > 5, "digits are still many"


def test_carries_come_from_as_far_as_the_difficulty_says():
    operands, digits, rng = 4, 6, np.random.default_rng(0)

    def top_digit(columns, i):
        """Digit i of the sum of columns [digits, operands]."""
        return sum(int(c.sum()) * 10**j for j, c in enumerate(columns)) // 10**i % 10

    nearer = 0
    for index in range(40):
        made = Addition(operands, digits).instance(0, index)
        columns = made.tokens[1:].reshape(digits + 1, operands + 1)[:, :-1]
        for i, (_, label, far) in enumerate(asked(made)):
            for _ in range(10):
                other = columns.copy()
                other[: max(i - far, 0)] = rng.integers(0, 10, other[: max(i - far, 0)].shape)
                assert top_digit(other, i) == label  # what lies further back than `far` columns does not matter
                if i >= far > 1:
                    other[i - far] = rng.integers(0, 10, operands)
                    nearer += top_digit(other, i) != label
    assert nearer > 100  # the column `far` back does


def solutions(cells):
    """All completions of 16 cells, by trying every digit in the first blank."""
    for i, cell in enumerate(cells):
        near = [
            j
            for j in range(16)
            if j != i and (j // 4 == i // 4 or j % 4 == i % 4 or (j // 8, j % 4 // 2) == (i // 8, i % 4 // 2))
        ]
        if cell and cell in [cells[j] for j in near]:
            return
        if not cell:
            for digit in range(1, 5):
                if digit not in [cells[j] for j in near]:
                    yield from solutions([*cells[:i], digit, *cells[i + 1 :]])
            return
    yield cells


def test_there_are_288_grids():
    assert len(grids()) == len({tuple(g) for g in grids()}) == 288
    assert all(len(list(solutions(g.tolist()))) == 1 for g in grids()[::40])


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.integers(1, 11), streams, numbers)
def test_puzzles_have_one_solution_and_it_is_the_answer(blanks, seed, index):
    made = Sudoku(blanks).instance(seed, index)
    cells = made.tokens[1:17].tolist()
    assert cells == made.tokens[17:].tolist()
    (solution,) = solutions(cells)
    assert [(i, x, blanks) for i, x in enumerate(solution, 17) if not cells[i - 17]] == asked(made)
    assert cells.count(0) == blanks


@hypothesis.settings(max_examples=30)
@hypothesis.given(st.integers(2, 5), streams, numbers)
def test_the_way_through_a_maze_is_the_only_one(side, seed, index):
    made = Maze(side).instance(seed, index)
    n = 2 * side - 1
    text = made.tokens[1 : 1 + n * (n + 1)].reshape(n, n + 1)
    assert made.tokens[0] == BOS
    assert (text[:, -1] == NEWLINE).all()
    np.testing.assert_array_equal(made.tokens[1 + n * (n + 1) :], text.ravel())
    squares = {(y, x): t for y, row in enumerate(text.tolist()) for x, t in enumerate(row[:-1]) if t != WALL}
    (start,) = (p for p, t in squares.items() if t == START)
    (goal,) = (p for p, t in squares.items() if t == GOAL)

    def ways(path):
        """Every way to the goal that crosses no square twice."""
        y, x = path[-1]
        if (y, x) == goal:
            yield path
        for step in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            if step in squares and step not in path:
                yield from ways([*path, step])

    (way,) = ways([start])
    answers = {divmod(i - 1 - n * (n + 1), n + 1): (label, hard) for i, label, hard in asked(made)}
    assert set(answers) == set(squares) - {start}
    assert {p for p, (label, _) in answers.items() if label == YES} == set(way) - {start}
    assert [answers[p][1] for p in way[1:]] == list(range(1, len(way)))


FAMILIES = [
    WordProblem("S5", 9), PointerChasing(3, 6), Reachability(3), Expression(4), Addition(3, 4), Sudoku(5), Maze(3),
]  # fmt: skip


@pytest.mark.parametrize("task", FAMILIES, ids=lambda task: type(task).__name__)
def test_instances_are_functions_of_seed_and_index(task):
    first, again = task.instance(5, 6), task.instance(5, 6)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.int32
    others = [task.instance(5, i).tokens.tolist() for i in range(10)] + [task.instance(6, 6).tokens.tolist()]
    assert len({tuple(t) for t in others}) >= 10
    many = batch(task, 0, 0, 64)
    assert many["tokens"].max() < task.vocab_size
    assert many["labels"].max() < task.vocab_size
    assert ((many["labels"] == IGNORED) == (many["difficulty"] == 0)).all()
    # No answer can be guessed from how often it occurs: the commonest stands for less than 70 %.
    labels = many["labels"][many["labels"] != IGNORED]
    assert np.bincount(labels).max() < 0.7 * len(labels)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: PointerChasing(8, 8), "PointerChasing.hops = 8: must be an integer of at least 1 and at most 7"),
        (lambda: PointerChasing(1, 1), "PointerChasing.nodes = 1: must be an integer of at least 2"),
        (lambda: Reachability(0), "Reachability.distance = 0: must be an integer of at least 1"),
        (lambda: Reachability(20), "Reachability.names = 40: must be an integer of at least 42"),
        (lambda: Expression(0), "Expression.operators = 0: must be an integer of at least 1 and at most 200"),
        (lambda: Expression(3, 1), "Expression.modulus = 1: must be an integer of at least 2"),
        (lambda: Expression(3, nested="no"), "Expression.nested = 'no': must be True or False"),
        (lambda: Corridor(3), "Corridor.length = 3: must be an integer of at least 4"),
        (lambda: Addition(10), "Addition.operands = 10: must be an integer of at least 2 and at most 9"),
        (lambda: Addition(3, 4, 1.5), "Addition.passing = 1.5: must be between 0 and 1"),
        (lambda: Addition(3, 0), "Addition.digits = 0: must be an integer of at least 1"),
        (lambda: Sudoku(12), "Sudoku.blanks = 12: must be an integer of at least 1 and at most 11"),
        (lambda: Maze(True), "Maze.side = True: must be an integer of at least 2 and at most 50"),
        (lambda: Maze(3).instance(0, -1), "index = -1: must not be negative"),
    ],
)
def test_wrong_difficulty_is_one_line(make, line):
    with pytest.raises(InputError) as error:
        make()
    assert str(error.value) == line


@pytest.mark.parametrize("name", TASKS)
def test_named_tasks_grow_with_their_size(name):
    small, large = named(name, 4), named(name, 6)
    assert small != large
    assert small.vocab_size == large.vocab_size
    assert len(small.instance(0, 0).tokens) < len(large.instance(0, 0).tokens) or name == "sudoku"


def test_unknown_names_of_tasks_are_one_line():
    with pytest.raises(InputError, match=r"^data.task = 'additon': there is no such task. Did you mean 'addition'\?$"):
        named("additon", 3)
