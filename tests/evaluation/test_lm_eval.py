"""lm-eval's tasks through our model: scores of a transparent computation, one unroll for all depths, clear refusals."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from experiment_scripts import EXPERIMENTS

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TQDM_DISABLE="1")

import rdlm
from rdlm.checkpoint import save_parameters
from rdlm.config import PRESETS, InputError
from rdlm.evaluation.lm_eval import DepthLM, Protocol, evaluate, headline, load_tasks, tasks
from rdlm.evaluation.lm_eval import model as harness_model
from rdlm.tokenizer import Tokenizer

DEPTHS = (1, 4)
SPECIAL = {"<b>": 1, "<e>": 2, "<stop>": 3}
MULTIPLE_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: bits_per_byte}]
"""
GENERATE = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """datasets keeps what it has read; not in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def model():
    return golden_cases.model("A2")


def spelt(ids):
    """Ids as text: one Chinese character each."""
    return "".join(chr(0x4E00 + int(i)) for i in ids)


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character; ids 1 to 3 are special."""
    vocab = {spelt([i]): i for i in range(128)}
    vocab = {t: i for t, i in vocab.items() if i not in SPECIAL.values()} | SPECIAL
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=spelt([0])))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, {"bos_token": "<b>", "eos_token": "<e>"})


@pytest.fixture
def task(tmp_path):
    """task(name, yaml, rows) writes a task and its data, and loads it."""

    def make(name, text, rows, **more):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(head + text + "".join(f"{k}: {json.dumps(v)}\n" for k, v in more.items()))
        return load_tasks([name], folder)

    return make


@functools.partial(jax.jit, static_argnames="config")
def alone(params, config, tokens, segments, r):
    return rdlm.forward(params, config, tokens, r, segment_ids=segments).logits[0]


