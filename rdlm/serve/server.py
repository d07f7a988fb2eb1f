"""A server as a process, with its signals and its end; or in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from rdlm.config import InputError
from rdlm.runtime import is_alone, is_first, together
from rdlm.serve.options import ServeOptions

if TYPE_CHECKING:
    import uvicorn

    from rdlm.run import Run
    from rdlm.serve.service import Service
    from rdlm.serve.worker import Worker


def serve(run: Run, options: ServeOptions | None = None, host: str = "127.0.0.1", port: int = 8000) -> int:
    """Serve a model over HTTP until SIGTERM or Ctrl-C.

    On several hosts all processes call this. Process 0 listens, and its end is that of the others: they heed no signal.

    Args:
      run: the model.
      options: sizes, limits, default depth; None: all defaults.
      host: the address to listen on; others than loopback can be reached by other machines.
      port: 0: any that is free.

    Returns:
      0, after a signal to process 0.

    Raises:
      InputError: options that the model cannot serve, an address that cannot be listened on, or the extra `serve` is
        not installed.
    """
    if not is_alone():
        from rdlm.model.tensor_parallel import tensor_mesh

        tensor_mesh(run.tensor, run.data)
        if not is_first():
            return _follow(run, options or ServeOptions())
    service, config, listening = together(lambda: (*_web(run, options), open_socket(host, port)))
    service.worker.require_memory()  # of all hosts together, so not before they all have come as far
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            asyncio.get_running_loop().call_soon_threadsafe(service.drain)
            super().handle_exit(sig, frame)

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    log = logging.getLogger("rdlm.serve")
    log.setLevel(logging.INFO)
    log.propagate = False
    plain = logging.StreamHandler(sys.stderr)
    plain.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [plain]
    server = Server(config)

    def end() -> None:
        server.should_exit = True

    service.on_failure = end
    name, bound = listening.getsockname()[:2]
    place = f"[{name}]" if ":" in name else name
    where = f"http://{place}:{bound}"
    print(f"serving {service.name} at {where}; compiling, /ready answers 200 after that", file=sys.stderr)
    # Otherwise uvicorn ends the process by the signal itself.
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        if not is_alone():
            service.worker.stop()  # a second Ctrl-C leaves it running, and other hosts wait for its last word
    if service.worker.failure is not None:
        raise service.worker.failure
    return 0


def _follow(run: Run, options: ServeOptions) -> int:
    """What `serve` does on other processes than the first."""

    def prepared() -> Worker:
        with _extra():
            from rdlm.serve.service import depths_of
            from rdlm.serve.worker import Worker

        run.require_tokenizer()
        return Worker(run, depths_of(run, options), lambda _: None)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    worker = together(prepared)
    worker.require_memory()
    print("following process 0, which answers", file=sys.stderr)
    worker.follow()
    return 0


def _web(run: Run, options: ServeOptions | None) -> tuple[Service, uvicorn.Config]:
    """What serves a model, and its settings for uvicorn.

    Raises:
      InputError: as `serve`.
    """
    with _extra():
        import uvicorn

        from rdlm.serve.app import make_app
        from rdlm.serve.service import Service

    service = Service(run, options or ServeOptions())
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=int(service.options.grace) + 5,
        timeout_keep_alive=30,
    )
    return service, config


@contextlib.contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = f"{error.name}: not installed; a server needs the extra `serve` (pip install 'rdlm[serve]')"
        raise InputError(missing) from error


@dataclasses.dataclass(frozen=True)
class Background:
    """A server in a thread of this process."""

    url: str
    service: Service
    tasks: set[asyncio.Task[None]]
    """One for each request that is being answered."""

    def wait_until_ready(self) -> None:
        """Until everything is compiled. Raises what went wrong, if anything did."""
        worker = self.service.worker
        while not worker.ready:
            if worker.failure is not None:
                raise worker.failure
            time.sleep(0.01)


@contextlib.contextmanager
def in_thread(run: Run, options: ServeOptions | None = None) -> Iterator[Background]:
    """Serve a model on loopback, at a port that is free, until the end of the block.

    Raises:
      InputError: as `serve`.
    """
    service, config = _web(run, options)
    service.worker.require_memory()
    import uvicorn

    listening, server = open_socket("127.0.0.1", 0), uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), name="server")
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(0.005)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        yield Background(url, service, server.server_state.tasks)
    finally:
        server.should_exit = True
        thread.join()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether uvicorn says what our own log does not: an answer that a slow reader loses ends early on purpose."""
    return "without completing response" not in record.getMessage()


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
      InputError: no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--host {host} --port {port}: cannot be listened on ({reason}); choose another") from error
    return listening
