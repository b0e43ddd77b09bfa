"""Memory: how much a process takes and may take, and which errors mean that there was not enough. Unit: bytes."""

import contextlib
import re
from pathlib import Path

import torch

from retinanet.errors import UserError

_WORDS = re.compile(
    r"not enough memory|out of memory|can't allocate memory|cannot allocate memory|insufficient memory|"
    r"failed to allocate \d+ bytes|unable to allocate|unable to mmap|ALLOC_FAILED|no space left on device.*shm|"
    r"unable to (resize|write to|open shared memory)",
    re.IGNORECASE,
)
_SYSTEM = Path("/proc")
_GROUP = Path("/sys/fs/cgroup")


class OutOfMemory(UserError):  # noqa: N818  what happened, as in torch.OutOfMemoryError
    """There was not enough memory; the message says for what, and what to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory ran out, on a GPU, in main memory or in shared memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)):
        return True
    # PyTorch on a CPU, cuDNN and cuBLAS raise RuntimeError; OpenCV an error of its own
    named = isinstance(error, RuntimeError) or type(error).__module__.startswith("cv2")
    return named and bool(_WORDS.search(str(error)))


def restart_peak(device: torch.device) -> None:
    """Let `peak` count from now on. On a CPU that is possible on Linux alone; elsewhere it counts from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (_SYSTEM / "self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Return the most that this process has taken: of the GPU by tensors, or of main memory altogether."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return _field(_SYSTEM / "self/status", "VmHWM")
    except (OSError, KeyError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_use(device: torch.device) -> int:
    """Return what this process takes now: of the GPU by tensors, or of main memory altogether."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _field(_SYSTEM / "self/status", "VmRSS")


def available(device: torch.device) -> int:
    """Return what this process could still take: what is free on the GPU or cached there, or free in main memory.

    In a container the limit of its control group counts.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = _field(_SYSTEM / "meminfo", "MemAvailable")
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        cached = _words(_GROUP / "memory.stat").get("inactive_file", 0)
        return max(0, min(free, limit - used + cached))
    except (OSError, ValueError):  # "max": no limit; or no control groups
        return free


def gib(size: float) -> str:
    """Return `size` in GiB, as messages show it."""
    return f"{size / 2**30:.2f} GiB"


def _field(path: Path, name: str) -> int:
    """Return a field of a /proc file that is given in kB."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _words(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2}
