"""Precision and recall at the score threshold that maximizes F1: the "label precision" and "label recall".

AP averages over all thresholds; somebody who deploys a detector picks one. This file matches detections to boxes at
IoU 0.5 by pycocotools' rules (`COCOeval.evaluateImg`, area range "all", 100 detections per image and class) and reads
precision, recall and F1 off the sorted scores. A detection that only meets a crowd counts as nothing.
"""

import numpy as np

from retinanet.engine.coco_json import GroundTruth, Results

MIN_IOU = 0.5
MAX_PER_GROUP = 100  # detections per image and class that COCO metrics look at
MAX_AREA = 1e5**2  # COCO's area range "all"; boxes annotated beyond it are ignored like crowds
PAIRS_AT_ONCE = 1 << 21  # (detection, box) pairs in memory at a time: about 300 MiB

FALSE, TRUE, IGNORED = 0, 1, 2  # outcome of a detection


def operating_point(truth: GroundTruth, found: Results) -> dict:
    """Return `threshold` (score, kept when >= it), `precision`, `recall` and `f1` in percent over all classes together.

    The threshold maximizes F1 = 2 TP / (2 TP + FP + FN); of equals the highest. `per_class` holds, in the order of
    `truth.names`, dicts with the same three numbers of each class at that shared threshold, and the class's own
    `best_threshold` and `best_f1`. None stands for what is undefined: precision without detections, recall without
    boxes, a threshold without a single true positive.
    """
    outcome = match(truth, found)
    counted = ~_ignored(truth)
    threshold, f1 = _best(*curve(found.scores, outcome), int(counted.sum()))
    kept = found.scores >= (np.inf if threshold is None else threshold)
    classes = []
    for label in range(len(truth.names)):
        of_class = found.labels == label
        num_boxes = int((counted & (truth.labels == label)).sum())
        best_threshold, best_f1 = _best(*curve(found.scores[of_class], outcome[of_class]), num_boxes)
        rates = _rates(outcome[of_class & kept], num_boxes)
        classes.append({**rates, "best_threshold": best_threshold, "best_f1": best_f1})
    return {"threshold": threshold, **_rates(outcome[kept], int(counted.sum())), "per_class": classes}


