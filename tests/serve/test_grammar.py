"""Schemas as grammars over the tokens of any tokenizer: no server, no model, a random choice of what is allowed."""

import asyncio
import json
import logging
import sys
import threading
import time

import numpy as np
import pytest
from foreign_tokenizers import load

import rdlm.serve.grammar
from rdlm.serve.errors import APIError
from rdlm.serve.grammar import ANY_OBJECT, MAX_SCHEMA, MAX_WAITING, Grammars
from rdlm.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": -9, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["é", "12", None, True]}, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
BYTES = Tokenizer.bytes_only()


def grammar(schema, tokenizer=BYTES, more=0):
    return asyncio.run(Grammars(tokenizer, tokenizer.vocab_size + more).of(schema))


def allowed(progress):
    return np.flatnonzero(np.unpackbits(progress.allowed().view(np.uint8), bitorder="little")).tolist()


def at_random(grammar, tokenizer, rng, most=200):
    """Tokens chosen from what is allowed, the last one included."""
    progress, tokens = grammar.start(), []
    while len(tokens) < most:
        tokens.append(int(rng.choice(allowed(progress))))
        if tokens[-1] in tokenizer.end_ids:
            break
        progress.accept(tokens[-1])
    return tokens


@pytest.mark.parametrize("kind", ["bytes", "learned", "llama2", "mistral", "gemma"])
def test_whatever_is_chosen_is_json_of_the_schema(kind, tmp_path):
    if kind == "bytes":
        tokenizer = BYTES
    elif kind == "learned":
        tokenizer = Tokenizer.train(['{"name": "the cat", "size": 12, "tags": [null, true]}'] * 9, 280)
    else:
        tokenizer = load(kind, tmp_path)
    rng, found = np.random.default_rng(0), grammar(SCHEMA, tokenizer)
    texts = set()
    for _ in range(20):
        tokens = at_random(found, tokenizer, rng)
        assert tokens[-1] in tokenizer.end_ids
        assert not {*tokens[:-1]} & {*tokenizer.special_ids.values()}
        text = tokenizer.decode(tokens, after=[tokenizer.bos_id])
        value = json.loads(text)
        assert list(value) == ["name", "size", "tags"]
        assert len(value["name"]) <= 5
        assert -9 <= value["size"] <= 99
        assert all(tag in ("é", "12", None, True) for tag in value["tags"])
        texts.add(text)
    assert len(texts) > 15


def test_a_key_of_an_answer_may_have_the_name_of_an_option():
    schema = {"type": "object", "properties": {"x-guidance": {"const": 1}}, "required": ["x-guidance"]}
    tokens = at_random(grammar(schema | {"additionalProperties": False}), BYTES, np.random.default_rng(0))
    assert BYTES.decode(tokens) == '{"x-guidance": 1}'


def test_a_complete_answer_can_only_end():
    progress = grammar({"type": "boolean"}).start()
    for token in b"true":
        assert not {*allowed(progress)} & {*BYTES.end_ids}
        progress.accept(token)
    assert allowed(progress) == list(BYTES.end_ids)


def test_answers_to_one_request_do_not_share_their_progress():
    found = grammar({"type": "boolean"})
    one, other = found.start(), found.start()
    one.accept(ord("t"))
    assert allowed(one) == [ord("r")]
    assert allowed(other) == [ord("f"), ord("t")]


def many(schema, levels):
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nope"}, "Invalid type: nope"),
        ({"type": "object", "properties": 5}, "properties must be an object"),
        ({"$ref": "https://example.com/schema"}, "cannot be compiled"),
        ({"$ref": "file:///etc/passwd"}, "cannot be compiled"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "cannot be compiled"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, "holds 'x-guidance'"),
        ({"type": "boolean", "x-guidance": None}, "holds 'x-guidance'"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"enum": [1, -(2**53) - 1]}, "holds -9007199254740993"),
        ({"enum": ["x" * MAX_SCHEMA]}, f"at most {MAX_SCHEMA}"),
        ({"type": "number", "minimum": float("inf")}, "not finite"),
        (many({"type": "boolean"}, 200), "recursion limit"),
        (many({"type": "boolean"}, 3000), "nested too deeply"),
        ({"enum": ["\ud800"]}, "cannot be compiled"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_one_line(schema, words):
    with pytest.raises(APIError) as refusal:
        grammar(schema)
    error = refusal.value
    assert (error.status, error.param) == (400, "response_format")
    assert words in error.message
    assert "\n" not in error.message
    assert len(error.message) < 300
    assert "llguidance {" not in error.message


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 99999999},
        {"type": "string", "allOf": [{"pattern": f"(a|b)*a(a|b){{{30 + i}}}c"} for i in range(40)]},
    ],
)
def test_a_schema_that_would_take_for_ever_is_refused_and_remembered(schema):
    grammars = Grammars(BYTES, BYTES.vocab_size)
    for seconds in (50.0, 0.5):
        begin = time.monotonic()
        with pytest.raises(APIError, match="too complex"):
            asyncio.run(grammars.of(schema))
        assert time.monotonic() - begin < seconds


