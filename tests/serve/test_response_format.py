"""`response_format`: even a model of random weights answers with JSON of the schema."""

import concurrent.futures
import dataclasses
import json
from typing import Literal

import httpx
import openai
import pydantic
import pytest
from test_wrong_requests import refused

import rdlm.serve.grammar
from rdlm.decode.lanes import advance, insert
from rdlm.decode.loop import begin, read_chunk
from rdlm.serve.errors import wrong

pytestmark = pytest.mark.slow


class Seen(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    ok: bool
    n: Literal[1, 2, 3, 4]


def format_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema, "strict": True}}


SEEN = format_of(Seen.model_json_schema())
DIGIT = format_of({"type": "integer", "minimum": 0, "maximum": 9})
ASK = {"prompt": "a", "max_tokens": 28, "temperature": 1.0}


def programs():
    return [f._cache_size() for f in (begin, read_chunk, insert, advance)]


def test_an_answer_follows_its_schema(server):
    free, before = server.post("completions", **ASK, seed=3), programs()
    status, answer = server.post("completions", **ASK, n=6, seed=3, response_format=SEEN)
    assert status == 200
    for choice in answer["choices"]:
        Seen.model_validate_json(choice["text"])
        assert choice["finish_reason"] == "stop"
        assert len(choice["steps"]) == len(choice["text"]) + 1  # the end
    assert len({choice["text"] for choice in answer["choices"]}) > 2
    assert programs() == before
    with pytest.raises(pydantic.ValidationError):  # control: without
        Seen.model_validate_json(free[1]["choices"][0]["text"])
    assert (
        server.post("completions", **ASK, seed=3, response_format={"type": "text"})[1]["choices"] == free[1]["choices"]
    )


def test_others_get_what_they_get_anyway(server):
    asks = [ASK | {"seed": i, "exit": ("kl", "latent_diff", "none")[i % 3], "num_steps": 1 + i % 8} for i in range(12)]
    mixed = [ask | {"response_format": SEEN} if i % 2 else ask for i, ask in enumerate(asks)]
    alone = [server.post("completions", **ask)[1]["choices"] for ask in mixed]
    with concurrent.futures.ThreadPoolExecutor(len(mixed)) as pool:
        together = list(pool.map(lambda ask: server.post("completions", **ask)[1]["choices"], mixed))
    assert together == alone
    for choices in alone[1::2]:
        Seen.model_validate_json(choices[0]["text"])


def test_the_openai_client_parses_the_answer(client):
    class Digit(pydantic.BaseModel):
        a: Literal[1, 2, 3]

    for messages in ([{"role": "user", "content": ""}], [{"role": "user", "content": "x"}]):
        answer = client.chat.completions.parse(model="toy", messages=messages, response_format=Digit, seed=1)
        assert answer.choices[0].message.parsed.a in (1, 2, 3)
        assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="toy", messages=messages, response_format=Digit, max_completion_tokens=3)


def test_a_stream_says_the_same_in_pieces(client):
    ask = {"model": "toy", "messages": [{"role": "user", "content": ""}], "seed": 5, "response_format": DIGIT}
    whole = client.chat.completions.create(**ask).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert whole.message.content.isdigit()
    assert chunks[-1].finish_reason == whole.finish_reason == "stop"


