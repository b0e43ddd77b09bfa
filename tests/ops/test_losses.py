"""Focal and box losses: values and gradients by hand, against torchvision's operators and the original projects."""

import math

import pytest
import torch
import torchvision
from detection_cases import SyncWatch, random_boxes, reference
from torch.nn import functional as F

from retinanet.ops import losses
from retinanet.ops.boxes import decode, encode
from retinanet.ops.losses import (
    BOX_LOSSES,
    DETECTRON_MAX_LOG,
    ciou_loss,
    diou_loss,
    giou_loss,
    l1_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from retinanet.structures import BACKGROUND, IGNORE


def random_case(num_images=2, rows=30, classes=5, seed=0, dtype=torch.float32):
    """Logits (N, R, K) and labels (N, R) with positive, background and ignored anchors."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, rows, classes, generator=generator, dtype=torch.float64) * 3 - 2
    labels = torch.randint(-2, classes, (num_images, rows), generator=generator)
    return logits.to(dtype).requires_grad_(), labels


def torchvision_focal_loss(logits, labels, gamma, alpha):
    """The same sums by way of a one-hot target and a mask."""
    target = F.one_hot(labels.clamp(min=0), logits.shape[2]) * (labels >= 0).unsqueeze(2)
    loss = torchvision.ops.sigmoid_focal_loss(logits, target.to(logits), alpha=alpha, gamma=gamma)
    return (loss * (labels != IGNORE).unsqueeze(2)).sum((1, 2))


def test_focal_loss_of_undecided_logits():
    logits, labels = torch.zeros(3, 1, 1), torch.tensor([[0], [BACKGROUND], [IGNORE]])
    expected = torch.tensor([0.25, 0.75, 0.0]) * 0.25 * math.log(2)  # alpha, 1 - alpha; (1 / 2)^2
    torch.testing.assert_close(sigmoid_focal_loss(logits, labels, 2.0, 0.25), expected)


def test_an_ignored_anchor_gets_no_gradient():
    logits = torch.randn(1, 2, 3, requires_grad=True)
    sigmoid_focal_loss(logits, torch.tensor([[IGNORE, 1]]), 2.0, 0.25).sum().backward()
    assert logits.grad[0, 0].tolist() == [0.0, 0.0, 0.0]
    assert (logits.grad[0, 1] != 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_focal_loss_equals_torchvision_in_float64(gamma, alpha):
    logits, labels = random_case(dtype=torch.float64)
    weight = torch.tensor([1.0, -0.5], dtype=torch.float64)
    loss = sigmoid_focal_loss(logits, labels, gamma, alpha)
    (grad,) = torch.autograd.grad(loss @ weight, logits)
    expected = torchvision_focal_loss(logits, labels, gamma, alpha)
    (expected_grad,) = torch.autograd.grad(expected @ weight, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-12)


def test_focal_loss_in_float32_is_close_to_float64():
    logits, labels = random_case(rows=2000)
    exact, _ = random_case(rows=2000, dtype=torch.float64)
    loss, expected = sigmoid_focal_loss(logits, labels, 2.0, 0.25), sigmoid_focal_loss(exact, labels, 2.0, 0.25)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


def test_focal_loss_passes_gradcheck():
    logits, labels = random_case(rows=6, classes=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, labels, 2.0, 0.25), logits)


def test_focal_loss_refuses_a_second_derivative():
    logits, labels = random_case()
    weight = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(sigmoid_focal_loss(logits, labels, 2.0, 0.25) @ weight, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("prefix", ["focal", "focal_b"])
def test_focal_loss_of_caffe2_detectron(prefix):
    arrays = reference("caffe2/losses")
    gamma, alpha, scale, num_classes = arrays[f"{prefix}_params"].tolist()
    images, channels, height, width = arrays["focal_x"].shape
    rows = (images, channels // int(num_classes), int(num_classes), height, width)

    def to_rows(blob):  # (N, A*K, H, W) -> (N, H*W*A, K)
        return blob.view(rows).permute(0, 3, 4, 1, 2).flatten(1, 3)

    logits = to_rows(arrays["focal_x"]).double().requires_grad_()
    blob = arrays["focal_t"].permute(0, 2, 3, 1).flatten(1).long()  # 0 background, -1 ignored
    labels = torch.where(blob > 0, blob - 1, torch.where(blob == 0, BACKGROUND, IGNORE))
    factor = scale / arrays["focal_fg_num"].double().squeeze()
    loss = sigmoid_focal_loss(logits, labels, gamma, alpha, DETECTRON_MAX_LOG).sum() * factor
    loss.backward()
    torch.testing.assert_close(loss, arrays[f"{prefix}_loss_f64"], rtol=1e-9, atol=0)
    torch.testing.assert_close(logits.grad, to_rows(arrays[f"{prefix}_dx_f64"]), rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("project", ["detectron2", "torchvision"])
def test_focal_loss_of_detectron2_and_torchvision(project):
    arrays = reference(f"{project}/units")
    logits = arrays["logits"].reshape(-1, 1, 1).requires_grad_()  # each number is an image of its own; up to +-100
    labels = torch.where(arrays["target"].reshape(-1, 1) == 1, 0, BACKGROUND)
    loss = sigmoid_focal_loss(logits, labels, 2.0, 0.25)
    loss.sum().backward()
    torch.testing.assert_close(loss, arrays["focal"].flatten(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits.grad.flatten(), arrays["focal_grad"].flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [100.0, 1e4])
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_extreme_logits(size, gamma):
    logits = torch.tensor([[[size]], [[-size]], [[size]], [[-size]]], requires_grad=True)
    labels = torch.tensor([[0], [0], [BACKGROUND], [BACKGROUND]])
    loss = sigmoid_focal_loss(logits, labels, gamma, 0.25)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.25 * size, 0.75 * size, 0.0]), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(logits.grad.flatten(), torch.tensor([0.0, -0.25, 0.75, 0.0]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits, labels = random_case(rows=500, dtype=dtype)
    wide = logits.detach().float().requires_grad_()
    loss, expected = sigmoid_focal_loss(logits, labels, 2.0, 0.25), sigmoid_focal_loss(wide, labels, 2.0, 0.25)
    loss.sum().backward()
    expected.sum().backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    assert torch.equal(loss, expected)
    assert torch.equal(logits.grad, wide.grad.to(dtype))


def test_pieces_do_not_change_the_focal_loss(monkeypatch):
    def run():
        logits, labels = random_case(rows=37)
        loss = sigmoid_focal_loss(logits, labels, 2.0, 0.25)
        loss.sum().backward()
        return loss, logits.grad

    expected = run()
    for elements in (1, 40, 100):
        monkeypatch.setattr(losses, "_CPU_CHUNK", elements)
        torch.testing.assert_close(run(), expected, rtol=1e-6, atol=1e-9)


def test_focal_loss_of_strided_logits():
    logits, labels = random_case()
    strided = logits.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    loss = sigmoid_focal_loss(strided, labels, 2.0, 0.25)
    loss.sum().backward()
    sigmoid_focal_loss(logits, labels, 2.0, 0.25).sum().backward()
    assert not strided.is_contiguous()
    assert torch.equal(strided.grad, logits.grad)


def test_focal_loss_keeps_only_logits_and_labels():
    logits, labels = random_case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sigmoid_focal_loss(logits, labels, 2.0, 0.25).sum()
    assert sorted(tuple(tensor.shape) for tensor in kept if tensor.dim() > 1) == [(2, 30), (2, 30, 5)]


def test_focal_loss_never_waits_for_the_device():
    logits, labels = random_case()
    with SyncWatch() as watch:
        sigmoid_focal_loss(logits, labels, 2.0, 0.25).sum().backward()
    assert not watch.waits
    assert watch.largest > 0


def test_focal_loss_compiles_into_one_graph():
    logits, labels = random_case()
    compiled = torch.compile(lambda x: sigmoid_focal_loss(x, labels, 2.0, 0.25), backend="aot_eager", fullgraph=True)
    loss = compiled(logits)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    expected = sigmoid_focal_loss(logits, labels, 2.0, 0.25)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close((loss, grad), (expected, expected_grad), rtol=1e-6, atol=1e-9)


def test_smooth_l1_turns_linear_at_beta():
    loss = smooth_l1_loss(torch.tensor([0.0, 0.1, 0.2, -1.0]), torch.zeros(4), beta=0.2)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.025, 0.1, 0.9]))


def test_smooth_l1_without_beta_is_l1():
    pred, target = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.5, 0.0, 0.5])
    assert smooth_l1_loss(pred, target, beta=0.0).tolist() == l1_loss(pred, target).tolist() == [0.5, 2.0, 0.0]


@pytest.mark.parametrize("prefix", ["sl1", "sl1_b"])
def test_smooth_l1_of_caffe2_detectron(prefix):
    arrays = reference("caffe2/losses")
    beta, scale = arrays[f"{prefix}_params"].tolist()
    image, channel, row, column = arrays["sl1_loc"].long().unbind(1)
    channels = channel.unsqueeze(1) + torch.arange(4)
    pred = arrays["sl1_yhat"].double().requires_grad_()
    chosen = pred[image.unsqueeze(1), channels, row.unsqueeze(1), column.unsqueeze(1)]
    factor = scale / arrays["sl1_fg_num"].double().squeeze()
    loss = smooth_l1_loss(chosen, arrays["sl1_y"].double(), beta).sum() * factor
    loss.backward()
    torch.testing.assert_close(loss, arrays[f"{prefix}_loss_f64"], rtol=1e-7, atol=0)
    torch.testing.assert_close(pred.grad, arrays[f"{prefix}_dyhat_f64"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("project", "name", "kind", "beta"),
    [
        ("detectron2", "l1", "l1", 0.0),
        ("detectron2", "smooth_l1_0.1", "smooth_l1", 0.1),
        ("detectron2", "giou", "giou", 0.0),
        ("torchvision", "l1", "l1", 0.0),
        ("torchvision", "smooth_l1_1.0", "smooth_l1", 1.0),
        ("torchvision", "giou", "giou", 0.0),
    ],
)
def test_box_losses_of_detectron2_and_torchvision(project, name, kind, beta):
    arrays = reference(f"{project}/units")
    deltas = arrays["deltas"].requires_grad_()
    loss = BOX_LOSSES[kind](deltas, arrays["anchors"], arrays["gt"], beta, False).sum()
    loss.backward()
    torch.testing.assert_close(loss, arrays[f"box_loss_sum/{name}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(deltas.grad, arrays[f"box_loss_grad/{name}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "oracle"),
    [
        (giou_loss, torchvision.ops.generalized_box_iou_loss),
        (diou_loss, torchvision.ops.distance_box_iou_loss),
        (ciou_loss, torchvision.ops.complete_box_iou_loss),
    ],
)
def test_iou_losses_equal_torchvision(loss, oracle):
    far = torch.tensor([[0.0, 0.0, 4.0, 4.0], [10.0, 10.0, 20.0, 20.0], [0.0, 0.0, 9.0, 9.0], [3.0, 3.0, 7.0, 8.0]])
    near = torch.tensor([[4.0, 0.0, 8.0, 4.0], [30.0, 30.0, 50.0, 60.0], [2.0, 2.0, 5.0, 6.0], [3.0, 3.0, 7.0, 8.0]])
    pred = torch.cat((random_boxes(40), far)).requires_grad_()  # then: touching, apart, inside, equal
    boxes = torch.cat((random_boxes(40, seed=1), near))
    value, expected = loss(pred, boxes), oracle(pred, boxes)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    weight = torch.linspace(0.5, 1.5, len(boxes))
    (grad,), (expected_grad,) = (torch.autograd.grad((v * weight).sum(), pred) for v in (value, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", BOX_LOSSES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_does(kind, plus_one):
    anchors, boxes = random_boxes(2, 6), random_boxes(2, 6, seed=1)
    deltas = encode(boxes, anchors, plus_one)
    right = BOX_LOSSES[kind](deltas, anchors, boxes, 0.1, plus_one)
    wrong = BOX_LOSSES[kind](deltas + 0.1, anchors, boxes, 0.1, plus_one)
    assert right.shape == (2, 6)
    assert right.abs().max() < 1e-4
    assert wrong.min() > 1e-3


def test_plus_one_iou_losses_see_the_border_pixels():
    anchor = torch.tensor([[0.0, 0.0, 9.0, 9.0]])  # 10 x 10 pixels
    shift = torch.tensor([[0.5, 0.0, 0.0, 0.0]])  # by 5 pixels: IoU and hull as of 10 x 10 squares 5 apart
    expected = 1 - (50 / 150 - 0 / 150)
    assert BOX_LOSSES["giou"](shift, anchor, anchor, 0.0, True).item() == pytest.approx(expected, abs=1e-6)
    assert decode(shift, anchor, plus_one=True).tolist() == [[5, 0, 14, 9]]


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_losses_of_bfloat16_deltas_are_float32(kind):
    deltas = torch.randn(8, 4).bfloat16().requires_grad_()
    loss = BOX_LOSSES[kind](deltas, random_boxes(8), random_boxes(8, seed=1), 0.1, False)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert deltas.grad.dtype == torch.bfloat16 and deltas.grad.isfinite().all()
