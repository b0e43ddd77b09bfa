"""From head outputs to detections, of one view of each image or of several (test-time augmentation).

Each view goes through `postprocess` alone. Their detections, mirrored back, are one list for each image, which is
suppressed once more by the same rule; scores are not averaged. Detectron (`core/test_retinanet.py`) and detectron2
suppress the candidates of all views in one go: a box suppressed in its own view cannot come back here.
"""

from dataclasses import dataclass

import torch

from retinanet.modeling.postprocess import CONVENTIONS, Padded, postprocess_padded, split
from retinanet.ops.fixed_nms import device_nms, fixed_nms
from retinanet.structures import Batch, Detections, HeadOutputs


@dataclass(frozen=True)
class Postprocessor:
    """The settings of `postprocess`, as a function of outputs and their batch, and what merges views."""

    score_thresh: float
    pre_nms_topk: int
    nms_iou: float
    max_dets: int
    convention: str

    def __call__(self, outputs: HeadOutputs, batch: Batch) -> list[Detections]:
        """Return the detections of each image of `batch`, in original pixels as this view shows them."""
        return split(self._padded(outputs, batch, device_nms))

    def padded(self, outputs: HeadOutputs, batch: Batch) -> Padded:
        """Return the same in tensors of a fixed size, by operations that never wait for the device."""
        return self._padded(outputs, batch, fixed_nms)

    def _padded(self, outputs: HeadOutputs, batch: Batch, suppress) -> Padded:
        sizes = (batch.image_sizes, batch.original_sizes, batch.scales)
        return postprocess_padded(outputs, *sizes, **vars(self), suppress=suppress)

    def merge(self, views: list[Batch], found: list[list[Detections]]) -> list[Detections]:
        """Return the detections of each of N images; found: those of each view, N each, in the order of `views`.

        Of equal scores the earlier view comes first. One view that is not mirrored is returned as it is.
        """
        rules = CONVENTIONS[self.convention]
        if len(views) == 1 and not views[0].mirrored:
            return found[0]
        upright = [self._mirror_back(view, each) for view, each in zip(views, found, strict=True)]
        merged = []
        for parts in zip(*upright, strict=True):
            boxes, scores, labels = (torch.cat([part[key] for part in parts]) for key in ("boxes", "scores", "labels"))
            order = scores.argsort(descending=True, stable=True)
            boxes, scores, labels = boxes[order], scores[order], labels[order]
            valid = torch.ones_like(scores, dtype=torch.bool)[None]
            keep = device_nms(
                boxes[None], labels[None], valid, self.nms_iou, self.max_dets, rules.plus_one, rules.inclusive
            )
            keep = keep[keep >= 0]
            merged.append(Detections(boxes=boxes[keep], scores=scores[keep], labels=labels[keep]))
        return merged

    def _mirror_back(self, view: Batch, found: list[Detections]) -> list[Detections]:
        if not view.mirrored:
            return found
        edge = view.original_sizes[:, 1].to(torch.float32) - (1.0 if CONVENTIONS[self.convention].plus_one else 0.0)
        turned = []
        for width, each in zip(edge, found, strict=True):
            x1, y1, x2, y2 = each["boxes"].unbind(1)
            turned.append(Detections(**{**each, "boxes": torch.stack([width - x2, y1, width - x1, y2], dim=1)}))
        return turned
