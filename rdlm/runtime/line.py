"""A line from process 0 to each of the others: what it says, all hear in the same order, and who is lost ends the rest.

JAX's heartbeat notices a lost process as well, but half a minute later and not in one line.
"""

from __future__ import annotations

import atexit
import contextlib
import hmac
import queue
import secrets
import socket
import sys
import threading
import time
from typing import BinaryIO

from rdlm.runtime.cli import EXIT_FAILED
from rdlm.runtime.processes import StartError, connection, exchange, leave

_SIZE = 8  # bytes before every message that say how long it is
_TIMEOUT = 300  # seconds


class Line:
    """This process's end of the line. All processes make theirs together; `close` is said by process 0.

    While it is open, a process that loses another one ends with one line and exit code 1, whatever it is doing: it may
    be waiting for the lost one in a program, for ever.
    """

    def __init__(self) -> None:
        joined = connection()
        self.index, self.count, self.open = joined.process_id, joined.num_processes, True
        self._heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._others: list[socket.socket] = []
        if self.index == 0:
            secret = secrets.token_hex(16)
            with socket.create_server(("", 0), backlog=self.count) as server:
                port, deadline = server.getsockname()[1], time.monotonic() + _TIMEOUT
                exchange(f"{port} {secret}")
                arrived: dict[int, tuple[socket.socket, BinaryIO]] = {}
                while len(arrived) < self.count - 1:
                    server.settimeout(max(deadline - time.monotonic(), 0.001))
                    try:
                        other, _ = server.accept()  # anybody may connect to this port
                    except TimeoutError as error:
                        missing = sorted({*range(1, self.count)} - arrived.keys())
                        problem = f"processes {missing} did not reach port {port} of this host within {_TIMEOUT} s"
                        raise StartError(f"{problem}; hosts must reach each other at any port") from error
                    other.settimeout(5)
                    with contextlib.suppress(OSError, ValueError):
                        file: BinaryIO = other.makefile("rb")
                        number, _, found = file.readline(100).strip().partition(b" ")
                        if hmac.compare_digest(found, secret.encode()):
                            arrived[int(number)] = other, file
                            continue
                    other.close()
            for index, (other, file) in sorted(arrived.items()):
                self._keep(other)
                self._others.append(other)
                threading.Thread(target=self._watch, args=(index, file), daemon=True).start()
        else:
            port, secret = exchange("")[0].split()
            host = joined.coordinator_address.rpartition(":")[0].strip("[]")
            try:
                first = socket.create_connection((host, int(port)), timeout=_TIMEOUT)
            except OSError as error:
                problem = f"process 0 cannot be reached at {host}:{port} ({error})"
                raise StartError(f"{problem}; hosts must reach each other at any port") from error
            self._keep(first)
            first.sendall(f"{self.index} {secret}\n".encode())
            self._others.append(first)
            threading.Thread(target=self._listen, args=(first.makefile("rb"),), daemon=True).start()
        atexit.register(self._unclosed)  # runs before JAX's own way out, which would wait for the others

    def _keep(self, other: socket.socket) -> None:
        other.settimeout(None)
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a message is short and waited for
        other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def say(self, message: bytes) -> None:
        """On process 0: tell all others, unless it is closed. An empty message closes it."""
        for index, other in enumerate(self._others, start=1):
            try:
                other.sendall(len(message).to_bytes(_SIZE, "big") + message)
            except OSError:
                self._lost(index)

    def hear(self) -> bytes:
        """On the others: the next message. After an empty one, which says that the line is closed, none comes."""
        return self._heard.get()

    def close(self) -> None:
        """On process 0: let go of the others; from now on any process may end without the others."""
        if self.open and self.index == 0:
            self.open = False
            self.say(b"")

    def cut(self) -> None:
        """Let the others end as if this process were lost."""
        self.open = False
        for other in self._others:
            with contextlib.suppress(OSError):
                other.shutdown(socket.SHUT_RDWR)

    def _watch(self, index: int, file: BinaryIO) -> None:
        with contextlib.suppress(OSError):
            file.read(1)  # nothing ever comes
        self._lost(index)

    def _listen(self, file: BinaryIO) -> None:
        with contextlib.suppress(OSError):
            while len(head := file.read(_SIZE)) == _SIZE:
                size = int.from_bytes(head, "big")
                message = file.read(size)
                if len(message) < size:
                    break
                if not message:
                    self.open = False
                self._heard.put(message)
                if not message:
                    return
        self._lost(0)

    def _lost(self, index: int) -> None:
        if self.open:
            self.cut()
            lost = f"process {index} of {self.count} has failed or is gone; start all of them again"
            print(f"error: {lost}", file=sys.stderr, flush=True)
            leave(EXIT_FAILED, at_once=True)

    def _unclosed(self) -> None:
        if self.open:
            self.cut()
            print("error: ended without Engine.close(), and so do the other hosts", file=sys.stderr, flush=True)
            leave(EXIT_FAILED, at_once=True)
