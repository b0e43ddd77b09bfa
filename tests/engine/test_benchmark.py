"""The parts of a benchmark: gauges, interleaving, arithmetic, and what happens when a process dies."""

import os
import signal
import sys

import pytest
import torch
from benchmark_cases import TINY, job_of

from retinanet.engine import benchmark
from retinanet.engine.benchmark import Measured, Remote, Settings, measure, summary
from retinanet.engine.benchmark_tasks import Job
from retinanet.engine.benchmark_worker import Worker, peak_resident, restart_peak_resident
from retinanet.errors import UserError


def test_worker_times_every_run_and_reports():
    _, job = job_of(TINY, variant="GN", task="layer_contiguous", size=(16, 16))
    worker = Worker(job)
    assert worker.build()["device"] == "cpu"
    runs, real = [], worker.task.run
    object.__setattr__(worker.task, "run", lambda: runs.append(real()))
    worker.warm_up(2)
    times = worker.time(3, 1)
    assert len(runs) == 6 and len(times["ms"]) == len(times["cpu_ms"]) == 3
    assert min(times["ms"] + times["cpu_ms"]) > 0
    assert worker.report()["images"] == 2


def test_profile_is_a_table_and_a_trace(tmp_path):
    _, job = job_of(TINY, variant="GN", task="layer_contiguous", size=(16, 16))
    worker = Worker(job)
    worker.build()
    assert "native_group_norm" in worker.profile(str(tmp_path / "traces"))
    assert (tmp_path / "traces/layer_contiguous_GN.json").stat().st_size > 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the gauge can be restarted on Linux only")
def test_peak_follows_allocations_and_can_be_restarted():
    restart_peak_resident()
    start = peak_resident()
    big = torch.ones(2**24)  # 64 MiB
    high = peak_resident() - 2**20  # the kernel counts in lots of pages
    assert high - start > 60 * 2**20
    del big
    assert peak_resident() >= high
    restart_peak_resident()
    assert peak_resident() - start < 30 * 2**20


def measured(name: str, ms, cpu_ms, memory) -> Measured:
    report = {"images": 4, "memory": memory, "facts": {"last_loss": 2.0}}
    return Measured(Job(name, "train", "", (8, 8), 4), ms, cpu_ms, {"device": "cpu"}, report)


def test_summary_has_medians_and_ratios_of_the_same_round():
    """In round 2 the machine is twice as slow for both: the ratio does not notice, the spread does."""
    base = measured("BN", [[10, 20, 12], [24, 24, 24]], [[8, 8, 8], [8, 8, 8]], 100 * 2**20)
    other = measured("MABN", [[18, 18, 90], [30, 36, 36]], [[12, 12, 12], [10, 10, 10]], 150 * 2**20)
    first, second = summary([base, other])
    assert first["ms"] == 22 and first["ms_low"] == 12 and first["ms_high"] == 24
    assert first["spread"] == pytest.approx(12 / 22)
    assert first["images_per_s"] == pytest.approx(4 / 0.022)
    assert (first["ratio"], first["ratio_low"], first["ratio_high"], first["memory_ratio"]) == (1, 1, 1, 1)
    assert second["ms"] == 33
    assert second["ratio_low"] == second["ratio_high"] == second["ratio"] == 1.5  # 18 / 12 and 36 / 24
    assert second["cpu_ms"] == 11 and second["cpu_ratio"] == pytest.approx((1.5 + 1.25) / 2)
    assert second["memory_mib"] == 150 and second["memory_ratio"] == 1.5
    assert second["last_loss"] == 2 and second["rounds_ms"] == other.ms


def test_unknown_memory_is_none_and_not_a_ratio():
    rows = summary([measured("BN", [[1]], [[1]], None), measured("GN", [[1]], [[1]], 5)])
    assert [row["memory_mib"] for row in rows] == [None, 5 / 2**20]
    assert [row["memory_ratio"] for row in rows] == [None, None]


class Recorder:
    """Stands for `Remote`: notes what it is asked for."""

    calls: list[tuple] = []
    fails = ""

    def __init__(self, job):
        self.job = job

    def call(self, method, *arguments):
        self.calls.append((self.job.name, method, *arguments))
        if self.job.name == self.fails:
            raise UserError("broken")
        report = {"images": 1, "memory": 1, "facts": {}}
        return {"time": {"ms": [1.0], "cpu_ms": [1.0]}, "report": report, "build": {"device": "cpu"}}.get(method)

    def stop(self):
        self.calls.append((self.job.name, "stop"))


@pytest.fixture
def recorder(monkeypatch):
    recorder = type("FreshRecorder", (Recorder,), {"calls": []})
    monkeypatch.setattr(benchmark, "Remote", recorder)
    return recorder


def jobs(*names):
    return [Job(name, "train", "", (8, 8), 1) for name in names]


def test_variants_take_turns_round_by_round(recorder):
    lines = []
    rows = measure(jobs("a", "b", "c"), Settings(rounds=2, steps=5, warm_up=4), lines.append)
    assert [name for name, method, *_ in recorder.calls if method == "time"] == list("abcabc")
    assert ("b", "warm_up", 4) in recorder.calls and ("b", "time", 5, 1) in recorder.calls
    assert recorder.calls[-3:] == [("a", "stop"), ("b", "stop"), ("c", "stop")]
    assert [row["variant"] for row in rows] == ["a", "b", "c"] and "round 2 of 2: a 1 ms" in lines[-1]


def test_peak_memory_is_read_before_a_process_measures_the_rates_of_the_machine(recorder):
    """The matrices for that are larger than many a model: the first variant once seemed to need 90 MiB more."""
    measure(jobs("a", "b"), Settings(rounds=1, steps=1, warm_up=0))
    order = [(name, method) for name, method, *_ in recorder.calls if method in ("report", "ceiling", "cost")]
    assert order == [("a", "report"), ("b", "report"), ("a", "ceiling"), ("a", "cost"), ("b", "cost")]


def test_failure_of_one_variant_stops_all(recorder):
    recorder.fails = "b"
    with pytest.raises(UserError, match="broken"):
        measure(jobs("a", "b"), Settings(rounds=1, steps=1, warm_up=0))
    assert recorder.calls[-2:] == [("a", "stop"), ("b", "stop")]


def test_errors_and_the_end_of_a_process_are_reported():
    """A mistake of the user keeps its message, a defect its traceback, and a killed process says what may help."""
    _, job = job_of(TINY, variant="GN", task="layer_contiguous", channels=30)
    handler, remote = signal.getsignal(signal.SIGINT), Remote(job)
    try:
        assert signal.getsignal(signal.SIGINT) is handler
        with pytest.raises(UserError, match="variant GN: GN: 30 channels do not divide into 32 groups"):
            remote.call("build")
        os.kill(remote.process.pid, signal.SIGINT)  # Ctrl-C is for the parent
        with pytest.raises(RuntimeError, match="process of GN failed in report:\n(.|\n)*AttributeError"):
            remote.call("report")
        os.kill(remote.process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="variant GN: its process was killed, .* smaller --batch"):
            remote.call("report")
    finally:
        remote.stop()
    assert not remote.process.is_alive()
