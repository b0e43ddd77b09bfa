"""What was taken for what, at one score threshold; and how each image fared there."""

from typing import NamedTuple

import numpy as np

from retinanet.engine.coco_json import GroundTruth, Results
from retinanet.engine.matching import FALSE, TRUE, Matches, ignored_boxes, match


def keep(found: Results, threshold: float | None) -> Results:
    """Return the detections with a score of `threshold` or more; none when it is None."""
    chosen = found.scores >= (np.inf if threshold is None else threshold)
    return Results(*(column[chosen] for column in (found.images, found.labels, found.boxes, found.scores)))


def confusion_matrix(truth: GroundTruth, found: Results) -> np.ndarray:
    """Return counts (K + 1, K + 1) int64: row the class of a box, column the class that was found there; K is nothing.

    First every detection takes a box of its class by COCO's rules, so that the diagonal holds the right ones of
    precision and recall; what is left, boxes and detections, pairs up by IoU >= 0.5 whatever the class. Row sums are
    the numbers of boxes, column sums those of detections; ignored boxes and detections are in neither.
    """
    num_classes = len(truth.names)
    matches = match(truth, found)
    right = matches.outcome == TRUE
    matrix = np.diag(np.bincount(found.labels[right], minlength=num_classes + 1))
    free = ~ignored_boxes(truth)
    free[matches.box[right]] = False
    boxes, wrong = np.flatnonzero(free), np.flatnonzero(matches.outcome == FALSE)
    rest = match(_without_class(truth, boxes), _detections_without_class(found, wrong), limit=len(wrong))
    confused = rest.outcome == TRUE
    np.add.at(matrix, (truth.labels[boxes[rest.box[confused]]], found.labels[wrong[confused]]), 1)
    np.add.at(matrix, (num_classes, found.labels[wrong[~confused]]), 1)
    np.add.at(matrix, (truth.labels[np.delete(boxes, rest.box[confused])], num_classes), 1)
    return matrix


def _without_class(truth: GroundTruth, boxes: np.ndarray) -> GroundTruth:
    return GroundTruth(
        source=truth.source,
        image_ids=truth.image_ids,
        category_ids=[0],
        names=["any"],
        images=truth.images[boxes],
        labels=np.zeros(len(boxes), dtype=np.int64),
        boxes=truth.boxes[boxes],
        area=truth.area[boxes],
        crowd=truth.crowd[boxes],
    )


def _detections_without_class(found: Results, chosen: np.ndarray) -> Results:
    labels = np.zeros(len(chosen), dtype=np.int64)
    return Results(found.images[chosen], labels, found.boxes[chosen], found.scores[chosen])


class ImageCounts(NamedTuple):
    """Right and false detections and boxes not found, each (I,) int64 in the order of `truth.image_ids`."""

    right: np.ndarray
    false: np.ndarray
    missed: np.ndarray

    def f1(self) -> np.ndarray:
        """Return F1 (I,) in [0, 1]; NaN for an image without boxes and without detections."""
        total = 2 * self.right + self.false + self.missed
        return np.divide(2 * self.right, total, out=np.full(len(total), np.nan), where=total > 0)


def count_by_image(truth: GroundTruth, found: Results, matches: Matches) -> ImageCounts:
    """Return how each image fared; `matches` are those of `found`."""
    num_images = len(truth.image_ids)
    unfound = ~ignored_boxes(truth)
    unfound[matches.box[matches.outcome == TRUE]] = False
    outcome = matches.outcome
    right, false = (np.bincount(found.images[outcome == kind], minlength=num_images) for kind in (TRUE, FALSE))
    return ImageCounts(right, false, np.bincount(truth.images[unfound], minlength=num_images))


def rank_images(counts: ImageCounts) -> np.ndarray:
    """Return the places of the images, worst first: by F1, then by number of mistakes; the best ends the list.

    Images without boxes and detections are left out: there is nothing to see. Equal images stay in their order.
    """
    f1 = counts.f1()
    shown = np.flatnonzero(~np.isnan(f1))
    mistakes = counts.false + counts.missed
    tie = np.where(mistakes > 0, -mistakes, counts.right)  # of perfect images the fullest are the best
    return shown[np.lexsort((tie[shown], f1[shown]))]
