"""A server of a toy model in this process, on a port of its own; one for all tests."""

import functools
import threading

import httpx
import openai
import pytest
from served import serving, until
from small_runs import saved

import rdlm
from rdlm.config import DataConfig
from rdlm.serve.options import ServeOptions
from rdlm.tokenizer import Tokenizer

CONTEXT = 32


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
    options = ServeOptions(lanes=4, prefill_chunk=8, exit=("kl", "latent_diff"), access_log=False)
    with serving(toy_run, options) as server:
        until(lambda: server.service.worker.ready or server.service.worker.failure, 300)
        assert server.service.worker.failure is None
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine may answer late: httpx itself gives up after 5 seconds."""
    for name in ("get", "post", "stream"):
        monkeypatch.setattr(httpx, name, functools.partial(getattr(httpx, name), timeout=120))


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
