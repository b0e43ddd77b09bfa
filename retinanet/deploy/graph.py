"""Detection as one graph for `torch.export`: pixels in, candidates or detections out, in tensors of fixed rank.

The arithmetic is that of `RetinaNet` and `modeling/postprocess.py`, called and not repeated. Two steps there depend on
values in ways that a graph cannot hold, and are replaced by what computes the same:

- A level with fewer anchors than are wanted gives fewer pairs. Here its rows are padded with -inf, so that the number
  of candidates is a constant and sizes stay dynamic.
- `ops/nms.py` loops until nothing changes. Here all images and classes are suppressed by one call of an NMS operator,
  torchvision's or ONNX's.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from retinanet.modeling.postprocess import best_candidates, select, stable_topk
from retinanet.modeling.retinanet import RetinaNet
from retinanet.modeling.views import Postprocessor
from retinanet.ops.nms import first_true
from retinanet.structures import HeadOutputs

PADDING_LABEL = -1
CANDIDATE_INPUTS, DETECTION_INPUTS = ("images", "image_sizes"), ("images", "image_sizes", "original_sizes", "scales")
CANDIDATE_OUTPUTS, DETECTION_OUTPUTS = ("boxes", "scores", "labels"), ("boxes", "scores", "labels", "counts")
Suppress = Callable[[Tensor, Tensor, Tensor, float, bool, bool], Tensor]


class CandidateGraph(nn.Module):
    """images, image_sizes -> the candidates, for users who suppress outside.

    selection: the settings of post-processing, of `modeling.build.build_postprocess`.
    topk: values (N, n) float32 and a count -> the largest of each row and their columns, the first of equals first.
    """

    inputs, outputs = CANDIDATE_INPUTS, CANDIDATE_OUTPUTS

    def __init__(self, model: RetinaNet, selection: Postprocessor, topk=stable_topk):
        super().__init__()
        self.model, self.selection, self.topk = model, selection, topk

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (N, n, 4), scores (N, n) by falling score and labels (N, n) int64.

        images: (N, 3, H, W) raw pixels, H and W multiples of the configuration's; image_sizes: (N, 2) int64 (height,
        width) without padding. Boxes are xyxy in pixels of `images`, not clipped; what is no candidate has score 0 and
        label -1. n is 5 times `pre_nms_topk`.
        """
        found = self.candidates(images, image_sizes)
        scores = torch.where(found.valid, found.scores, 0.0)
        return found.boxes, scores, torch.where(found.valid, found.labels, PADDING_LABEL)

    def candidates(self, images: Tensor, image_sizes: Tensor):
        outputs: HeadOutputs = self.model(self.model.normalize(images, image_sizes))
        rule = self.selection
        return best_candidates(outputs, rule.score_thresh, rule.pre_nms_topk, rule.convention, self._pairs)

    def _pairs(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """`modeling.postprocess.best_pairs` with always `count` pairs; those that are not there have the logit -inf."""
        num_classes, rows = logits.shape[2], logits.shape[1]
        best = F.pad(logits.amax(2), (0, count), value=-math.inf)
        anchor_idx = self.topk(best, count)[1].sort(dim=1).values  # (N, count), padding last
        real = anchor_idx < rows
        anchor_idx = torch.where(real, anchor_idx, 0)
        pairs = logits.gather(1, anchor_idx.unsqueeze(2).expand(-1, -1, num_classes))
        pairs = torch.where(real.unsqueeze(2), pairs, -math.inf)
        values, pair = self.topk(pairs.flatten(1), count)
        return values, anchor_idx.gather(1, pair // num_classes), pair % num_classes


class DetectionGraph(CandidateGraph):
    """images, image_sizes, original_sizes, scales -> detections.

    suppress: boxes (N, n, 4), labels (N, n), valid (N, n), threshold, plus_one, inclusive -> the mask (N, n) of those
    that stay; see `ops/nms.py` for their meaning.
    """

    inputs, outputs = DETECTION_INPUTS, DETECTION_OUTPUTS

    def __init__(self, model: RetinaNet, selection: Postprocessor, suppress: Suppress, topk=stable_topk):
        super().__init__(model, selection, topk)
        self.suppress = suppress

    def forward(
        self, images: Tensor, image_sizes: Tensor, original_sizes: Tensor, scales: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return boxes (N, D, 4), scores (N, D), labels (N, D) int64 and counts (N,) int64; D is `max_dets`.

        images, image_sizes: as for candidates. original_sizes: (N, 2) int64 (height, width) before the resize; scales:
        (N, 2) float32 (x, y) resized pixels per original pixel. Boxes are in pixels of the original images, by falling
        score; slots from `counts` on are boxes of zeros with score 0 and label -1.
        """
        rule, found = self.selection, self.candidates(images, image_sizes)
        kept = select(
            found, image_sizes, original_sizes, scales, rule.nms_iou, rule.max_dets, rule.convention, self._keep
        )
        used = torch.arange(rule.max_dets, device=kept.counts.device) < kept.counts.unsqueeze(1)
        return (
            torch.where(used.unsqueeze(2), kept.boxes, 0.0),
            torch.where(used, kept.scores, 0.0),
            torch.where(used, kept.labels, PADDING_LABEL),
            kept.counts,
        )

    def _keep(self, boxes, labels, valid, nms_iou, max_dets, plus_one, inclusive) -> Tensor:
        """`ops.nms.nms` with the operator of the graph."""
        kept = self.suppress(boxes, labels, valid, nms_iou, plus_one, inclusive) & valid
        position = first_true(kept, max_dets)
        return torch.where(position < valid.shape[1], position, -1)


def apart_nms(boxes: Tensor, labels: Tensor, valid: Tensor, nms_iou: float, plus_one: bool, inclusive: bool) -> Tensor:
    """Return the mask (N, n) of the boxes that greedy suppression within image and class keeps; as `ops.nms.nms`.

    One call of torchvision's operator, with every image and class moved to a place of its own. In float64: the sums are
    exact to 1e-9 pixels, where the usual float32 offset of 80 classes costs a hundredth of a pixel. An overlap within
    rounding (1e-7) of the threshold may fall on the other side than in float32.
    """
    num_images, width = valid.shape
    groups = torch.arange(num_images, device=boxes.device).unsqueeze(1) * (labels.amax() + 1) + labels  # (N, n)
    corners = inclusive_corners(boxes.to(torch.float64), plus_one)
    room = 2 * corners.abs().amax() + 1
    corners = (corners + (groups * room).unsqueeze(2)).flatten(0, 1)
    rows = valid.flatten().nonzero().squeeze(1)
    ranks = -rows.to(torch.float64)  # candidates lie by falling score
    rows = rows[torchvision.ops.nms(corners[rows], ranks, strict_threshold(nms_iou, inclusive))]
    kept = torch.zeros(num_images * width, dtype=torch.bool, device=boxes.device)
    return kept.index_fill(0, rows, True).view(num_images, width)


def inclusive_corners(boxes: Tensor, plus_one: bool) -> Tensor:
    """Return `boxes` (..., 4) so that x2 - x1 is the width, also where it was x2 - x1 + 1."""
    return boxes + torch.tensor([0, 0, 1, 1], dtype=boxes.dtype, device=boxes.device) if plus_one else boxes


def strict_threshold(threshold: float, inclusive: bool) -> float:
    """Return t so that `iou > t` is `iou >= threshold` where `inclusive`; the operators only know `>`."""
    return math.nextafter(threshold, -1.0) if inclusive else threshold
