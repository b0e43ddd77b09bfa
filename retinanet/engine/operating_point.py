"""Precision and recall at the score threshold that maximizes F1: the "label precision" and "label recall".

AP averages over all thresholds; somebody who deploys a detector picks one. This file matches detections to boxes at
IoU 0.5 by pycocotools' rules (matching.py) and reads precision, recall and F1 off the sorted scores.
"""

import numpy as np

from retinanet.engine.coco_json import GroundTruth, Results
from retinanet.engine.matching import FALSE, IGNORED, TRUE, ignored_boxes, match

THRESHOLDS = 127  # the most that TensorBoard's precision-recall curves hold


def operating_point(truth: GroundTruth, found: Results) -> dict:
    """Return `threshold` (score, kept when >= it), `precision`, `recall` and `f1` in percent over all classes together.

    The threshold maximizes F1 = 2 TP / (2 TP + FP + FN); of equals the highest. `per_class` holds, in the order of
    `truth.names`, dicts with the same three numbers of each class at that shared threshold, and the class's own
    `best_threshold` and `best_f1`. None stands for what is undefined: precision without detections, recall without
    boxes, a threshold without a single true positive.
    """
    outcome = match(truth, found).outcome
    counted = ~ignored_boxes(truth)
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
    outcome, counted = match(truth, found).outcome, ~ignored_boxes(truth)
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


def counts_by_threshold(truth: GroundTruth, found: Results, num: int = THRESHOLDS) -> list[dict[str, np.ndarray]]:
    """Return `true`, `false` and `missed` (num,) int64 at `num` thresholds evenly from 0 to 1: all classes together
    first, then every class."""
    outcome, counted, at = match(truth, found).outcome, ~ignored_boxes(truth), np.linspace(0, 1, num)
    parts = []
    for label in [None, *range(len(truth.names))]:
        chosen = np.full(len(outcome), True) if label is None else found.labels == label
        num_boxes = int((counted if label is None else counted & (truth.labels == label)).sum())
        scores = [np.sort(found.scores[chosen & (outcome == kind)]) for kind in (TRUE, FALSE)]
        true, false = (len(values) - np.searchsorted(values, at, side="left") for values in scores)
        parts.append({"true": true, "false": false, "missed": num_boxes - true})
    return parts


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
