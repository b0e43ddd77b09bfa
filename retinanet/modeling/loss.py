"""RetinaNetLoss: head outputs and ground truth -> the two losses, batched over images, summed level by level.

Nothing waits for the device, and the logits of the levels are never put together. The normalizer is separate from the
sum, so that a training step may spread it over what it cannot hold at once. With micro-batches, on one process:

    assignments = [loss.assign(anchors, batch.gt_boxes, batch.gt_labels) for batch in batches]
    total = sum(loss.count(assignment.num_fg) for assignment in assignments)
    divisor = loss.divisor(total)                       # once per optimizer step
    for batch, assignment in zip(batches, assignments):
        losses = loss(model(batch), batch.gt_boxes, batch.gt_labels, assignment, divisor)
        sum(losses.values()).backward()                 # gradients add up to those of one big batch

With W ranks, the caller adds `total` up over them before `divisor`, and multiplies the losses by W where gradients are
then averaged over the ranks, as DistributedDataParallel does. The sum over all micro-batches and ranks is the loss of
the big batch, for every normalizer.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from retinanet.errors import pick
from retinanet.modeling.assign import LOW_QUALITY, assign
from retinanet.ops.losses import BOX_LOSSES, DETECTRON_MAX_LOG, sigmoid_focal_loss
from retinanet.structures import HeadOutputs


class Assignment(NamedTuple):
    """What each anchor of a batch shall learn.

    matched_idx: (N, R) int64, a row of `gt_boxes`, `BACKGROUND` or `IGNORE`.
    labels: (N, R) int64, the class of that row, `BACKGROUND` or `IGNORE`.
    num_fg: (N,) int64, positive anchors per image as the normalizer counts them (`assign.py`, "detectron").
    """

    matched_idx: Tensor
    labels: Tensor
    num_fg: Tensor


# MODEL.LOSS.NORMALIZER -> function(num_fg): what N images add to the total that `RetinaNetLoss.divisor` turns into the
# divisor. "batch": positives + 1 of every image (Detectron `roi_data/retinanet.py`). "ema": positives (detectron2
# `modeling/meta_arch/retinanet.py`). "image": images, whose losses are then over their own positives (torchvision
# `models/detection/retinanet.py`).
NORMALIZERS = {
    "batch": lambda num_fg: (num_fg + 1).sum(),
    "ema": lambda num_fg: num_fg.sum(),
    "image": lambda num_fg: torch.ones_like(num_fg).sum(),
}

# detectron2: the running mean of positives starts here, and keeps this share of itself in each step.
_EMA_START, _EMA_KEEP = 100.0, 0.9


class RetinaNetLoss(nn.Module):
    """Focal loss of the classes and box loss of the positive anchors (RetinaNet, arXiv 1708.02002, section 4).

    num_classes: K. gamma, alpha: of the focal loss. box: a key of `BOX_LOSSES`; beta: of smooth_l1; box_weight: factor
    of the box loss. normalizer: a key of `NORMALIZERS`. fg_iou, bg_iou, low_quality, plus_one: of `assign`. Unknown
    names raise `UserError`.

    With normalizer "ema" the module has one buffer, `running_positives` (), which belongs in checkpoints.
    """

    def __init__(
        self,
        num_classes: int,
        gamma: float = 2.0,
        alpha: float = 0.25,
        box: str = "smooth_l1",
        beta: float = 0.11,
        box_weight: float = 1.0,
        normalizer: str = "batch",
        fg_iou: float = 0.5,
        bg_iou: float = 0.4,
        low_quality: str = "detectron2",
        plus_one: bool = False,
    ):
        super().__init__()
        for table, name, key in (
            (BOX_LOSSES, box, "MODEL.LOSS.BOX"),
            (NORMALIZERS, normalizer, "MODEL.LOSS.NORMALIZER"),
            (LOW_QUALITY, low_quality, "MODEL.MATCHER.LOW_QUALITY"),
        ):
            pick(table, name, key)
        self.num_classes, self.gamma, self.alpha = num_classes, gamma, alpha
        self.box, self.beta, self.box_weight, self.normalizer = box, beta, box_weight, normalizer
        self.matching = {"fg_iou": fg_iou, "bg_iou": bg_iou, "low_quality": low_quality, "plus_one": plus_one}
        if normalizer == "ema":
            self.register_buffer("running_positives", torch.tensor(_EMA_START))

    @torch.no_grad()
    def assign(self, anchors: list[Tensor], gt_boxes: Tensor, gt_labels: Tensor) -> Assignment:
        """Return what each of the R anchors of each image shall learn.

        anchors: per level (H*W*A, 4). gt_boxes: (N, M, 4), gt_labels: (N, M) int64, as in `Batch`.
        """
        matched_idx, num_fg = assign(anchors, gt_boxes, gt_labels, **self.matching)
        if gt_labels.shape[1] == 0:
            return Assignment(matched_idx, matched_idx, num_fg)
        labels = torch.where(matched_idx >= 0, gt_labels.gather(1, matched_idx.clamp(min=0)), matched_idx)
        return Assignment(matched_idx, labels, num_fg)

    def count(self, num_fg: Tensor) -> Tensor:
        """Return what images with `num_fg` (N,) positives add to the total () that `divisor` takes, float32."""
        return NORMALIZERS[self.normalizer](num_fg).to(torch.float32)

    @torch.no_grad()
    def divisor(self, total: Tensor) -> Tensor:
        """Return the divisor () of an optimizer step from the `total` () of `count` over all its images.

        "ema": in training mode this first moves `running_positives` a tenth of the way to the total; call it once
        per optimizer step. In evaluation mode the buffer is only read.
        """
        total = total.clamp(min=1.0)
        if self.normalizer != "ema":
            return total
        if self.training:
            self.running_positives.mul_(_EMA_KEEP).add_((1 - _EMA_KEEP) * total)
        return self.running_positives.clone()

    def forward(
        self,
        outputs: HeadOutputs,
        gt_boxes: Tensor,
        gt_labels: Tensor,
        assignment: Assignment | None = None,
        divisor: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return {"loss_cls": (), "loss_box": ()}, float32: the sums over the images, over the divisor.

        outputs: of `RetinaNet.forward`. gt_boxes: (N, M, 4), gt_labels: (N, M) int64, as in `Batch`.
        assignment: of `assign` for these images; made here when absent. divisor: of `divisor`; when absent, that of
        these images alone, in which case "ema" moves its buffer.
        """
        assert outputs["logits"][0].shape[-1] == self.num_classes, (outputs["logits"][0].shape, self.num_classes)
        if assignment is None:
            assignment = self.assign(outputs["anchors"], gt_boxes, gt_labels)
        if divisor is None:
            divisor = self.divisor(self.count(assignment.num_fg))
        image_weight = 1 / divisor
        if self.normalizer == "image":
            image_weight = image_weight / assignment.num_fg.clamp(min=1)  # (N,)
        loss_cls = (self._class_sums(outputs["logits"], assignment.labels) * image_weight).sum()
        loss_box = (self._box_sums(outputs, gt_boxes, assignment.matched_idx) * image_weight).sum()
        return {"loss_cls": loss_cls, "loss_box": loss_box * self.box_weight}

    def _class_sums(self, logits: list[Tensor], labels: Tensor) -> Tensor:
        """Return the focal loss (N,) of each image."""
        level_labels = labels.split([level.shape[1] for level in logits], dim=1)
        pairs = zip(logits, level_labels, strict=True)
        max_log = DETECTRON_MAX_LOG if self.matching["plus_one"] else math.inf  # plus_one marks Detectron's conventions
        return sum(sigmoid_focal_loss(level, target, self.gamma, self.alpha, max_log) for level, target in pairs)

    def _box_sums(self, outputs: HeadOutputs, gt_boxes: Tensor, matched_idx: Tensor) -> Tensor:
        """Return the box loss (N,) of each image, summed over its positive anchors.

        It runs on all R anchors: to select the positive ones would wait for the device. The others predict their own
        anchor and shall, which costs nothing and has no infinity whose gradient could turn into NaN.
        """
        positive = (matched_idx >= 0).unsqueeze(2)  # (N, R, 1)
        anchors = torch.cat(outputs["anchors"])
        if gt_boxes.shape[1] == 0:
            gt_boxes = gt_boxes.new_zeros(len(gt_boxes), 1, 4)
        matched = gt_boxes.gather(1, matched_idx.clamp(min=0).unsqueeze(2).expand(-1, -1, 4))
        matched = torch.where(positive, matched, anchors)
        deltas = torch.where(positive, torch.cat(outputs["deltas"], dim=1), 0.0)
        loss = BOX_LOSSES[self.box](deltas, anchors, matched, self.beta, self.matching["plus_one"])  # (N, R)
        return torch.where(positive.squeeze(2), loss, 0.0).sum(1)
