"""RetinaNetLoss against torchvision's heads, the formulas of the other projects, and its own promises on batches."""

import copy

import pytest
import torch
import torchvision
from detection_cases import SyncWatch, random_boxes
from torch.nn import functional as F
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead

from retinanet.errors import UserError
from retinanet.modeling.anchors import AnchorGenerator
from retinanet.modeling.loss import NORMALIZERS, RetinaNetLoss
from retinanet.ops.boxes import encode
from retinanet.ops.losses import BOX_LOSSES
from retinanet.structures import BACKGROUND, IGNORE, PAD_LABEL, HeadOutputs, Target, pad_targets

NUM_CLASSES = 4
ANCHORS = AnchorGenerator(1.5, 2, (0.5, 1.0), "detectron2", strides=(8, 16))((64, 96))
ROWS = [len(level) for level in ANCHORS]


def random_outputs(num_images, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(num_images, rows, NUM_CLASSES, generator=generator) - 2 for rows in ROWS]
    deltas = [torch.randn(num_images, rows, 4, generator=generator) * 0.3 for rows in ROWS]
    leaves = [[tensor.to(dtype).requires_grad_() for tensor in tensors] for tensors in (logits, deltas)]
    return HeadOutputs(logits=leaves[0], deltas=leaves[1], anchors=ANCHORS)


def random_targets(counts=(3, 0, 5, 1)):
    return [
        Target(boxes=random_boxes(count, seed=i, size=60.0), labels=torch.arange(count) % NUM_CLASSES)
        for i, count in enumerate(counts)
    ]


def part(outputs, images):
    """Return the outputs of a slice of the images."""
    return HeadOutputs(
        logits=[level[images] for level in outputs["logits"]],
        deltas=[level[images] for level in outputs["deltas"]],
        anchors=outputs["anchors"],
    )


def gradients(losses, outputs):
    leaves = [*outputs["logits"], *outputs["deltas"]]
    return torch.autograd.grad(losses["loss_cls"] + losses["loss_box"], leaves)


def sums_by_loops(outputs, assignment, gt_boxes, beta=0.0):
    """Return the focal and the smooth L1 sum of each image, (N,) each, with masks and selections."""
    logits, deltas = torch.cat(outputs["logits"], 1), torch.cat(outputs["deltas"], 1)
    anchors, focal, box = torch.cat(outputs["anchors"]), [], []
    for image, (matched, labels) in enumerate(zip(assignment.matched_idx, assignment.labels, strict=True)):
        valid, positive = labels != IGNORE, matched >= 0
        target = F.one_hot(labels.clamp(min=0), NUM_CLASSES) * positive.unsqueeze(1)
        focal.append(torchvision.ops.sigmoid_focal_loss(logits[image, valid], target[valid].float(), reduction="sum"))
        wanted = encode(gt_boxes[image, matched[positive]], anchors[positive])
        box.append(F.smooth_l1_loss(deltas[image, positive], wanted, reduction="sum", beta=beta))
    return torch.stack(focal), torch.stack(box)


def test_one_positive_by_hand():
    anchors = [torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])]
    outputs = HeadOutputs(logits=[torch.zeros(1, 2, 1)], deltas=[torch.full((1, 2, 4), 0.5)], anchors=anchors)
    boxes, labels = torch.tensor([[[0.0, 0.0, 10.0, 10.0]]]), torch.tensor([[0]])
    losses = RetinaNetLoss(1, box="l1", box_weight=3.0)(outputs, boxes, labels)
    log2 = 0.6931472
    torch.testing.assert_close(losses["loss_cls"], torch.tensor((0.25 + 0.75) * 0.25 * log2 / 2))  # 1 positive + 1
    torch.testing.assert_close(losses["loss_box"], torch.tensor(3.0 * 4 * 0.5 / 2))


def test_assignment_holds_the_class_of_the_matched_box():
    gt_boxes, gt_labels = pad_targets(random_targets())
    assignment = RetinaNetLoss(NUM_CLASSES).assign(ANCHORS, gt_boxes, gt_labels)
    for matched, labels, boxes_labels in zip(assignment.matched_idx, assignment.labels, gt_labels, strict=True):
        positive = matched >= 0
        assert torch.equal(labels[positive], boxes_labels[matched[positive]])
        assert torch.equal(labels[~positive], matched[~positive])
    assert (assignment.labels[1] == BACKGROUND).all()
    assert (assignment.labels[0] == IGNORE).any() and (assignment.labels[0] >= 0).any()


