"""From head outputs to detections in original pixels, for a whole batch, in the conventions of three projects.

All take the best (anchor, class) pairs of each level, decode them, suppress class by class over all levels together
and keep the best. They differ in frame and edges:

| convention | suppression runs on                  | widths     | goes at IoU | afterwards                           |
|------------|--------------------------------------|------------|-------------|--------------------------------------|
| detectron  | original pixels, clipped to size - 1 | x2 - x1 + 1| >= nms_iou  | nothing                              |
| detectron2 | resized pixels, not clipped          | x2 - x1    | > nms_iou   | scaled, clipped, empty boxes dropped |
| torchvision| resized pixels, clipped              | x2 - x1    | > nms_iou   | scaled                               |

and Detectron takes any score above 0 on the last level, so that a tiny image cannot come out empty.
Sources: Detectron `core/test_retinanet.py`, detectron2 `modeling/meta_arch/retinanet.py` and
`modeling/postprocessing.py`, torchvision `models/detection/retinanet.py` and `transform.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from retinanet.errors import pick
from retinanet.ops.boxes import clip, decode
from retinanet.ops.fixed_nms import device_nms
from retinanet.ops.nms import first_true
from retinanet.structures import Detections, HeadOutputs


class _Convention(NamedTuple):
    plus_one: bool
    inclusive: bool
    suppress_in_original: bool
    clip_before: bool
    clip_after: bool
    any_score_on_last_level: bool


# MODEL.BOX.CONVENTION
CONVENTIONS = {
    "detectron": _Convention(True, True, True, True, False, True),
    "detectron2": _Convention(False, False, False, False, True, False),
    "torchvision": _Convention(False, False, False, True, False, False),
}


class Candidates(NamedTuple):
    """The best (anchor, class) pairs of N images, all levels together, by falling score; n of each image.

    boxes: (N, n, 4) xyxy pixels of the padded input, not clipped. scores: (N, n) in [0, 1]. labels: (N, n) int64.
    valid: (N, n) bool; what is not valid comes last and is no candidate.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor


