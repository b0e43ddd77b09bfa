"""COCO's arrays of precision and recall for boxes, in NumPy over all images at once: pycocotools' results, bit for bit.

pycocotools and its C++ successor build a dict for every detection and visit every pair of image and class. Here the
pairs that overlap by 0.5 are found once; the ten IoU thresholds are matched together, once for each area range.
"""

import numpy as np

from retinanet.engine.coco_json import GroundTruth, Results
from retinanet.engine.matching import FALSE, IGNORED, MAX_PER_GROUP, TRUE, candidate_pairs, choose, ranks_in_groups

IOUS = np.linspace(0.5, 0.95, 10)  # as pycocotools makes them: the sixth is not exactly 0.75
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = ((0.0, 1e5**2), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e5**2))  # all, small, medium, large
COUNTS = (1, 10, 100)  # detections per image and class


def coco_arrays(truth: GroundTruth, found: Results) -> dict[str, np.ndarray]:
    """Return `precision` (10 IoUs, 101 recalls, K, 4 areas, 3 counts) and `recall` (10, K, 4, 3) in [0, 1].

    Cells without annotated boxes hold -1. The same numbers as `COCOeval.accumulate` of pycocotools.
    """
    num_classes = len(truth.names)
    ranks = ranks_in_groups(found)
    # by falling score; of equals by image, then by place in the file: the order of pycocotools' stable sorts
    order = np.lexsort((found.images, -found.scores))
    order = order[ranks[order] < MAX_PER_GROUP]
    by_class = order[np.argsort(found.labels[order], kind="stable")]
    bounds = np.searchsorted(found.labels[by_class], np.arange(num_classes + 1))
    pairs = candidate_pairs(truth, found, np.flatnonzero(ranks < MAX_PER_GROUP), IOUS[0])
    precision = -np.ones((len(IOUS), len(RECALLS), num_classes, len(AREAS), len(COUNTS)))
    recall = -np.ones((len(IOUS), num_classes, len(AREAS), len(COUNTS)))
    for area, limits in enumerate(AREAS):
        ignored = truth.crowd | (truth.area < limits[0]) | (truth.area > limits[1])
        outcome = _outcomes(truth, found, pairs, ranks, ignored, limits)
        for label in range(num_classes):
            num_boxes = int((~ignored & (truth.labels == label)).sum())
            if num_boxes == 0:
                continue
            members = by_class[bounds[label] : bounds[label + 1]]
            for place, count in enumerate(COUNTS):
                chosen = outcome[:, members[ranks[members] < count]]
                cells = _curve(chosen[:, (chosen != IGNORED).any(axis=0)], num_boxes)
                precision[:, :, label, area, place], recall[:, label, area, place] = cells
    return {"precision": precision, "recall": recall}


def _outcomes(truth: GroundTruth, found: Results, pairs, ranks, ignored: np.ndarray, limits) -> np.ndarray:
    """Return (10, D) int8: the outcome of each detection at each IoU threshold, for one area range."""
    num_dets, num_boxes, copies = len(ranks), len(truth.boxes), len(IOUS)
    det, box, iou = (np.tile(column, copies) for column in pairs)
    level = np.repeat(np.arange(copies), len(pairs[0]))
    near = iou >= IOUS[level]
    det, box, iou = (det + level * num_dets)[near], (box + level * num_boxes)[near], iou[near]
    never, reusable = np.tile(ignored, copies), np.tile(truth.crowd, copies)
    chosen = choose(det, box, iou, np.tile(ranks, copies), never, reusable)
    areas = found.boxes[:, 2] * found.boxes[:, 3]
    alone = np.where((areas < limits[0]) | (areas > limits[1]), IGNORED, FALSE).astype(np.int8)
    outcome = np.tile(alone, copies)
    matched = np.flatnonzero(chosen >= 0)
    outcome[matched] = np.where(never[chosen[matched]], IGNORED, TRUE)
    return outcome.reshape(copies, num_dets)


def _curve(outcome: np.ndarray, num_boxes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (10, 101) at `RECALLS`, made to fall, and the last recall (10,) of detections by falling score.

    outcome: (10, n). Precision is 0 beyond the last recall.
    """
    true = np.cumsum(outcome == TRUE, axis=1, dtype=np.float64)
    false = np.cumsum(outcome == FALSE, axis=1, dtype=np.float64)
    reached = true / num_boxes
    rates = true / (false + true + np.spacing(1))
    falling = np.maximum.accumulate(rates[:, ::-1], axis=1)[:, ::-1]
    falling = np.concatenate([falling, np.zeros((len(IOUS), 1))], axis=1)
    at = np.stack([np.searchsorted(row, RECALLS, side="left") for row in reached])  # (10, 101)
    return np.take_along_axis(falling, at, axis=1), (reached[:, -1] if reached.shape[1] else np.zeros(len(IOUS)))