def curve(scores: np.ndarray, outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(thresholds, true, false)`, each (S,): falling distinct scores, and the true and false positives kept
    at each of them."""
    scored = outcome != IGNORED
    scores, true = scores[scored], outcome[scored] == TRUE
    order = np.argsort(-scores, kind="stable")
    scores, true = scores[order], true[order]
    last = np.append(scores[1:] != scores[:-1], True)[: len(scores)]  # equal scores are kept or dropped together
    return scores[last], np.cumsum(true)[last], np.cumsum(~true)[last]


def curves(truth: GroundTruth, found: Results) -> list[dict[str, np.ndarray]]:
    """Return `threshold` (S,), falling, and `precision`, `recall`, `f1` (S,) in percent: all classes together first,
    then every class. Empty where there are no boxes."""
    outcome, counted = match(truth, found), ~_ignored(truth)
    parts = []
    for label in [None, *range(len(truth.names))]:
        chosen = np.full(len(outcome), True) if label is None else found.labels == label
        num_boxes = int((counted if label is None else counted & (truth.labels == label)).sum())
        thresholds, true, false = curve(found.scores[chosen], outcome[chosen])
        thresholds, true, false = (column[: len(column) if num_boxes else 0] for column in (thresholds, true, false))
        rates = {"precision": true / (true + false), "recall": true / max(num_boxes, 1)}
        rates["f1"] = 2 * true / (true + false + num_boxes)
        parts.append({"threshold": thresholds, **{name: 100 * rate for name, rate in rates.items()}})
    return parts


def match(truth: GroundTruth, found: Results) -> np.ndarray:
    """Return the outcome (D,) int8 of each detection: TRUE, FALSE or IGNORED.

    In each image and class, detections choose in the order of falling scores: the free box with the highest IoU (of
    equals the last annotated), else the best crowd, which is never used up. Detections after the 100th of an image and
    class are ignored. Rank by rank over all images at once, so there are at most 100 rounds of array operations.
    """
    ranks = _ranks(found)
    outcome = np.where(ranks < MAX_PER_GROUP, FALSE, IGNORED).astype(np.int8)
    det, box, iou = _candidates(truth, found, ranks)
    ignored, free = _ignored(truth), np.ones(len(truth.boxes), dtype=bool)
    order = np.lexsort((-box, -iou, ignored[box], det, ranks[det]))
    det, box = det[order], box[order]
    bounds = np.searchsorted(ranks[det], np.arange(MAX_PER_GROUP + 1))
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        usable = np.flatnonzero(free[box[start:stop]]) + start
        first = usable[np.unique(det[usable], return_index=True)[1]]  # each detection's best usable box
        outcome[det[first]] = np.where(ignored[box[first]], IGNORED, TRUE)
        free[box[first]] = truth.crowd[box[first]]
    return outcome


def _ignored(truth: GroundTruth) -> np.ndarray:
    """Return (G,) bool: the boxes that need not be found."""
    return truth.crowd | (truth.area < 0) | (truth.area > MAX_AREA)


def _groups(images: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    return images * num_labels + labels


def _ranks(found: Results) -> np.ndarray:
    """Return (D,) int64: the place of each detection among those of its image and class, by falling score."""
    num_labels = int(found.labels.max(initial=0)) + 1
    group = _groups(found.images, found.labels, num_labels)
    order = np.lexsort((-found.scores, group))  # stable: equal scores keep the order of the file
    starts = np.flatnonzero(np.append(True, group[order][1:] != group[order][:-1]))[: len(order)]
    lengths = np.diff(np.append(starts, len(order)))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    return ranks


def _candidates(truth: GroundTruth, found: Results, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(detection, box, iou)`, each (P,): the pairs of one image and class with IoU >= 0.5."""
    num_labels = len(truth.names)
    box_groups = _groups(truth.images, truth.labels, num_labels)
    by_group = np.argsort(box_groups, kind="stable")
    sorted_groups = box_groups[by_group]
    det_groups = _groups(found.images, found.labels, num_labels)
    starts = np.searchsorted(sorted_groups, det_groups, side="left")
    counts = np.searchsorted(sorted_groups, det_groups, side="right") - starts
    dets = np.flatnonzero((counts > 0) & (ranks < MAX_PER_GROUP))
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for chunk in _chunks(dets, counts):
        det = np.repeat(chunk, counts[chunk])
        within = np.arange(len(det)) - np.repeat(np.cumsum(counts[chunk]) - counts[chunk], counts[chunk])
        box = by_group[np.repeat(starts[chunk], counts[chunk]) + within]
        iou = _iou(found.boxes[det], truth.boxes[box], truth.crowd[box])
        near = iou >= MIN_IOU
        parts.append((det[near], box[near], iou[near]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _chunks(dets: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Split `dets` so that the pairs of one part fit into memory."""
    if len(dets) == 0:
        return []
    part = np.cumsum(counts[dets]) // PAIRS_AT_ONCE
    return np.split(dets, np.flatnonzero(part[1:] != part[:-1]) + 1)


def _iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU (P,) of xywh boxes, over the area of `a` alone where `crowd`.

    The operations stand in the order of pycocotools' `bbIou`, so that ties fall alike.
    """
    width = np.minimum(a[:, 2] + a[:, 0], b[:, 2] + b[:, 0]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3] + a[:, 1], b[:, 3] + b[:, 1]) - np.maximum(a[:, 1], b[:, 1])
    overlap = np.where((width > 0) & (height > 0), width * height, 0.0)
    area = a[:, 2] * a[:, 3]
    union = np.where(crowd, area, area + b[:, 2] * b[:, 3] - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def _best(thresholds: np.ndarray, true: np.ndarray, false: np.ndarray, num_boxes: int) -> tuple[float | None, float]:
    """Return the threshold with the highest F1, and that F1 in percent; None where F1 is nowhere above zero."""
    if num_boxes == 0:
        return None, None
    if len(thresholds) == 0 or true[-1] == 0:
        return None, 0.0
    f1 = 2 * true / (true + false + num_boxes)
    best = int(f1.argmax())
    return float(thresholds[best]), 100 * float(f1[best])


def _rates(outcome: np.ndarray, num_boxes: int) -> dict:
    """Return precision, recall and F1 in percent of the detections kept."""
    true, false = int((outcome == TRUE).sum()), int((outcome == FALSE).sum())
    total = true + false + num_boxes
    return {
        "precision": 100 * true / (true + false) if true + false else None,
        "recall": 100 * true / num_boxes if num_boxes else None,
        "f1": 200 * true / total if num_boxes else None,
    }
