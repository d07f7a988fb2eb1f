"""What the processes of a run notice of each other: when one of them is gone, all stop, within a second or a minute.

Every process keeps one connection to process 0 open, and one thread looks at it. A process that ends as it should says
so first. One that is killed only closes its connections, which its kernel does at once; if the whole machine is gone,
TCP's own probes find out in less than a minute. JAX notices as well, but later (100 s), and aborts with a stack trace.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import select
import socket
import sys
import threading
import time

EXIT_LOST = 1


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another process of the run."""

    index: int
    host: str


_lines: dict[socket.socket, Peer] = {}
_index = 0
_leaving = threading.Event()


def watch(index: int, lines: dict[socket.socket, Peer]) -> None:
    """Hold process `index`'s connections to others until it ends, and end it when one of them does so early."""
    global _index
    _index = index
    for line in lines:
        line.settimeout(None)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _lines.update(lines)
    threading.Thread(target=_look, name="lifelines", daemon=True).start()
    atexit.register(leave)  # before JAX's own farewell, which waits for everyone


def leave(code: int = 0, why: str = "") -> None:
    """Tell the others that this process ends: as it should, or (`why`) so that they must end as well, with `code`."""
    if _leaving.is_set():
        return
    _leaving.set()
    _tell({"code": code, "why": why})


def await_news(seconds: float = 5.0) -> None:
    """After an error that another process may have caused: time for the one line that says so, and ends this one."""
    if _lines:
        time.sleep(seconds)


def relay(address: str) -> str:
    """A local port that passes everything on to `address`, and stays open when that is gone: returns its address.

    JAX's client aborts the process the moment its connection breaks, before anyone can say why.
    """
    host, _, port = address.rpartition(":")
    server = socket.create_server(("localhost", 0))

    def accept() -> None:
        while True:
            near = server.accept()[0]
            try:
                far = socket.create_connection((host, int(port)), timeout=30)
            except OSError:
                near.close()  # not there yet: JAX asks again
                continue
            far.settimeout(None)
            for source, sink, ends in ((near, far, True), (far, near, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pump, args=(source, sink, ends), name="relay", daemon=True).start()

    threading.Thread(target=accept, name="relay", daemon=True).start()
    return f"localhost:{server.getsockname()[1]}"


def _pump(source: socket.socket, sink: socket.socket, ends: bool) -> None:
    """Pass everything on, and, if `ends`, the end of it."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        if ends:
            sink.shutdown(socket.SHUT_WR)


def _tell(message: dict[str, object]) -> None:
    for line in list(_lines):
        with contextlib.suppress(OSError):
            line.sendall((json.dumps(message) + "\n").encode())


def _look() -> None:
    heard: dict[socket.socket, bytes] = {line: b"" for line in _lines}
    while heard:
        for line in select.select(list(heard), [], [])[0]:
            try:
                data = line.recv(65536)
            except OSError:  # the probes found nobody
                data = b""
            heard[line] += data
            whole, _, _ = heard[line].partition(b"\n")
            if data and b"\n" not in heard[line]:
                continue
            peer = _lines[line]
            said = json.loads(whole) if b"\n" in heard[line] else None
            del heard[line]
            if said is None:
                _end(
                    EXIT_LOST,
                    f"process {peer.index} ({peer.host}) is gone: killed, crashed, or its machine is; all stop, "
                    "and the same command on all of them goes on from the newest checkpoint",
                )
            elif said["why"]:
                why = said["why"]
                _end(said["code"], why if why.startswith("process ") else f"process {peer.index}: {why}")


def _end(code: int, why: str) -> None:
    if _leaving.is_set():  # this process has said its own word
        return
    _leaving.set()
    _tell({"code": code, "why": why})
    print(f"error: {why}", file=sys.stderr, flush=True)
    if _index == 0:
        time.sleep(0.5)  # the others' connections to JAX end with this process
    os._exit(code)
