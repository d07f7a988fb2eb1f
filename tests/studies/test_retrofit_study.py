"""Chains of facts: right answers, as many dependent steps as is said, even answers. The study on a toy model."""

import dataclasses
import itertools
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest
from experiment_scripts import script

from experiments.studies.shared.chains import (
    ASKED,
    CHAINS,
    CHANCE,
    COLOURS,
    LENGTH,
    TEMPLATES,
    problem,
    questions_alone,
    training_lines,
)
from rdlm.config import InputError
from rdlm.evaluation import read_questions
from rdlm.tokenizer import Tokenizer

STUDY = script("studies/retrofit")
LISTS = [problem(template, np.random.default_rng(seed)) for template in TEMPLATES for seed in range(30)]
ASKED_ALONE = questions_alone(1, 8, range(1, LENGTH + 1))


def facts_of(text):
    """{word: what its fact says of it}, in order, and the word that is asked for, from the text alone."""
    told, asked = text.split("\n\n")
    pairs = re.findall(r"^(\w+) (?:=|wears|copies) (\w+)$", told, re.MULTILINE)
    assert len({word for word, _ in pairs}) == len(pairs) == len(told.split("\n")), "a word has one fact"
    return dict(pairs), re.fullmatch(r"(\w+):", asked)[1]


def way(text):
    """The words from the one asked for to the colour, which is the last."""
    facts, word = facts_of(text)
    passed = [word]
    while passed[-1] in facts:
        passed.append(facts[passed[-1]])
    return passed


def conversations(steps=(1, 2, 3)):
    """(facts, [(word asked for, answer)]) of some lines of training."""
    for line in training_lines(0, 20, steps).splitlines():
        said = [message["content"] for message in json.loads(line)["messages"]]
        facts, first = said[0].split("\n\n")
        yield facts, list(zip([first.strip(":"), *(x.strip("\n:") for x in said[2::2])], said[1::2], strict=True))


def test_the_answer_is_right_and_takes_as_many_steps():
    for test in ASKED_ALONE:
        *passed, colour = way(test.question.prompt)
        assert (len(passed), f" {colour}") == (test.steps, test.question.answer), test
        assert test.question.category == f"{test.template}, {test.steps} steps"
    for facts, asked in conversations():
        assert len(asked) == ASKED
        for word, answer in asked:
            *passed, colour = way(f"{facts}\n\n{word}:")
            assert (len(passed) <= 3, f" {colour}") == (True, answer), (facts, word)


def test_a_list_is_chains_in_which_every_fact_refers_to_an_earlier_one():
    for made in LISTS:
        facts, _ = facts_of(made.cloze(0, 1).prompt)
        words = list(facts)
        assert len(words) == CHAINS * LENGTH
        ways = [way(f"{made.facts}\n{word}:") for word in words]
        assert {*Counter(map(len, ways)).values()} == {CHAINS}, "chains of different lengths"
        assert all(words.index(b) < words.index(a) for *passed, _ in ways for a, b in itertools.pairwise(passed))


def test_guessing_a_colour_is_right_by_chance_alone():
    for made in LISTS:
        for steps in range(1, LENGTH + 1):
            answers = [made.cloze(chain, steps).answer for chain in range(CHAINS)]
            assert len({*answers}) == CHAINS == 1 / CHANCE, "some colour is right more often"
    named = [[said for said in facts_of(made.cloze(0, 1).prompt)[0].values() if said in COLOURS] for made in LISTS]
    for place in range(CHAINS):  # of the colour in the list
        right = [colours[place] in made.cloze(0, 1).answer for made, colours in zip(LISTS, named, strict=True)]
        assert 0.1 < np.mean(right) < 0.4, "the place of a colour gives it away"


def test_no_answer_shortens_the_way_to_a_later_one():
    shortened = 0
    for facts, asked in conversations():
        for i, (word, _) in enumerate(asked):
            on_the_way = {*way(f"{facts}\n\n{word}:")[1:]}
            assert not on_the_way & {before for before, _ in asked[:i]}
            shortened += bool(on_the_way & {after for after, _ in asked[i + 1 :]})
    assert shortened > 20, "in the other order they would"


