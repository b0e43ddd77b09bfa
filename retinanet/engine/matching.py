"""Which detection found which box, by the rules of COCO (`COCOeval.evaluateImg`, area range "all").

In each image and class, detections choose in the order of falling scores: the free box with the highest IoU, of equals
the last annotated; else the best crowd, whose IoU is over the detection's own area and which is never used up. What
only meets a crowd counts as nothing, and so do detections after the 100th of an image and class.
"""

from typing import NamedTuple

import numpy as np

from retinanet.engine.coco_json import GroundTruth, Results

MIN_IOU = 0.5
MAX_PER_GROUP = 100  # detections per image and class that COCO metrics look at
MAX_AREA = 1e5**2  # COCO's area range "all"; boxes annotated beyond it are ignored like crowds
PAIRS_AT_ONCE = 1 << 21  # (detection, box) pairs in memory at a time: about 300 MiB

FALSE, TRUE, IGNORED = 0, 1, 2  # outcome of a detection


class Matches(NamedTuple):
    """outcome: (D,) int8, TRUE, FALSE or IGNORED. box: (D,) int64, the box or crowd that was chosen, else -1."""

    outcome: np.ndarray
    box: np.ndarray


def match(truth: GroundTruth, found: Results, min_iou: float = MIN_IOU, limit: int = MAX_PER_GROUP) -> Matches:
    """Return outcome and box of each detection; those after the `limit`-th of an image and class are ignored."""
    ranks = ranks_in_groups(found)
    pairs = candidate_pairs(truth, found, np.flatnonzero(ranks < limit), min_iou)
    ignored = ignored_boxes(truth)
    chosen = choose(*pairs, ranks, ignored, truth.crowd)
    outcome = np.where(ranks < limit, FALSE, IGNORED).astype(np.int8)
    matched = np.flatnonzero(chosen >= 0)
    outcome[matched] = np.where(ignored[chosen[matched]], IGNORED, TRUE)
    return Matches(outcome, chosen)


def choose(
    det: np.ndarray, box: np.ndarray, iou: np.ndarray, ranks: np.ndarray, ignored: np.ndarray, reusable: np.ndarray
) -> np.ndarray:
    """Return (D,) int64: the box that each detection chooses, or -1.

    det, box, iou: (P,) the pairs that may match. ranks: (D,) the turn of each detection. ignored, reusable: (G,) bool,
    boxes that come after all others, and boxes that any number of detections may choose. Rank by rank over all images
    at once, so there are as many rounds of array operations as a group has detections, at most.
    """
    chosen = np.full(len(ranks), -1, dtype=np.int64)
    free = np.ones(len(ignored), dtype=bool)
    order = np.lexsort((-box, -iou, ignored[box], det, ranks[det]))
    det, box = det[order], box[order]
    bounds = np.searchsorted(ranks[det], np.arange(ranks[det].max(initial=-1) + 2))
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        usable = np.flatnonzero(free[box[start:stop]]) + start
        dets = det[usable]
        first = usable[np.append(True, dets[1:] != dets[:-1])[: len(dets)]]  # each detection's best usable box
        chosen[det[first]] = box[first]
        free[box[first]] = reusable[box[first]]
    return chosen


