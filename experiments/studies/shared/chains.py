"""Problems in words whose difficulty is a number of dependent steps: lists of facts that refer to earlier ones.

A list has four chains of six facts, mixed. The first fact of a chain names a colour, every other one refers to the fact
before it, so asking for the n-th takes n steps:

  variables   b = pink, r = b, k = r, ...
  people      Tom wears pink, Ann copies Tom, Sam copies Ann, ...

Every chain has another colour, and every colour of a list is the right answer equally often at every number of steps,
so whoever guesses among the four is right one time in four.

In training a list is followed by eight of its questions with their answers, the ones of most steps first: an answer
then never shortens the way to one that is still to come. In tests every question stands alone behind its list.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rdlm.evaluation import Cloze

CHAINS, LENGTH = 4, 6
"""Chains of a list, and the facts of each: the most steps that can be asked for."""
ASKED = 8
"""Questions behind a list in training."""
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink", "gray", "purple", "orange", "gold")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
NAMES = (
    "Ann", "Kim", "Sam", "Dan", "Paul", "John", "Mark", "Jack", "Luke", "Adam", "Alex", "Peter", "James", "Ben", "Tom",
    "Max", "Mary", "Anna", "Rose", "Jane", "Bob", "Carl", "David", "Sarah", "Henry", "Alice", "Maria", "Frank", "Simon",
)  # fmt: skip


class Template(NamedTuple):
    """How facts are worded, and the words that chains are made of. A question is the word and a colon."""

    first: str
    later: str
    words: tuple[str, ...]


TEMPLATES = {
    "variables": Template("{} = {}\n", "{} = {}\n", LETTERS),
    "people": Template("{} wears {}\n", "{} copies {}\n", NAMES),
}
CHANCE = 1 / CHAINS
"""Share right of a random colour of the list."""
CONVERSATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""A chat template that writes the messages one after the other: only answers are scored."""


class Question(NamedTuple):
    """What one word of a list leads to, after so many steps. answer: with its leading space."""

    steps: int
    text: str
    answer: str


class Problem(NamedTuple):
    """A list of facts, and a question for every chain and number of steps up to `LENGTH`."""

    template: str
    facts: str
    questions: tuple[tuple[Question, ...], ...]  # [CHAINS][LENGTH]

    def cloze(self, chain: int, steps: int) -> Cloze:
        """One question alone."""
        asked = self.questions[chain][steps - 1]
        return Cloze(f"{self.facts}\n{asked.text}", asked.answer, f"{self.template}, {steps} steps")


def problem(template: str, random: np.random.Generator) -> Problem:
    """A list with random words and colours in random order, every fact behind the one that it refers to."""
    worded = TEMPLATES[template]
    words = random.choice(worded.words, (CHAINS, LENGTH), replace=False).tolist()
    colours = random.choice(COLOURS, CHAINS, replace=False).tolist()
    facts, told = "", [0] * CHAINS
    for chain in random.permutation(np.repeat(np.arange(CHAINS), LENGTH)).tolist():
        n, chain_words = told[chain], words[chain]
        facts += (worded.later if n else worded.first).format(chain_words[n], ([colours[chain], *chain_words])[n])
        told[chain] += 1
    asked = [
        tuple(Question(n, f"{word}:", f" {colour}") for n, word in enumerate(chain_words, 1))
        for colour, chain_words in zip(colours, words, strict=True)
    ]
    return Problem(template, facts, tuple(asked))


def training_lines(seed: int, each: int, steps: Sequence[int]) -> str:
    """Conversations of `each` lists of every template, a JSON line each: a function of the arguments alone.

    A list is followed by `ASKED` of its questions of one of `steps`, or by all if there are fewer.
    """
    lines = []
    for i in range(each):
        for t, template in enumerate(TEMPLATES):
            random = np.random.default_rng((seed, i, t))
            made = problem(template, random)
            all_asked = [made.questions[chain][n - 1] for chain in range(CHAINS) for n in steps]
            some = random.permutation(len(all_asked))[:ASKED]
            asked = sorted((all_asked[j] for j in some.tolist()), key=lambda question: -question.steps)
            messages, before = list[dict[str, str]](), made.facts
            for question in asked:
                messages.append({"role": "user", "content": f"{before}\n{question.text}"})
                messages.append({"role": "assistant", "content": question.answer})
                before = ""
            lines.append(json.dumps({"messages": messages}) + "\n")
    return "".join(lines)


class Test(NamedTuple):
    """A question that is asked alone."""

    template: str
    steps: int
    question: Cloze


def questions_alone(seed: int, each: int, steps: Sequence[int]) -> list[Test]:
    """Questions about `each` lists of every template, a function of the arguments alone.

    A list is asked once for every number of steps, each time for the next chain.
    """
    found = []
    for i in range(each):
        for t, template in enumerate(TEMPLATES):
            made = problem(template, np.random.default_rng((seed, i, t)))
            found += [Test(template, n, made.cloze((i + k) % CHAINS, n)) for k, n in enumerate(steps)]
    return found