def log_softmax(params, config, ids, r):
    """[n, V] of the tokens `ids` alone, from `forward`."""
    tokens, segments = np.zeros((2, 1, config.max_length), np.int32)
    tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    logits = np.asarray(alone(params, config, tokens, segments, jnp.int32(r)), np.float64)[: len(ids)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_multiple_choice_is_what_forward_says(model, tokenizer, task, monkeypatch):
    params, config = model
    rng = np.random.default_rng(2)
    text = lambda n: spelt(rng.integers(4, 128, n))  # noqa: E731
    # The last question is cut on the left, and keeps its begin token.
    rows = [{"question": text(n), "choices": [text(1), text(3)], "gold": 1} for n in (1, 3, 6, 20, 50)]
    calls = []
    monkeypatch.setattr(harness_model, "score", lambda *a, **k: calls.append(a[3]) or rdlm.evaluation.score(*a, **k))
    lm = DepthLM(params, config, tokenizer, DEPTHS)
    found = evaluate(lm, task("mine", MULTIPLE_CHOICE, rows), Protocol())
    assert calls == [DEPTHS]  # one unroll for every depth
    encode = lambda text: [ord(c) - 0x4E00 for c in text]  # noqa: E731
    chosen = []
    for row, r in zip(found, DEPTHS, strict=True):
        right = 0
        for doc in rows:
            scores = []
            for choice in doc["choices"]:
                whole = [1, *[*encode(doc["question"]), *encode(choice)][-config.max_length :]]
                log_p = log_softmax(params, config, whole[:-1], r)
                n = len(choice)
                scores.append(log_p[np.arange(len(whole) - 1 - n, len(whole) - 1), whole[-n:]].sum())
                asked = harness_model.Instance("loglikelihood", {}, (doc["question"], choice), 0)
                lm.row = DEPTHS.index(r)
                value, greedy = lm.loglikelihood([asked])[0]
                assert value == pytest.approx(scores[-1], abs=1e-4)
                assert greedy == bool((log_p[-n:].argmax(-1) == whole[-n:]).all())
            right += int(np.argmax(scores)) == doc["gold"]
            chosen.append(scores)
        assert row.results["mine"]["acc,none"] == right / len(rows)
        assert (row.depth, row.rule) == (r, None)
        assert row.effort["mine"].recurrences == r * row.effort["mine"].tokens
    assert calls == [DEPTHS]  # asking again costs nothing
    assert lm.cut == (2, 10)  # both choices of one question
    assert np.abs(np.subtract(chosen[:5], chosen[5:])).min() > 1e-3  # and the depths do differ
    assert headline(found[0].results["mine"]) == [("", found[0].results["mine"]["acc,none"])]


def test_choices_are_the_references(model, tokenizer, task):
    """Zero-state logits of the public PyTorch class at r = 4 decide; through lm-eval we must say the same."""
    params, config = model
    case = golden_cases.cases("A2")["forward_zero_state"]["arrays"]
    rng = np.random.default_rng(3)
    rows = []
    for ids, logits in zip(case["input_ids"], case["logits_r4"], strict=True):
        for n in range(1, len(ids)):
            choices = rng.choice(np.arange(4, 128), 20, replace=False)
            gold = int(logits[n - 1, choices].argmax())
            rows.append({"question": spelt(ids[:n]), "choices": [spelt([c]) for c in choices], "gold": gold})
    lm = DepthLM(params, config, tokenizer, DEPTHS, bos=False, init_scale=0.0)
    shallow, deep = evaluate(lm, task("golden", MULTIPLE_CHOICE, rows), Protocol())
    assert deep.results["golden"]["acc,none"] == 1.0
    assert shallow.results["golden"]["acc,none"] < 1.0  # at another depth it does not


def test_rolling_counts_every_token_once(model, tokenizer, task):
    """A text of two and a half windows: each token given as much as the model reads, the first the begin token."""
    params, config = model
    L = config.max_length
    ids = np.random.default_rng(4).integers(4, 128, 2 * L + 11).tolist()
    found = evaluate(
        DepthLM(params, config, tokenizer, (4,)),
        task("roll", ROLLING, [{"text": spelt(ids)}, {"text": spelt(ids[:5])}]),
        Protocol(),
    )
    total = 0.0
    for text in (ids, ids[:5]):
        whole = [1, *text]
        for start in range(0, len(text), L):
            end = min(start + L, len(text))
            first = max(0, end - L)
            log_p = log_softmax(params, config, whole[first:end], 4)
            total += sum(log_p[i - first, whole[i + 1]] for i in range(start, end))
    size = len(spelt(ids + ids[:5]).encode())
    assert found[0].results["roll"]["bits_per_byte,none"] == pytest.approx(-total / math.log(2) / size, rel=1e-6)


def test_generation_is_generate_cut_at_its_stop(model, tokenizer, task):
    params, config = model
    prompts = [np.arange(3) + 10, np.arange(9) + 40]
    made = rdlm.generate(params, config, [[1, *p] for p in prompts], max_new_tokens=8, num_steps=4)
    texts = [spelt(t) for t in made.tokens]
    assert not set(SPECIAL.values()) & set(np.concatenate(made.tokens).tolist())
    stop = texts[0][3]
    cut = [text.split(stop)[0] for text in texts]
    rows = [{"question": spelt(p), "answer": a} for p, a in zip(prompts, cut, strict=True)]
    options = {
        "generation_kwargs": {"until": [stop, "<stop>"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}
    }
    lm = DepthLM(params, config, tokenizer, (4,))
    found = evaluate(lm, task("make", GENERATE, rows, **options), Protocol())
    assert found[0].results["make"]["exact_match,none"] == 1.0
    assert len(cut[0]) <= 3
    uncut = [{**row, "answer": text} for row, text in zip(rows, texts, strict=True)]
    found = evaluate(lm, task("uncut", GENERATE, uncut, **options), Protocol())
    assert found[0].results["uncut"]["exact_match,none"] < 1.0  # what follows the stop is gone
    request = harness_model.Instance("generate_until", {}, (spelt([9]), {"max_gen_toks": 48}), 0)
    with pytest.raises(InputError, match=re.escape("max_gen_toks = 48: must be in [1, 47]")):
        lm.generate_until([request])
    request.arguments = (spelt([9]), {"num_beams": 4})
    with pytest.raises(InputError, match="'num_beams' is not supported"):
        lm.generate_until([request])


@pytest.fixture
def asked(model, tokenizer):
    """asked(options, ...) -> the texts of requests with one prompt each, and the model they were asked."""

    def ask(*options, prompt=(9, 10, 11), depth=2):
        lm = DepthLM(*model, tokenizer, (depth,), lanes=4)
        requests = [harness_model.Instance("generate_until", {}, (spelt(prompt), o), 0) for o in options]
        return lm.generate_until(requests), lm

    return ask


def test_repeats_are_other_samples(asked):
    sampled = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    other = sampled | {"temperature": 1.9}
    texts, lm = asked(sampled, sampled, sampled, sampled)
    assert len(set(texts)) == 4
    # The same whatever stands between them, and the first as without repeats.
    mixed, _ = asked(sampled, other, sampled, other, sampled)
    assert mixed[::2] == texts[:3]
    assert mixed[1] != mixed[3]
    assert asked(sampled)[0] == texts[:1]
    effort = lm.effort([harness_model.Instance("generate_until", {}, (spelt((9, 10, 11)), sampled), 0)])
    assert effort.tokens == 4 * (1 + 3 + 11)  # begin token, prompt, and all new tokens but the last
    greedy = {"max_gen_toks": 12}
    assert len(set(asked(greedy, greedy)[0])) == 1


@pytest.mark.parametrize(
    ("options", "sampled"),
    [
        ({"temperature": 2.0}, True), ({"temperature": 2, "do_sample": None}, True),
        ({"temperature": 2.0, "do_sample": True}, True), ({"temperature": 2.0, "do_sample": False}, False),
        ({"temperature": 0.0}, False), ({"temperature": 0}, False), ({}, False), ({"do_sample": False}, False),
        ({"temperature": None, "top_k": None}, False),
    ],
)  # fmt: skip
def test_sampling_is_decided_as_lm_eval_does(options, sampled, asked):
    from lm_eval.models.utils import normalize_gen_kwargs

    if None not in options.values():  # which it cannot read
        assert normalize_gen_kwargs(options)["do_sample"] == sampled
    texts, _ = asked({"max_gen_toks": 12, **options}, {"max_gen_toks": 12})
    assert (texts[0] != texts[1]) == sampled


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": True}, "do_sample = True: needs a temperature above 0"),
        ({"do_sample": True, "temperature": 0}, "do_sample = True: needs a temperature above 0"),
        ({"do_sample": "false", "temperature": 1.0}, "do_sample = 'false': must be true or false"),
        ({"do_sample": 1, "temperature": 1.0}, "do_sample = 1: must be true or false"),
        ({"temperature": "0.7"}, "temperature = '0.7': must be a number"),
        ({"temperature": True}, "temperature = True: must be a number"),
        ({"until": 3}, "until = 3: must be a text"), ({"until": [3]}, "until = [3]: must be a text"),
        ({"until": ["a", None]}, "must be a text or a list of texts"), ({"until": {"a": 1}}, "must be a text"),
        ({"max_gen_toks": "many"}, "max_gen_toks = 'many': must be a whole number"),
        ({"max_gen_toks": 3.5}, "max_gen_toks = 3.5: must be a whole number"),
        ({"max_gen_toks": True}, "max_gen_toks = True: must be a whole number"),
        ({"max_gen_toks": 0}, "max_gen_toks = 0: must be in [1, 47]"),
        ({"max_gen_toks": -1}, "max_gen_toks = -1"), ({"max_gen_toks": 10**30}, "must be in [1, 47]"),
        ({"colour": "red"}, "'colour' is not supported"),
    ],
)  # fmt: skip
def test_generation_kwargs_that_are_refused(options, words, asked):
    with pytest.raises(InputError) as error:
        asked({"max_gen_toks": 4, **options})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_to_generate(asked):
    assert asked()[0] == []


