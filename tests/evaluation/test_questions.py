"""Questions: read and refused, scored at every depth as `rdlm.forward` would, and their statistics."""

import dataclasses
import functools
import hashlib
import json
import math
import zipfile
from pathlib import Path

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rdlm
from rdlm.config import InputError
from rdlm.evaluation import (
    Choice,
    Cloze,
    answer,
    answer_steps,
    as_pairs,
    baselines,
    bootstrap_mean,
    cut_left,
    cut_pair,
    is_cut,
    question_file,
    question_sets,
    read_questions,
    score,
    split,
    wilson,
)
from rdlm.tokenizer import Tokenizer

DEPTHS = (1, 2, 4)


@pytest.fixture(scope="module")
def model():
    return golden_cases.model("A2")  # 128 tokens, at most 48 of them


@pytest.fixture(scope="module")
def pairs():
    """Ten pairs: several lengths, one too long for the model, three that share all but their last token."""
    rng = np.random.default_rng(1)

    def ids(n):
        return rng.integers(0, 128, n)

    shared = ids(20)
    mixed = [(ids(n), ids(m)) for n, m in ((1, 1), (5, 6), (30, 2), (9, 5), (12, 3), (60, 4), (30, 30))]
    return mixed + [(shared, ids(1)) for _ in range(3)]


@functools.partial(jax.jit, static_argnames="config")
def alone(params, config, tokens, segments, r, rule):
    out = rdlm.forward(params, config, tokens, r, segment_ids=segments, exit_rule=rule)
    return out.logits[0], out.steps[0]


def transparent(params, config, pair, r, rule=None):
    """(log-likelihood, greedy, steps) of one pair alone, from the logits of `forward`."""
    whole = np.concatenate(pair)[-(config.max_length + 1) :]
    n, m = len(whole) - 1, len(pair[1])
    tokens, segments = np.zeros((2, 1, config.max_length), np.int32)  # one shape for all
    tokens[0, :n], segments[0, :n] = whole[:-1], 1
    logits, steps = (np.asarray(x)[:n] for x in alone(params, config, tokens, segments, jnp.int32(r), rule))
    logits = logits[-m:].astype(np.float64)
    chosen = logits[np.arange(m), pair[1]] - np.log(np.exp(logits).sum(-1))
    return chosen.sum(), bool((logits.argmax(-1) == pair[1]).all()), steps


def greedy_pair(params, config, before, r, count=3):
    """A pair whose continuation is what greedy decoding gives."""
    out = rdlm.generate(params, config, [before], max_new_tokens=count, num_steps=r)
    return before, out.tokens[0]


def test_every_depth_of_one_unroll_is_forward_at_that_depth(model, pairs):
    params, config = model
    pairs = [*pairs, greedy_pair(params, config, np.arange(5), 4)]
    found = score(params, config, pairs, DEPTHS, tokens_per_batch=128)
    wrong = score(params, config, [(a, (np.roll(b, 1) + 1) % 128) for a, b in pairs], DEPTHS, tokens_per_batch=128)
    for d, r in enumerate(DEPTHS):
        expected = [transparent(params, config, pair, r) for pair in pairs]
        np.testing.assert_allclose(found.log_likelihood[d], [x[0] for x in expected], atol=1e-4)
        assert found.greedy[d].tolist() == [x[1] for x in expected]
        assert np.abs(wrong.log_likelihood[d] - found.log_likelihood[d]).min() > 1e-3  # shifted continuations
    assert found.greedy[2, -1]
    assert not found.greedy[2, :-1].any()
    assert np.abs(found.log_likelihood[0] - found.log_likelihood[2]).min() > 1e-3  # another depth
    assert found.recurrences.tolist() == [[r] * len(pairs) for r in DEPTHS]
    assert found.length.tolist() == [min(len(a) + len(b) - 1, 48) for a, b in pairs]