def test_it_goes_with_the_other_fields(server):
    def answer(**fields):
        status, got = server.post("completions", **ASK | {"seed": 2, "response_format": SEEN} | fields)
        assert status == 200, got
        return got["choices"][0]

    plain = answer()
    cut = answer(max_tokens=5)
    assert (cut["text"], cut["finish_reason"]) == (plain["text"][:5], "length")
    stopped = answer(stop=[","])
    assert (stopped["text"], stopped["finish_reason"]) == (plain["text"].split(",")[0], "stop")
    assert answer(stop_token_ids=[ord(":")])["text"] == '{"ok":'
    assert '"n": 4' in answer(logit_bias={str(ord("4")): 100})["text"]
    greedy = answer(temperature=0, repetition_penalty=1.5, top_p=0.5)
    Seen.model_validate_json(greedy["text"])
    assert answer(prompt="a longer one", max_tokens=8)["text"].startswith('{"ok": ')  # read in chunks
    scored = answer(echo=True, logprobs=2)
    assert scored["text"] == "a" + plain["text"]
    own = scored["logprobs"]
    assert all(p < 0 for p in own["token_logprobs"][1:])
    # The model's own: before the mask, which seldom leaves the likeliest.
    best = [max(top, key=top.get) for top in own["top_logprobs"][1:]]
    assert sum(x == y for x, y in zip(best, own["tokens"][1:], strict=True)) < 10
    any_object = answer(response_format={"type": "json_object"}, logit_bias={str(ord("}")): 100})
    assert json.loads(any_object["text"]) == {}


JSON = {"type": "json_object"}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "valid dictionary"),
        ({"response_format": {}}, "response_format.type", "missing"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "missing"),  # noqa: E501
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}, "response_format.json_schema.schema", "valid dictionary"),  # noqa: E501
        ({"response_format": JSON | {"json_schema": {"schema": {}}}}, "response_format", "takes no json_schema"),
        ({"response_format": format_of({"type": "nope"})}, "response_format", "Invalid type: nope"),
        ({"response_format": format_of({"enum": ["x" * 70_000]})}, "response_format", "at most 65536"),
        ({"response_format": format_of({"type": "nope"}), "max_tokens": 99}, "max_tokens", "exceed the context"),
        ({"response_format": JSON, "min_tokens": 2}, "min_tokens", "leave one of them out"),
        ({"response_format": JSON, "ignore_eos": True}, "ignore_eos", "leave one of them out"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(server, fields, param, words):
    refused(httpx.post(f"{server.url}/v1/completions", json=ASK | fields), 400, param, words)
    assert server.post("completions", **ASK, response_format=DIGIT)[1]["choices"][0]["text"].isdigit()


def test_a_grammar_that_fails_ends_its_own_answer(server, monkeypatch):
    accept, sick = rdlm.serve.grammar.InGrammar.accept, []

    def fails(self, token):
        accept(self, token)
        sick.append(token)
        if len(sick) == 4:
            raise wrong("response_format", "the answer cannot go on (on purpose)")

    other = server.post("completions", **ASK, seed=1)[1]["choices"]
    monkeypatch.setattr(rdlm.serve.grammar.InGrammar, "accept", fails)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        bad = pool.submit(server.post, "completions", **ASK, response_format=SEEN)
        good = pool.submit(server.post, "completions", **ASK, seed=1)
    status, answer = bad.result()
    assert (status, answer["error"]["param"]) == (400, "response_format")
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert "cannot go on" in answer["error"]["message"]
    assert good.result()[1]["choices"] == other
    monkeypatch.undo()
    assert server.post("completions", **ASK, response_format=DIGIT)[0] == 200


def test_a_grammar_that_fails_at_once_ends_its_own_answer(server, monkeypatch):
    def fails(self):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(rdlm.serve.grammar.InGrammar, "allowed", fails)
    status, answer = server.post("completions", **ASK, response_format=SEEN)
    assert (status, answer["error"]["code"]) == (500, "engine_error")
    monkeypatch.undo()
    assert server.post("completions", **ASK, response_format=DIGIT)[0] == 200


def test_the_time_of_a_request_begins_once(server, rounds, monkeypatch):
    service = server.service
    of, options = service.grammars.of, service.options

    async def then_patient(schema):
        monkeypatch.setattr(service, "options", dataclasses.replace(options, request_timeout=1000.0))
        return await of(schema)

    monkeypatch.setattr(service.grammars, "of", then_patient)
    for stream in (False, True):
        monkeypatch.setattr(service, "options", dataclasses.replace(options, request_timeout=0.3))
        body = ASK | {"response_format": DIGIT, "stream": stream}
        assert '"timeout"' in httpx.post(f"{server.url}/v1/completions", json=body).text
        assert service.options.request_timeout == 1000