def test_long_prompts_of_texts_are_counted_and_keep_the_begin_token(asked, model):
    params, config = model
    ids = np.random.default_rng(5).integers(4, 128, 60)
    texts, lm = asked({"max_gen_toks": 8}, {"max_gen_toks": 7}, prompt=ids)
    assert lm.cut == (2, 2)
    kept = [1, *ids[-(config.max_length - 8 - 1) :]]
    made = rdlm.generate(params, config, [kept], max_new_tokens=8, num_steps=2).tokens[0]
    assert texts[0] == spelt([t for t in made if t not in SPECIAL.values()])
    assert asked({"max_gen_toks": 8})[1].cut == (0, 1)


def test_a_model_that_computes_nan_gets_no_score(model, tokenizer, task):
    params, config = model
    broken = params | {"ln_f": {"scale": params["ln_f"]["scale"].at[0].set(np.nan)}}
    row = {"question": spelt([9]), "choices": [spelt([10]), spelt([11])], "gold": 0, "text": spelt([9, 10])}
    for name, text in (("choose", MULTIPLE_CHOICE), ("rolls", ROLLING)):
        with pytest.raises(InputError, match="the logits are not finite at r = 1"):
            evaluate(DepthLM(broken, config, tokenizer, (1,)), task(name, text, [row]), Protocol())


