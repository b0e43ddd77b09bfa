"""Variants measured side by side: a process for each, rounds that interleave them, medians and ratios.

Variants run in turns A B C A B C ..., so that what changes on the machine meanwhile meets all of them, and a ratio
compares turns of the same round. All processes live until the last round.
"""

import multiprocessing
import os
import platform
import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from retinanet.engine.benchmark_cost import Ceiling
from retinanet.engine.benchmark_end_to_end import END_TO_END
from retinanet.engine.benchmark_tasks import Job
from retinanet.engine.benchmark_worker import serve
from retinanet.errors import UserError

LEAD = 1  # runs without a clock at the start of a turn: another process has had the caches
_PATIENCE = 30.0  # seconds in which a run that goes on may end
_ENVIRONMENT = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "ATEN_CPU", "ONEDNN_",
                "CUDA_VISIBLE_DEVICES", "PYTORCH_")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """rounds: turns of each variant. steps: runs with a clock in a turn. warm_up: runs before the first round.

    profile: folder for traces, "" for none. cost: also measure what `Worker.cost` and the rates of the machine tell.
    """

    rounds: int
    steps: int
    warm_up: int
    profile: str = ""
    cost: bool = True


@dataclass
class Measured:
    """What one variant gave. ms, cpu_ms: a list for each round, of milliseconds per run. The rest: of `Worker`."""

    job: Job
    ms: list[list[float]] = field(default_factory=list)
    cpu_ms: list[list[float]] = field(default_factory=list)
    host: dict = field(default_factory=dict)
    report: dict = field(default_factory=dict)
    cost: dict = field(default_factory=dict)
    kernels: str = ""


class Remote:
    """The process of one variant, seen from here; `call` runs a method of `Worker` there."""

    def __init__(self, job: Job):
        self.job = job
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.connection, theirs = context.Pipe()
        self.has_children = job.task == END_TO_END  # its loader's; Python allows them to no daemon
        self.process = context.Process(target=serve, args=(theirs, job), daemon=not self.has_children)
        with _interrupts_ignored():  # Ctrl-C reaches all processes of a terminal; this one ends the others
            self.process.start()
        theirs.close()

    def call(self, method: str, *arguments):
        """Return the result; `UserError` for what the user can fix, `RuntimeError` with the traceback otherwise."""
        try:
            self.connection.send((method, arguments))
            succeeded, answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        if succeeded:
            return answer
        fixable, text = answer
        if fixable:
            raise UserError(f"variant {self.job.name}: {text}")
        raise RuntimeError(f"the process of {self.job.name} failed in {method}:\n{text}")

    def stop(self) -> None:
        self.connection.close()
        if self.has_children:  # it ends them when it ends by itself
            self.process.join(_PATIENCE)
        self.process.terminate()
        self.process.join()

    def _death(self) -> Exception:
        self.process.join()
        code = self.process.exitcode
        if code == -signal.SIGKILL:
            return UserError(
                f"variant {self.job.name}: its process was killed, as Linux does when memory runs out; use a smaller "
                "--batch or --size, or fewer --norms at a time"
            )
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return RuntimeError(f"the process of {self.job.name} ended with {ended}; its own messages are above")


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def measure(jobs: list[Job], settings: Settings, progress: Callable[[str], None] = lambda text: None) -> list[dict]:
    """Return a row of `summary` for each of `jobs`, which belong to one task; the first is what ratios refer to.

    progress: gets a line for people from time to time.
    """
    remotes: list[Remote] = []
    found = [Measured(job) for job in jobs]
    try:
        remotes += [Remote(job) for job in jobs]
        for remote, one in zip(remotes, found, strict=True):
            one.host = remote.call("build")
            remote.call("warm_up", settings.warm_up)
            progress(f"{one.job.task}: {one.job.name} is ready")
        for number in range(settings.rounds):
            for remote, one in zip(remotes, found, strict=True):
                times = remote.call("time", settings.steps, LEAD)
                one.ms.append(times["ms"])
                one.cpu_ms.append(times["cpu_ms"])
            medians = ", ".join(f"{one.job.name} {statistics.median(one.ms[-1]):.4g} ms" for one in found)
            progress(f"{jobs[0].task}: round {number + 1} of {settings.rounds}: {medians}")
        for remote, one in zip(remotes, found, strict=True):
            one.report = remote.call("report")  # before its process does anything else that needs memory
        ceiling = remotes[0].call("ceiling") if settings.cost else None  # when nothing else of ours runs
        for remote, one in zip(remotes, found, strict=True):
            one.cost = remote.call("cost", ceiling)
            one.kernels = remote.call("profile", settings.profile) if settings.profile else ""
    finally:
        for remote in remotes:
            remote.stop()
    return summary(found, ceiling)


def summary(found: list[Measured], ceiling: Ceiling | None = None) -> list[dict]:
    """Return a flat dict for each variant.

    ms: median over all runs, ms_low and ms_high: smallest and largest median of a round, spread: their difference over
    `ms`. ratio: median over the rounds of (median of the variant / median of the first variant in that round), with
    ratio_low and ratio_high. cpu_ms, cpu_ratio: likewise. memory_mib: peak above the process before the model was
    made; None where unknown. rounds_ms: every run. With a `ceiling`, also what `Worker.cost` gives, mfu, the share of
    the device's arithmetic rate that the convolutions' FLOPs are, and roofline, the share of `ms` that they need.
    """
    first = found[0]
    rows = []
    for one in found:
        medians = [statistics.median(turn) for turn in one.ms]
        ratios, middle = _ratios(one.ms, first.ms), statistics.median(sum(one.ms, []))
        memory, base = one.report["memory"], first.report["memory"]
        row = {
            "task": one.job.task,
            "variant": one.job.name,
            "ms": middle,
            "ms_low": min(medians),
            "ms_high": max(medians),
            "spread": (max(medians) - min(medians)) / middle,
            "images_per_s": 1000 * one.report["images"] / middle,
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "cpu_ms": statistics.median(sum(one.cpu_ms, [])),
            "cpu_ratio": statistics.median(_ratios(one.cpu_ms, first.cpu_ms)),
            "memory_mib": None if memory is None else memory / 2**20,
            "memory_ratio": memory / base if memory and base else None,
            **({"reserved_mib": one.report["reserved"] / 2**20} if "reserved" in one.report else {}),
            **one.report["facts"],
            **_shares(one.cost, middle, ceiling),
            "rounds_ms": one.ms,
        }
        rows.append({**row, "host": one.host, **({"kernels": one.kernels} if one.kernels else {})})
    return rows


def _shares(cost: dict, ms: float, ceiling: Ceiling | None) -> dict:
    if not cost or ceiling is None:
        return {}
    shares = {"mfu": 1e9 * cost["gflop"] / (ms / 1000) / ceiling.flops, "roofline": cost["floor_ms"] / ms}
    return {**cost, **shares, "tflops": ceiling.flops / 1e12, "gb_per_s": ceiling.bandwidth / 1e9}


def _ratios(turns: list[list[float]], reference: list[list[float]]) -> list[float]:
    """Return the ratio of the medians, round by round."""
    pairs = zip(turns, reference, strict=True)
    return [statistics.median(own) / statistics.median(other) for own, other in pairs]


def machine() -> dict:
    """Return what a reader needs to judge the figures: machine, versions, environment, load, and the time (UTC)."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "torchvision")},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_ENVIRONMENT)},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return " ".join(fields[next(name for name in fields if name.startswith("model name"))].split())
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
