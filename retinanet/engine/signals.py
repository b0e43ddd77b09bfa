"""Ctrl-C and SIGTERM ask a run to save and stop; a second one stops it at once."""

import contextlib
import signal
import threading
import time

SAME_REQUEST = 2.0  # seconds: torchrun and Slurm pass on to the processes a signal that these got as well


class StopRequest:
    """True once the user (Ctrl-C) or a cluster (SIGTERM) has asked the run to stop; `name` says which signal."""

    def __init__(self):
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextlib.contextmanager
def stop_request():
    """Yield a `StopRequest` that SIGINT and SIGTERM set; the previous handlers return at the end.

    The first signal only sets the request, so the step in progress is finished and saved. A second one, two seconds
    later or more, raises `KeyboardInterrupt` at once; sooner it counts as the same request, for a launcher repeats what
    a terminal sent to all. Outside the main thread, where Python allows no handlers, nothing is installed.
    """
    request, start = StopRequest(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number, _frame):
        nonlocal start
        if not request:
            request.name, start = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - start > SAME_REQUEST:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