def test_tasks_named_twice_count_once(model, tokenizer, task, tmp_path):
    row = {"question": spelt([9]), "choices": [spelt([10]), spelt([11])], "gold": 0}
    task("mc", MULTIPLE_CHOICE, [row] * 3)
    task("other", MULTIPLE_CHOICE, [row])
    folder = tmp_path / "tasks"
    (folder / "all.yaml").write_text("group: all\ntask: [mc, other]\n")
    (folder / "some.yaml").write_text("group: some\ntask: [mc]\n")
    lm = DepthLM(model[0], model[1], tokenizer, (1,))
    for names, found in ((["mc", "mc"], {"mc"}), (["all", "mc"], {"all", "mc", "other"}),
                         (["mc", "all", "all"], {"all", "mc", "other"})):  # fmt: skip
        assert set(evaluate(lm, load_tasks(names, folder), Protocol())[0].results) >= found - {"all"}
    with pytest.raises(InputError, match="found in both"):
        evaluate(lm, load_tasks(["all", "some"], folder), Protocol())


CHOICES = {"question": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(
    ("text", "rows", "words"),
    [
        (MULTIPLE_CHOICE, [CHOICES | {"choices": ["", "c"]}], "a choice of its first document is empty"),
        (MULTIPLE_CHOICE, [CHOICES, CHOICES | {"choices": ["b", ""]}], "document 1: choices ['b', '']"),
        (MULTIPLE_CHOICE, [CHOICES, CHOICES | {"choices": []}], "document 1: target 0 is not one of the 0 choices"),
        (MULTIPLE_CHOICE, [CHOICES, CHOICES | {"gold": 2}], "document 1: target 2 is not one of the 2 choices"),
        (MULTIPLE_CHOICE, [CHOICES, CHOICES | {"gold": -1}], "document 1: target -1"),
        (MULTIPLE_CHOICE, [CHOICES | {"gold": 2}], "a target that is not one of them"),
        (MULTIPLE_CHOICE, [CHOICES | {"gold": "d"}], "document 0: target 'd'"),
    ],
)
def test_documents_that_no_model_can_get_right(text, rows, words, task):
    with pytest.raises(InputError) as error:
        task("mine", text, rows)
    assert words in str(error.value)
    assert "empty or damaged" not in str(error.value)


def test_what_lm_eval_raises_is_one_line(model, tokenizer, task, monkeypatch):
    lm = DepthLM(model[0], model[1], tokenizer, (1,))
    number = GENERATE.replace('"{{question}}"', "question")
    asked = task("number", number, [{"question": 3, "answer": "a"}])
    with pytest.raises(InputError, match="tasks: lm-eval cannot run them"):
        evaluate(lm, asked, Protocol())
    few = task("few", MULTIPLE_CHOICE, [CHOICES] * 3, fewshot_split="test")
    with pytest.raises(InputError, match="fewshot = 50: a task has fewer examples"):
        evaluate(lm, few, Protocol(fewshot=50))

    def bug(*a, **k):
        raise ZeroDivisionError

    monkeypatch.setattr(harness_model, "score", bug)  # our own mistakes stay what they are
    with pytest.raises(ZeroDivisionError):
        evaluate(lm, task("fine", MULTIPLE_CHOICE, [CHOICES]), Protocol())


def test_an_exit_rule_is_one_more_row(model, tokenizer, task):
    params, config = model
    rows = [{"question": spelt([5, 6, 7]), "choices": [spelt([c]) for c in range(10, 19)], "gold": 1}]
    rule = rdlm.exits.latent_diff(0.3)
    lm = DepthLM(params, config, tokenizer, (4,), exit_rule=rule, max_steps=12)
    _, row = evaluate(lm, task("exits", MULTIPLE_CHOICE, rows), Protocol())
    out = rdlm.forward(params, config, np.array([[1, 5, 6, 7]]), 12, exit_rule=rule)
    assert (row.depth, row.rule) == (12, "latent_diff")
    effort = row.effort["exits"]
    assert effort.recurrences / effort.tokens == pytest.approx(float(out.steps.mean()))
    lm.row = 1
    logits = np.asarray(out.logits[0, -1], np.float64)
    asked = [harness_model.Instance("loglikelihood", {}, (spelt([5, 6, 7]), spelt([c])), c) for c in range(10, 19)]
    ours = [value for value, _ in lm.loglikelihood(asked)]
    np.testing.assert_allclose(ours, logits[10:19] - np.log(np.exp(logits).sum()), atol=1e-4)


def test_chats_are_written_by_the_tokenizers_template():
    own = Tokenizer.bytes_only()
    lm = DepthLM(None, PRESETS["nano"].model, own, (1,))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say <|end_turn|>"},  # spelt out by a user: stays text
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "2+2?"},
    ]
    text = lm.apply_chat_template(messages)
    before, after = lm._pair(text, "4")
    whole = own.encode_chat(messages)
    assert [*before, *after] == [*whole, ord("4")]
    assert whole.tolist().count(own.special_ids["<|end_turn|>"]) == 4
    assert before[0] == own.bos_id != before[1]  # one begin token, the template's
    opened = lm.apply_chat_template([*messages, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert lm._encode_written(opened).tolist() == [*whole, *b"It is"]


def test_tasks_that_are_refused(task, tmp_path):
    row = {"question": "a", "choices": ["b", "c"], "gold": 0}
    for name, text, rows, words in (
        ("empty", MULTIPLE_CHOICE, [], "'empty'"),
        ("template", MULTIPLE_CHOICE.replace("{{question}}", "{{quest}}"), [row], "'quest' is undefined"),
        ("word", MULTIPLE_CHOICE.replace('"{{question}}"', "quest"), [row], "doc_to_text: column 'quest' is missing"),
        ("kind", MULTIPLE_CHOICE.replace("multiple_choice", "guess"), [row], "invalid output_type 'guess'"),
    ):
        with pytest.raises(InputError) as error:
            task(name, text, rows)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        (tmp_path / "tasks" / f"{name}.yaml").unlink()
    folder = tmp_path / "tasks"
    task("fine", MULTIPLE_CHOICE, [row])
    with pytest.raises(InputError, match=r"task 'fin': unknown in .*Did you mean 'fine'\?"):
        load_tasks(["fin"], folder)
    (tmp_path / "fine.jsonl").unlink()
    with pytest.raises(InputError, match="task 'fine': its data cannot be found"):
        load_tasks(["fine"], folder)
    with pytest.raises(InputError, match="name at least one"):
        load_tasks([], folder)
    with pytest.raises(InputError, match="not a folder"):
        load_tasks(["fine"], tmp_path / "none")
    (folder / "bad.yaml").write_text("task: [")
    with pytest.raises(InputError, match=r"bad\.yaml: not YAML"):
        load_tasks(["fine"], folder)
    (folder / "bad.yaml").write_text("colour: red")
    with pytest.raises(InputError, match=r"bad\.yaml: not a task"):
        load_tasks(["fine"], folder)


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n == "rdlm.evaluation.lm_eval" or n.startswith("rdlm.evaluation.lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"lm-eval: not installed .*pip install 'rdlm\[eval\]'"):
        importlib.import_module("rdlm.evaluation.lm_eval")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder of an untrained model that spells bytes."""
    folder, own = tmp_path_factory.mktemp("run"), Tokenizer.bytes_only()
    run = PRESETS["nano"]
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, vocab_size=own.vocab_size),
        data=dataclasses.replace(run.data, tokenizer_size=own.vocab_size),
    )
    params = rdlm.init_params(run.model, jax.random.key(0))
    save_parameters(folder, params, run, {"tokenizer": own.hash, "step": 0})
    own.save(folder / "tokenizer")
    return folder


def test_the_commands(run_folder, command, task, tmp_path):
    rows = [
        {"question": "abc", "choices": ["d", "e"], "gold": 0},
        {"question": "xyz", "choices": ["d", "e"], "gold": 1},
    ]
    task("arc_easy", MULTIPLE_CHOICE, rows)
    words = ("--tasks", "arc_easy", "--include-path", tmp_path / "tasks")
    code, out, err = command("lm_eval", run_folder, *words, "--depths", 1, 4, "--exit", "latent_diff")
    assert code == 0, err
    assert "Huginn-0125, r = 32" in out
    assert "69.91" in out
    found = json.loads((run_folder / "analysis" / "lm_eval.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["r = 1", "r = 4", "latent_diff(0.03), r <= 4"]
    assert {row["results"]["arc_easy"]["acc,none"] for row in found["rows"]} <= {0.0, 0.5, 1.0}
    assert found["protocol"]["tasks"] == ["arc_easy"]
    assert found["published"]["Pythia-6.9b"] == {"arc_easy": 60.48}
    assert all(row["cost"]["arc_easy"]["flops_per_token"] > 0 for row in found["rows"])
    questions = tmp_path / "mine.jsonl"
    questions.write_text("".join(json.dumps({**row, "answer": row["gold"]}) + "\n" for row in rows))
    code, out, err = command(
        "questions", run_folder, "--questions", questions, "--depths", 1, 4, "--exit", "latent_diff",
        "--steps-tokens", 4,
    )  # fmt: skip
    assert code == 0, err
    assert "without a model: chance 50.0%, majority 50.0%" in out
    found = json.loads((run_folder / "analysis" / "questions_mine.json").read_text())
    assert [row["depth"] for row in found["rows"]] == ["r = 1", "r = 4", "latent_diff < 0.03"]
    assert sum(found["new_token_steps"]["warm start"]["(all questions)"]["histogram"]) == 2 * 4
    assert found["step"] == 0
    for name in ("questions_mine.png", "questions_mine_steps.png", "questions_mine.csv", "lm_eval.csv"):
        assert (run_folder / "analysis" / name).stat().st_size > 100


def test_the_commands_refuse(run_folder, command, task, tmp_path):
    task("fine", MULTIPLE_CHOICE, [{"question": "a", "choices": ["b", "c"], "gold": 0}])
    local = ("--tasks", "fine", "--include-path", tmp_path / "tasks")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "?", "choices": ["a", "b"], "answer": 2}\n')
    right = tmp_path / "right.jsonl"
    right.write_text('{"question": "?", "choices": ["a", "b"], "answer": 1}\n')
    for words, name, *arguments in (
        ("--depths = (0, 4)", "lm_eval", *local, "--depths", 0, 4),
        ("--tasks: name at least one", "lm_eval"),
        ("task 'fin': unknown", "lm_eval", "--tasks", "fin", *local[2:]),
        ("--exit none has no threshold", "lm_eval", *local, "--threshold", 0.1),
        ("--preset gsm8k: sets", "lm_eval", "--preset", "gsm8k", "--chat"),
        ("step = 7: not saved", "lm_eval", *local, "--step", 7),
        ("--depths = (0,)", "questions", "--questions", right, "--depths", 0),
        ("line 1: answer = 2", "questions", "--questions", wrong),
        ("cannot be read", "questions", "--questions", tmp_path / "none"),
        ("--exit none has no threshold", "questions", "--questions", right, "--threshold", 1),
    ):
        code, out, err = command(name, run_folder, *arguments)
        assert (code, err.count("\n"), out) == (2, 1, ""), err
        assert err.startswith("error: ")
        assert words in err
    Tokenizer.train(["other words"] * 9, 263).save(tmp_path / "other")
    kept = {p: p.read_text() for p in (run_folder / "tokenizer").iterdir()}
    try:
        for path in kept:
            path.write_text((tmp_path / "other" / path.name).read_text())
        for name, arguments in (("lm_eval", local), ("questions", ("--questions", right))):
            code, _, err = command(name, run_folder, *arguments)
            assert (code, err.count("\n")) == (2, 1)
            assert "is not the one the checkpoint was trained with" in err
    finally:
        for path, text in kept.items():
            path.write_text(text)


def test_a_script_called_lm_eval_still_finds_the_package(tmp_path):
    """As a user starts it, Python looks for lm_eval beside the script first, which is the script itself."""
    words = [
        sys.executable,
        str(EXPERIMENTS / "lm_eval.py"),
        str(tmp_path),
        "--tasks",
        "x",
        "--include-path",
        str(tmp_path),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"task 'x': unknown in {tmp_path}" in done.stderr
