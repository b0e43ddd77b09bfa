"""Which anchor learns which box: RetinaNet's IoU matching for a whole batch, without a loop over images or boxes.

The device is never waited for, and the N * M * R overlaps are never held together: they are computed in pieces of
bounded size, once for the best box of each anchor and, where anchors may be matched below the threshold, once more to
find the anchors that tie with a box's best overlap.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from retinanet.errors import pick
from retinanet.ops.boxes import pairwise_iou
from retinanet.structures import BACKGROUND, IGNORE, PAD_LABEL

# Overlaps in one piece. On a CPU a piece and its temporaries stay in the second level cache; elsewhere this bounds the
# memory (about five float32 tensors of this size) and keeps the launches few.
_CPU_PIECE, _DEVICE_PIECE = 2**17, 2**25

_BOXES_PER_PIECE = 64

# Where padding rows are moved: no anchor of any image reaches it, and its square is finite in float32.
_FAR_AWAY = -1e8

# MODEL.MATCHER.LOW_QUALITY -> function(tied, iou, bg_iou): which of the anchors `tied` (N, R) bool become positive.
LOW_QUALITY: dict[str, Callable[[Tensor, Tensor, float], Tensor] | None] = {
    "none": None,
    "detectron": lambda tied, iou, bg_iou: tied & (iou >= bg_iou),
    "detectron2": lambda tied, iou, bg_iou: tied,
}


@torch.no_grad()
def assign(
    anchors: Tensor | list[Tensor],
    gt_boxes: Tensor,
    gt_labels: Tensor,
    fg_iou: float,
    bg_iou: float,
    low_quality: str,
    plus_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return `matched_idx` (N, R) int64, a box index in [0, M), `BACKGROUND` or `IGNORE`, and `num_fg` (N,) int64.

    anchors: (R, 4) float32 xyxy pixels, or a list over the levels of such tensors, which is concatenated.
    gt_boxes: (N, M, 4) float32 xyxy pixels of the same frame; gt_labels: (N, M) int64, `PAD_LABEL` marks rows that
        are no box, anywhere among the others. M may be 0.
    fg_iou, bg_iou: an anchor is positive for its best box (the first one of equals) at `fg_iou` or more, background
        below `bg_iou`, ignored between (RetinaNet, arXiv 1708.02002, section 4).
    low_quality: what becomes of the anchors whose overlap with some box equals that box's largest overlap with any
        anchor. They never get that box, but their own best one.
        "none": nothing; they are treated as all others.
        "detectron": positive from `bg_iou` on, background below. Detectron marks them positive, counts them, and then
            overwrites those below `bg_iou` (`roi_data/retinanet.py`), so `num_fg` counts all of them here.
        "detectron2": always positive (detectron2 `modeling/matcher.py`, torchvision `models/detection/_utils.py`).
            With a box that touches no anchor, whose largest overlap is 0, every anchor is positive, as it is there.
    plus_one: widths of Detectron (`ops/boxes.py`).

    `num_fg` is the number of positive anchors of each image but for the quirk above. An unknown `low_quality` raises
    `UserError`.
    """
    rule = pick(LOW_QUALITY, low_quality, "MODEL.MATCHER.LOW_QUALITY")
    if isinstance(anchors, (list, tuple)):
        anchors = torch.cat(list(anchors))
    if gt_labels.shape[1] == 0:
        gt_boxes = gt_boxes.new_zeros(len(gt_boxes), 1, 4)
        gt_labels = gt_labels.new_full((len(gt_labels), 1), PAD_LABEL)
    assert gt_boxes.shape == (*gt_labels.shape, 4), (gt_boxes.shape, gt_labels.shape)
    padding = gt_labels == PAD_LABEL
    boxes = torch.where(padding.unsqueeze(2), _FAR_AWAY, gt_boxes)
    iou, box_idx, iou_of_box = _best_overlaps(boxes, anchors, plus_one)
    # Anchors without any overlap have all boxes for equals; the first of those is the first that is no padding.
    box_idx = torch.where(iou > 0, box_idx, padding.long().argmin(1, keepdim=True))
    positive = counted = iou >= fg_iou
    if rule is not None:
        tied = _tied(boxes, anchors, iou_of_box.masked_fill(padding, 2.0), plus_one)  # no overlap is 2
        positive, counted = positive | rule(tied, iou, bg_iou), counted | tied
    matched_idx = torch.where(positive, box_idx, torch.where(iou < bg_iou, BACKGROUND, IGNORE))
    return matched_idx, counted.sum(1)


def _best_overlaps(boxes: Tensor, anchors: Tensor, plus_one: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best overlap (N, R) of each anchor, the first box (N, R) with it, and the best (N, M) of each box."""
    num_images, num_boxes = boxes.shape[:2]
    best = anchors.new_full((num_images, len(anchors)), -1.0)
    best_idx = torch.zeros(best.shape, dtype=torch.int32, device=best.device)
    best_of_box = anchors.new_zeros(num_images, num_boxes)
    box_numbers = torch.arange(num_boxes, dtype=torch.int32, device=best.device).unsqueeze(1)  # (M, 1)
    for columns, rows in _pieces(boxes, anchors):
        iou = pairwise_iou(boxes[:, columns], anchors[rows], plus_one)  # (N, m, r)
        best_of_box[:, columns] = torch.maximum(best_of_box[:, columns], iou.amax(2))
        value = iou.amax(1)
        # amax and a search for its place take a tenth of the time of max(1), which finds both, on a CPU.
        index = torch.where(iou == value.unsqueeze(1), box_numbers[columns], num_boxes).amin(1)
        better = value > best[:, rows]  # strictly: the first of equals stays
        best[:, rows] = torch.where(better, value, best[:, rows])
        best_idx[:, rows] = torch.where(better, index, best_idx[:, rows])
    return best, best_idx.long(), best_of_box


def _tied(boxes: Tensor, anchors: Tensor, iou_of_box: Tensor, plus_one: bool) -> Tensor:
    """Return which anchors (N, R) bool have, with any box, exactly the overlap `iou_of_box` (N, M) of that box.

    Equality holds because `pairwise_iou` computes every overlap with the same operations as it did the first time.
    """
    tied = torch.zeros(len(boxes), len(anchors), dtype=torch.bool, device=boxes.device)
    for columns, rows in _pieces(boxes, anchors):
        iou = pairwise_iou(boxes[:, columns], anchors[rows], plus_one)  # (N, m, r)
        tied[:, rows] |= (iou == iou_of_box[:, columns].unsqueeze(2)).any(1)
    return tied


def _pieces(boxes: Tensor, anchors: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield (boxes, anchors) slices whose N * m * r overlaps are about one piece; the sizes depend on shapes alone."""
    num_images, num_boxes = boxes.shape[:2]
    num_columns = min(num_boxes, _BOXES_PER_PIECE)
    budget = _CPU_PIECE if boxes.device.type == "cpu" else _DEVICE_PIECE
    num_rows = max(1, budget // max(1, num_images * num_columns))
    for start in range(0, len(anchors), num_rows):
        for column in range(0, num_boxes, num_columns):
            yield slice(column, column + num_columns), slice(start, start + num_rows)