def test_a_schema_that_is_too_complex_in_the_middle_of_an_answer():
    flags = {f"p{i}": {"type": "boolean"} for i in range(900)}
    progress = grammar({"type": "object", "properties": flags, "additionalProperties": False}).start()

    def write(text):
        for token in text:
            progress.allowed()
            progress.accept(token)

    with pytest.raises(APIError, match="too complex, the answer cannot go on") as refusal:
        write(b'{"p0":')
    assert (refusal.value.status, refusal.value.param) == (400, "response_format")


def test_any_object_is_always_remembered():
    async def ask():
        grammars = Grammars(BYTES, BYTES.vocab_size)
        for schema in (ANY_OBJECT, *({"const": i} for i in range(20))):
            await grammars.of(schema)
        grammars._threads.shutdown()  # whatever is not remembered fails now
        await grammars.of(ANY_OBJECT)
        with pytest.raises(RuntimeError):  # control
            await grammars.of({"const": 0})

    asyncio.run(ask())


def test_a_remembered_schema_waits_for_no_other_and_few_others_may_wait():
    async def ask():
        grammars, hold = Grammars(BYTES, BYTES.vocab_size), threading.Event()
        await grammars.of({"type": "boolean"})
        grammars._threads.submit(hold.wait)
        try:
            new = [*range(MAX_WAITING), 0]  # one is wanted twice
            waiting = [asyncio.create_task(grammars.of({"const": i})) for i in new]
            await asyncio.sleep(0)
            await asyncio.wait_for(grammars.of({"type": "boolean"}), 10)
            with pytest.raises(APIError, match="too many schemas") as refusal:
                await grammars.of({"const": "new"})
            assert refusal.value.status == 429
            assert "Retry-After" in refusal.value.headers
        finally:
            hold.set()
        found = await asyncio.gather(*waiting)
        assert found[0] is found[-1]
        await grammars.of({"const": "new"})

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("name", "value", "status", "words"),
    [
        ("_TRIAL", "raise SystemExit('no library')", 500, "its log says why"),
        ("_TRIAL", "print('begin')\nraise SystemExit('no library')", 500, "its log says why"),
        ("_TRIAL_SECONDS", 0.001, 503, "too busy"),
    ],
)
def test_a_failure_of_the_server_is_not_remembered_as_the_schemas(monkeypatch, caplog, name, value, status, words):
    grammars = Grammars(BYTES, BYTES.vocab_size)
    monkeypatch.setattr(rdlm.serve.grammar, name, value)
    monkeypatch.setattr(logging.getLogger("rdlm.serve"), "propagate", True)
    with pytest.raises(APIError, match=words) as refusal:
        asyncio.run(grammars.of(SCHEMA))
    assert refusal.value.status == status
    assert ("no library" in caplog.text) == (status == 500)
    monkeypatch.undo()
    asyncio.run(grammars.of(SCHEMA))


def test_a_signal_to_all_processes_of_the_server_does_not_end_the_one_that_compiles(monkeypatch):
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    monkeypatch.setattr(rdlm.serve.grammar, "_TRIAL", f"{kill}\n{rdlm.serve.grammar._TRIAL}")
    grammar(SCHEMA)
    with pytest.raises(APIError, match="cannot compile schemas"):  # control: from a thread that takes the signal
        rdlm.serve.grammar._tried("")


def test_schemas_are_tried_with_the_modules_that_the_server_has(monkeypatch, tmp_path):
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.setattr(rdlm.serve.grammar, "_TRIAL", f"import only_here\n{rdlm.serve.grammar._TRIAL}")
    with pytest.raises(APIError, match="cannot compile schemas"):  # control
        grammar(SCHEMA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    grammar(SCHEMA)


def test_tokens_are_read_before_the_first_request():
    grammars = Grammars(BYTES, BYTES.vocab_size)
    assert "_tokenizer" not in vars(grammars)
    grammars.prepare()
    grammars._threads.shutdown()
    assert "_tokenizer" in vars(grammars)


def test_what_such_an_answer_needs_and_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(APIError, match="does not say what the bytes of its tokens are"):
        grammar(SCHEMA, load("bert", tmp_path / "bert"))
    with pytest.raises(APIError, match="no token of this model can begin"):
        grammar(SCHEMA, load("t5", tmp_path / "t5"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(APIError, match=r"not installed on the server \(pip install llguidance\)"):
        grammar(SCHEMA)