def test_exits_are_those_of_a_pair_alone(model, pairs):
    params, config = model
    rule = rdlm.exits.latent_diff(0.3)
    found = score(params, config, pairs, [12], exit_rule=rule, tokens_per_batch=128)
    for i, pair in enumerate(pairs):
        chosen, greedy, steps = transparent(params, config, pair, 12, rule)
        assert found.steps[i].tolist() == steps.tolist()
        assert found.log_likelihood[0, i] == pytest.approx(chosen, abs=1e-4)
        assert found.greedy[0, i] == greedy
        assert found.recurrences[0, i] == pytest.approx(steps.mean())
    assert len(set(np.concatenate(found.steps).tolist())) > 2  # tokens do stop apart


def test_reference_logits_choose_the_same(model):
    """Its zero-state logits at r = 4, made with the public PyTorch class, against ours on the same tokens."""
    params, config = model
    case = golden_cases.cases("A2")["forward_zero_state"]["arrays"]
    tokens, logits = case["input_ids"], case["logits_r4"].astype(np.float64)
    rng = np.random.default_rng(0)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    pairs, reference = [], []
    for row, ids in enumerate(tokens):
        for n in range(3, len(ids)):
            choices = rng.choice(config.vocab_size, 16, replace=False)
            pairs += [(ids[:n], [c]) for c in choices]
            reference.append(log_p[row, n - 1, choices])
    reference = np.asarray(reference)
    ours = score(params, config, pairs, (1, 4), init_scale=0.0).log_likelihood.reshape(2, -1, 16)
    np.testing.assert_allclose(ours[1], reference, atol=3e-4)
    assert (ours[1].argmax(-1) == reference.argmax(-1)).all()
    assert (ours[0].argmax(-1) != reference.argmax(-1)).any()  # the wrong depth chooses otherwise


def test_refused_scores(model):
    params, config = model
    pair = ([1, 2], [3])
    for pairs, depths, options, words in (
        ([], (1,), {}, "nothing to score"),
        ([([], [3])], (1,), {}, "the context has no tokens"),
        ([([3], [])], (1,), {}, "the continuation has no tokens"),
        ([([3], [0] * 49)], (1,), {}, "exceeds config.max_length = 48"),
        ([([3], [128])], (1,), {}, "ids must be in [0, 128)"),
        ([pair], (0, 1), {}, "each at least 1"),
        ([pair], (2, 1), {}, "must be increasing"),
        ([pair], (1, 2), {"exit_rule": rdlm.exits.kl()}, "an exit rule takes one"),
        ([pair], (1,), {"tokens_per_batch": 0}, "tokens_per_batch = 0"),
    ):
        with pytest.raises(InputError) as error:
            score(params, config, pairs, depths, **options)
        assert words in str(error.value)


BREAKS = {  # ways to NaN or infinity: in the embedding, the adapter, the core, the readout
    "embedding": ("wte", (5, 0), np.nan),
    "core": (("core_0", "mlp", "proj"), (0, 0), np.nan),
    "last norm": (("ln_f", "scale"), (0,), np.inf),
    "adapter": ("adapter", (0, 0, 0), -np.inf),
}


@pytest.mark.parametrize(
    ("where", "rule"), [*((where, None) for where in BREAKS), ("embedding", rdlm.exits.kl(1e-3))], ids=str
)
def test_scores_that_are_not_finite_are_refused(where, rule, model):
    params, config = model
    path, at, value = BREAKS[where]
    path = (path,) if isinstance(path, str) else path
    flat = {tuple(k.key for k in keys): x for keys, x in jax.tree_util.tree_leaves_with_path(params)}
    name = next(keys for keys in flat if keys[: len(path)] == path)
    flat[name] = flat[name].at[at[: flat[name].ndim] + (0,) * (flat[name].ndim - len(at))].set(value)
    broken = jax.tree_util.tree_unflatten(jax.tree.structure(params), list(flat.values()))
    with pytest.raises(InputError, match=r"pairs\[\d\]: the logits are not finite at") as error:
        score(broken, config, [([5, 6], [7]), ([5], [6, 7])], (2,), exit_rule=rule)
    assert "\n" not in str(error.value)


