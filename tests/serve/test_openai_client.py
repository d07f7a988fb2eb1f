"""What OpenAI's own client, unmodified, gets from the server."""

import asyncio

import jax
import numpy as np
import openai
import pytest

import rdlm
from rdlm import exits
from rdlm.config import Sampling
from rdlm.decode.requests import sample_keys

pytestmark = pytest.mark.slow

PROMPT = "The capital"
GREEDY = {"temperature": 0, "max_tokens": 8}


def expected(server, prompt=PROMPT, rule=None, **options):
    rule = exits.kl() if rule is None else rule
    options = {"max_new_tokens": 8, "num_steps": 8, "exit_rule": rule} | options
    return server.run.generate(prompt, **options)


def test_the_model_is_listed(client, server):
    (model,) = client.models.list().data
    assert model.id == client.models.retrieve("toy").id == server.service.name
    assert model.max_model_len == 32
    assert model.exits == ["kl", "latent_diff", "none"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_text_is_continued_as_by_the_library(client, server):
    out = expected(server)
    answer = client.completions.create(model="toy", prompt=PROMPT, **GREEDY, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    assert choice.text == out.text
    assert choice.token_ids == out.tokens[0].tolist()
    assert choice.steps == out.steps[0].tolist()
    assert choice.finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == len(server.run.tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == len(choice.steps)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.mean_steps == pytest.approx(np.mean(choice.steps), abs=1e-3)


def test_a_stream_says_the_same_in_pieces(client):
    whole = client.completions.create(model="toy", prompt=PROMPT, **GREEDY)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(model="toy", prompt=PROMPT, **GREEDY, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [r for chunk in chunks[:-1] for r in chunk.choices[0].steps] == whole.choices[0].steps
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_is_replied_to(client, server):
    messages = [{"role": "user", "content": "hi"}]
    limits = {"temperature": 0, "max_completion_tokens": 8}
    answer = client.chat.completions.create(model="toy", messages=messages, **limits)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected(server, messages).text
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    stream = list(client.chat.completions.create(model="toy", messages=parts, **limits, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in stream) == answer.choices[0].message.content
    assert stream[-1].choices[0].finish_reason == "length"


def test_async_streams_run_side_by_side(server):
    ask = {"model": "toy", "prompt": PROMPT, "max_tokens": 8, "stream": True}

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(seed):
                stream = await client.completions.create(**ask, seed=seed)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(seed) for seed in [*range(6), 0]))

    texts = asyncio.run(main())
    assert texts[0] == texts[-1]
    assert len(set(texts)) > 3
    assert texts[2] == expected(server, key=jax.random.key(2), sampling=Sampling(temperature=1.0)).text


def test_several_prompts_and_samples(client, server):
    prompts, options = ["The", "A river"], {"seed": 5, "temperature": 0.9, "max_tokens": 8}
    answer = client.completions.create(model="toy", prompt=prompts, n=3, **options)
    keys, sampling = sample_keys(jax.random.key(5)[None], 3), Sampling(temperature=0.9)
    outs = [expected(server, prompt, sampling=sampling, key=key) for prompt in prompts for key in keys]
    texts = [out.text for out in outs]
    assert len(set(texts)) > 3
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens == sum(len(out.tokens[0]) for out in outs)
    assert answer.usage.prompt_tokens == sum(len(server.run.tokenizer.encode(prompt)) for prompt in prompts)
    ids = [server.run.tokenizer.encode(prompt).tolist() for prompt in prompts]
    again = client.completions.create(model="toy", prompt=ids, n=3, **options)
    assert [choice.text for choice in again.choices] == texts
    single = client.completions.create(model="toy", prompt=ids[0], n=3, **options)
    assert [choice.text for choice in single.choices] == texts[:3]


def test_a_text_ends_before_a_stop_string(client):
    whole = client.completions.create(model="toy", prompt=PROMPT, **GREEDY).choices[0].text
    stop = whole[3:5]
    for stream in (False, True):
        answer = client.completions.create(model="toy", prompt=PROMPT, **GREEDY, stop=["never", stop], stream=stream)
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_tokens_that_stop_are_the_last(client):
    extra = {"return_token_ids": True}
    tokens = client.completions.create(model="toy", prompt=PROMPT, **GREEDY, extra_body=extra).choices[0].token_ids
    many = [*range(200, 204), tokens[4]] if tokens[4] not in range(200, 204) else [tokens[4]]
    first = next(i for i, token in enumerate(tokens) if token in many)
    extra = {**extra, "stop_token_ids": many}
    (choice,) = client.completions.create(model="toy", prompt=PROMPT, **GREEDY, extra_body=extra).choices
    assert choice.token_ids == tokens[: first + 1]
    assert choice.finish_reason == "stop"


def test_a_bias_decides_and_early_ends_are_put_off(client, server):
    bias, end = {"65": 100}, server.run.tokenizer.eos_id
    biased = client.completions.create(model="toy", prompt=PROMPT, **GREEDY, logit_bias=bias)
    assert biased.choices[0].text == "A" * 8
    ending = {"model": "toy", "prompt": PROMPT, **GREEDY, "logit_bias": {str(end): 100}}
    first = client.completions.create(**ending)
    assert (first.choices[0].finish_reason, first.usage.completion_tokens) == ("stop", 1)
    later = client.completions.create(**ending, extra_body={"min_tokens": 3})
    assert (later.choices[0].finish_reason, later.usage.completion_tokens) == ("stop", 4)
    never = client.completions.create(**ending, extra_body={"ignore_eos": True})
    assert (never.choices[0].finish_reason, never.usage.completion_tokens) == ("length", 8)
    tired = client.completions.create(**ending, frequency_penalty=2, extra_body={"ignore_eos": True})
    assert tired.usage.completion_tokens == 8


def test_without_a_limit_the_context_is_filled(client, server):
    answer = client.completions.create(model="toy", prompt="ab", temperature=0)
    ended = answer.choices[0].finish_reason == "stop"
    assert ended or answer.usage.total_tokens == server.service.max_context


def test_log_probabilities_are_those_of_the_library(client, server):
    out = expected(server)
    (choice,) = client.completions.create(model="toy", prompt=PROMPT, **GREEDY, logprobs=0).choices
    assert choice.logprobs.token_logprobs == pytest.approx(out.log_probs[0].tolist(), rel=1e-4)
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(out.tokens[0])
    chat = [{"role": "user", "content": "hi"}]
    (choice,) = client.chat.completions.create(model="toy", messages=chat, **GREEDY, logprobs=True).choices
    out = expected(server, chat)
    assert [t.logprob for t in choice.logprobs.content] == pytest.approx(out.log_probs[0].tolist(), rel=1e-4)
    plain = bytes(b for t, i in zip(choice.logprobs.content, out.tokens[0], strict=True) if i < 256 for b in t.bytes)
    assert plain.decode("utf-8", "replace") == choice.message.content


def test_the_likeliest_tokens_stand_beside_the_chosen_one(client, server):
    chat = [{"role": "user", "content": "hi"}]
    ask = {"model": "toy", "messages": chat, "max_tokens": 8, "seed": 2, "temperature": 1.5, "logprobs": True}
    for stream in (False, True):
        answer = client.chat.completions.create(**ask, top_logprobs=20, stream=stream)
        parts = [c.choices[0] for c in answer] if stream else answer.choices
        entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert len(entries) == 8
        for entry in entries:
            scores = [other.logprob for other in entry.top_logprobs]
            assert len(scores) == 20
            assert scores == sorted(scores, reverse=True)
            assert entry.logprob <= scores[0] + 1e-6
            same = [other.logprob for other in entry.top_logprobs if other.token == entry.token]
            assert same in ([], [pytest.approx(entry.logprob, abs=1e-5)])
        assert any(entry.logprob < entry.top_logprobs[0].logprob for entry in entries)  # sampled, so not always first
    greedy = client.completions.create(model="toy", prompt=PROMPT, **GREEDY, logprobs=3).choices[0].logprobs
    for token, score, others in zip(greedy.tokens, greedy.token_logprobs, greedy.top_logprobs, strict=True):
        assert max(others, key=others.get) == token
        assert others[token] == pytest.approx(score, abs=1e-5)
        assert len(others) == 3


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"num_steps": 3, "exit": "none"}, {"num_steps": 3, "exit_rule": None}),
        ({"exit": "none"}, {"num_steps": 4, "exit_rule": None}),
        ({"threshold": 0.3}, {"exit_rule": exits.kl(0.3)}),
        ({"exit": "latent_diff", "threshold": 0.4, "num_steps": 6},
         {"num_steps": 6, "exit_rule": exits.latent_diff(0.4)}),
        ({"exit": "latent_diff", "threshold": 0.4, "min_steps": 4},
         {"min_steps": 4, "exit_rule": exits.latent_diff(0.4)}),
    ],
)  # fmt: skip
def test_a_request_chooses_its_depth(client, server, fields, options):
    out = server.run.generate(PROMPT, **{"max_new_tokens": 8, "num_steps": 8} | options)
    (choice,) = client.completions.create(model="toy", prompt=PROMPT, **GREEDY, extra_body=fields).choices
    assert choice.steps == out.steps[0].tolist()
    assert choice.text == out.text


def test_text_becomes_tokens_and_back(server):
    ids = server.run.tokenizer.encode("héllo").tolist()
    assert server.post("tokenize", prompt="héllo") == (200, {"tokens": ids, "count": len(ids), "max_model_len": 32})
    assert server.post("tokenize", prompt="héllo", add_special_tokens=False)[1]["tokens"] == ids[1:]
    chat = [{"role": "user", "content": "hi"}]
    assert server.post("tokenize", messages=chat)[1]["tokens"] == server.run.tokenizer.encode_chat(chat).tolist()
    assert server.post("detokenize", tokens=ids[1:]) == (200, {"prompt": "héllo"})


def test_the_library_has_the_server():
    assert rdlm.serve.ServeOptions().lanes == 16
