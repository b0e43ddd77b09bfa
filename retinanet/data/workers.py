"""The processes that load batches: how they start, what they tell about their work, and what their death means.

A worker writes into shared memory which image it is about to read and where its time goes. The training process reads
it when a worker has died, and when it has to wait for data.
"""

import atexit
import contextlib
import copy
import multiprocessing
import multiprocessing.util
import os
import re
import signal
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from retinanet.errors import RunError, UserError
from retinanet.structures import Batch
from retinanet.utils.memory import OutOfMemory, is_out_of_memory

_DEATH = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([^.]+)| exited unexpectedly)"
)
_SIGNALS = {"Killed": "SIGKILL", "Segmentation fault": "SIGSEGV", "Bus error": "SIGBUS", "Aborted": "SIGABRT"}


class _Flag:
    """A `multiprocessing.Event` without a lock, which a process that is ended at a bad moment would keep for ever."""

    def __init__(self):
        self._value = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set(self) -> None:
        self._value.fill_(1)

    def is_set(self) -> bool:
        return bool(self._value.item())


class Board:
    """What each worker is doing, in shared memory: the row that it reads, and the seconds that it has worked.

    seconds: (W, 3) float64: the clock, on a core, waiting for a core. What is left of the clock was spent on waiting
    for the disk or the network. closing: set once the workers of the newest iterator are no longer wanted.
    """

    def __init__(self, workers: int):
        self.closing = _Flag()
        self.reading = torch.full((workers,), -1, dtype=torch.int64).share_memory_()
        self.seconds = torch.zeros(workers, 3, dtype=torch.float64).share_memory_()

    def shares(self) -> dict[str, float]:
        """Return the shares of the time of all workers since the last call: "cpu", "queue" and "disk"."""
        wall, cpu, queue = self.seconds.sum(0).tolist()
        self.seconds.zero_()
        cpu, queue = (min(part / wall, 1.0) if wall > 0 else 0.0 for part in (cpu, queue))
        return {"cpu": cpu, "queue": queue, "disk": max(0.0, 1.0 - cpu - queue) if wall > 0 else 0.0}


class Batches(Dataset):
    """A data set whose items are batches, made by `load(item)`; what a user can mend comes back as an item too.

    torch would wrap a raised `UserError` in the traceback of the worker. `dataset` is read by `load`, which calls
    `reading(row)` before it opens a file.
    """

    board: Board | None = None

    def __getitem__(self, item) -> Batch | UserError:
        try:
            with _Clock(self.board):
                return self.load(item)
        except UserError as error:
            return error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return OutOfMemory(
                f"not enough memory to load a batch ({_first_line(error)}): lower DATALOADER.NUM_WORKERS, "
                "SOLVER.IMS_PER_BATCH or INPUT.MAX_SIZE_TRAIN; in a container raise its shared memory (--shm-size)"
            )

    def load(self, item) -> Batch:
        """Return the batch of `item`; raises `UserError`."""
        raise NotImplementedError

    def file(self, row: int) -> Path:
        """Return the path of image `row`."""
        return self.dataset.file(row)

    def reading(self, row: int) -> None:
        """Note which image is read next."""
        if self.board is not None:
            self.board.reading[_worker()] = row


