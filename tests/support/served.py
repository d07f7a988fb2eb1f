"""A server in a thread of this process, and waiting for what it does."""

import asyncio
import contextlib
import dataclasses
import time

import httpx

from rdlm.serve import in_thread
from rdlm.serve.service import Service


@dataclasses.dataclass
class Server:
    """A running server and the model it serves."""

    url: str
    service: Service
    loop: asyncio.AbstractEventLoop
    requests: set[asyncio.Task]  # that are being served

    @property
    def run(self):
        return self.service.run

    def post(self, path, **body):
        """(status, answer) of a request."""
        response = httpx.post(f"{self.url}/v1/{path}", json=body, timeout=120)
        return response.status_code, response.json()

    def settle(self):
        """Wait until nobody holds anything any more: no request, no lane."""
        engines = self.service.worker.engines.values()
        until(lambda: not self.requests and not self.service._calls and not self.service.worker._active)
        until(lambda: not any(s is not None and not s.done for e in engines for s in e._schedule.serving))


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(run, options):
    """Serve in a thread until the end of the block."""
    with in_thread(run, options) as server:
        yield Server(server.url, server.service, server.service._loop, server.tasks)