@pytest.mark.parametrize("box", ["l1", "smooth_l1", "giou", "diou", "ciou"])
def test_image_normalizer_equals_torchvision(box):
    targets, outputs = random_targets(counts=(3, 0, 5)), random_outputs(3)
    gt_boxes, gt_labels = pad_targets(targets)
    loss_fn = RetinaNetLoss(NUM_CLASSES, box=box, beta=1.0, normalizer="image")
    losses = loss_fn(outputs, gt_boxes, gt_labels)
    matched = list(loss_fn.assign(ANCHORS, gt_boxes, gt_labels).matched_idx)
    head_outputs = {"cls_logits": torch.cat(outputs["logits"], 1), "bbox_regression": torch.cat(outputs["deltas"], 1)}
    regression = RetinaNetRegressionHead(8, 1)
    regression._loss_type = box
    expected = {
        "loss_cls": RetinaNetClassificationHead(8, 1, NUM_CLASSES).compute_loss(targets, head_outputs, matched),
        "loss_box": regression.compute_loss(targets, head_outputs, [torch.cat(ANCHORS)] * 3, matched),
    }
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(losses, outputs), gradients(expected, outputs), rtol=1e-4, atol=1e-6)


def test_batch_normalizer_is_the_sum_of_positives_plus_one_of_every_image():
    outputs, (gt_boxes, gt_labels) = random_outputs(4), pad_targets(random_targets())
    loss_fn = RetinaNetLoss(NUM_CLASSES, low_quality="detectron", beta=0.11)
    assignment = loss_fn.assign(ANCHORS, gt_boxes, gt_labels)
    focal, box = sums_by_loops(outputs, assignment, gt_boxes, beta=0.11)
    divisor = sum(count + 1 for count in assignment.num_fg.tolist())
    losses = loss_fn(outputs, gt_boxes, gt_labels)
    torch.testing.assert_close(losses["loss_cls"], focal.sum() / divisor)
    torch.testing.assert_close(losses["loss_box"], box.sum() / divisor)


def test_ema_normalizer_follows_detectron2():
    outputs, (gt_boxes, gt_labels) = random_outputs(4), pad_targets(random_targets())
    loss_fn = RetinaNetLoss(NUM_CLASSES, box="l1", normalizer="ema")
    assignment = loss_fn.assign(ANCHORS, gt_boxes, gt_labels)
    focal, box = sums_by_loops(outputs, assignment, gt_boxes)
    running = 100.0
    for _ in range(3):
        running = 0.9 * running + 0.1 * int(assignment.num_fg.sum())  # before it divides
        losses = loss_fn(outputs, gt_boxes, gt_labels)
        torch.testing.assert_close(losses["loss_cls"], focal.sum() / running)
        torch.testing.assert_close(losses["loss_box"], box.sum() / running)
    assert loss_fn.state_dict()["running_positives"].item() == pytest.approx(running)


def test_ema_counts_at_least_one_positive():
    loss_fn = RetinaNetLoss(NUM_CLASSES, normalizer="ema")
    assert loss_fn.divisor(loss_fn.count(torch.zeros(2, dtype=torch.int64))).item() == pytest.approx(90.1)


def test_ema_stands_still_in_evaluation_mode():
    loss_fn = RetinaNetLoss(NUM_CLASSES, normalizer="ema").eval()
    assert loss_fn.divisor(torch.tensor(7.0)).item() == 100.0
    assert loss_fn.running_positives.item() == 100.0


def test_divisor_is_no_view_of_the_running_mean():
    loss_fn = RetinaNetLoss(NUM_CLASSES, normalizer="ema")
    first = loss_fn.divisor(torch.tensor(50.0))
    loss_fn.divisor(torch.tensor(500.0))
    assert first.item() == pytest.approx(95.0)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 2, 3, 4)])
def test_micro_batches_add_up_to_the_big_batch(normalizer, cuts):
    targets, outputs = random_targets(), random_outputs(4)
    whole_fn = RetinaNetLoss(NUM_CLASSES, normalizer=normalizer)
    split_fn = copy.deepcopy(whole_fn)
    whole = whole_fn(outputs, *pad_targets(targets))
    parts = [slice(*ends) for ends in zip(cuts, cuts[1:], strict=False)]
    batches = [pad_targets(targets[images]) for images in parts]
    assignments = [split_fn.assign(ANCHORS, *batch) for batch in batches]
    divisor = split_fn.divisor(sum(split_fn.count(assignment.num_fg) for assignment in assignments))
    pieces = [
        split_fn(part(outputs, images), *batch, assignment, divisor)
        for images, batch, assignment in zip(parts, batches, assignments, strict=True)
    ]
    total = {name: sum(piece[name] for piece in pieces) for name in whole}
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradients(total, outputs), gradients(whole, outputs), rtol=1e-5, atol=1e-8)
    assert split_fn.state_dict() == whole_fn.state_dict()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("rows", [0, 8])