class BatchLoader(DataLoader):
    """A `DataLoader` over `Batches`: their errors are raised here, and a dead worker is explained.

    torch may raise the death of a worker anywhere in this process, not only here: see `explained`.
    """

    _workers: tuple[multiprocessing.Process, ...] = ()  # of the newest iterator

    def __init__(self, batches: Batches, order, workers: int, pin_memory: bool = False):
        batches.board = Board(max(1, workers))
        super().__init__(
            batches,
            batch_size=None,  # an item is a batch already
            sampler=order,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own: starting workers must not advance the generator of the training
        )

    def __iter__(self) -> Iterator[Batch]:
        iterator, closing = self._start()
        workers = self._workers = tuple(getattr(iterator, "_workers", ()))
        try:
            while True:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                except (RuntimeError, EOFError, OSError) as error:
                    raise self.death(error) or error from None
                if isinstance(item, UserError):
                    raise item
                yield item
        finally:
            # Not left to torch: when the garbage collector finds an iterator, its queues are closed already, so that
            # torch waits 5 s for each worker in vain and then sends them a signal that ours ignore.
            closing.set()
            for process in workers:
                process.terminate()

    def _start(self) -> tuple[Iterator[Batch | UserError], _Flag]:
        """Start the workers while OpenCV has no threads here: a forked worker would wait for them forever.

        Return their iterator, and their own `closing` of the board.
        """
        if self.num_workers:
            # Workers send tensors through a socket in a temporary folder. They inherit that of this process, which it
            # removes at its end; each would make its own, and leave it, as they are ended by a signal.
            multiprocessing.util.get_temp_dir()
        closing = self.dataset.board.closing = _Flag()
        _closings[id(closing)] = closing
        if self.num_workers:
            # torch's workers ask an event after each item whether to go on. Ended or killed just then, a worker would
            # leave it locked, and the training process, which sets it at the end, would wait for ever.
            self.multiprocessing_context = copy.copy(multiprocessing.get_context())
            self.multiprocessing_context.Event = lambda: closing
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            return super().__iter__(), closing
        finally:
            cv2.setNumThreads(threads)

    def death(self, error: Exception) -> RunError | None:
        """Return what torch's `error` about a worker that died means to a user; None when it is about something else.

        The worker may be that of another loader; then the image that it was reading is not known.
        """
        found = _DEATH.search(str(error) if isinstance(error, RuntimeError) else self._broken_connection())
        if found is None:
            return None
        pids = [int(pid) for pid in found[1].split(",")]
        dead = {number: process for number, process in enumerate(self._workers) if process.pid in pids}
        name = _SIGNALS.get((found[2] or "").strip(), (found[2] or "").strip())
        for process in dead.values():  # torch tells the signal only when it was told of the death by one
            name = name or _signal_name(process.exitcode)
        how = f"was ended by {name}" if name else "ended without a word"
        rows = [int(self.dataset.board.reading[number]) for number in dead]
        files = ", ".join(str(self.dataset.file(row)) for row in rows if row >= 0)
        last = f" The last image that it began to read is {files}." if files else ""
        return RunError(f"a process that loads images (pid {found[1]}) {how}.{last} {_remedy(name)}")


    def _broken_connection(self) -> str:
        """Return torch's words about workers that have died, or "": a connection breaks shortly before that shows."""
        dead, deadline = [], time.monotonic() + 1
        while self._workers and not dead and time.monotonic() < deadline:
            time.sleep(0.01)
            dead = [str(process.pid) for process in self._workers if process.exitcode]
        return f"DataLoader worker (pid(s) {', '.join(dead)}) exited unexpectedly" if dead else ""


@contextlib.contextmanager
def explained(loader: BatchLoader):
    """Turn the death of a worker that torch reports inside the block, by a signal handler, into a `RunError`."""
    try:
        yield
    except RuntimeError as error:
        raise loader.death(error) or error from None


_closings = weakref.WeakValueDictionary()  # flags of the iterators that may still have workers


@atexit.register  # runs before Python's own hook, which ends workers by SIGTERM and waits for them
def _close_all() -> None:
    for closing in list(_closings.values()):
        closing.set()


def _signal_name(exitcode: int | None) -> str:
    return signal.Signals(-exitcode).name if exitcode and -exitcode in set(signal.Signals) else ""


def _remedy(name: str) -> str:
    if name == "SIGBUS":
        return (
            "There was no room in shared memory: in a container raise it (docker run --shm-size 8g), or lower "
            "DATALOADER.NUM_WORKERS"
        )
    if name in ("SIGSEGV", "SIGABRT"):
        return (
            "A decoder crashed: look at that file with another program and take it out of the json; "
            "DATALOADER.NUM_WORKERS 0 shows where"
        )
    return (
        "Mostly the system does that when memory runs out (`dmesg` then says: Out of memory): lower "
        "DATALOADER.NUM_WORKERS, or SOLVER.IMS_PER_BATCH with a higher SOLVER.ACCUMULATE. --resume goes on from the "
        "last checkpoint"
    )


class _Clock:
    """Adds the time inside the block to the worker's row of the board."""

    def __init__(self, board: Board | None):
        self.board = board

    def __enter__(self):
        self.start = (time.perf_counter(), time.thread_time(), _seconds_in_queue())

    def __exit__(self, *_):
        if self.board is not None:
            now = (time.perf_counter(), time.thread_time(), _seconds_in_queue())
            spent = [after - before for after, before in zip(now, self.start, strict=True)]
            self.board.seconds[_worker()] += torch.tensor(spent, dtype=torch.float64)


def _seconds_in_queue() -> float:
    """Return how long this thread was ready to run and had no core; 0 where the system does not tell (not Linux)."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _as_it_is(batch):
    return batch


def _start_worker(worker: int) -> None:
    """One thread a worker (more fight over the cores); signals are for the training process, which ends the workers.

    A terminal and a cluster send them to the whole group, and the step in progress still needs its data. SIGTERM counts
    once the training process has said that it is closing. A worker whose training process was killed before this point
    ends here: torch looks for another parent than the first one it saw, and would see none.
    """
    parent, forked_by_it = multiprocessing.parent_process(), multiprocessing.get_start_method() != "forkserver"
    if not parent.is_alive() or (forked_by_it and os.getppid() != parent.pid):  # a brother keeps its sentinel open
        os._exit(1)
    closing = get_worker_info().dataset.board.closing
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.is_set() else None)
    if closing.is_set():  # the signal may have come before it had a handler here
        os._exit(0)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