class Padded(NamedTuple):
    """Detections of N images in the D slots of each, of which image i uses the first `counts[i]`, by falling score.

    boxes: (N, D, 4) xyxy pixels of the original images. scores: (N, D). labels, counts: (N, D), (N,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor


def postprocess(*args, **kwargs) -> list[Detections]:
    """Return the detections of `postprocess_padded`, which has the arguments, image by image; waits for the device."""
    return split(postprocess_padded(*args, **kwargs))


@torch.no_grad()
def postprocess_padded(
    outputs: HeadOutputs,
    image_sizes: Tensor,
    original_sizes: Tensor,
    scales: Tensor,
    score_thresh: float,
    pre_nms_topk: int,
    nms_iou: float,
    max_dets: int,
    convention: str,
    suppress: Callable[..., Tensor] = device_nms,
) -> Padded:
    """Return the detections of N images, boxes in pixels of the original images, by falling score.

    outputs: of `RetinaNet.forward`, any floating dtype; scores and boxes are computed in float32.
    image_sizes, original_sizes: (N, 2) (height, width) of the resized images before padding, and on disk.
    scales: (N, 2) (x, y), resized pixels per original pixel; only "detectron" divides by them, the other two by the
        ratio of the sizes, which differs by the rounding of the resized size.
    score_thresh: a pair needs a score above it. pre_nms_topk: pairs per level, before decoding. nms_iou: see above.
    max_dets: detections per image. convention: a key of `CONVENTIONS`; another one raises `UserError`.
    suppress: called and answering as `ops.nms.nms`; with `ops.fixed_nms.fixed_nms` nothing waits for the device.

    Equal scores keep the order level, anchor, class.
    """
    candidates = best_candidates(outputs, score_thresh, pre_nms_topk, convention)
    return select(candidates, image_sizes, original_sizes, scales, nms_iou, max_dets, convention, suppress)


def select(
    candidates: Candidates,
    image_sizes: Tensor,
    original_sizes: Tensor,
    scales: Tensor,
    nms_iou: float,
    max_dets: int,
    convention: str,
    suppress: Callable[..., Tensor] = device_nms,
) -> Padded:
    """Return what is left of `candidates` after suppression, in pixels of the original images, by falling score.

    The arguments are those of `postprocess_padded`; exported graphs bring a `suppress` of their own.
    """
    rules = pick(CONVENTIONS, convention, "MODEL.BOX.CONVENTION")
    boxes = candidates.boxes
    if rules.suppress_in_original:
        boxes = boxes / scales.to(boxes).repeat(1, 2).unsqueeze(1)
    if rules.clip_before:
        boxes = clip(boxes, original_sizes if rules.suppress_in_original else image_sizes, rules.plus_one)
    keep = suppress(boxes, candidates.labels, candidates.valid, nms_iou, max_dets, rules.plus_one, rules.inclusive)
    found, keep = keep >= 0, keep.clamp(min=0)  # (N, D)
    boxes = boxes.gather(1, keep.unsqueeze(2).expand(-1, -1, 4))
    if not rules.suppress_in_original:
        ratios = original_sizes.to(boxes.dtype) / image_sizes.to(boxes.dtype)  # (N, 2) as (y, x)
        boxes = boxes * ratios.flip(1).repeat(1, 2).unsqueeze(1)
    if rules.clip_after:
        boxes = clip(boxes, original_sizes)
        found = found & (boxes[..., 2:] > boxes[..., :2]).all(2)
        order = first_true(found, max_dets).clamp(max=max_dets - 1)  # what vanished leaves gaps
        boxes, keep = boxes.gather(1, order.unsqueeze(2).expand(-1, -1, 4)), keep.gather(1, order)
    return Padded(boxes, candidates.scores.gather(1, keep), candidates.labels.gather(1, keep), found.sum(1))


def split(padded: Padded) -> list[Detections]:
    """Return the detections image by image; waits for the device once, for the counts."""
    rows = zip(padded.boxes, padded.scores, padded.labels, padded.counts.tolist(), strict=True)
    return [
        Detections(boxes=boxes[:count], scores=scores[:count], labels=labels[:count])
        for boxes, scores, labels, count in rows
    ]


def best_candidates(
    outputs: HeadOutputs,
    score_thresh: float,
    pre_nms_topk: int,
    convention: str,
    pairs: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Candidates:
    """Return the best pairs of all levels together, decoded.

    pairs: called and answering as `best_pairs`, the default. The rest: `postprocess_padded`.
    """
    rules, levels = pick(CONVENTIONS, convention, "MODEL.BOX.CONVENTION"), []
    last = len(outputs["logits"]) - 1
    for level, (logits, deltas, anchors) in enumerate(
        zip(outputs["logits"], outputs["deltas"], outputs["anchors"], strict=True)
    ):
        values, anchor_idx, labels = (pairs or best_pairs)(logits, pre_nms_topk)
        scores = values.sigmoid()
        valid = scores > (0.0 if level == last and rules.any_score_on_last_level else score_thresh)
        level_deltas = deltas.gather(1, anchor_idx.unsqueeze(2).expand(-1, -1, 4)).to(torch.float32)
        levels.append((level_deltas, anchors[anchor_idx], scores, labels, valid))
    merged = [torch.cat(tensors, dim=1) for tensors in zip(*levels, strict=True)]
    order = torch.where(merged[4], merged[2], -1.0).argsort(dim=1, descending=True, stable=True)
    corners = order.unsqueeze(2).expand(-1, -1, 4)
    deltas, anchors = (tensor.gather(1, corners) for tensor in merged[:2])
    return Candidates(decode(deltas, anchors, rules.plus_one), *(tensor.gather(1, order) for tensor in merged[2:]))


def best_pairs(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits (N, k) float32, anchors (N, k) and classes (N, k) of the best pairs of one level, best first.

    logits: (N, R, K). k is the smaller of `count` and R * K. A pair among the best `count` belongs to an anchor among
    the best `count` by its best class, so only those anchors' classes are sorted: one read of the logits instead of a
    selection among R * K, 20 times faster on a CPU. That holds with equal logits too, because both selections
    prefer the first of equals.
    """
    num_images, num_rows, num_classes = logits.shape
    _, anchor_idx = stable_topk(logits.amax(2), min(count, num_rows))
    anchor_idx = anchor_idx.sort(1).values  # by position: equal logits are then compared as in the whole tensor
    rows = logits.gather(1, anchor_idx.unsqueeze(2).expand(-1, -1, num_classes))
    values, pair = stable_topk(rows.flatten(1), min(count, rows[0].numel()))
    return values, anchor_idx.gather(1, pair // num_classes), pair % num_classes


def stable_topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of each row of `values` (N, n) as float32, and their columns; first of equals first.

    `torch.topk` promises no order among equals, so it gets integers without any: the bits of the number, made to rise
    with it, above the column counted down. 15 times faster than a stable sort of 100,000 numbers.
    """
    bits = (values.to(torch.float32) + 0.0).view(torch.int32)  # -0.0 becomes 0.0, its equal
    rising = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    columns = torch.arange(values.shape[1], device=values.device)
    best = torch.topk((rising << 32) + (0xFFFFFFFF - columns), count, dim=1).values
    index = 0xFFFFFFFF - (best & 0xFFFFFFFF)
    return values.to(torch.float32).gather(1, index), index
