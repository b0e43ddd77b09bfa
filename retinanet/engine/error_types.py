"""Why detections are wrong and boxes are not found, and how much AP each reason costs.

After TIDE (Bolya et al., ECCV 2020, arXiv 2008.08115, sections 2.2 and 2.3) with its thresholds t_f = 0.5 and
t_b = 0.1. The paper leaves open what a detection is that fits two definitions; like its authors' code, the first of
`KINDS` that fits is taken. Matching and AP are COCO's at IoU 0.5, so detections that COCO ignores are no errors, and
100 detections count per image and class (TIDE: per image).
"""

from typing import NamedTuple

import numpy as np

from retinanet.engine.coco_json import GroundTruth, Results
from retinanet.engine.matching import FALSE, IGNORED, MIN_IOU, TRUE, ignored_boxes, iou_of_pairs, match

BACKGROUND_IOU = 0.1  # t_b: less than this is no attempt at a box
KINDS = ("localisation", "classification", "duplicate", "background", "both")
LOCALISATION, CLASSIFICATION, DUPLICATE, BACKGROUND, BOTH = range(len(KINDS))
NO_ERROR = -1
MEANINGS = {
    "localisation": "right class, IoU 0.1 to 0.5 with its box",
    "classification": "IoU 0.5 or more with a box of another class",
    "both": "IoU 0.1 to 0.5 with a box of another class",
    "duplicate": "right class and place, but a better detection has that box",
    "background": "IoU below 0.1 with every box",
    "missed": "boxes that no detection found, even with the wrong class or a poor outline",
    "false positives": "all wrong detections together",
    "false negatives": "all boxes not found",
}
RECALLS = np.linspace(0, 1, 101)  # COCO's


class Errors(NamedTuple):
    """kind: (D,) int8, place in `KINDS` or -1. box: (D,) int64, the box that a localisation or classification error
    stands for, else -1. outcome: (D,) as in `Matches`. unfound: (G,) bool, boxes that no detection matches; missed:
    (G,) bool, those of them that no localisation or classification error stands for."""

    kind: np.ndarray
    box: np.ndarray
    outcome: np.ndarray
    unfound: np.ndarray
    missed: np.ndarray


def classify(truth: GroundTruth, found: Results) -> Errors:
    """Return the kind of every wrong detection, and the boxes that nothing found."""
    outcome, chosen = match(truth, found)
    kind = np.full(len(outcome), NO_ERROR, dtype=np.int8)
    box = np.full(len(outcome), -1, dtype=np.int64)
    unfound = ~ignored_boxes(truth)
    boxes_of = _by_image(truth.images, np.flatnonzero(unfound), len(truth.image_ids))
    wrong_of = _by_image(found.images, np.flatnonzero(outcome == FALSE), len(truth.image_ids))
    unfound[chosen[outcome == TRUE]] = False
    for wrong, boxes in zip(wrong_of, boxes_of, strict=True):
        if len(wrong):
            kind[wrong], box[wrong] = _kinds_of_image(truth, found, wrong, boxes)
    missed = unfound.copy()
    missed[box[box >= 0]] = False
    return Errors(kind, box, outcome, unfound, missed)


def _by_image(images: np.ndarray, chosen: np.ndarray, num_images: int) -> list[np.ndarray]:
    """Return the members of `chosen` of each image, in their order."""
    order = chosen[np.argsort(images[chosen], kind="stable")]
    return np.split(order, np.searchsorted(images[order], np.arange(1, num_images)))


