"""Prefetching: same batches, errors reach the consumer, no thread stays behind."""

import threading
import time

import pytest

from rdlm.data import prefetch


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch") and t.is_alive()]


def test_batches_come_in_order_from_the_step_asked_for():
    iterator = prefetch(lambda step: step * step, 3)
    assert [next(iterator) for _ in range(4)] == [9, 16, 25, 36]
    iterator.close()


def test_at_most_size_batches_are_made_in_advance():
    made = []
    iterator = prefetch(made.append, 0, size=2)
    next(iterator)
    most = 4  # one consumed, two waiting, one in the hands of the thread
    deadline = time.monotonic() + 10
    while len(made) < most and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # time enough to make more
    assert made == list(range(most))
    iterator.close()


def test_the_next_batch_is_made_while_the_consumer_works():
    started = threading.Event()

    def slow(step):
        if step == 1:
            started.set()
        return step

    iterator = prefetch(slow)
    next(iterator)
    assert started.wait(timeout=5)  # nobody asked for batch 1 yet
    iterator.close()


def test_an_error_is_raised_at_its_own_step():
    def batch(step):
        if step == 2:
            raise ValueError("step 2 is broken")
        return step

    told = []
    iterator = prefetch(batch, on_error=lambda step, error: told.append((step, str(error))))
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(ValueError, match="step 2 is broken"):
        next(iterator)
    assert told == [(2, "step 2 is broken")]
    with pytest.raises(StopIteration):
        next(iterator)
    assert threads() == []


@pytest.mark.parametrize("end", ["close", "collect"])
def test_the_thread_ends_with_the_iterator(end):
    iterator = prefetch(lambda step: step)
    next(iterator)
    assert len(threads()) == 1  # control
    if end == "close":
        iterator.close()
    else:
        del iterator
    assert threads() == []


def test_an_iterator_never_used_starts_no_thread():
    iterator = prefetch(lambda step: step)
    assert threads() == []
    iterator.close()
