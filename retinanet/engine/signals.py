"""Ctrl-C and SIGTERM ask a run to save and stop; a second one stops it at once."""

import contextlib
import signal
import threading


class StopRequest:
    """True once the user (Ctrl-C) or a cluster (SIGTERM) has asked the run to stop; `name` says which signal."""

    def __init__(self):
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextlib.contextmanager
def stop_request():
    """Yield a `StopRequest` that SIGINT and SIGTERM set; the previous handlers return at the end.

    The first signal only sets the request, so the step in progress is finished and saved. A second one raises
    `KeyboardInterrupt` at once. Outside the main thread, where Python allows no handlers, nothing is installed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number, _frame):
        if request:
            raise KeyboardInterrupt
        request.name = signal.Signals(number).name

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
