"""What a benchmark runs: inputs, the real training step, detection, one norm, and the same of the peer."""

import pytest
import torch
from benchmark_cases import CPU, PEER, TINY, job_of
from torch import nn
from torchvision.models.detection.retinanet import _default_anchorgen

from retinanet.engine import benchmark_peer, benchmark_tasks
from retinanet.engine.benchmark_peer import build_peer, build_peer_detection, build_peer_train
from retinanet.engine.benchmark_tasks import (
    build_detection,
    build_layer,
    build_train,
    make_batches,
    make_maps,
    rotate,
    saved_bytes,
    set_scores,
)
from retinanet.errors import UserError
from retinanet.modeling.anchors import AnchorGenerator


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


@pytest.mark.parametrize("scale", [4.0, 2.0])
def test_peer_has_the_anchors_of_the_configuration(scale):
    cfg, job = job_of(PEER, variant="torchvision")
    cfg.defrost()
    cfg.MODEL.ANCHORS.SCALE = scale
    found = build_peer(cfg, job).anchor_generator
    ours = AnchorGenerator(scale, 3, [0.5, 1.0, 2.0], "torchvision")
    assert [sorted(cell.tolist()) for cell in found.cell_anchors] == [sorted(cell.tolist()) for cell in ours.cells]
    assert (found.sizes == _default_anchorgen().sizes) == (scale == 4.0)


def test_peer_that_torchvision_cannot_build_is_refused():
    cfg, job = job_of(TINY, variant="torchvision")
    with pytest.raises(UserError, match="the configuration has 32 and 1; leave it out"):
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
