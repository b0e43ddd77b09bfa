"""Ctrl-C and SIGTERM ask a run to save and stop; a second one stops it at once."""

import contextlib
import os
import signal
import threading
import time

SAME_REQUEST = 2.0  # seconds
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")  # they pass on a signal that their processes got as well


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
    `KeyboardInterrupt` at once; below torchrun or Slurm, which repeat what a terminal sent to all, it does so two
    seconds later or more. Outside the main thread, where Python allows no handlers, nothing is installed.
    """
    request, start = StopRequest(), 0.0
    patience = SAME_REQUEST if any(name in os.environ for name in _LAUNCHERS) else 0.0
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number, _frame):
        nonlocal start
        if not request:
            request.name, start = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - start > patience:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
