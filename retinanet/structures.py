"""The vocabulary: what flows between data, model, loss and evaluation. Read this file first.

Letters: N images, C channels, H W rows and columns, K classes without background, A anchors per cell, R anchors of
an image over all levels, M ground-truth boxes of an image, D detections of an image. Boxes are float32 xyxy in
absolute, continuous pixels (width = x2 - x1), of the resized image before `modeling/postprocess.py` and of the
original image after it. Sizes are (height, width). Levels run from high to low resolution.
"""

from dataclasses import dataclass, field, replace
from typing import TypedDict

import torch
from torch import Tensor

BACKGROUND = -1  # in `matched_idx` and in anchor labels: no object
IGNORE = -2  # in `matched_idx` and in anchor labels: takes part in no loss
PAD_LABEL = -1  # in `Batch.gt_labels`: a row that is padding, not a box


class Target(TypedDict):
    """Ground truth of one image.

    boxes: (M, 4) xyxy pixels of the image that travels with this target, 0 <= x1 < x2 <= W, 0 <= y1 < y2 <= H.
    labels: (M,) int64 in [0, K), the position of the category in the data set's sorted category ids.
    """

    boxes: Tensor
    labels: Tensor


class HeadOutputs(TypedDict):
    """What `RetinaNet.forward` returns, in training and in evaluation alike; lists run over the levels P3..P7.

    logits: (N, H*W*A, K) before the sigmoid, in the order row, column, anchor, which is the order of `anchors`.
    deltas: (N, H*W*A, 4) encoded (dx, dy, dw, dh).
    anchors: (H*W*A, 4) float32 xyxy pixels of the padded input.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    anchors: list[Tensor]


class Detections(TypedDict):
    """Detections of one image, sorted by falling score.

    boxes: (D, 4) float32 xyxy pixels of the original image.
    scores: (D,) float32 in [0, 1].
    labels: (D,) int64 in [0, K).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass
class Batch:
    """Images of one step, padded to one size, with their ground truth padded to one count.

    The ground truth is padded here, once, because assignment and loss then run over the whole batch without a loop
    and without a host synchronisation.

    images: (N, 3, H, W) uint8, RGB or BGR as `MODEL.CHANNEL_ORDER` says, zero at the bottom and right; float32 when
        `INPUT.RESIZE` asks for a resize in floating point.
    image_sizes: (N, 2) int64 (height, width) of the resized images before padding.
    original_sizes: (N, 2) int64 (height, width) of the images on disk; in training of what `INPUT.AUGMENT` cut out of
        them or put together.
    scales: (N, 2) float32 (x, y): resized pixels per original pixel.
    gt_boxes: (N, M, 4) float32 xyxy pixels of the resized image; padding rows are zero.
    gt_labels: (N, M) int64 in [0, K), `PAD_LABEL` in padding rows.
    image_ids: the N image ids of the data set's json, in order; a mosaic is known by the first of its images.
    mirrored: whether the images are mirrored left to right, which their sizes do not tell (in evaluation; in training
        each image has its own flip, which its boxes share).
    views: the same images at other sizes or mirrored, for evaluation to look at as well.
    """

    images: Tensor
    image_sizes: Tensor
    original_sizes: Tensor
    scales: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    image_ids: list[int] = field(default_factory=list)
    mirrored: bool = False
    views: list["Batch"] = field(default_factory=list)

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`; copies from pinned memory do not wait for the device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; `torch.utils.data.DataLoader` calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, fn) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        views = [view._map(fn) for view in self.views]
        return replace(self, views=views, **{name: fn(value) for name, value in tensors.items()})


def pad_targets(targets: list[Target]) -> tuple[Tensor, Tensor]:
    """Return `gt_boxes (N, M, 4)` and `gt_labels (N, M)` for N targets, as `Batch` describes them.

    M is the largest count of the batch rounded up to 8, 16, 32, ...: few distinct shapes, so that compiled and
    captured code is reused.
    """
    most = max((len(target["labels"]) for target in targets), default=0)
    padded = 8
    while padded < most:
        padded *= 2
    gt_boxes = torch.zeros(len(targets), padded, 4)
    gt_labels = torch.full((len(targets), padded), PAD_LABEL, dtype=torch.int64)
    for row, target in enumerate(targets):
        count = len(target["labels"])
        gt_boxes[row, :count] = target["boxes"]
        gt_labels[row, :count] = target["labels"]
    return gt_boxes, gt_labels
