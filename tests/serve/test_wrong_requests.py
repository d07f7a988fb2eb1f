"""Wrong requests: the status, the field and the message of each, and nothing of the machine in any."""

import asyncio
import dataclasses
import json
import socket
import threading
import types

import httpx
import pytest

from rdlm.decode import Engine
from rdlm.serve.protocol import encode_texts
from rdlm.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

TEXT = {"prompt": "a", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
LONG = "a" * 40
NESTED = json.loads("[" * 900 + "]" * 900)

# (fields, the one that is named, words of the message)
WRONG_TEXTS = [
    ({"prompt": None}, "prompt", "must be a text"),
    ({"prompt": 5}, "prompt", "must be a text"),
    ({"prompt": []}, "prompt", "none of them empty"),
    ({"prompt": [[]]}, "prompt", "none of them empty"),
    ({"prompt": ["a", 1]}, "prompt", "must be a text"),
    ({"prompt": [1.5]}, "prompt", "must be a text"),
    ({"prompt": [-1]}, "prompt", "must be a text"),
    ({"prompt": [True]}, "prompt", "must be a text"),
    ({"prompt": [9999]}, "prompt", "9999 is no token"),
    ({"prompt": {"text": "a"}}, "prompt", "must be a text"),
    ({"prompt": "\ud800"}, "prompt", "Unicode"),
    ({"prompt": LONG, "max_tokens": None}, "prompt", "has 41 tokens, but at most 31 fit"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -1, "echo": True}, "max_tokens", "greater than or equal to 0"),
    ({"echo": 1}, "echo", "valid boolean"),
    ({"max_tokens": "3"}, "max_tokens", "valid integer"),
    ({"max_tokens": 2.5}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_tokens": 31}, "max_tokens", "exceed the context of 32"),
    ({"max_tokens": 10**30}, "max_tokens", "exceed the context of 32"),
    ({"prefix": True}, "prefix", "every token of this model sees only those before it"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"n": 100}, "n", "at most 64"),
    ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
    ({"seed": 1.5}, "seed", "valid integer"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": True, "stream_options": 1}, "stream_options", "valid dictionary"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "valid boolean"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"min_p": 2}, "min_p", "less than or equal to 1"),
    ({"top_p": 1e-310}, "top_p", "in (0, 1]"),
    ({"repetition_penalty": 1e-310}, "repetition_penalty", "from 1e-6"),
    ({"repetition_penalty": 1e-45}, "repetition_penalty", "from 1e-6"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
    ({"stop": ""}, "stop", "none of them empty"),
    ({"stop": [""]}, "stop", "none of them empty"),
    ({"stop": 3}, "stop", "must be a text"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ["x", "y" * 257]}, "stop", "longer than 256"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
    ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
    ({"logprobs": True}, "logprobs", "valid integer"),
    ({"num_steps": 0}, "num_steps", "greater than or equal to 1"),
    ({"num_steps": 9}, "num_steps", "9 is not in [1, 8]"),
    ({"num_steps": "deep"}, "num_steps", "valid integer"),
    ({"exit": "soon"}, "exit", "kl, latent_diff, none"),
    ({"exit": "gated_kl"}, "exit", "kl, latent_diff, none"),
    ({"exit": 1}, "exit", "valid string"),
    ({"threshold": -1}, "threshold", "greater than or equal to 0"),
    ({"exit": "none", "threshold": 0.1}, "threshold", "leave it out"),
    ({"min_steps": -1}, "min_steps", "greater than or equal to 0"),
    ({"priority": 1}, "priority", "1 is more than the 0 that this server allows (--max-priority)"),
    ({"priority": 101}, "priority", "less than or equal to 100"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
    ({"logit_bias": [1]}, "logit_bias", "must be an object"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "9999 is no token"),
    ({"min_tokens": 3}, "min_tokens", "more than the 2"),
    ({"min_tokens": 2, "stop_token_ids": [1, 2, 3, 4]}, "min_tokens", "at most 4"),
    ({"ignore_eos": 1}, "ignore_eos", "valid boolean"),
    ({"best_of": 3}, "best_of", "not served"),
    ({"suffix": "b"}, "suffix", "not served"),
]  # fmt: skip
WRONG_CHATS = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "valid list"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content", "valid"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type", "text"),  # noqa: E501
    ({"messages": [{"role": "user", "content": "\ufdd0"}]}, "messages", "U+FDD0"),
    ({"messages": [{"role": "user", "content": "a", "extra": NESTED}]}, "messages", "nested too deeply"),
    ({"messages": [{"role": "user", "content": LONG}]}, "messages", "tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "greater than or equal to 1"),
    ({"max_completion_tokens": 99}, "max_completion_tokens", "exceed the context"),
    ({"logprobs": 1}, "logprobs", "valid boolean"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"tools": [{"type": "function"}]}, "tools", "not served"),
]  # fmt: skip
ALL = [("completions", TEXT, *w) for w in WRONG_TEXTS] + [("chat/completions", CHAT, *w) for w in WRONG_CHATS]


def refused(response, status, param, words=""):
    """An error object that names the field and tells nothing of the machine."""
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    for secret in ("Traceback", "/work", "/tmp", "site-packages", ".py", "pydantic"):
        assert secret not in response.text
    return error


@pytest.mark.parametrize(("path", "right", "fields", "param", "words"), ALL)
def test_a_wrong_value_is_named(server, path, right, fields, param, words):
    body = json.dumps(right | fields)
    response = httpx.post(f"{server.url}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert refused(response, 400, param, words)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "JSON object"), ("x", "not JSON"), ("[]", "JSON object"), ("3", "JSON object"), ("null", "JSON object"),
        ('{"prompt": "a",', "not JSON"), ("[" * 100_000, "not JSON"), ("9" * 10_000, "not JSON"),
        ('{"prompt": "a", "temperature": NaN}', "temperature"), (b"\xff\xfe", "not JSON"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_object(server, content, words):
    response = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.fixture
def encoded_in(monkeypatch):
    """The thread in which each text was encoded."""
    threads, encode = [], Tokenizer.encode
    monkeypatch.setattr(
        Tokenizer, "encode", lambda *given: threads.append(threading.current_thread()) or encode(*given)
    )
    return threads


def test_too_many_prompts_are_refused_before_one_is_encoded(server, encoded_in):
    for prompts, n in (([""] * 300_000, 1), (["a"] * 33, 2), (["a"] * 65, None)):
        status, answer = server.post("completions", prompt=prompts, n=n)
        assert (status, answer["error"]["code"]) == (400, "too_many")
        assert f"{len(prompts) * (n or 1)} answers in one request, at most 64 may wait" in answer["error"]["message"]
    assert encoded_in == []
    assert server.post("completions", **TEXT)[0] == 200
    assert len(encoded_in) == 1, "the control: encoding is seen here"


def test_only_a_few_short_texts_are_encoded_in_the_event_loop(encoded_in):
    service, here = types.SimpleNamespace(tokenizer=Tokenizer.bytes_only()), threading.current_thread()
    for prompts, at_once in ((["a"] * 8, True), (["a" * 1001], False), ([""] * 9, False), ([[1]] * 9 + ["a"], True)):
        encoded_in.clear()
        found = asyncio.run(encode_texts(service, prompts))
        assert len(found) == len(prompts)
        assert {thread is here for thread in encoded_in} == {at_once}


def test_what_is_not_there(server):
    for path in ("/v2", "/v1/embeddings", "/../../etc/passwd", "/v1/models/../../etc/passwd", "/static/app.js"):
        response = httpx.get(server.url + path)
        assert response.status_code == 404
        assert "root:" not in response.text
        refused(response, 404, response.json()["error"]["param"])
    refused(httpx.get(f"{server.url}/v1/completions"), 405, None)
    refused(httpx.post(f"{server.url}/v1/completions", json=TEXT | {"model": "gpt-4"}), 404, "model", "only 'toy'")


def test_unknown_fields_are_ignored_or_refused(server, monkeypatch):
    extra = TEXT | {"user": "me", "frequency_penaltee": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=extra).status_code == 200
    with_flag = dataclasses.replace(server.service.options, refuse_unknown=True)
    monkeypatch.setattr(server.service, "options", with_flag)
    refused(httpx.post(f"{server.url}/v1/completions", json=extra), 400, "frequency_penaltee", "does not know")
    assert httpx.post(f"{server.url}/v1/completions", json=TEXT | {"user": "me"}).status_code == 200


def test_values_that_change_nothing_are_taken(server):
    nothing = {"best_of": 1, "suffix": None, "temperature": None, "n": None, "stop": None, "logprobs": None}
    assert server.post("completions", **TEXT, **nothing)[0] == 200
    nothing = {"tools": [], "response_format": {"type": "text"}, "logprobs": False, "tool_choice": "none"}
    assert server.post("chat/completions", **CHAT, **nothing)[0] == 200


def test_a_model_with_prefix_attention_is_asked_for_it(server, monkeypatch):
    config, seen, submit = dataclasses.replace(server.run.config, prefix_attention=True), [], Engine.submit
    monkeypatch.setattr(server.service, "run", types.SimpleNamespace(config=config))

    def noted(self, prompt, prefix, **options):
        seen.append(prefix)
        return submit(self, prompt, **options)

    monkeypatch.setattr(Engine, "submit", noted)
    for prefix in (True, False):
        assert server.post("completions", **TEXT, prefix=prefix)[0] == 200
    assert seen == [True, False]
    status, answer = server.post("completions", **TEXT, prefix=True, echo=True, logprobs=0)
    assert (status, answer["error"]["param"]) == (400, "prefix")


def test_a_large_body_is_refused_before_it_is_read(server):
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 104857600\r\n\r\n".encode())
        connection.settimeout(10)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    with httpx.Client() as client:  # of a length that is not said
        pieces = (b"x" * 2**16 for _ in range(40))
        response = client.post(f"{server.url}/v1/completions", content=pieces)  # which is read to its end
        refused(response, 413, None, "1048576 bytes")


def test_a_flood_of_headers_is_refused(server):
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        try:
            for i in range(5000):
                connection.sendall(f"X-{i}: {'a' * 100}\r\n".encode())
            answer = connection.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
        assert b" 400 " in answer or answer == b""
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_key_is_needed_where_there_are_keys(server):
    keys = server.service.keys
    keys.append(b"right")
    try:
        for value in ("", "Bearer wrong", "right", "Bearer", "Basic right", "Bearer right2"):
            response = httpx.get(f"{server.url}/v1/models", headers={"Authorization": value} if value else {})
            assert refused(response, 401, None)["code"] == "invalid_api_key"
            assert "right" not in response.text
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer right"}).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        keys.clear()