def test_a_context_that_is_cut_keeps_its_begin_token_and_is_counted(model):
    params, config = model
    ids = np.random.default_rng(3).integers(4, 128, 70)
    before, after = np.append(1, ids[:60]), ids[60:63]
    kept = np.concatenate([[1], ids[:63][-config.max_length :]])
    found = score(params, config, [cut_pair((before, after), config, 1)], (4,))
    value, greedy, _ = transparent(params, config, (kept[:-3], kept[-3:]), 4)
    assert found.log_likelihood[0, 0] == pytest.approx(value, abs=1e-4)
    assert found.greedy[0, 0] == greedy
    plain = score(params, config, [(before, after)], (4,)).log_likelihood[0, 0]
    assert abs(plain - value) > 1e-3  # without it the tokens move by one
    for size, expected in ((config.max_length + 1, False), (config.max_length + 2, True)):
        assert is_cut(([1] * (size - 2), [2, 3]), config) == expected
    longest = np.append([1], ids)[: config.max_length]
    for room, begin, expected in (
        (9, None, longest[-9:]),
        (9, 1, [1, *longest[-8:]]),
        (9, 2, longest[-9:]),
        (1, 1, longest[-1:]),
    ):
        assert cut_left(longest, room, begin).tolist() == list(expected)
    assert cut_left(longest, 99, 1) is longest


def test_answers_count_the_questions_that_are_cut(model):
    params, _ = model
    config = dataclasses.replace(model[1], vocab_size=300, padded_vocab_size=None)
    params = params | {"wte": jnp.tile(params["wte"], (3, 1))[:300]}
    tokenizer = Tokenizer.bytes_only()
    questions = [Choice("a" * n, ("b", "c"), 0) for n in (1, 200, 300)]
    assert answer(params, config, tokenizer, questions, (1,)).cut == 2


def test_context_and_continuation_are_cut_as_one_text():
    tokenizer = Tokenizer.bytes_only()
    begin = tokenizer.bos_id
    before, after = split(tokenizer.encode, begin, "ab  ", "cd")  # blanks move to the continuation
    assert (before.tolist(), after.tolist()) == ([begin, *b"ab"], [*b"  cd"])
    plain = lambda text: tokenizer.encode(text, bos=False)  # noqa: E731
    before, after = split(plain, begin, "", "cd")  # an empty context is the begin token
    assert (before.tolist(), after.tolist()) == ([begin], [*b"cd"])
    with pytest.raises(InputError, match="no token of its own"):
        split(plain, begin, "ab", "")
    merging = Tokenizer.train(["aaaa bbbb aaaa bbbb cabba bbbbbb " * 20] * 8, 266)
    whole = merging.encode("aaaa bb" + "bb aaaa").tolist()
    before, after = split(merging.encode, merging.bos_id, "aaaa bb", "bb aaaa")
    assert whole[: len(before)] != before.tolist()  # the border lies inside a token
    assert after.tolist() == whole[len(before) :]  # not the continuation encoded alone


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


QUESTION = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}


