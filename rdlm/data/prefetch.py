"""Batches made ahead of time in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")


def prefetch(batch_fn: Callable[[int], T], start_step: int = 0, size: int = 2) -> Generator[T, None, None]:
    """Yield batch_fn(start_step), batch_fn(start_step + 1), ... without end, up to `size` of them made in advance.

    The thread starts with the first `next`. It ends when the iterator is closed (`close()`, or when it is garbage
    collected), and when `batch_fn` raises: the consumer gets that exception at the step where it happened.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(size, 1))
    closed = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        step = start_step
        try:
            while put((batch_fn(step), None)):
                step += 1
        except BaseException as error:  # handed over, whatever it is
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            yield batch  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
