"""Evaluation and prediction see an image once, or several times: at other sizes and mirrored (test-time augmentation).

Every view is resized from the image on disk, so that a larger one shows more detail. The first view is the `Batch`, and
the others travel with it in `Batch.views`; `modeling/views.py` puts their detections together.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from retinanet.data.coco import CocoDataset
from retinanet.data.collate import Collator
from retinanet.data.transforms import Augmentation
from retinanet.data.workers import Batches
from retinanet.structures import Batch, Target

Sample = tuple[np.ndarray, Target]


class View(NamedTuple):
    """One way to look at an image: `collator` caps its long side, `short_side` in pixels, `mirrored` left to right."""

    collator: Collator
    short_side: int
    mirrored: bool = False

    def batch(self, samples: Iterable[Sample], sizes: list[tuple[int, int]], image_ids: list[int]) -> Batch:
        """Return the samples of original `sizes` (height, width) as they look in this view."""
        augmentations = [Augmentation(self.short_side, self.mirrored) for _ in sizes]
        geometries = [self.collator.geometry(size, self.short_side) for size in sizes]
        canvas = self.collator.canvas(geometries)
        return replace(self.collator(samples, augmentations, geometries, canvas, image_ids), mirrored=self.mirrored)


def look(views: list[View], samples: Iterable[Sample], sizes: list[tuple[int, int]], image_ids: list[int]) -> Batch:
    """Return the samples in the first of `views`, with the other views in `Batch.views`.

    `samples` is consumed one at a time when there is one view; more views keep all decoded images meanwhile.
    """
    if len(views) > 1:
        samples = list(samples)
    first, *others = [view.batch(samples, sizes, image_ids) for view in views]
    return replace(first, views=others) if others else first


class EvalBatches(Batches):
    """List of rows -> `Batch`, as evaluation wants it; an unreadable image is an error, for AP is over all images."""

    def __init__(self, dataset: CocoDataset, views: list[View]):
        self.dataset, self.views = dataset, views

    def load(self, rows: list[int]) -> Batch:
        """Return the batch of these rows; raises `UserError` for an image that cannot be read."""
        sizes = [self.dataset.image_size(row) for row in rows]
        return look(self.views, map(self._read, rows), sizes, self.dataset.image_ids[rows].tolist())

    def _read(self, row: int) -> Sample:
        self.reading(row)
        return self.dataset.read(row)


class ImageBatcher:
    """Images (H, W, 3) uint8 BGR -> `Batch` without ground truth, in `views`; ids count from 0."""

    def __init__(self, views: list[View]):
        self.views = views

    def __call__(self, images: list[np.ndarray]) -> Batch:
        nothing = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
        samples = [(image, nothing) for image in images]
        return look(self.views, samples, [image.shape[:2] for image in images], list(range(len(images))))

    def canvas(self, image: np.ndarray) -> tuple[tuple[int, int], ...]:
        """Return the padded (height, width) that the image alone has in each view."""
        sizes = [(view.collator, view.collator.geometry(image.shape[:2], view.short_side)) for view in self.views]
        return tuple(collator.canvas([geometry]) for collator, geometry in sizes)
