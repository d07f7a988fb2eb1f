"""Words: group laws, answers against composition of permutations letter by letter."""

import numpy as np
import pytest

from rdlm.config import InputError
from rdlm.tasks import IGNORED, Source, WordProblem, batch
from rdlm.tasks.words import elements, letters, product


@pytest.mark.parametrize("group", ["Z2", "S3", "S5"])
def test_answers_are_products_of_permutations(group):
    known, task = elements(group), WordProblem(group, 12)
    seen = set()
    for index in range(20):
        tokens, labels, difficulty = task.instance(3, index)
        assert tokens[0] == task.vocab_size - 1
        assert labels[0] == IGNORED
        assert difficulty.tolist() == list(range(13))
        for t in range(1, 13):  # where each point goes, followed through the word
            points = range(len(known[0]))
            for g in tokens[1 : t + 1]:
                points = [known[g][x] for x in points]
            assert known[labels[t]] == tuple(points)
        seen |= set(tokens[1:].tolist())
    assert seen == set(letters(group))


@pytest.mark.parametrize(("group", "size"), [("Z2", 2), ("S3", 6), ("S5", 120)])
def test_letters_generate_the_group(group, size):
    table, found = product(group), {0}
    while True:
        more = found | {int(table[a, g]) for a in found for g in letters(group)}
        if more == found:
            break
        found = more
    assert len(found) == size


def test_parity_is_the_sum_of_bits():
    tokens, labels, _ = WordProblem("Z2", 40).instance(0, 0)
    np.testing.assert_array_equal(labels[1:], np.cumsum(tokens[1:]) % 2)


def test_batches_are_consecutive_instances_of_a_stream():
    task = WordProblem("S3", 5)
    second, source = batch(task, 7, 1, 4), Source(task, 7, 8)
    for row in range(4):
        for name in ("tokens", "labels", "difficulty"):
            np.testing.assert_array_equal(second[name][row], source[4 + row][name])
    assert not np.array_equal(batch(task, 8, 1, 4)["tokens"], second["tokens"])
    assert len(source) == len(list(source)) == 8


def test_several_difficulties_take_turns_and_are_filled_up():
    mixed = batch([WordProblem("S3", 3), WordProblem("S3", 6)], 0, 0, 4)
    assert mixed["tokens"].shape == (4, 7)
    assert (mixed["labels"][::2, 4:] == IGNORED).all()
    assert (mixed["labels"][1::2, 4:] != IGNORED).all()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: WordProblem("S4"), "WordProblem.group = 'S4'"),
        (lambda: WordProblem("S3", 0), "WordProblem.length = 0"),
        (lambda: WordProblem("S3", 2.0), "WordProblem.length = 2.0"),
        (lambda: WordProblem().instance(-1, 0), "seed = -1"),
        (lambda: batch(WordProblem(), 0, 0, 0), "batch size = 0"),
        (lambda: batch([], 0, 0, 4), "tasks"),
        (lambda: batch([WordProblem("S3"), WordProblem("S5")], 0, 0, 4), "tasks"),
        (lambda: Source(WordProblem(), 0, 0), "source size = 0"),
    ],
)
def test_wrong_input_is_one_line(make, field):
    with pytest.raises(InputError) as error:
        make()
    assert field in str(error.value)
    assert "\n" not in str(error.value)
