"""Non-maximum suppression, class by class, for a whole batch at once.

Plain greedy suppression: a box is removed when a better one of its image and class, itself not removed, overlaps it
too much. There is no loop over images or classes and no offset that keeps classes apart (added to float32
coordinates, as is common, it costs precision). Boxes are settled in blocks from the best score down, and the work ends
when every image has as many as it may return, which is usually after the first block. For devices that would have to be
waited for, `ops/fixed_nms.py` never asks whether it may end.
"""

import torch
from torch import Tensor

from retinanet.ops.boxes import pairwise_iou

# Undecided boxes of an image that one round settles. 8 images of 5,000 candidates take 1.5 to 60 ms on one CPU core,
# where a call of torchvision.ops.nms for each image and class takes 10 to 320.
_BLOCK = 128


@torch.no_grad()
def nms(
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    iou_thresh: float,
    max_dets: int,
    plus_one: bool = False,
    inclusive: bool = False,
) -> Tensor:
    """Return the positions (N, max_dets) int64 of the boxes that stay, in their order; -1 fills what is left over.

    boxes: (N, n, 4) xyxy, n candidates of each image by falling score. labels: (N, n) int64, the class of each.
    valid: (N, n) bool; False marks a candidate that is none.
    iou_thresh: a box goes when its IoU with a better one is above it, or at least it with `inclusive` (Detectron,
        `utils/cython_nms.pyx`). plus_one: widths of Detectron (`ops/boxes.py`).

    Waits for the device a few times, to learn whether anything is left to do.
    """
    num_images, width = valid.shape
    undecided, kept = valid.clone(), torch.zeros_like(valid)
    while width > 0:
        block = first_true(undecided, min(_BLOCK, width))  # (N, B)
        block_boxes, block_labels = take(boxes, block), take(labels, block)
        within = clashes(block_boxes, block_labels, block_boxes, block_labels, iou_thresh, plus_one, inclusive)
        stays = _settle(within, block < width)
        kept |= _scatter(block, stays, width)
        undecided &= ~_scatter(block, block < width, width)
        undecided &= kept.sum(1, keepdim=True) < max_dets
        # Images that are done need no suppression; the most boxes that any other image kept sizes the next step.
        num_kept = int((stays.sum(1) * undecided.any(1)).amax())
        if num_kept == 0:
            break
        column = first_true(stays, num_kept)
        better, better_labels = take(block_boxes, column), take(block_labels, column)
        others = clashes(better, better_labels, boxes, labels, iou_thresh, plus_one, inclusive)  # (N, num_kept, n)
        undecided &= ~(others & (column < stays.shape[1]).unsqueeze(2)).any(1)
    position = first_true(kept, max_dets)
    return torch.where(position < width, position, -1)


def clashes(
    boxes: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, thresh: float, plus_one: bool, inclusive: bool
) -> Tensor:
    """Return which of `boxes` (N, B, 4) overlap which of `others` (N, n, 4) of their class too much, (N, B, n) bool."""
    iou = pairwise_iou(boxes, others, plus_one)
    too_much = iou >= thresh if inclusive else iou > thresh
    return too_much & (labels.unsqueeze(2) == other_labels.unsqueeze(1))


def _settle(suppresses: Tensor, valid: Tensor) -> Tensor:
    """Return which boxes (N, B) bool of a block stay, given which box suppresses which (N, B, B), best first.

    A box stays when no better box that stays suppresses it. Each pass of the loop makes that right for one more link
    of every chain of boxes, and it ends when nothing changes.
    """
    matrix = suppresses.triu(diagonal=1).to(torch.float32)
    stays = valid
    while True:
        suppressed = torch.bmm(stays.to(torch.float32).unsqueeze(1), matrix).squeeze(1) > 0
        if torch.equal(valid & ~suppressed, stays):
            return stays
        stays = valid & ~suppressed


def first_true(mask: Tensor, count: int) -> Tensor:
    """Return the columns (N, count) int64 of the first True entries of `mask` (N, n); n stands for those not there."""
    num_images, width = mask.shape
    slot = torch.where(mask, mask.cumsum(1) - 1, count).clamp(max=count)
    columns = torch.arange(width, device=mask.device).expand(num_images, width)
    found = torch.full((num_images, count + 1), width, dtype=torch.int64, device=mask.device)
    return found.scatter_(1, slot, columns)[:, :count]


def _scatter(columns: Tensor, flags: Tensor, width: int) -> Tensor:
    """Return a mask (N, width) with `flags` (N, B) at `columns` (N, B), else False; column `width` is none."""
    mask = torch.zeros(len(columns), width + 1, dtype=torch.bool, device=columns.device)
    return mask.scatter_(1, columns, flags)[:, :width]


def take(rows: Tensor, columns: Tensor) -> Tensor:
    """Return `rows` (N, n) or (N, n, 4) at `columns` (N, B); a column that is none gives any row."""
    columns = columns.clamp(max=rows.shape[1] - 1)
    return rows.gather(1, columns) if rows.dim() == 2 else rows.gather(1, columns.unsqueeze(2).expand(-1, -1, 4))