def match_image(
    gt_boxes: np.ndarray,
    gt_labels: np.ndarray,
    crowd: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    iou: float = MIN_IOU,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(box of each detection (D,), ignored (D,) bool, detection of each box (M,))` of one image; -1 for none.

    gt_boxes: (M, 4) xyxy; gt_labels: (M,) integers; crowd: (M,) bool. boxes: (D, 4) xyxy; scores, labels: (D,).
    A detection that met a crowd is ignored and names that crowd; a crowd itself is nobody's, so it stays at -1, and
    neither it nor an ignored detection is a mistake. Arrays in any order; the answers are in the order given.
    """
    gt_labels, labels = np.asarray(gt_labels, dtype=np.int64), np.asarray(labels, dtype=np.int64)
    assert len(gt_boxes) == len(gt_labels) == len(crowd), (len(gt_boxes), len(gt_labels), len(crowd))
    assert len(boxes) == len(scores) == len(labels), (len(boxes), len(scores), len(labels))
    num_classes = 1 + max(gt_labels.max(initial=0), labels.max(initial=0))
    xywh = _to_xywh(gt_boxes)
    truth = GroundTruth(
        source="image",
        image_ids=[0],
        category_ids=list(range(num_classes)),
        names=[str(label) for label in range(num_classes)],
        images=np.zeros(len(gt_labels), dtype=np.int64),
        labels=gt_labels,
        boxes=xywh,
        area=xywh[:, 2] * xywh[:, 3],
        crowd=np.asarray(crowd, dtype=bool),
    )
    scores = np.asarray(scores, dtype=np.float64)
    found = Results(np.zeros(len(labels), dtype=np.int64), labels, _to_xywh(boxes), scores)
    outcome, box = match(truth, found, iou)
    finder = np.full(len(gt_labels), -1, dtype=np.int64)
    right = np.flatnonzero(outcome == TRUE)
    finder[box[right]] = right
    return box, outcome == IGNORED, finder


def _to_xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def ignored_boxes(truth: GroundTruth) -> np.ndarray:
    """Return (G,) bool: the boxes that need not be found."""
    return truth.crowd | (truth.area < 0) | (truth.area > MAX_AREA)


def _groups(images: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    return images * num_labels + labels


def ranks_in_groups(found: Results) -> np.ndarray:
    """Return (D,) int64: the place of each detection among those of its image and class, by falling score."""
    num_labels = int(found.labels.max(initial=0)) + 1
    group = _groups(found.images, found.labels, num_labels)
    order = np.lexsort((-found.scores, group))  # stable: equal scores keep the order of the file
    starts = np.flatnonzero(np.append(True, group[order][1:] != group[order][:-1]))[: len(order)]
    lengths = np.diff(np.append(starts, len(order)))
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    return ranks


def candidate_pairs(
    truth: GroundTruth, found: Results, dets: np.ndarray, min_iou: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `(detection, box, iou)`, each (P,): the pairs of one image and class with `min_iou` or more, of `dets`."""
    num_labels = len(truth.names)
    box_groups = _groups(truth.images, truth.labels, num_labels)
    by_group = np.argsort(box_groups, kind="stable")
    sorted_groups = box_groups[by_group]
    det_groups = _groups(found.images, found.labels, num_labels)
    starts = np.searchsorted(sorted_groups, det_groups, side="left")
    counts = np.searchsorted(sorted_groups, det_groups, side="right") - starts
    dets = dets[counts[dets] > 0]
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for chunk in _chunks(dets, counts):
        det = np.repeat(chunk, counts[chunk])
        within = np.arange(len(det)) - np.repeat(np.cumsum(counts[chunk]) - counts[chunk], counts[chunk])
        box = by_group[np.repeat(starts[chunk], counts[chunk]) + within]
        iou = iou_of_pairs(found.boxes[det], truth.boxes[box], truth.crowd[box])
        near = iou >= min_iou
        parts.append((det[near], box[near], iou[near]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _chunks(dets: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Split `dets` so that the pairs of one part fit into memory."""
    if len(dets) == 0:
        return []
    part = np.cumsum(counts[dets]) // PAIRS_AT_ONCE
    return np.split(dets, np.flatnonzero(part[1:] != part[:-1]) + 1)


def iou_of_pairs(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU (P,) of xywh boxes, over the area of `a` alone where `crowd`.

    The operations stand in the order of pycocotools' `bbIou`, so that ties fall alike.
    """
    width = np.minimum(a[:, 2] + a[:, 0], b[:, 2] + b[:, 0]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 3] + a[:, 1], b[:, 3] + b[:, 1]) - np.maximum(a[:, 1], b[:, 1])
    overlap = np.where((width > 0) & (height > 0), width * height, 0.0)
    area = a[:, 2] * a[:, 3]
    union = np.where(crowd, area, area + b[:, 2] * b[:, 3] - overlap)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)
