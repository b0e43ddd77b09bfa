"""Losses as pure functions: the focal loss summed over each image, and box losses one by one.

Everything is computed in float32, or in float64 when the predictions are float64, whatever their dtype.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from retinanet.ops.boxes import decode, encode
from retinanet.structures import IGNORE

# Elements that one pass of the focal loss works on. On a CPU the few temporaries of a pass then stay in the second
# level cache (of 2 MiB; 2^18 was the fastest of 2^15 .. 2^21 there); elsewhere it only bounds the memory.
_CPU_CHUNK, _DEVICE_CHUNK = 2**18, 2**25

# exp() of this is far from overflow in float32, and 1 + exp() has long been exp() itself.
_MAX_EXPONENT = 80.0


# Detectron floors p of a positive at float32's smallest normal number before the logarithm, so -log(p) ends here.
DETECTRON_MAX_LOG = -math.log(torch.finfo(torch.float32).tiny)


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, gamma: float, alpha: float, max_log: float = math.inf
) -> Tensor:
    """Return the focal loss of every image, (N,) float32, summed over its anchors and classes.

    logits: (N, R, K) before the sigmoid, any floating dtype and strides; finite. The gradient has their dtype.
    labels: (N, R) int64, the class in [0, K) of an anchor, `BACKGROUND` (all K classes negative) or `IGNORE` (none
        takes part).
    gamma >= 0 and 0 <= alpha <= 1: the loss of a positive is alpha * (1 - p)^gamma * -log(p), that of a negative
        (1 - alpha) * p^gamma * -log(1 - p), p = sigmoid(logit) (RetinaNet, arXiv 1708.02002, equation 5).
    max_log: cap of -log(p) of a positive in the loss, not in its gradient. Detectron's checkpoints were trained with
        `DETECTRON_MAX_LOG`, which only logits below -87 reach; detectron2 and torchvision have none.

    Only `logits` and `labels` are kept for the backward pass, which computes the sigmoid again: a second pass over
    the logits costs less than storing one more tensor of their size. There is no one-hot target, and the device is
    never waited for. Not differentiable twice.
    """
    assert logits.shape[:2] == labels.shape, (logits.shape, labels.shape)
    return _SigmoidFocalLoss.apply(logits, labels, gamma, alpha, max_log)


class _SigmoidFocalLoss(torch.autograd.Function):
    """Treats every class of every valid anchor as negative, then exchanges the one positive of an anchor."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, gamma: float, alpha: float, max_log: float) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.gamma, ctx.alpha = gamma, alpha
        dtype = _compute_dtype(logits)
        per_anchor = torch.empty(labels.shape, dtype=dtype, device=logits.device)
        for rows, buffers in _passes(logits, 2):
            torch.sum(_negative_loss(logits[:, rows].to(dtype), gamma, *buffers), -1, out=per_anchor[:, rows])
        own = logits.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2).to(dtype)  # (N, R), of the anchor's class
        # where the cap is reached (1 - p)^gamma is 1, so it caps the product
        positive = _negative_loss(-own, gamma).clamp(max=max_log)
        exchange = alpha * positive - (1 - alpha) * _negative_loss(own, gamma)
        per_anchor = (1 - alpha) * per_anchor + torch.where(labels >= 0, exchange, 0.0)
        return torch.where(labels != IGNORE, per_anchor, 0.0).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        logits, labels = ctx.saved_tensors
        gamma, alpha = ctx.gamma, ctx.alpha
        dtype = _compute_dtype(logits)
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        factor = ((1 - alpha) * grad_output.unsqueeze(1) * (labels != IGNORE)).unsqueeze(2)  # (N, R, 1)
        for rows, buffers in _passes(logits, 3):
            slope = _negative_gradient(logits[:, rows].to(dtype), gamma, *buffers)
            torch.mul(slope, factor[:, rows], out=grad[:, rows])
        column = labels.clamp(min=0).unsqueeze(2)
        positive = _negative_gradient(-logits.gather(2, column).to(dtype), gamma)
        positive = positive.mul_(-alpha * grad_output[:, None, None]).to(grad.dtype)
        grad.scatter_(2, column, torch.where((labels >= 0).unsqueeze(2), positive, grad.gather(2, column)))
        return grad, None, None, None, None


