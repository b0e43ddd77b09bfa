"""Peak memory of a call, for the tests of files that claim to be large."""

import contextlib
import tracemalloc

import pytest


@contextlib.contextmanager
def _peak_below(limit: int):
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes at once"


@pytest.fixture(scope="session")
def peak_below():
    """A context manager that fails when Python allocates `limit` bytes or more at once inside it."""
    return _peak_below
