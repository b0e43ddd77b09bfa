"""One variant of a benchmark in a process of its own, so that its peak memory is its own.

The process is asked over a pipe: a message is the name of a method of `Worker` and its arguments, an answer is
(True, result) or (False, (whether the user can fix it, text)). It ends when the other end of the pipe is closed.
"""

import contextlib
import ctypes
import gc
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from retinanet.config.load import load_config_text
from retinanet.engine.benchmark_cost import (
    Ceiling,
    Convolution,
    HostWaits,
    build_convolutions,
    floor_seconds,
    measure_ceiling,
)
from retinanet.engine.benchmark_end_to_end import END_TO_END, build_end_to_end
from retinanet.engine.benchmark_peer import PEERS, build_peer_detection, build_peer_train
from retinanet.engine.benchmark_tasks import (
    MEMORY_FORMATS,
    NUM_BATCHES,
    Job,
    Task,
    build_detection,
    build_layer,
    build_train,
    make_batches,
    make_maps,
)
from retinanet.engine.evaluate import build_amp, dtype_of
from retinanet.engine.machine import tune_process
from retinanet.engine.run import choose_device, set_seed
from retinanet.errors import UserError

_BUILDERS = {
    ("train", False): build_train,
    ("train", True): build_peer_train,
    ("detect", False): build_detection,
    ("detect", True): build_peer_detection,
}
_TABLE_ROWS = 30


def serve(connection: Connection, job: Job) -> None:
    """Answer requests until the pipe is closed; the target of the process."""
    worker = Worker(job)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, getattr(worker, method)(*arguments)
        except Exception as error:
            answer = False, _describe(error)
        connection.send(answer)


def _describe(error: Exception) -> tuple[bool, str]:
    if isinstance(error, torch.OutOfMemoryError):
        return True, f"does not fit into the memory of the device; use a smaller --batch or --size ({error})"
    if isinstance(error, UserError):
        return True, str(error)
    return False, traceback.format_exc()


class Worker:
    """A task, and the clocks and the memory gauge around it."""

    def __init__(self, job: Job):
        self.job = job
        self.device = torch.device("cpu")
        self.task: Task | None = None
        self.baseline = 0
        self.convolutions: list[Convolution] = []
        self.dtype = torch.float32

    def build(self) -> dict:
        """Make inputs and task; return what runs it: device, threads, capability of the CPU's kernels, settings."""
        cfg = load_config_text(self.job.config, "benchmark")
        self.device = choose_device(cfg.DEVICE)
        tuned = tune_process(self.device) if self.job.allocator else []  # before the first tensor
        set_seed(cfg.SEED, cfg.DETERMINISTIC)
        if self.job.task in MEMORY_FORMATS:
            inputs, build = make_maps(self.job, self.device), build_layer
        elif self.job.task == END_TO_END:
            inputs, build = self.device, build_end_to_end
        else:
            inputs = make_batches(self.job, cfg.MODEL.NUM_CLASSES, NUM_BATCHES, self.device)
            build = _BUILDERS[self.job.task, self.job.variant in PEERS]
            training = self.job.task != "detect"
            self.convolutions = build_convolutions(cfg, self.job.batch, self.job.size, training)
            self.dtype = dtype_of(cfg.SOLVER.AMP if training else build_amp(cfg, self.device))
        self.baseline = self._restart_gauge()
        self.task = build(cfg, self.job, inputs)
        graphs = cfg.TEST.CUDA_GRAPHS if self.job.task == "detect" else cfg.SOLVER.CUDA_GRAPHS
        self.traced = cfg.SOLVER.COMPILE or graphs
        return {
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "tuned": "; ".join(tuned),
        }

    def warm_up(self, steps: int) -> None:
        """Run without a clock; the peak of memory that making, tuning and compiling needed is then forgotten."""
        for _ in range(steps):
            self.task.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            restart_peak_resident()

    def time(self, steps: int, lead: int) -> dict[str, list[float]]:
        """Return for each of `steps` runs its milliseconds and those of the CPU, after `lead` runs without a clock.

        On a GPU the milliseconds are those between events in its queue; the CPU is waited for at both ends only.
        The CPU's are of all threads of this process: less sensitive to other processes than the clock on the wall.
        """
        if self.task.turn is not None:
            return self.task.turn(steps, lead)
        for _ in range(lead):
            self.task.run()
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
        marks, cpu = [_mark(cuda)], [time.process_time()]
        for _ in range(steps):
            self.task.run()
            marks.append(_mark(cuda))
            cpu.append(time.process_time())
        if cuda:
            torch.cuda.synchronize()
        pairs = list(zip(marks[:-1], marks[1:], strict=True))
        wall = [start.elapsed_time(end) if cuda else 1000 * (end - start) for start, end in pairs]
        if cuda:  # the next variant may need the memory
            torch.cuda.empty_cache()
        return {"ms": wall, "cpu_ms": [1000 * (end - start) for start, end in zip(cpu[:-1], cpu[1:], strict=True)]}

    def ceiling(self) -> Ceiling | None:
        """Return what the device reaches in the precision of this variant, None for a layer; takes seconds."""
        return measure_ceiling(self.device, self.dtype) if self.convolutions else None

    def cost(self, ceiling: Ceiling | None) -> dict:
        """Return gflop and floor_ms of a run's convolutions, and its operations and host_waits; {} for a layer.

        A run that is compiled or a graph is not counted: it has no operations that could be watched.
        """
        if ceiling is None:
            return {}
        seconds = floor_seconds(self.convolutions, ceiling, self.dtype.itemsize)
        found = {"gflop": sum(one.flops for one in self.convolutions) / 1e9, "floor_ms": 1000 * seconds}
        if not self.traced:
            with HostWaits() as watch:
                self.task.run()
            found |= {"operations": watch.operations, "host_waits": watch.waits}
        if self.device.type == "cuda":
            found["kernel_ms"] = self._kernel_ms()
        return found

    def _kernel_ms(self) -> float:
        """Return the time of all kernels of a run: what is left of its milliseconds are gaps between them."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self.task.run()
            torch.cuda.synchronize()
        return sum(event.self_device_time_total for event in profiler.key_averages()) / 1000

    def report(self) -> dict:
        """Return images of a run, peak memory in bytes above that before the model was made (or None), and facts."""
        # a layer needs less than the libraries that its first runs load, so resident pages say nothing about it
        unknown = self.job.task in MEMORY_FORMATS and self.device.type == "cpu"
        peak = None if unknown else self._peak()
        used = {"memory": None if peak is None else peak - self.baseline}
        if self.device.type == "cuda":
            used["reserved"] = torch.cuda.max_memory_reserved()
        return {"images": self.task.images, **used, "facts": self.task.facts()}

    def profile(self, folder: str) -> str:
        """Run once under the profiler; write the trace to `folder` and return the table of kernels."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with profile(activities=activities) as profiler:
            self.task.run()
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path / f"{self.job.task}_{self.job.name}.json".replace(" ", "_")))
        return profiler.key_averages().table(f"self_{self.device.type}_time_total", row_limit=_TABLE_ROWS)

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_resident()

    def _restart_gauge(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated()
        restart_peak_resident()
        return peak_resident() or 0


def _mark(cuda: bool):
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_resident() -> int | None:
    """Return the largest resident set of this process so far in bytes; None where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def restart_peak_resident() -> None:
    """Let `peak_resident` start from what is in use now, where Linux and glibc allow it; elsewhere it only grows."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
