"""What to do when training waits for its data: the number of workers, or what they themselves wait for."""

import os
from pathlib import Path

from retinanet.data.workers import BatchLoader


def waiting_advice(loader: BatchLoader, waited: float, cores: int) -> str:
    """Return what to do when training waits for data for the share `waited` of its time.

    cores: that this process and its workers may use. With w workers that are waited for, w / (1 - waited) would keep
    up; the training process itself needs a core as well.
    """
    shares = loader.dataset.board.shares()
    workers, most = loader.num_workers, max(1, cores - 1)
    wanted = -(-workers // max(1 - waited, 0.01)) if workers else -(-waited // max(1 - waited, 0.01))
    wanted = int(min(max(wanted, workers + 1), most))
    waits = f"training waits for data {100 * waited:.0f} % of the time: "
    spent = (
        f"loading is {100 * shares['cpu']:.0f} % decoding and resizing, {100 * shares['disk']:.0f} % waiting for the "
        f"disk, {100 * shares['queue']:.0f} % waiting for a core"
    )
    if wanted > workers:
        return f"{waits}raise DATALOADER.NUM_WORKERS from {workers} to {wanted} ({spent})"
    if shares["disk"] > max(shares["cpu"], shares["queue"]):
        return f"{waits}{spent}; {workers} workers are enough for {cores} cores: copy the images to a faster disk"
    if shares["queue"] > shares["cpu"]:
        return f"{waits}{spent}; other processes take the {cores} cores: stop them, or lower OMP_NUM_THREADS"
    smaller = "store the images no larger than INPUT.MAX_SIZE_TRAIN, with width, height and boxes in the json to match"
    return f"{waits}{spent}; {workers} workers already take the {cores} cores of this process: {smaller}"


def usable_cores(processes_here: int = 1) -> int:
    """Return the cores that one of `processes_here` training processes of this machine may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, -(-int(quota) // int(period)))
    except (OSError, ValueError):  # no limit, or no control groups
        pass
    return max(1, cores // processes_here)