def _kinds_of_image(
    truth: GroundTruth, found: Results, wrong: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return kind and box of the wrong detections of one image, whose counted boxes are `boxes`."""
    if len(boxes) == 0:
        return np.full(len(wrong), BACKGROUND, dtype=np.int8), np.full(len(wrong), -1)
    rows, columns = np.repeat(wrong, len(boxes)), np.tile(boxes, len(wrong))
    iou = iou_of_pairs(found.boxes[rows], truth.boxes[columns], truth.crowd[columns]).reshape(len(wrong), len(boxes))
    same = found.labels[wrong][:, None] == truth.labels[boxes]
    own, other = np.where(same, iou, -1.0), np.where(same, -1.0, iou)
    own_best, other_best = own.max(1), other.max(1)
    cases = [  # in the order of KINDS
        (own_best >= BACKGROUND_IOU) & (own_best < MIN_IOU),
        other_best >= MIN_IOU,
        own_best >= MIN_IOU,
        iou.max(1) < BACKGROUND_IOU,
    ]
    kind = np.select(cases, range(len(cases)), BOTH).astype(np.int8)
    nearest = np.select([kind == LOCALISATION, kind == CLASSIFICATION], [own.argmax(1), other.argmax(1)], -1)
    return kind, np.where(nearest >= 0, boxes[nearest], -1)


def error_costs(truth: GroundTruth, found: Results, errors: Errors) -> dict[str, dict]:
    """Return what each kind costs: kind -> `count`, and `gain`, the points of AP50 that correcting it alone would add.

    Kinds are those of `MEANINGS`, in its order. Corrected means: a localisation or classification error becomes right
    if its box is free, the one with the highest score for each box, and the others vanish; "both", duplicate and
    background errors vanish; missed boxes are not asked for. `gain` is None without any box. A class whose boxes are
    all missed stays in the mean with an AP of 0, as in TIDE's code.
    """
    num_boxes = _count(truth, ~ignored_boxes(truth))
    among = num_boxes > 0
    right, taking_part = errors.outcome == TRUE, errors.outcome != IGNORED
    base = mean_ap(found, found.labels, right, taking_part, num_boxes, among)
    costs = {}
    for name in MEANINGS:
        if name in ("missed", "false negatives"):
            gone = errors.missed if name == "missed" else errors.unfound
            count, corrected = gone.sum(), (found.labels, right, taking_part, num_boxes - _count(truth, gone))
        else:
            affected = errors.kind == KINDS.index(name) if name in KINDS else errors.kind != NO_ERROR
            count, corrected = affected.sum(), (*_corrected(truth, found, errors, affected, name in KINDS), num_boxes)
        ap = mean_ap(found, *corrected, among)
        costs[name] = {"count": int(count), "gain": None if base is None else ap - base}
    return costs


def _count(truth: GroundTruth, chosen: np.ndarray) -> np.ndarray:
    return np.bincount(truth.labels[chosen], minlength=len(truth.names))


def _corrected(
    truth: GroundTruth, found: Results, errors: Errors, affected: np.ndarray, repair: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(labels, right, kept)`, each (D,), once the `affected` detections are made right or taken away."""
    labels, right = found.labels.copy(), errors.outcome == TRUE
    kept = (errors.outcome != IGNORED) & ~affected
    repaired = _repaired(found, errors, np.flatnonzero(affected)) if repair else np.zeros(0, dtype=np.int64)
    right[repaired] = kept[repaired] = True
    labels[repaired] = truth.labels[errors.box[repaired]]
    return labels, right, kept


def _repaired(found: Results, errors: Errors, affected: np.ndarray) -> np.ndarray:
    """Return those of `affected` that a correction makes right: for each box not found yet, the highest score."""
    able = affected[errors.box[affected] >= 0]
    able = able[errors.unfound[errors.box[able]]]
    able = able[np.argsort(-found.scores[able], kind="stable")]
    return able[np.unique(errors.box[able], return_index=True)[1]]


def mean_ap(
    found: Results,
    labels: np.ndarray,
    right: np.ndarray,
    kept: np.ndarray,
    num_boxes: np.ndarray,
    among: np.ndarray,
) -> float | None:
    """Return the mean over classes of `average_precision`, in percent; None without a class.

    labels, right, kept: (D,) class, whether right, whether it takes part. num_boxes: (K,) boxes to find. among: (K,)
    bool, the classes of the mean.
    """
    order = np.lexsort((found.images, -found.scores))  # the order in which COCO breaks ties
    order = order[kept[order]]
    labels, right = labels[order], right[order]
    classes = np.flatnonzero(among)
    values = [average_precision(right[labels == label], int(num_boxes[label])) for label in classes]
    return 100 * float(np.mean(values)) if values else None


def average_precision(right: np.ndarray, num_boxes: int) -> float:
    """Return COCO's AP in [0, 1] of detections by falling score: the mean over 101 recalls of the best precision at
    that recall or a higher one. right: (D,) bool."""
    if num_boxes == 0 or len(right) == 0:
        return 0.0
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    place = np.searchsorted(hits / num_boxes, RECALLS, side="left")
    return float(np.where(place < len(hits), precision[np.minimum(place, len(hits) - 1)], 0.0).mean())
