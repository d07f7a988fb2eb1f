"""Scores of prompts, as lm-eval reads them."""

import pytest
from lm_eval.models.openai_completions import LocalCompletionsAPI

from rdlm import exits
from rdlm.evaluation.scoring import score
from rdlm.model import tensor_parallel
from rdlm.serve import worker
from rdlm.serve.depth import DepthChoice
from rdlm.serve.scores import PromptScores, score_prompt

pytestmark = pytest.mark.slow

CASES = [("The cap", "ital"), ("A", " river is"), ("Land 3", " ")]


def asked(server, **fields):
    """What lm-eval's local-completions sends, and how it reads the answers: (log-likelihoods, greedy?)."""
    tokens = server.run.tokenizer
    pairs = [(tokens.encode(before).tolist(), tokens.encode(after, bos=False).tolist()) for before, after in CASES]
    prompts, lengths = [before + after for before, after in pairs], [len(before) for before, _ in pairs]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    status, answer = server.post("completions", **body, **fields)
    assert status == 200, answer
    return pairs, answer, LocalCompletionsAPI.parse_logprobs(answer, prompts, lengths)


@pytest.mark.parametrize(
    ("fields", "rule", "depth"),
    [({"exit": "none", "num_steps": 3}, None, 3), ({"threshold": 0.3}, exits.kl(0.3), 8)],
)
def test_lm_eval_reads_the_likelihoods_that_evaluation_finds(server, fields, rule, depth):
    pairs, answer, found = asked(server, **fields)
    expected = score(server.run.params, server.run.config, pairs, [depth], exit_rule=rule)
    assert [value for value, _ in found] == pytest.approx(expected.log_likelihood[0].tolist(), rel=1e-5)
    assert [greedy for _, greedy in found] == expected.greedy[0].tolist()
    for choice, (before, after), text in zip(answer["choices"], pairs, CASES, strict=True):
        scores = choice["logprobs"]
        assert choice["text"].startswith("".join(text))
        assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
        assert len(scores["tokens"]) == len(before) + len(after) + 1
        assert len(choice["steps"]) == 1


def test_a_prompt_alone(server):
    body = {"prompt": "The capital", "max_tokens": 0, "echo": True, "logprobs": 2}
    status, answer = server.post("completions", **body)
    (choice,) = answer["choices"]
    assert (status, choice["text"], choice["finish_reason"]) == (200, "The capital", "length")
    assert (choice["steps"], answer["usage"]["completion_tokens"]) == ([], 0)
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    plain = server.post("completions", prompt="The capital", max_tokens=2, echo=True, temperature=0)[1]
    bare = server.post("completions", prompt="The capital", max_tokens=2, temperature=0)[1]
    assert plain["choices"][0]["text"] == "The capital" + bare["choices"][0]["text"]
    assert plain["choices"][0]["logprobs"] is None


def test_every_prompt_is_scored_once_and_never_two_in_one_round(server, monkeypatch):
    """So that requests of others get their tokens in between."""
    rounds, scored, go_on = [0], [], server.service.worker._round

    def count():
        rounds[0] += 1
        go_on()

    def made(_params, _config, prompt, _depth):
        scored.append((rounds[0], prompt.tolist()))
        return PromptScores([-float(len(prompt))] * (len(prompt) - 1), [[]] * (len(prompt) - 1))

    monkeypatch.setattr(server.service.worker, "_round", count)
    monkeypatch.setattr(worker, "score_prompt", made)
    prompts = [[5, 6], [5, 6, 7], [8, 9, 8, 9]]
    body = {"prompt": prompts, "n": 3, "max_tokens": 2, "echo": True, "logprobs": 0}
    status, answer = server.post("completions", **body)
    assert status == 200, answer
    assert [prompt for _, prompt in scored] == prompts
    assert len({at for at, _ in scored}) == len(prompts)
    for i, choice in enumerate(answer["choices"]):
        n = len(prompts[i // 3])
        assert choice["logprobs"]["token_logprobs"][:n] == [None] + [-float(n)] * (n - 1)
        assert len(choice["steps"]) == 2


def test_every_copy_of_the_model_scores_alike(server):
    run, choice = server.run, DepthChoice("kl", "kl", 3, exits.kl(0.3))
    prompt = run.tokenizer.encode("The capital")
    one = score_prompt(run.params, run.config, prompt, choice)
    found = score_prompt(*tensor_parallel(run.params, run.config, 1, data=2), prompt, choice)
    assert found.log_probs == pytest.approx(one.log_probs, rel=1e-5)
    assert [[token for token, _ in row] for row in found.likeliest] == [[t for t, _ in row] for row in one.likeliest]