def _negative_loss(x: Tensor, gamma: float, p: Tensor | None = None, softplus: Tensor | None = None) -> Tensor:
    """Return p^gamma * softplus(x) with p = sigmoid(x), elementwise; softplus(x) = -log(1 - p).

    `p` and `softplus` are memory to write to, shaped as `x`; the result is in that of `p`.
    """
    p = torch.clamp(x, max=_MAX_EXPONENT, out=p).exp_()
    softplus = torch.add(p, 1, out=softplus)
    p.div_(softplus)
    # log(1 + e) where log1p would be more exact: the error, 6e-8, is multiplied by p^gamma, and log1p is 12 times
    # slower on a CPU. Softplus is never below x; beyond the cap of the exponent it equals x.
    softplus = torch.maximum(softplus.log_(), x, out=softplus)
    return p.pow_(gamma).mul_(softplus)


def _negative_gradient(
    x: Tensor, gamma: float, p: Tensor | None = None, rest: Tensor | None = None, softplus: Tensor | None = None
) -> Tensor:
    """Return d/dx of `_negative_loss`, elementwise: p^gamma * (gamma * (1 - p) * softplus(x) + p).

    The tensors are memory, as in `_negative_loss`.
    """
    p = torch.clamp(x, max=_MAX_EXPONENT, out=p).exp_()
    softplus = torch.add(p, 1, out=softplus)
    rest = torch.reciprocal(softplus, out=rest)  # 1 - p without cancellation
    p.mul_(rest)
    softplus = torch.maximum(softplus.log_(), x, out=softplus)
    slope = torch.addcmul(p, rest, softplus, value=gamma, out=softplus)
    return p.pow_(gamma).mul_(slope)