def test_questions_of_both_kinds(tmp_path):
    found = read_questions(lines(tmp_path / "a", QUESTION, "", {**QUESTION, "answer": "A", "category": "sums", "x": 1}))
    assert found == [Choice("2 + 2?", ("3", "4"), 1), Choice("2 + 2?", ("3", "4"), 0, "sums")]
    assert found[0].texts("text") == ("Question: 2 + 2?\nAnswer:", [" 3", " 4"])
    assert found[0].texts("letters") == ("2 + 2?\nA. 3\nB. 4\nAnswer:", [" A", " B"])
    assert read_questions(lines(tmp_path / "b", {"prompt": "a", "answer": " b"})) == [Cloze("a", " b")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"question": ', "not JSON"),
        ("[1]", "expected an object"),
        ({"question": "?", "answer": 1}, "column 'choices' is missing (there: 'question', 'answer')"),
        ({"question": "?", "choices": ["a", "b"]}, "column 'answer' is missing"),
        ({"choices": ["a", "b"], "answer": 1}, "column 'question' is missing"),
        ({**QUESTION, "answer": 2}, "answer = 2: must be an index in [0, 1] or a letter from A to B"),
        ({**QUESTION, "answer": -1}, "answer = -1"),
        ({**QUESTION, "answer": "C"}, "answer = 'C'"),
        ({**QUESTION, "answer": True}, "answer = True"),
        ({**QUESTION, "choices": ["a"]}, "at least two texts"),
        ({**QUESTION, "choices": "ab"}, "at least two texts"),
        ({**QUESTION, "category": 3}, "category = 3"),
        ({"prompt": "a"}, "column 'answer' is missing (there: 'prompt')"),
        ({"text": "a"}, "column 'prompt' is missing"),
        ({"prompt": "a", "answer": ""}, "must be text, and not empty"),
        ({"prompt": "a", "answer": "b"}, "multiple choice and cloze in one file"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, words):
    path = lines(tmp_path / "q.jsonl", QUESTION, row)
    with pytest.raises(InputError) as error:
        read_questions(path)
    assert words in str(error.value)
    assert str(error.value).startswith(f"questions {path}, line 2: ")


def test_a_byte_order_mark_is_read_over(tmp_path):
    path = lines(tmp_path / "q.jsonl", QUESTION)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_questions(path) == [Choice("2 + 2?", ("3", "4"), 1)]


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "a", "answer": "\\ud800"}', '{"question": "\\udc00", "choices": ["a", "b"], "answer": 0}',
        '{"question": "a", "choices": ["a", "\\ud83d"], "answer": 0}',
        '{"prompt": "a", "answer": "b", "category": "\\ud800"}',
        '{"prompt": "a", "answer": ' + 5000 * "1" + "}", "[" * 100_000,
    ],
    ids=["answer", "question", "choice", "category", "digits", "brackets"],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named(row, tmp_path):
    with pytest.raises(InputError, match=r"q\.jsonl, line 2: not ") as error:
        read_questions(lines(tmp_path / "q.jsonl", '{"prompt": "a", "answer": "b"}', row))
    assert "\n" not in str(error.value)


def test_a_question_that_the_model_cannot_read_is_named_with_its_line(tmp_path, model):
    config = model[1]
    tokenizer = Tokenizer.bytes_only()
    path = lines(tmp_path / "q.jsonl", QUESTION, QUESTION | {"choices": ["a", "b" * 60]})
    with pytest.raises(InputError, match=r"q\.jsonl, line 2: tokens of an answer = 61: .* max_length = 48"):
        as_pairs(tokenizer, config, read_questions(path))
    as_pairs(tokenizer, config, read_questions(path), "letters")  # of which it reads the letters alone


