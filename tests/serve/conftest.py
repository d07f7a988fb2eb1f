"""A server of a toy model in this process, on a port of its own; one for all tests."""

import asyncio
import contextlib
import dataclasses
import threading
import time

import httpx
import jax
import openai
import pytest
import uvicorn
from small_runs import saved

import rdlm
from rdlm.config import DataConfig
from rdlm.serve.app import make_app
from rdlm.serve.options import ServeOptions
from rdlm.serve.server import open_socket
from rdlm.serve.service import Service
from rdlm.tokenizer import Tokenizer

CONTEXT = 32


@dataclasses.dataclass
class Server:
    """A running server and the model it serves."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop

    @property
    def run(self):
        return self.service.run

    def post(self, path, **body):
        """(status, answer) of a request."""
        response = httpx.post(f"{self.url}/v1/{path}", json=body, timeout=120)
        return response.status_code, response.json()

    def settle(self):
        """Wait until nobody holds anything any more: no request, no lane."""
        engines = self.service.worker._engines.values()
        until(lambda: not self.service._calls and not self.service.worker._active)
        until(lambda: not any(s is not None and not s.done for e in engines for s in e._serving))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(service):
    """Serve in a thread until the end of the block."""
    listening = open_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_config=None, timeout_graceful_shutdown=5))
    loops = []

    async def main():
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listening])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        until(lambda: server.started)
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", service, loops[0])
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    tokenizer = Tokenizer.bytes_only()
    data = DataConfig(tokenizer_size=tokenizer.vocab_size, sequence_length=24, batch_size=2)
    folder = tmp_path_factory.mktemp("served") / "toy"
    saved(folder, tokenizer.vocab_size, {"data": data}, tokenizer, max_length=CONTEXT)
    return rdlm.load(folder)


@pytest.fixture(scope="session")
def server(toy_run):
    """Four lanes for each of two kinds of rules, at most 8 recurrences."""
    jax.config.update("jax_disable_most_optimizations", True)
    with serving(Service(toy_run, ServeOptions(lanes=4, exit=("kl", "latent_diff"), access_log=False))) as server:
        until(lambda: server.service.worker.ready or server.service.worker.failure, 300)
        jax.config.update("jax_disable_most_optimizations", False)
        assert server.service.worker.failure is None
        yield server


@pytest.fixture
def client(server):
    """OpenAI's client, as it is."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def rounds(server, monkeypatch):
    """The engine stands still; `rounds.release(n)` lets it take n more steps."""
    allowed, go_on = threading.Semaphore(0), server.service.worker._round

    def wait():
        allowed.acquire(timeout=60)
        go_on()

    monkeypatch.setattr(server.service.worker, "_round", wait)
    yield allowed
    monkeypatch.undo()
    allowed.release(1000)
    server.settle()