def test_no_list_of_the_tests_is_in_training():
    steps = (1, 2, 3)
    told = {facts for facts, _ in conversations()}
    assert len(told) == 20 * len(TEMPLATES)
    assert not told & {test.question.prompt.split("\n\n")[0] for test in ASKED_ALONE}
    assert training_lines(0, 20, steps) == training_lines(0, 20, steps) != training_lines(2, 20, steps)


def test_only_answers_are_scored(tmp_path):
    tokenizer = STUDY.conversing(Tokenizer.bytes_only(), tmp_path)
    for line in training_lines(0, 2, (1, 2)).splitlines():
        messages = json.loads(line)["messages"]
        ids, scored = tokenizer.encode_conversation(messages, reply=False)
        assert tokenizer.decode(ids) == "".join(message["content"] for message in messages)
        assert tokenizer.decode(ids[scored]) == "".join(m["content"] for m in messages if m["role"] == "assistant")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Results of a quick run of one method, made once and then read once more from what is saved."""
    folder, options = tmp_path_factory.mktemp("study"), ["--methods", "pilot_depths", "--seeds", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["retrofit.py", "--quick", "--runs", str(folder), *options])
        patch.chdir(folder)
        assert STUDY.main() == 0
        patch.setattr(STUDY, "trained", None)
        assert STUDY.main() == 0, "finished runs are made again"
    return folder / "quick"


def test_quick_run(quick):
    found = json.loads((quick / "retrofit.json").read_text())
    assert (quick / "retrofit.png").exists()
    assert found["chance"] == CHANCE
    methods = found["methods"]
    assert list(methods) == ["source", "pilot_depths"]
    for name, row in methods.items():
        assert row["depths"] == ([1, 4] if name == "pilot_depths" else [1])
        assert list(row["accuracy"]) == ["1", "2"]
        for steps in row["accuracy"].values():
            assert all(low <= mean <= high for mean, low, high in steps)
        assert all(nats > 1 for nats in row["text_nats"])
    deeper = methods["pilot_depths"]
    assert deeper["answer_flops"][1] > deeper["answer_flops"][0] >= methods["source"]["answer_flops"][0]
    assert methods["source"]["questions"]["test"]["count"] == 1
    assert deeper["questions"] == {}


def test_what_it_asks_is_a_question_file(quick):
    asked = read_questions(quick / "data/test.jsonl")
    assert asked == [test.question for test in questions_alone(1, 10, (1, 2))]


def test_training_has_the_flops_that_were_asked_for(quick):
    setting = STUDY.Setting().quick()
    places = STUDY.prepare(STUDY.Args(quick=True), setting, quick)[0]
    runs = {
        name: STUDY.run_config(name, setting, places, 0)
        for name in ("plain", "plain_flops", "retrofit", "pilot_core", "pilot_depths")
    }
    spent = {name: STUDY.training_flops(run) for name, run in runs.items()}
    plain = spent["plain"] / setting.steps
    assert abs(spent["plain_flops"] - spent["retrofit"]) <= plain / 2
    assert spent["plain"] < spent["retrofit"]
    assert runs["pilot_core"].steps == setting.pilot_steps == setting.steps // 2
    # One shape, twice: the whole model once forward and twice back is 3 forwards.
    forward = STUDY.flops.forward_flops(runs["plain"].model, 1, setting.length)
    assert spent["plain"] == pytest.approx(3 * forward * setting.steps * setting.batch_size * setting.length)
    assert 2 * spent["pilot_core"] < spent["retrofit"] < 2 * spent["pilot_depths"]


def test_refusals(tmp_path, monkeypatch):
    args = STUDY.Args(model=tmp_path, runs=tmp_path / "runs")
    with pytest.raises(InputError, match=re.escape(f"--model {tmp_path}: not a Hugging Face folder")):
        STUDY.prepare(args, STUDY.Setting(), args.runs)
    with pytest.raises(InputError, match="--methods"):
        STUDY.check_comparison(dataclasses.replace(args, methods=()), ())
