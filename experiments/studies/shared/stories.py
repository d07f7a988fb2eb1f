"""Problems in words whose difficulty is a number of dependent steps, told as short stories with one right word.

Four templates, and what a step is in each:

  rooms    five rooms in a circle: go on one or two rooms, or turn around (the dihedral group of ten elements)
  swaps    five people hold five things: the holder of what is asked for swaps with somebody; others swap among
           themselves in between, every second time
  likes    ten people, each of whom likes one: one more "the one liked by"
  dial     the digits 0 to 9: add a digit, or multiply by 3, 7 or 9, modulo 10

Every step can be undone, so a uniform start makes a uniform answer (in `likes` because names are drawn); answers are
also dealt out evenly, problem by problem. Training and tests use different people, so no problem is in both.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rdlm.evaluation import Choice

ROOMS = ("kitchen", "hall", "garden", "office", "attic", "bedroom", "basement", "library", "garage", "porch")
THINGS = ("ball", "book", "coin", "key", "hat", "lamp", "cup", "ring", "bag", "pen")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FACTORS = {3: "Triple it.", 7: "Multiply it by seven.", 9: "Multiply it by nine."}
TRAINING_NAMES = (
    "Ann", "Kim", "Eva", "Leo", "Sam", "Dan", "Paul", "John", "Mark", "Jack", "Noah", "Luke", "Adam", "Ryan",
    "Alex", "Alice", "Dave", "Peter", "James", "Laura", "Frank", "Susan", "Grace", "Simon", "Clara", "Maria",
    "Brian", "Jason", "Eric", "Linda", "Betty", "Martin", "Thomas", "Edward", "William", "Richard",
)  # fmt: skip
TEST_NAMES = (
    "Ben", "Tom", "Max", "Amy", "Joe", "Kate", "Mary", "Lisa", "Anna", "Emma", "Rose", "Lucy", "Sara", "Jane",
    "Bob", "Carl", "Mike", "David", "Sarah", "Helen", "Henry", "Karen", "Oscar", "Ruth", "Julia", "Steve", "Kevin",
    "Scott", "Emily", "Nancy", "Diana", "Robert", "George", "Charles", "Michael", "Joseph",
)  # fmt: skip


class Story(NamedTuple):
    """A problem. choice: the question, its choices and the index of the right one."""

    template: str
    steps: int
    choice: Choice

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return self.choice.texts("text")[0]

    @property
    def completion(self) -> str:
        """The right word, with its leading space."""
        return self.choice.texts("text")[1][self.choice.answer]


class Draw(NamedTuple):
    """What a template is told. random: of this problem alone. right: place of the right answer among the choices."""

    random: np.random.Generator
    names: Sequence[str]
    steps: int
    right: int

    def some(self, words: Sequence[str], count: int) -> list[str]:
        """Different words, in random order."""
        return [str(word) for word in self.random.choice(words, count, replace=False)]


def rooms(draw: Draw) -> tuple[str, list[str]]:
    """Somebody walks around a circle of five rooms, in either direction."""
    words, place, direction, told = draw.some(ROOMS, 5), 0, 1, list[str]()
    for step in range(draw.steps):
        turns = 0 < step < draw.steps - 1 and told[-1] != "Turn around." and draw.random.integers(3) == 0
        if turns:
            direction = -direction
            told.append("Turn around.")
        else:
            far = int(draw.random.integers(1, 3))
            place += direction * far
            told.append("Go on one room." if far == 1 else "Go on two rooms.")
    ring = [words[(draw.right + i - place) % 5] for i in range(5)]  # from where the walk starts
    turned = int(draw.random.integers(5))
    listed = ", ".join([*ring[turned:], *ring[:turned]])
    (name,) = draw.some(draw.names, 1)
    return f"Five rooms form a circle: {listed}. {name} is in the {ring[0]}. {' '.join(told)} Where is {name}?", words


def swaps(draw: Draw) -> tuple[str, list[str]]:
    """Five people exchange five things."""
    people, things = draw.some(draw.names, 5), draw.some(THINGS, 5)
    holder, told = 0, list[str]()

    def swap(one: int, other: int) -> str:
        first, second = (one, other) if draw.random.integers(2) else (other, one)
        return f"{people[first]} and {people[second]} swap."

    for step in range(draw.steps):
        if step % 2:
            told.append(swap(*draw.random.choice([i for i in range(5) if i != holder], 2, replace=False)))
        new = int(draw.random.choice([i for i in range(5) if i != holder]))
        told.append(swap(holder, new))
        holder = new
    held = things[draw.right :] + things[: draw.right]  # person 0 begins with the right one
    has = [f"{people[i]} has the {held[i]}." for i in draw.random.permutation(5)]
    return f"{' '.join(has + told)} What does {people[holder]} have?", things


def likes(draw: Draw) -> tuple[str, list[str]]:
    """A chain of people, each of whom likes the next, among others."""
    people = draw.some(draw.names, 10)
    path = draw.steps + 1
    after = [i + 1 if i < path - 1 else int(draw.random.choice([j for j in range(10) if j != i])) for i in range(10)]
    end = path - 1
    liked = sorted({*after} - {end})
    others = [people[i] for i in draw.random.choice(liked, 4, replace=False)] if len(liked) >= 4 else None
    if others is None:
        return likes(draw)  # too few are liked at all to choose from
    facts = [f"{people[i]} likes {people[after[i]]}." for i in draw.random.permutation(10)]
    asked = "the one liked by " * (draw.steps - 1)
    choices = [*others[: draw.right], people[end], *others[draw.right :]]
    return f"{' '.join(facts)} Who is liked by {asked}{people[0]}?", choices


def dial(draw: Draw) -> tuple[str, list[str]]:
    """Arithmetic modulo ten; told forwards, drawn backwards from the answer."""
    value, told = draw.right, list[str]()
    for _ in range(draw.steps):
        if draw.random.integers(2):
            more = int(draw.random.integers(1, 10))
            value = (value - more) % 10
            told.append(f"Add {DIGITS[more]}.")
        else:
            factor = int(draw.random.choice(list(FACTORS)))
            value = value * pow(factor, -1, 10) % 10
            told.append(FACTORS[factor])
    (name,) = draw.some(draw.names, 1)
    steps = " ".join(reversed(told))
    return f"{name} counts modulo ten, from {DIGITS[value]}. {steps} What is the number?", [*DIGITS]


TEMPLATES = {"rooms": (rooms, 5), "swaps": (swaps, 5), "likes": (likes, 5), "dial": (dial, 10)}
"""By name: what tells the problem, and its number of choices."""
MAX_STEPS = 9
"""Of `likes`, which has ten people."""


def chance() -> float:
    """Accuracy of a random choice, over all templates."""
    return sum(1 / choices for _, choices in TEMPLATES.values()) / len(TEMPLATES)


def stories(seed: int, each: int, steps: Sequence[int], names: Sequence[str]) -> list[Story]:
    """`each` problems of every template and number of steps in turn, a function of the arguments alone.

    The right answers of every such group are dealt out evenly over the places of the choices.
    """
    made = []
    for i in range(each):
        for t, (template, (tell, count)) in enumerate(TEMPLATES.items()):
            for n in steps:
                draw = Draw(np.random.default_rng((seed, i, t, n)), names, n, i % count)
                question, choices = tell(draw)
                made.append(Story(template, n, Choice(question, tuple(choices), draw.right, f"{template}, {n} steps")))
    return made


def as_lines(told: Sequence[Story]) -> str:
    """The problems as `prepare_data.py --prompt-field prompt --field completion` reads them, a line each."""
    return "".join(json.dumps({"prompt": story.prompt, "completion": story.completion}) + "\n" for story in told)
