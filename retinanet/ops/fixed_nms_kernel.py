"""`fixed_nms` as one Triton kernel: a program for each image, which goes through the candidates by falling score.

It takes them in blocks. What the boxes that stay so far overlap too much goes first; then the best of the block that is
left stays, and suppresses within the block, until none is left or enough boxes stay. Most images end in their first
block. Widths, areas and the division round as PyTorch's do (no fused multiply-add, IEEE division), so that an overlap
falls on the same side of the threshold. Imported by `ops/fixed_nms.py` alone, because Triton is not everywhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # candidates that a program holds in registers
_WARPS = 8


def scan(
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    iou_thresh: float,
    max_dets: int,
    plus_one: bool,
    inclusive: bool,
) -> Tensor:
    """Return what `fixed_nms` returns; boxes: (N, n, 4) float32, n > 0."""
    num_images, width = valid.shape
    kept = torch.empty(num_images, max_dets, dtype=torch.int64, device=boxes.device)
    _scan[(num_images,)](
        boxes.contiguous(),
        labels.contiguous(),
        valid.to(torch.uint8),
        kept,
        width,
        max_dets,
        iou_thresh,
        PLUS_ONE=plus_one,
        INCLUSIVE=inclusive,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        SLOTS=triton.next_power_of_2(max_dets),
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return kept


@triton.jit
def _scan(
    boxes,
    labels,
    valid,
    kept,
    width,
    max_dets,
    thresh,
    PLUS_ONE: tl.constexpr,
    INCLUSIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    boxes += image * width * 4
    labels += image * width
    valid += image * width
    slots = tl.arange(0, SLOTS)
    places = tl.full((SLOTS,), -1, tl.int32)
    count = 0
    start = 0
    while (start < width) & (count < max_dets):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        x1 = tl.load(boxes + 4 * column, mask=inside, other=0.0)
        y1 = tl.load(boxes + 4 * column + 1, mask=inside, other=0.0)
        x2 = tl.load(boxes + 4 * column + 2, mask=inside, other=0.0)
        y2 = tl.load(boxes + 4 * column + 3, mask=inside, other=0.0)
        label = tl.load(labels + column, mask=inside, other=-1)
        left = tl.load(valid + column, mask=inside, other=0) != 0
        for slot in range(0, count):
            place = tl.sum(tl.where(slots == slot, places, 0))
            goes = _clash(boxes, labels, place, x1, y1, x2, y2, label, thresh, PLUS_ONE, INCLUSIVE)
            left = left & (goes == 0)
        best = tl.min(tl.where(left, column, width))
        while (best < width) & (count < max_dets):
            places = tl.where(slots == count, best, places)
            count += 1
            goes = _clash(boxes, labels, best, x1, y1, x2, y2, label, thresh, PLUS_ONE, INCLUSIVE)
            left = left & (goes == 0) & (column != best)
            best = tl.min(tl.where(left, column, width))
        start += BLOCK
    tl.store(kept + image * max_dets + slots, places.to(tl.int64), mask=slots < max_dets)


@triton.jit
def _clash(
    boxes, labels, place, x1, y1, x2, y2, label, thresh, PLUS_ONE: tl.constexpr, INCLUSIVE: tl.constexpr
):
    """Whether the box at `place` overlaps each of the others, of its class, too much; `ops.boxes.pairwise_iou`."""
    extra = 1.0 if PLUS_ONE else 0.0
    own_x1 = tl.load(boxes + 4 * place)
    own_y1 = tl.load(boxes + 4 * place + 1)
    own_x2 = tl.load(boxes + 4 * place + 2)
    own_y2 = tl.load(boxes + 4 * place + 3)
    width = tl.maximum(tl.minimum(own_x2, x2) - tl.maximum(own_x1, x1) + extra, 0.0)
    height = tl.maximum(tl.minimum(own_y2, y2) - tl.maximum(own_y1, y1) + extra, 0.0)
    intersection = width * height
    areas = (own_x2 - own_x1 + extra) * (own_y2 - own_y1 + extra) + (x2 - x1 + extra) * (y2 - y1 + extra)
    iou = tl.div_rn(intersection, areas - intersection)
    too_much = iou >= thresh if INCLUSIVE else iou > thresh
    return (too_much & (tl.load(labels + place) == label)).to(tl.int32)