def _passes(logits: Tensor, num_buffers: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield slices of the R anchors, each with `num_buffers` tensors to write to, the same memory every time.

    A compiler gets one pass over everything: it fuses the operations and needs no memory in between.
    """
    num_images, num_rows, num_classes = logits.shape
    budget = _CPU_CHUNK if logits.device.type == "cpu" else _DEVICE_CHUNK
    step = num_rows if torch.compiler.is_compiling() else max(1, budget // max(1, num_images * num_classes))
    step = min(step, num_rows)
    buffers = logits.new_empty((num_buffers, num_images, step, num_classes), dtype=_compute_dtype(logits))
    for start in range(0, num_rows, step):
        rows = min(step, num_rows - start)
        yield slice(start, start + rows), list(buffers[:, :, :rows].unbind(0))


def _compute_dtype(predictions: Tensor) -> torch.dtype:
    return torch.promote_types(predictions.dtype, torch.float32)


def smooth_l1_loss(pred: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return, elementwise, d^2 / (2 beta) for |d| < beta and |d| - beta / 2 beyond, d = pred - target.

    beta >= 0 in the unit of the input; 0 is the L1 loss (Fast R-CNN, arXiv 1504.08083, equation 3, with Detectron's
    beta).
    """
    return F.smooth_l1_loss(pred.to(_compute_dtype(pred)), target, reduction="none", beta=beta)


def l1_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Return |pred - target|, elementwise."""
    return smooth_l1_loss(pred, target, 0.0)


def giou_loss(pred: Tensor, boxes: Tensor, eps: float = 1e-7) -> Tensor:
    """Return 1 - GIoU (...) in [0, 2] of `pred` (..., 4) with `boxes` (..., 4), xyxy of one frame (arXiv 1902.09630).

    GIoU = IoU - (hull - union) / hull, where the hull is the smallest box around both. `eps`, in square pixels, keeps
    divisions finite; 1e-7 is what torchvision and detectron2 take.
    """
    intersection, union = _intersection_union(pred, boxes)
    low, high = _hull(pred, boxes)
    hull = (high - low).prod(-1)
    return 1 - (intersection / (union + eps) - (hull - union) / (hull + eps))


def diou_loss(pred: Tensor, boxes: Tensor, eps: float = 1e-7) -> Tensor:
    """Return 1 - DIoU (...) of `pred` (..., 4) with `boxes` (..., 4) (arXiv 1911.08287, equation 7).

    DIoU = IoU - (distance of the centres)^2 / (diagonal of the hull)^2; arguments as in `giou_loss`.
    """
    return _diou(pred, boxes, eps)[0]


def ciou_loss(pred: Tensor, boxes: Tensor, eps: float = 1e-7) -> Tensor:
    """Return 1 - CIoU (...) of `pred` (..., 4) with `boxes` (..., 4) (arXiv 1911.08287, equations 8 to 11).

    CIoU = DIoU - a * v with v = (4 / pi^2) * (atan(w / h of the box) - atan(w / h of the prediction))^2 and
    a = v / (1 - IoU + v), which takes no gradient; arguments as in `giou_loss`.
    """
    loss, iou = _diou(pred, boxes, eps)
    angle = _aspect_angle(boxes) - _aspect_angle(pred)
    v = (4 / torch.pi**2) * angle.pow(2)
    with torch.no_grad():
        weight = v / (1 - iou + v + eps)
    return loss + weight * v


def _diou(pred: Tensor, boxes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the DIoU loss (...) and the IoU (...)."""
    intersection, union = _intersection_union(pred, boxes)
    iou = intersection / (union + eps)
    low, high = _hull(pred, boxes)
    diagonal = (high - low).pow(2).sum(-1) + eps
    offset = (pred[..., 2:] + pred[..., :2]) / 2 - (boxes[..., :2] + boxes[..., 2:]) / 2
    return 1 - iou + offset.pow(2).sum(-1) / diagonal, iou


def _intersection_union(pred: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.maximum(pred[..., :2], boxes[..., :2])
    size = torch.minimum(pred[..., 2:], boxes[..., 2:]) - low
    # A choice, not a clamp: boxes that just touch get no gradient through their empty intersection.
    intersection = torch.where((size > 0).all(-1), size.prod(-1), 0.0)
    areas = (pred[..., 2:] - pred[..., :2]).prod(-1) + (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return intersection, areas - intersection


def _hull(pred: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(pred[..., :2], boxes[..., :2]), torch.maximum(pred[..., 2:], boxes[..., 2:])


def _aspect_angle(boxes: Tensor) -> Tensor:
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return torch.atan(width / height)


def _compare_deltas(deltas, anchors, boxes, beta, plus_one) -> Tensor:
    return smooth_l1_loss(deltas, encode(boxes, anchors, plus_one), beta).sum(-1)


def _compare_boxes(loss, deltas, anchors, boxes, beta, plus_one) -> Tensor:
    pred = decode(deltas, anchors, plus_one)
    if plus_one:  # x2, y2 name the last pixel inside; the far border lies one further
        pred, boxes = (torch.cat((corners[..., :2], corners[..., 2:] + 1), dim=-1) for corners in (pred, boxes))
    return loss(pred, boxes)


# Name of MODEL.LOSS.BOX -> function(deltas, anchors, boxes, beta, plus_one): the loss (...) of each prediction
# `deltas` (..., 4) for its `anchors` (..., 4), when `boxes` (..., 4) are right. L1 losses compare codes and sum their
# four coordinates, IoU losses compare decoded boxes; only smooth_l1 reads `beta`.
BOX_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float, bool], Tensor]] = {
    "smooth_l1": _compare_deltas,
    "l1": lambda deltas, anchors, boxes, beta, plus_one: _compare_deltas(deltas, anchors, boxes, 0.0, plus_one),
    "giou": partial(_compare_boxes, giou_loss),
    "diou": partial(_compare_boxes, diou_loss),
    "ciou": partial(_compare_boxes, ciou_loss),
}
