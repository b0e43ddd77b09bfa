"""Variants of work on one CPU core, side by side in this process: they take turns within a round, piece by piece."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import torch

from retinanet.engine.benchmark import Measured, Settings, summary
from retinanet.engine.benchmark_tasks import Job

Piece = Callable[[int], object]  # does piece number i of the work


def take_turns(
    jobs: list[Job], work: list[Piece], pieces: int, units: int, settings: Settings, progress: Callable[[str], None]
) -> list[dict]:
    """Return a row of `summary` for each of `jobs`; its milliseconds are per unit, one value a round.

    work: what each job does with piece i in 0 .. `pieces` - 1. units: images, or whatever all pieces together consist
    of. Variants change places from piece to piece, so that what else happens on the machine meets all of them.
    """
    found = [Measured(job) for job in jobs]
    with one_thread():
        for run in work:
            for piece in range(min(settings.warm_up, pieces)):
                run(piece)
        for number in range(settings.rounds):
            wall, cpu = [0.0] * len(jobs), [0.0] * len(jobs)
            for piece in range(pieces):
                for place in range(len(jobs)):
                    which = (place + piece + number) % len(jobs)
                    starts = time.perf_counter(), time.process_time()
                    work[which](piece)
                    wall[which] += time.perf_counter() - starts[0]
                    cpu[which] += time.process_time() - starts[1]
            for one, elapsed, used in zip(found, wall, cpu, strict=True):
                one.ms.append([1000 * elapsed / units])
                one.cpu_ms.append([1000 * used / units])
            times = ", ".join(f"{one.job.name} {one.ms[-1][0]:.4g} ms" for one in found)
            progress(f"{jobs[0].task}: round {number + 1} of {settings.rounds}: {times}")
    for one in found:
        one.host = {"device": "cpu", "threads": 1, "capability": torch.backends.cpu.get_cpu_capability()}
        one.report = {"memory": None, "images": 1, "facts": {}}
    return summary(found)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let OpenCV and PyTorch use one thread inside the block, as in the workers of a loader."""
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])
