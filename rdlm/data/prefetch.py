"""Batches made ahead of time in a background thread."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    batch_fn: Callable[[int], T],
    start_step: int = 0,
    size: int = 2,
    on_error: Callable[[int, Exception], object] = lambda step, error: None,
) -> Generator[T, None, None]:
    """Yield batch_fn(start_step), batch_fn(start_step + 1), ... without end, up to `size` of them made in advance.

    The thread starts with the first `next` and ends with the iterator: when it is closed or garbage collected, or when
    `batch_fn` raises, which the consumer sees at the step where it happened. `on_error` is told at once, in the thread.
    """

    def made(step: int) -> T:
        try:
            return batch_fn(step)
        except Exception as error:
            on_error(step, error)
            raise

    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        ahead = deque(pool.submit(made, start_step + i) for i in range(size + 1))
        for step in itertools.count(start_step + size + 1):
            batch = ahead.popleft().result()
            ahead.append(pool.submit(made, step))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
