"""Work ahead in a thread: order, bound, errors in their turn, and an end when the caller leaves."""

import threading
import time

import pytest

from retinanet.utils.background import in_background


def test_all_items_come_in_order():
    assert list(in_background(range(100), 3)) == list(range(100))
    assert list(in_background([], 1)) == []


def test_no_more_than_depth_and_one_items_wait():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    source = in_background(items(), 3)
    next(source)
    wait_for(lambda: len(made) >= 1 + 3 + 1)  # taken, in the queue, in the hand of the thread
    time.sleep(0.2)
    assert len(made) == 5
    source.close()


def test_the_next_item_is_made_while_the_caller_works():
    made = []

    def items():
        for number in range(2):
            made.append(number)
            yield number

    for number in in_background(items(), 2):
        wait_for(lambda: len(made) == 2)  # without a thread the second would wait for the end of this pass
        assert number in (0, 1)


def wait_for(condition) -> None:
    """Wait until `condition()` holds; a failure when it does not within ten seconds."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("two")

    source = in_background(items(), 5)
    assert next(source) == 1
    with pytest.raises(ValueError, match="two"):
        next(source)


def test_leaving_early_closes_the_items_and_ends_the_thread():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    source = in_background(items(), 1)
    next(source)
    source.close()
    assert closed.is_set() and threading.active_count() == before
