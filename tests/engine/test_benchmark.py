"""The parts of a benchmark: inputs, tasks, gauges, interleaving, arithmetic, and what happens when a process dies."""

import os
import signal
import sys

import pytest
import torch
from torch import nn

from retinanet.config.load import dump_config, load_config_text
from retinanet.engine import benchmark, benchmark_peer, benchmark_tasks
from retinanet.engine.benchmark import Measured, Remote, Settings, measure, summary
from retinanet.engine.benchmark_peer import build_peer, build_peer_detection, build_peer_train
from retinanet.engine.benchmark_tasks import (
    Job,
    build_detection,
    build_layer,
    build_train,
    make_batches,
    make_maps,
    rotate,
    saved_bytes,
    set_scores,
)
from retinanet.engine.benchmark_worker import Worker, peak_resident, restart_peak_resident
from retinanet.errors import UserError

CPU = torch.device("cpu")
TINY = """
MODEL:
  NUM_CLASSES: 3
  BACKBONE: {NAME: R18, NORM: BN, FREEZE_AT: 0}
  FPN: {CHANNELS: 32}
  HEAD: {NUM_CONVS: 1}
SOLVER: {ACCUMULATE: 2}
DEVICE: cpu
"""
PEER = "{MODEL: {NUM_CLASSES: 3, BACKBONE: {NAME: R18, FREEZE_AT: 2}}, DEVICE: cpu, TEST: {MAX_DETS: 7}}"


def job_of(text: str, **changes) -> tuple:
    cfg = load_config_text(text, "test")
    values = {"variant": "config", "task": "train", "size": (64, 96), "batch": 2, "boxes": 3, "scores": 20}
    return cfg, Job(config=dump_config(cfg), **{**values, **changes})


def test_batches_are_the_same_every_time_and_hold_boxes_inside_the_image():
    _, job = job_of(TINY)
    first, second = (make_batches(job, 3, 2, CPU) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.images.equal(theirs.images) and ours.gt_boxes.equal(theirs.gt_boxes)
    assert not first[0].images.equal(first[1].images)
    batch = first[0]
    assert batch.images.shape == (2, 3, 64, 96) and batch.images.dtype == torch.uint8
    assert batch.image_sizes.tolist() == [[64, 96]] * 2 and (batch.gt_labels >= 0).sum(1).tolist() == [3, 3]
    boxes = batch.gt_boxes[:, :3]
    assert (boxes >= 0).all() and (boxes[..., 2] <= 96).all() and (boxes[..., 3] <= 64).all()
    assert (boxes[..., 2:] - boxes[..., :2] > 6).all()


def test_images_without_boxes_can_be_timed():
    cfg, job = job_of(TINY, boxes=0)
    task = build_train(cfg, job, make_batches(job, 3, 2, CPU))
    task.run()
    assert task.facts()["last_loss"] > 0


def test_rotation_takes_several_batches_per_step_in_a_circle():
    steps = rotate(list("abc"), 2)
    assert ["".join(next(steps)) for _ in range(4)] == ["ab", "ca", "bc", "ab"]


def test_training_task_is_the_real_step_on_changing_batches(monkeypatch):
    """The function that training calls, with `ACCUMULATE` batches; weights and running statistics change."""
    calls, real = [], benchmark_tasks.train_step

    def spy(trainer, batches):
        before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        values = real(trainer, batches)
        calls.append((trainer.model, batches, before))
        return values

    monkeypatch.setattr(benchmark_tasks, "train_step", spy)
    monkeypatch.setattr(benchmark_tasks, "RATE", 0.01)  # so that no step is lost in rounding
    cfg, job = job_of(TINY)
    batches = make_batches(job, 3, 3, CPU)
    task = build_train(cfg, job, batches)
    task.run()
    model, _, before = calls[0]
    same = [name for name, value in model.state_dict().items() if value.equal(before[name])]
    assert not same, same
    task.run()
    assert [id(batch) for _, used, _ in calls for batch in used] == [id(batches[i]) for i in (0, 1, 2, 0)]
    assert task.images == 4
    assert task.facts()["first_loss"] != task.facts()["last_loss"]


def test_task_of_the_peer_trains_what_the_configuration_does_not_freeze(monkeypatch):
    made = []
    monkeypatch.setattr(benchmark_tasks, "RATE", 0.01)
    monkeypatch.setattr(benchmark_peer, "build_peer", lambda cfg, job: made.append(build_peer(cfg, job)) or made[-1])
    cfg, job = job_of(PEER, variant="torchvision", size=(64, 64))
    task = build_peer_train(cfg, job, make_batches(job, 3, 2, CPU))
    before = {name: value.clone() for name, value in made[0].named_parameters()}
    task.run()
    changed = {name for name, value in made[0].named_parameters() if not value.equal(before[name])}
    assert {name for name in before if name not in changed} == {
        name for name in before if name.startswith(("backbone.body.conv1", "backbone.body.layer1"))
    }
    assert task.facts()["last_loss"] > 0


def test_peer_has_as_many_trained_weights_as_our_model():
    """With frozen norms the two networks are the same: parameters of P6 and P7, classes and anchors included."""
    cfg, job = job_of(PEER, variant="torchvision")
    ours = benchmark_tasks.build_model(cfg)
    both = (ours, build_peer(cfg, job))
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in both]
    assert counts[0] == counts[1] > 0