def test_a_batch_without_boxes_has_a_class_loss_alone(normalizer, rows):
    outputs = random_outputs(2)
    losses = RetinaNetLoss(NUM_CLASSES, normalizer=normalizer)(
        outputs, torch.zeros(2, rows, 4), torch.full((2, rows), PAD_LABEL)
    )
    assert losses["loss_box"].item() == 0.0
    assert 0 < losses["loss_cls"].item() < float("inf")
    grads = gradients(losses, outputs)
    assert all((grad != 0).all() for grad in grads[: len(ROWS)])
    assert all((grad == 0).all() for grad in grads[len(ROWS) :])


@pytest.mark.parametrize("box", BOX_LOSSES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_box_gradients_are_finite_and_on_positive_anchors_alone(box, plus_one):
    outputs, (gt_boxes, gt_labels) = random_outputs(4), pad_targets(random_targets())
    loss_fn = RetinaNetLoss(NUM_CLASSES, box=box, plus_one=plus_one)
    positive = loss_fn.assign(ANCHORS, gt_boxes, gt_labels).matched_idx >= 0
    with torch.no_grad():
        for level, mask in zip(outputs["deltas"], positive.split(ROWS, 1), strict=True):
            level[~mask] = float("inf")  # what no anchor learns must not matter
    losses = loss_fn(outputs, gt_boxes, gt_labels)
    grad = torch.cat(gradients(losses, outputs)[len(ROWS) :], 1)
    assert losses["loss_box"].isfinite() and losses["loss_box"] > 0
    assert (grad[~positive] == 0).all()
    assert grad[positive].isfinite().all() and (grad[positive] != 0).any(1).all()


def test_bfloat16_outputs_give_float32_losses():
    outputs, (gt_boxes, gt_labels) = random_outputs(4, dtype=torch.bfloat16), pad_targets(random_targets())
    wide = HeadOutputs(
        logits=[level.detach().float() for level in outputs["logits"]],
        deltas=[level.detach().float() for level in outputs["deltas"]],
        anchors=ANCHORS,
    )
    loss_fn = RetinaNetLoss(NUM_CLASSES)
    losses = loss_fn(outputs, gt_boxes, gt_labels)
    torch.testing.assert_close(losses, loss_fn(wide, gt_boxes, gt_labels), rtol=1e-6, atol=0)
    assert {grad.dtype for grad in gradients(losses, outputs)} == {torch.bfloat16}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("box", ["smooth_l1", "ciou"])
def test_loss_never_waits_for_the_device(normalizer, box):
    outputs, (gt_boxes, gt_labels) = random_outputs(4), pad_targets(random_targets())
    loss_fn = RetinaNetLoss(NUM_CLASSES, box=box, normalizer=normalizer)
    with SyncWatch() as watch:
        losses = loss_fn(outputs, gt_boxes, gt_labels)
        (losses["loss_cls"] + losses["loss_box"]).backward()
    assert not watch.waits
    assert watch.largest > 0


def test_loss_compiles_into_one_graph():
    outputs, (gt_boxes, gt_labels) = random_outputs(4), pad_targets(random_targets())
    loss_fn = RetinaNetLoss(NUM_CLASSES)
    expected = loss_fn(outputs, gt_boxes, gt_labels)
    losses = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)(outputs, gt_boxes, gt_labels)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradients(losses, outputs), gradients(expected, outputs), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": "gious"}, "MODEL.LOSS.BOX: 'gious' .*did you mean 'giou'"),
        ({"normalizer": "mean"}, "MODEL.LOSS.NORMALIZER: 'mean' is not one of batch, ema, image"),
        ({"low_quality": "no"}, "MODEL.MATCHER.LOW_QUALITY: 'no' is not one of"),
    ],
)
def test_unknown_names_are_refused_at_once(options, message):
    with pytest.raises(UserError, match=message):
        RetinaNetLoss(NUM_CLASSES, **options)