def test_no_questions(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(tmp_path / "none")
    with pytest.raises(InputError, match="holds no questions"):
        read_questions(lines(tmp_path / "empty", ""))


def test_answers_by_likelihood_and_by_length(model, monkeypatch):
    """The longer right choice wins only per character; a cloze counts when it is the greedy continuation."""
    params, config = model
    chosen = {" no": -4.0, " certainly": -6.0}

    def fake(params, config, pairs, depths, **options):
        texts = ["".join(map(chr, after)) for _, after in pairs]
        log_p = np.array([[chosen.get(t, -1.0) for t in texts]] * len(depths))
        greedy = np.array([[t == " yes" for t in texts]] * len(depths))
        return score.__globals__["Scores"](
            log_p, greedy, log_p * 0 + 3.0, np.zeros(len(texts)), np.array([4] * len(texts)), None
        )

    monkeypatch.setattr("rdlm.evaluation.questions.score", fake)
    tokenizer = Tokenizer.bytes_only()
    found = answer(params, config, tokenizer, [Choice("?", ("no", "certainly"), 1)], (3,))
    assert {way: right.tolist() for way, right in found.right.items()} == {"sum": [[False]], "per_character": [[True]]}
    assert found.nats.tolist() == [[6.0]]
    found = answer(params, config, tokenizer, [Cloze("a", " yes"), Cloze("a", " no")], (3,))
    assert found.right["greedy"].tolist() == [[True, False]]
    assert found.recurrences.tolist() == [3.0]


def test_wilson_covers():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Wilson 1927, as tabulated
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    rng, share, n = np.random.default_rng(0), 0.25, 60
    inside = [low <= share <= high for low, high in (wilson(int(k), n) for k in rng.binomial(n, share, 4000))]
    assert 0.94 < np.mean(inside) < 0.97
    counts = rng.binomial(40, 0.05, 4000)
    wald = [abs(k / 40 - 0.05) <= 1.96 * math.sqrt(k / 40 * (1 - k / 40) / 40) for k in counts]
    assert np.mean(wald) < 0.9 < np.mean([wilson(int(k), 40)[0] <= 0.05 <= wilson(int(k), 40)[1] for k in counts])


def test_bootstrap_draws_whole_questions():
    rng = np.random.default_rng(0)
    groups = [np.full(50, x) for x in rng.normal(size=40)]  # fifty equal tokens are no fifty observations
    mean, low, high = bootstrap_mean(groups)
    one_each = bootstrap_mean([g[:1] for g in groups])
    assert (mean, low, high) == pytest.approx(one_each)
    assert high - low > 0.4


def test_baselines():
    questions = [Choice("?", ("a", "bb"), 1), Choice("?", ("aa", "b", "cc", "d"), 0), Choice("?", ("a", "b"), 1)]
    assert baselines(questions) == pytest.approx(
        {"chance": (0.5 + 0.25 + 0.5) / 3, "majority": 2 / 3, "longest": (1 + 0.5 + 0.5) / 3, "shortest": 0.5 / 3}
    )


def test_steps_of_new_tokens(model):
    params, config = model
    rule, prompts = rdlm.exits.latent_diff(0.3), [np.arange(5), np.arange(3) + 9]
    found = answer_steps(params, config, prompts, rule, 12, new_tokens=6)
    warm = answer_steps(params, config, prompts, rule, 12, new_tokens=6, warm_start="raw")
    for prompt, steps in zip(prompts, found, strict=True):
        alone = rdlm.generate(params, config, [prompt], max_new_tokens=7, num_steps=12, exit_rule=rule)
        assert steps.tolist() == alone.steps[0][1:].tolist()  # the prompt's own token is left out
    assert np.concatenate(warm).mean() < np.concatenate(found).mean()
    with pytest.raises(InputError, match="new_tokens = 47"):
        answer_steps(params, config, prompts, rule, 12, new_tokens=47)


def wheel(path):
    listed = "Which?\nA. one\nB. two\nC. three\nD. four"
    rows = {
        "fcc": {"input": [{"content": "Answer."}, {"content": listed + "\n"}], "ideal": "C"},
        "mmlu": {"topic": "law", "question": listed + "\nAnswer:", "answer": "A"},
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, (member, _) in question_sets.SETS.items():
            archive.writestr(member, json.dumps(rows[name]) + "\n")
    return path


def test_sets_come_out_of_the_pinned_wheel(tmp_path, monkeypatch):
    made = wheel(tmp_path / "made.whl")
    with pytest.raises(InputError, match="its sha256 differs"):
        question_sets.read_set(made, "fcc")
    pinned = question_sets.WHEEL._replace(sha256=hashlib.sha256(made.read_bytes()).hexdigest())
    monkeypatch.setattr(question_sets, "WHEEL", pinned)
    monkeypatch.setattr(question_sets, "download_wheel", lambda pinned, folder, _: Path(wheel(folder / "x.whl")))
    expected = {"fcc": (2, "amateur radio"), "mmlu": (0, "law")}
    for name, (right, category) in expected.items():
        path = question_file(name, tmp_path)
        assert read_questions(path) == [Choice("Which?", ("one", "two", "three", "four"), right, category)]
    monkeypatch.setattr(question_sets, "download_wheel", lambda *_: pytest.fail("it is there"))
    question_file("fcc", tmp_path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["fcc.jsonl", "mmlu.jsonl"]


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        InputError, match=r"evals==\S+: cannot be downloaded \(.*; or give a file of questions of your own"
    ):
        question_file("fcc", tmp_path)
    assert list(tmp_path.iterdir()) == []