def test_peer_that_torchvision_cannot_build_is_refused():
    cfg, job = job_of(TINY, variant="torchvision")
    with pytest.raises(UserError, match="the configuration has 32, 1 and 9; leave it out"):
        build_peer(cfg, job)


@pytest.mark.parametrize("folded", [False, True])
def test_detection_task_finds_something(folded):
    cfg, job = job_of(TINY, task="detect", folded=folded)
    task = build_detection(cfg, job, make_batches(job, 3, 1, CPU))
    task.run()
    assert 1 <= task.facts()["detections_per_image"] <= job.scores
    assert job.name == ("config folded" if folded else "config")


def test_detection_task_of_the_peer_finds_something():
    cfg, job = job_of(PEER, task="detect", variant="torchvision", size=(64, 64), scores=500)
    task = build_peer_detection(cfg, job, make_batches(job, 3, 1, CPU))
    task.run()
    assert task.facts()["detections_per_image"] == 7  # MAX_DETS


@pytest.mark.parametrize("count", [0, 7])
def test_wanted_number_of_scores_lies_above_the_threshold(count):
    torch.manual_seed(0)
    prediction, x = nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 5)
    set_scores(prediction, lambda: prediction(x), 0.05, count)
    logits = prediction(x).detach()
    assert int((logits > torch.logit(torch.tensor(0.05)) + 1e-6).sum()) == count
    torch.testing.assert_close(float(logits.std()), 1.0, rtol=0.35, atol=0)  # the bias of each channel is not scaled


def test_saved_bytes_count_a_tensor_once_and_no_parameter():
    x, layer = torch.randn(2, 3, 8, 8, requires_grad=True), nn.Linear(8, 8)
    size = 4 * x.numel()
    assert saved_bytes(lambda: x.exp(), layer) == size  # its result
    assert saved_bytes(lambda: x * x, layer) == size  # x, asked for twice
    assert saved_bytes(lambda: layer(x), layer) == size  # x; the weight does not count
    assert saved_bytes(lambda: x + 1, layer) == 0


@pytest.mark.parametrize("task", ["layer_contiguous", "layer_channels_last"])
@pytest.mark.parametrize("variant", ["BatchNorm2d", "AffineChannel", "GN", "MABN", "BCN"])
def test_layer_task_keeps_the_memory_format_and_one_activation(variant, task):
    cfg, job = job_of(TINY, variant=variant, task=task, size=(32, 32))
    x, grad = make_maps(job, CPU)[0]
    assert x.shape == grad.shape == (2, 64, 32, 32)
    assert x.is_contiguous() == grad.is_contiguous() == (task == "layer_contiguous")
    built = build_layer(cfg, job, [(x, grad)])
    assert built.run()[0].shape == x.shape
    assert built.facts()["saved_mib"] * 2**20 < 4.0 * x.numel() * (1 if variant == "AffineChannel" else 1.1)


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
