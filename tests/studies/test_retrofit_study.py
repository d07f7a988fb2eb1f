"""Problems in words: right answers, as many dependent steps as is said, even answers. The study on a toy model."""

import dataclasses
import json
import re
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from experiment_scripts import script

from experiments.studies.shared.stories import (
    DIGITS,
    TEMPLATES,
    TEST_NAMES,
    TRAINING_NAMES,
    as_lines,
    chance,
    stories,
)
from rdlm.config import InputError
from rdlm.evaluation import baselines

STUDY = script("studies/retrofit")
STEPS = (1, 2, 3, 5, 8)
TOLD = stories(0, 20, STEPS, TRAINING_NAMES)


def walked(question):
    """(answer, steps) of a walk around rooms, from the text alone."""
    listed, told = re.fullmatch(r"Five rooms form a circle: (.*?)\. (.*) Where is \w+\?", question).groups()
    ring, (start, *told) = listed.split(", "), re.findall(r"is in the (\w+)|(Go on \w+|Turn)", told)
    place, direction = ring.index(start[0]), 1
    for _, told_step in told:
        far = {"Go on one": 1, "Go on two": 2, "Turn": 0}[told_step]
        place, direction = place + direction * far, direction * (1 if far else -1)
    return ring[place % 5], len(told)


def swapped(question):
    """(answer, swaps that the answer passed through), traced forwards over everybody's things."""
    has = dict(re.findall(r"(\w+) has the (\w+)\.", question))
    moves = dict.fromkeys(has.values(), 0)
    for one, other in re.findall(r"(\w+) and (\w+) swap\.", question):
        has[one], has[other] = has[other], has[one]
        moves[has[one]] += 1
        moves[has[other]] += 1
    held = has[re.search(r"does (\w+) have\?", question)[1]]
    return held, moves[held]


def followed(question):
    """(answer, links followed)."""
    likes = dict(re.findall(r"(\w+) likes (\w+)\.", question))
    assert len(likes) == 10
    asked, person = re.search(r"Who is (.*)liked by (\w+)\?", question).groups()
    steps = 1 + asked.count("liked by")
    passed = [person]
    for _ in range(steps):
        passed.append(likes[passed[-1]])
    assert len({*passed}) == steps + 1, "no way around"
    return passed[-1], steps


def counted(question):
    """(answer, operations)."""
    start, told = re.search(r"from (\w+)\. (.*) What is", question).groups()
    value, steps = DIGITS.index(start), [step for step in told.split(".") if step]
    for step in steps:
        word = step.split()[-1]
        if step.strip().startswith("Add"):
            value += DIGITS.index(word)
        else:
            value *= 3 if word == "it" else DIGITS.index(word)
    return DIGITS[value % 10], len(steps)


READ = {"rooms": walked, "swaps": swapped, "likes": followed, "dial": counted}


def test_the_answer_is_right_and_takes_as_many_steps():
    assert TEMPLATES.keys() == READ.keys()
    for story in TOLD:
        found, steps = READ[story.template](story.choice.question)
        assert (story.choice.choices[story.choice.answer], story.steps) == (found, steps), story
        assert story.prompt == f"Question: {story.choice.question}\nAnswer:"
        assert story.completion == f" {found}"


def test_fewer_steps_would_give_another_answer():
    """A model that stops early, or leaves a step out, is wrong more often than by chance right."""
    for name, read in READ.items():
        longest = [s.choice for s in TOLD if s.template == name and s.steps == 8]
        early = [read(_shortened(name, c.question))[0] == c.choices[c.answer] for c in longest]
        assert np.mean(early) < 0.5, name


def _shortened(name, question):
    if name == "likes":
        return question.replace("liked by the one ", "", 1)
    sentences = {"rooms": r"(Go on|Turn)[^.]*\. (?=Where)", "swaps": r"\w+ and \w+ swap\. (?=What)"}
    return re.sub(sentences.get(name, r"(Add|Triple|Multiply)[^.]*\. (?=What)"), "", question)


def test_answers_are_even_so_chance_is_what_is_said():
    known = baselines([s.choice for s in TOLD])
    assert known["chance"] == pytest.approx(chance())
    assert known["majority"] <= 2 / 9 + 1e-9, "one place is right more often"
    for name, (_, count) in TEMPLATES.items():
        for steps in STEPS:
            some = [s.choice for s in TOLD if (s.template, s.steps) == (name, steps)]
            assert {*Counter(c.answer for c in some).values()} == {20 // count}
            assert all(len({*c.choices}) == count for c in some)
            assert len({c.question for c in some}) > (10 if steps == 1 else 18)
    words = Counter(s.completion for s in TOLD if s.template == "likes")
    assert max(words.values()) < 12, "a name is the answer too often"


def test_no_test_problem_is_in_training():
    assert not {*TRAINING_NAMES} & {*TEST_NAMES}
    tests = stories(1, 20, STEPS, TEST_NAMES)
    assert not {s.prompt for s in TOLD} & {s.prompt for s in tests}
    for story in tests:
        assert {*re.findall(r"\w+", story.choice.question)} & {*TEST_NAMES}
        assert not {*re.findall(r"\w+", story.prompt)} & {*TRAINING_NAMES}
    assert stories(1, 20, STEPS, TEST_NAMES) == tests
    assert stories(2, 20, STEPS, TEST_NAMES) != tests


def test_a_document_is_a_prompt_and_its_completion():
    lines = [json.loads(line) for line in as_lines(TOLD).splitlines()]
    assert [line["prompt"] + line["completion"] for line in lines] == [s.prompt + s.completion for s in TOLD]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Results of a quick run of one method, made once and then read once more from what is saved."""
    folder, options = tmp_path_factory.mktemp("study"), ["--methods", "pilot_depths", "--seeds", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["retrofit.py", "--quick", "--runs", str(folder), *options])
        patch.chdir(folder)
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            assert STUDY.main() == 0
            patch.setattr(STUDY, "train", None)
            assert STUDY.main() == 0, "finished runs are made again"
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
    return folder / "quick"


def test_quick_run(quick):
    found = json.loads((quick / "retrofit.json").read_text())
    assert (quick / "retrofit.png").exists()
    assert found["chance"] == pytest.approx(chance())
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
    assert methods["source"]["questions"]["test"]["count"] == 80
    assert deeper["questions"] == {}


def test_what_it_asks_is_a_question_file(quick):
    from rdlm.evaluation import read_questions

    expected = stories(1, 10, (1, 2), TEST_NAMES)
    assert read_questions(quick / "data/test.jsonl") == [s.choice for s in expected]


@pytest.mark.usefixtures("quick_compile")
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
