"""A server in a thread of this process, and waiting for what it does."""

import asyncio
import contextlib
import dataclasses
import threading
import time

import httpx
import uvicorn

from rdlm.serve.app import make_app
from rdlm.serve.server import open_socket
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
        engines = self.service.worker._engines.values()
        until(lambda: not self.requests and not self.service._calls and not self.service.worker._active)
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
        yield Server(f"http://127.0.0.1:{listening.getsockname()[1]}", service, loops[0], server.server_state.tasks)
    finally:
        server.should_exit = True
        thread.join()
