"""Work ahead: a thread prepares the next items while the caller uses the current one."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_PATIENCE = 0.1  # seconds after which a full queue is looked at again: the caller may have left
_FAREWELL = 2.0  # seconds that a thread inside a blocking call gets to end


def in_background(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """Yield `items` in order; a thread iterates over them and is at most `depth` + 1 items ahead.

    What `items` raises is raised here, in its turn. When the caller stops early, the thread stops too and closes
    `items`, as it would have been closed here.
    """
    assert depth > 0, depth
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, stop), daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join(_FAREWELL)


def _fill(items: Iterable[Item], ready: queue.Queue, stop: threading.Event) -> None:
    source = iter(items)
    try:
        for item in source:
            if not _put(ready, ("item", item), stop):
                return
        _put(ready, ("end", None), stop)
    except BaseException as error:  # of any kind: it belongs to the caller
        _put(ready, ("error", error), stop)
    finally:
        if hasattr(source, "close"):
            source.close()


def _put(ready: queue.Queue, entry: tuple, stop: threading.Event) -> bool:
    """Return whether `entry` found a place before the caller left."""
    while not stop.is_set():
        try:
            ready.put(entry, timeout=_PATIENCE)
            return True
        except queue.Full:
            continue
    return False
