"""Full queues, clients that leave or do not read, failures, and the end."""

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import inspect
import json
import logging
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor as Pool

import httpx
import pytest
from served import serving, until
from small_runs import saved
from uvicorn.protocols.http import h11_impl

import rdlm
import rdlm.decode.running
import rdlm.serve.grammar
from rdlm.config import InputError
from rdlm.decode.loop import begin
from rdlm.serve.app import make_app
from rdlm.serve.errors import APIError
from rdlm.serve.guard import LOG
from rdlm.serve.options import ServeOptions
from rdlm.serve.server import _is_news, open_socket
from rdlm.serve.service import Call, Service
from rdlm.serve.worker import End, Token, Worker

pytestmark = pytest.mark.slow

LONG = {"prompt": "ab", "max_tokens": 24, "temperature": 1, "seed": 3}


def options(server, monkeypatch, **changed):
    monkeypatch.setattr(server.service, "options", dataclasses.replace(server.service.options, **changed))


@contextlib.contextmanager
def streams(server, count, **fields):
    """So many requests whose answers have begun."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(httpx.Client(timeout=60))
        body = LONG | {"stream": True} | fields
        yield [
            stack.enter_context(client.stream("POST", f"{server.url}/v1/completions", json=body)) for _ in range(count)
        ]


def events(response):
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def busy_lanes(server):
    return sum(
        s is not None and not s.done
        for engine in server.service.worker.engines.values()
        for s in engine._schedule.serving
    )


def test_a_full_queue_refuses_until_there_is_room(server, rounds, monkeypatch):
    options(server, monkeypatch, max_queue=2)
    with streams(server, 6) as waiting:  # four lanes, two in the queue
        assert [response.status_code for response in waiting] == [200] * 6
        response = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        rounds.release(1000)
        assert [events(response)[-1] for response in waiting] == ["[DONE]"] * 6
    until(lambda: not server.service._calls)
    assert httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60).status_code == 200


def test_a_full_queue_of_one_rule_refuses_nobody_of_another(server, rounds, monkeypatch):
    options(server, monkeypatch, max_queue=2)
    with streams(server, 6, exit="kl") as waiting, streams(server, 6, exit="latent_diff") as others:
        # six of each: four lanes, and two in the queue that both share
        assert [response.status_code for response in waiting] == [200] * 6
        assert [response.status_code for response in others] == [200] * 4 + [429] * 2
        rounds.release(1000)


def test_requests_that_gave_up_their_lanes_fill_the_queue(server, rounds, monkeypatch):
    options(server, monkeypatch, max_queue=4)
    before, slow = server.service.worker.preempted, {"exit": "none", "num_steps": 8}  # at most a token in each round
    with streams(server, 4, priority=-1, **slow) as low:
        rounds.release(6)
        until(lambda: server.service.running == 4)
        with streams(server, 4, **slow) as high:
            assert [response.status_code for response in high] == [200] * 4
            rounds.release(6)
            until(lambda: server.service.running == 8)
            assert server.service.worker.preempted >= before + 4
            with streams(server, 1) as more:
                assert more[0].status_code == 429
            rounds.release(1000)
            assert [events(response)[-1] for response in (*low, *high)] == ["[DONE]"] * 8


def schema(digit):
    """Only this digit is an answer."""
    return {"type": "json_schema", "json_schema": {"name": "digit", "schema": {"const": digit}}}


@contextlib.contextmanager
def schema_in_the_works(monkeypatch):
    """(set once a schema is being compiled, set to let it be done)."""
    begun, go_on = threading.Event(), threading.Event()

    def tried(grammar):
        begun.set()
        go_on.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(rdlm.serve.grammar, "_tried", tried)
        try:
            yield begun, go_on
        finally:
            go_on.set()


def asked(server, fields):
    """The socket of a request that has just been sent."""
    body, (host, port) = json.dumps(fields), server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}\r\n\r\n{body}".encode())
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_lanes_within_one_step(server, rounds, stream):
    with asked(server, LONG | {"n": 2, "stream": stream}):
        until(lambda: server.service._calls)
        rounds.release(2)
        until(lambda: busy_lanes(server) == 2)
    until(lambda: not server.service._calls)
    rounds.release(2)  # one may be under way
    until(lambda: busy_lanes(server) == 0, 5)


def test_requests_come_and_hang_up_and_no_lane_is_lost(server):
    expected = server.post("completions", **LONG)[1]["choices"]
    for i in range(12):
        with streams(server, 3, n=1 + i % 3) as responses:
            for response in responses[: i % 3]:
                next(response.iter_lines())
    server.settle()
    assert busy_lanes(server) == 0
    assert server.post("completions", **LONG)[1]["choices"] == expected


def test_a_slow_reader_loses_its_request_alone():
    async def main():
        call = Call(2, max_buffer=3)
        call.put(0, [Token("a", 1, 2, -1.0)] * 3)
        assert len(await call.take()) == 3  # it has caught up
        call.put(0, [Token("a", 1, 2, -1.0)] * 2)
        call.put(1, [Token("a", 1, 2, -1.0), End("stop")])
        with pytest.raises(APIError, match="too slowly"):
            await call.take()

    asyncio.run(main())


async def straight(server, receive, send):
    """A stream without a socket; `receive` says when the client hangs up. Returns its line of the log."""
    given = [{"type": "http.request", "body": json.dumps(LONG | {"stream": True}).encode(), "more_body": False}]

    async def body_first():
        return given.pop() if given else await receive()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "root_path": "",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "scheme": "http",
        "server": ("x", 1), "client": ("x", 1), "http_version": "1.1", "asgi": {"version": "3.0"},
    }  # fmt: skip
    noted = []
    app = make_app(server.service)
    app._options = dataclasses.replace(app._options, access_log=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LOG, "info", lambda line: noted.append(json.loads(line)))
        await app(scope, body_first, send)
    (line,) = noted
    return line


def on_loop(server, coroutine, seconds=20):
    return asyncio.run_coroutine_threadsafe(coroutine, server.loop).result(seconds)


@pytest.mark.parametrize("ticks", range(8))
def test_a_client_that_hangs_up_while_it_is_written_to_is_noticed(server, rounds, ticks):
    async def main():
        left = asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            left.set()
            for _ in range(ticks):
                await asyncio.sleep(0)

        return await asyncio.wait_for(straight(server, receive, send), 5)

    assert on_loop(server, main())["status"] == 499


def test_a_client_that_takes_nothing_is_left(server, monkeypatch):
    options(server, monkeypatch, write_timeout=0.2)

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    told = on_loop(server, straight(server, receive, send))
    server.settle()
    assert (told["status"], told["error"]) == (503, "slow_reader")


def test_uvicorn_does_not_say_again_that_a_slow_reader_lost_its_answer():
    text = "ASGI callable returned without completing response."  # as uvicorn writes it
    assert text in inspect.getsource(h11_impl)
    for said, shown in ((text, False), ("Exception in ASGI application\n", True)):
        assert _is_news(logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, said, None, None)) is shown


def test_a_request_that_takes_too_long_ends(server, rounds, monkeypatch):
    options(server, monkeypatch, request_timeout=0.3)
    response = httpx.post(f"{server.url}/v1/completions", json=LONG)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    with streams(server, 1) as (response,):
        error, done = events(response)
        assert json.loads(error)["error"]["code"] == "timeout"
        assert done == "[DONE]"


def test_a_failure_of_the_engine_is_told_and_shows_in_health_until_it_works_again(server, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("/secret/path: the device is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(rdlm.decode.running, "advance", fail)
        status, answer = server.post("completions", **LONG)
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (500, "engine_error", "server_error")
        assert "secret" not in str(answer)
        with streams(server, 1) as (response,):
            error, done = events(response)[-2:]
            assert json.loads(error)["error"]["code"] == "engine_error"
            assert done == "[DONE]"
        assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.post("completions", **LONG)[0] == 200
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_logits_that_are_not_finite_end_their_request_alone(server, rounds, monkeypatch):
    worker, begin = server.service.worker, Worker._begin

    def poisoned(self, answer):
        begin(self, answer)
        if answer.sample == 1:  # as the engine does it for such a row
            answer.served._end(rdlm.decode.running.not_finite("request", 0))

    monkeypatch.setattr(worker, "_begin", poisoned.__get__(worker))
    with streams(server, 1, n=1) as (good,), streams(server, 1, n=2) as (bad,):
        rounds.release(1000)
        assert "not finite" in json.loads(events(bad)[-2])["error"]["message"]
        assert events(good)[-1] == "[DONE]"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_server_that_stops_ends_its_streams(server, rounds, monkeypatch):
    options(server, monkeypatch, grace=0.5)
    monkeypatch.setattr(server.service, "draining", False)
    monkeypatch.setattr(server.service, "_expired", server.loop.create_future())
    with streams(server, 1) as (response,), schema_in_the_works(monkeypatch) as (begun, _), Pool(1) as pool:
        compiling = pool.submit(server.post, "completions", **LONG, response_format=schema(1))
        begun.wait(60)
        server.loop.call_soon_threadsafe(server.service.drain)
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
        error, done = events(response)
        assert json.loads(error)["error"]["code"] == "stopping"
        assert done == "[DONE]"
        status, answer = compiling.result(60)
        assert (status, answer["error"]["code"]) == (503, "stopping")


def test_probes_may_ask_with_head_and_the_schema_has_the_version_of_the_package(server):
    for path in ("health", "ready"):
        response = httpx.head(f"{server.url}/{path}")
        assert (response.status_code, response.content) == (200, b"")
    schema = httpx.get(f"{server.url}/openapi.json").json()
    assert schema["info"]["version"] == importlib.metadata.version("rdlm")
    assert list(schema["paths"]["/health"]) == ["get"]


def test_before_everything_is_compiled_nothing_is_served(toy_run, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(Worker, "_warm_up", lambda self, depth: go_on.wait(60))
    with serving(toy_run, ServeOptions(lanes=4, exit=("kl",), access_log=False)) as server:
        for path in ("health", "ready"):
            response = httpx.get(f"{server.url}/{path}")
            assert (response.status_code, response.json()["status"]) == (503, "warming_up")
        assert server.post("completions", **LONG)[0] == 503
        go_on.set()
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)


def test_a_long_prompt_whose_tokens_see_each_other_compiles_nothing(toy_run, tmp_path):
    shape = {"prefix_attention": True, "max_length": 32}
    folder = saved(
        tmp_path / "toy", toy_run.config.vocab_size, {"data": toy_run.run_config.data}, toy_run.tokenizer, **shape
    )
    with serving(rdlm.load(folder), ServeOptions(lanes=2, prefill_chunk=8, exit=("none",), access_log=False)) as server:
        until(lambda: server.service.worker.ready or server.service.worker.failure, 300)
        programs = begin._cache_size()
        for length in (3, 9, 17, 31):
            assert server.post("completions", prompt=[1] * length, max_tokens=1, prefix=True)[0] == 200
        assert begin._cache_size() == programs


@contextlib.contextmanager
def beside(work):
    """A thread that works while the main thread does something else; its errors are raised at the end."""
    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:
            errors.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join()
    assert not errors, errors


def free_port():
    with contextlib.closing(open_socket("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def ready(url):
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/ready").status_code == 200
    return False


def test_a_priority_reaches_the_engine(server, monkeypatch):
    engine, seen = server.service.worker.engines["kl"], []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda *given, **options: seen.append(options) or submit(*given, **options))
    with monkeypatch.context() as patch:
        options(server, patch, max_priority=7)
        given = [{}, {"priority": -100}, {"priority": 7}]
        for fields in given:
            assert server.post("completions", prompt="a", max_tokens=1, **fields)[0] == 200
        assert server.post("completions", prompt="a", max_tokens=1, priority=8)[0] == 400
    assert [options["priority"] for options in seen] == [0, -100, 7]
    for priority, status in ((0, 200), (1, 400)):
        assert server.post("completions", prompt="a", max_tokens=1, priority=priority)[0] == status


def test_the_command_serves_until_a_signal_and_ends_what_it_has_begun(toy_run, server, command, monkeypatch):
    url, seen = f"http://127.0.0.1:{(port := free_port())}", []

    def client():
        until(lambda: ready(url), 120)
        ask = LONG | {"max_tokens": 9, "response_format": schema(2)}
        with schema_in_the_works(monkeypatch) as (begun, go_on), Pool(1) as pool:
            compiling = pool.submit(httpx.post, f"{url}/v1/completions", json=ask, timeout=60)
            begun.wait(60)
            with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=60) as response:
                os.kill(os.getpid(), signal.SIGTERM)
                seen.extend(events(response))
            until(lambda: not ready(url))
            go_on.set()
            assert compiling.result().json()["choices"][0]["text"] == "2"

    with beside(client):
        flags = ("--lanes", "4", "--exit", "kl", "latent_diff", "--port", port)
        code, _out, err = command("serve", toy_run.folder, *flags)
    assert code == 0
    assert seen[-1] == "[DONE]"
    assert json.loads(seen[-2])["choices"][0]["finish_reason"] in ("length", "stop")
    line, other = sorted(map(json.loads, err.splitlines()[-2:]), key=lambda line: line["completion_tokens"] == 2)
    assert (other["status"], other["completion_tokens"]) == (200, 2)  # "2" and its end
    assert (line["path"], line["status"], line["prompt_tokens"]) == ("/v1/completions", 200, 3)
    assert line["completion_tokens"] == sum(len(json.loads(e)["choices"][0]["steps"]) for e in seen[:-1])
    assert "ab" not in {*line.values()}


def test_the_command_ends_when_the_engine_cannot_go_on(toy_run, server, command, monkeypatch):
    url, seen = f"http://127.0.0.1:{(port := free_port())}", []

    def client():
        until(lambda: ready(url), 120)
        monkeypatch.setattr(Worker, "_round", lambda self: 1 / 0)
        seen.append(httpx.post(f"{url}/v1/completions", json=LONG, timeout=60))

    with beside(client), pytest.raises(ZeroDivisionError):
        command("serve", toy_run.folder, "--lanes", "4", "--exit", "kl", "latent_diff", "--port", port)
    assert seen[0].status_code == 500
    assert seen[0].json()["error"]["code"] == "engine_error"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--exit", "gate"], ["--exit gate", "no exit gate"]),
        (["--exit", "kl", "kl"], ["--exit", "twice"]),
        (["--lanes", "0"], ["--lanes", "at least 1"]),
        (
            ["--lanes", "100000000"],
            ["--lanes 100000000", "GiB", "--max-context, --cache-recurrences or"],
        ),
        (["--prompt-cache", "900000"], ["--lanes 16", "900,000.0 GiB for prompts", "or --prompt-cache"]),
        (["--prompt-cache", "1e-12"], ["--prompt-cache 1e-12", "give at least 0.0", "GiB, or 0"]),
        (["--max-context", "33"], ["--max-context", "32"]),
        (["--max-context", "32", "--cache-tokens", "31"], ["--cache-tokens", "at least --max-context 32"]),
        (["--cache-tokens", "0"], ["--cache-tokens", "at least 1"]),
        (["--steps", "9", "--max-steps", "8"], ["--steps", "--max-steps 8"]),
        (["--threshold", "-1"], ["--threshold"]),
        (["--api-key-file", "/no/such/file"], ["--api-key-file", "cannot be read"]),
        (["--port", "70000"], ["--port", "65535"]),
        (["--host", "256.1.1.1"], ["--host 256.1.1.1", "choose another"]),
        (["--grace", "0"], ["--grace", "above 0"]),
        (["--max-priority", "101"], ["--max-priority", "in [0, 100]"]),
    ],
)
def test_wrong_flags_are_named_in_one_line(toy_run, command, flags, words):
    code, out, err = command("serve", toy_run.folder, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in err


def test_the_least_prompt_cache_that_is_named_is_enough(toy_run):
    def worker(room):
        options = ServeOptions(lanes=4, prefill_chunk=8, exit=("latent_diff", "kl"), prompt_cache=room)
        return Service(toy_run, options).worker

    with pytest.raises(InputError, match="give at least") as refusal:
        worker(1e-9).require_memory()
    least = float(re.search("at least ([0-9.]+) GiB", str(refusal.value))[1])
    with pytest.raises(InputError):
        worker(least - 2e-6).require_memory()
    worker(least).require_memory()
    for kind in ("latent_diff", "kl"):
        worker(least)._engine(kind)
    with pytest.raises(InputError, match="prompt_cache = "):  # control: the engine agrees
        worker(least - 2e-6)._engine("kl")


def test_a_folder_that_is_absent_is_named_with_what_is_needed(command, tmp_path):
    code, out, err = command("serve", tmp_path / "none")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{tmp_path / 'none'}: does not exist; give a run folder" in err
    assert "or a Hugging Face folder" in err


def test_a_port_that_is_taken_is_named(toy_run, server, command):
    port = server.url.rpartition(":")[2]
    code, _, err = command("serve", toy_run.folder, "--port", port)
    assert code == 2
    assert f"--port {port}" in err


def test_an_empty_key_file_is_refused(toy_run, command, tmp_path):
    (tmp_path / "keys").write_text("\n")
    code, _, err = command("serve", toy_run.folder, "--api-key-file", tmp_path / "keys")
    assert code == 2
    assert "holds no key" in err
