"""Box arithmetic: area, IoU, clipping, and the (dx, dy, dw, dh) code that the box head predicts.

Boxes are (..., 4) xyxy in absolute, continuous pixels, width = x2 - x1. Detectron counts both border pixels instead,
width = x2 - x1 + 1, an inheritance of integer pixel indices; its checkpoints were trained that way, so every function
in which widths matter takes `plus_one` (True for Caffe2 Detectron checkpoints alone). The expressions keep the order
of operations of Detectron (`utils/cython_bbox.pyx`, `utils/boxes.py`), detectron2 (`structures/boxes.py`,
`modeling/box_regression.py`) and torchvision (`ops/boxes.py`): matching compares overlaps for equality, so rounding
counts.
"""

import math

import torch
from torch import Tensor

# dw and dh above this decode as this: no more than what turns a 16 pixel anchor into a 1000 pixel box (Detectron,
# BBOX_XFORM_CLIP). There is no lower cap, and none on dx and dy.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def box_area(boxes: Tensor, plus_one: bool = False) -> Tensor:
    """Return the areas (...) in square pixels of `boxes` (..., 4)."""
    width, height = _sizes(boxes, plus_one)
    return width * height


def pairwise_iou(a: Tensor, b: Tensor, plus_one: bool = False) -> Tensor:
    """Return the IoU (..., M, R) in [0, 1] of every box of `a` (..., M, 4) with every box of `b` (..., R, 4).

    Leading dimensions broadcast. Boxes that do not overlap have exactly 0; two boxes without area have NaN (0 / 0).
    """
    x1a, y1a, x2a, y2a = (coordinate.unsqueeze(-1) for coordinate in a.unbind(-1))  # (..., M, 1)
    x1b, y1b, x2b, y2b = (coordinate.unsqueeze(-2) for coordinate in b.unbind(-1))  # (..., 1, R)
    width = torch.minimum(x2a, x2b).sub_(torch.maximum(x1a, x1b))
    height = torch.minimum(y2a, y2b).sub_(torch.maximum(y1a, y1b))
    if plus_one:
        width, height = width.add_(1), height.add_(1)
    intersection = width.clamp(min=0) * height.clamp(min=0)
    areas = box_area(a, plus_one).unsqueeze(-1) + box_area(b, plus_one).unsqueeze(-2)
    return intersection / (areas - intersection)


def matched_iou(a: Tensor, b: Tensor, plus_one: bool = False) -> Tensor:
    """Return the IoU (...) in [0, 1] of each box of `a` (..., 4) with the box of `b` (..., 4) at the same place."""
    return pairwise_iou(a.unsqueeze(-2), b.unsqueeze(-2), plus_one).squeeze(-1).squeeze(-1)


def encode(boxes: Tensor, anchors: Tensor, plus_one: bool = False) -> Tensor:
    """Return the `deltas` (..., 4) from which `decode` makes `boxes` (..., 4) out of `anchors` (..., 4).

    With centres c and sizes s: dx = (cx_box - cx_anchor) / w_anchor, dw = log(w_box / w_anchor), and so for y and h
    (R-CNN, arXiv 1311.2524, appendix C). A box without width gives -inf.
    """
    width, height = _sizes(boxes, plus_one)
    anchor_width, anchor_height = _sizes(anchors, plus_one)
    dx = _center(boxes[..., 0], width).sub_(_center(anchors[..., 0], anchor_width)) / anchor_width
    dy = _center(boxes[..., 1], height).sub_(_center(anchors[..., 1], anchor_height)) / anchor_height
    return torch.stack((dx, dy, torch.log(width / anchor_width), torch.log(height / anchor_height)), dim=-1)


def decode(deltas: Tensor, anchors: Tensor, plus_one: bool = False) -> Tensor:
    """Return the boxes (..., 4) that `deltas` (..., 4) make of `anchors` (..., 4), in the frame of the anchors.

    The inverse of `encode`, except that dw and dh are capped at `MAX_LOG_SCALE`. Computed in the wider dtype of the
    two, so bfloat16 deltas give float32 boxes. Nothing is clipped.
    """
    dx, dy, dw, dh = deltas.to(torch.promote_types(deltas.dtype, anchors.dtype)).unbind(-1)
    anchor_width, anchor_height = _sizes(anchors, plus_one)
    center_x = dx * anchor_width + _center(anchors[..., 0], anchor_width)
    center_y = dy * anchor_height + _center(anchors[..., 1], anchor_height)
    half_width = 0.5 * (torch.exp(dw.clamp(max=MAX_LOG_SCALE)) * anchor_width)
    half_height = 0.5 * (torch.exp(dh.clamp(max=MAX_LOG_SCALE)) * anchor_height)
    x2, y2 = center_x + half_width, center_y + half_height
    if plus_one:  # the far corner is the last pixel inside; the near one needs no such shift
        x2, y2 = x2 - 1, y2 - 1
    return torch.stack((center_x - half_width, center_y - half_height, x2, y2), dim=-1)


def clip(boxes: Tensor, sizes: Tensor, plus_one: bool = False) -> Tensor:
    """Return `boxes` (N, D, 4) or (D, 4) with every coordinate moved into its image.

    sizes: (N, 2), or (2,) for (D, 4), (height, width) in pixels. The range is [0, width], or [0, width - 1] with
    `plus_one`. A box outside its image becomes one without area; none is removed.
    """
    height, width = sizes.to(boxes.dtype).unbind(-1)
    limits = torch.stack((width, height, width, height), dim=-1).unsqueeze(-2)  # (N, 1, 4)
    return torch.minimum(boxes, limits - 1 if plus_one else limits).clamp(min=0)


def _sizes(boxes: Tensor, plus_one: bool) -> tuple[Tensor, Tensor]:
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return (width + 1, height + 1) if plus_one else (width, height)


def _center(low: Tensor, size: Tensor) -> Tensor:
    return low + 0.5 * size
