"""TIDE's error types: each by hand, and all of them against a slow reading of the paper's definitions."""

import json

import numpy as np
import pytest
from simulated_detections import coco_json, detection, simulated

from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.coco_metrics import coco_metrics
from retinanet.engine.error_types import KINDS, MEANINGS, NO_ERROR, average_precision, classify, error_costs, mean_ap
from retinanet.engine.matching import IGNORED, TRUE, ignored_boxes

NAMES = {1: "cat", 2: "dog"}
CAT = [0, 0, 100, 100]
RECALLS = np.linspace(0, 1, 101)  # as pycocotools writes them: a few differ from k / 100 in the last bit


def kinds(annotations: dict, rows: list) -> tuple[list[str], list[bool]]:
    """Return the kind of each detection ("" for none) and whether each box is missed."""
    truth = ground_truth(annotations)
    errors = classify(truth, results(rows, truth))
    return ["" if kind == NO_ERROR else KINDS[kind] for kind in errors.kind], errors.missed.tolist()


def costs(annotations: dict, rows: list) -> dict:
    truth = ground_truth(annotations)
    found = results(rows, truth)
    return error_costs(truth, found, classify(truth, found))


@pytest.mark.parametrize(
    ("category", "box", "kind", "missed"),
    [
        (1, [0, 0, 100, 50], "", False),
        (1, [0, 0, 100, 49], "localisation", False),
        (1, [0, 0, 100, 10], "localisation", False),
        (1, [0, 0, 100, 9], "background", True),
        (2, [0, 0, 100, 50], "classification", False),
        (2, [0, 0, 100, 49], "both", True),
        (2, [0, 0, 100, 9], "background", True),
        (1, [500, 500, 9, 9], "background", True),
    ],
)
def test_kind_of_the_only_detection(category, box, kind, missed):
    assert kinds(coco_json({1: [(1, *CAT)]}, NAMES), [detection(1, category, box, 0.5)]) == ([kind], [missed])


def test_second_detection_of_a_box_is_a_duplicate_and_an_image_without_boxes_is_background():
    annotations = coco_json({1: [(1, *CAT)], 2: []}, NAMES)
    rows = [detection(1, 1, CAT, 0.9), detection(1, 1, [0, 0, 100, 90], 0.8), detection(2, 1, CAT, 0.7)]
    assert kinds(annotations, rows) == (["", "duplicate", "background"], [False])


def test_detection_in_a_crowd_is_no_error_and_the_crowd_is_not_missed():
    annotations = coco_json({1: [(1, *CAT), (1, 300, 300, 50, 50)]}, NAMES, crowds=[0])
    assert kinds(annotations, [detection(1, 1, [10, 10, 30, 30], 0.9)]) == ([""], [False, True])


def test_costs_by_hand():
    """One cat, one dog. A wrong outline of the cat is all there is of it: right, cat's AP is 100 and the mean gains 50.

    The dog is found at .5, below a second cat-sized box called dog at .9: without it dog's AP rises from 50 to 100.
    """
    annotations = coco_json({1: [(1, *CAT), (2, 300, 300, 50, 50)], 2: []}, NAMES)
    rows = [detection(1, 1, [0, 0, 100, 40], 0.3), detection(1, 2, [300, 300, 50, 50], 0.5)]
    found = costs(annotations, [*rows, detection(2, 2, CAT, 0.9)])
    gains = {name: round(row["gain"], 6) for name, row in found.items() if row["gain"]}
    assert gains == {"localisation": 50, "background": 25, "false positives": 25}
    assert {name: row["count"] for name, row in found.items() if row["count"]} == {
        "localisation": 1,
        "background": 1,
        "false positives": 2,
        "false negatives": 1,
    }


def test_missing_one_of_two_boxes_costs_its_recall():
    """AP is 51 of 101 points with one of two boxes found, and 100 when only that one is asked for."""
    annotations = coco_json({1: [(1, *CAT), (1, 500, 500, 50, 50)]}, NAMES)
    found = costs(annotations, [detection(1, 1, CAT, 0.9)])
    assert found["missed"] == {"count": 1, "gain": pytest.approx(100 - 100 * 51 / 101)}
    assert found["false negatives"] == found["missed"]


def test_only_the_best_of_several_corrections_of_a_box_counts_and_the_rest_vanish():
    annotations = coco_json({1: [(1, *CAT)]}, NAMES)
    found = costs(annotations, [detection(1, 1, [0, 0, 100, side], 0.1 * side) for side in (20, 30, 40)])
    assert found["localisation"] == {"count": 3, "gain": pytest.approx(100)}


def test_a_corrected_class_moves_the_detection_to_it():
    annotations = coco_json({1: [(1, *CAT)]}, NAMES)
    assert costs(annotations, [detection(1, 2, CAT, 0.9)])["classification"] == {"count": 1, "gain": 100}


def test_without_boxes_nothing_can_be_gained_and_without_detections_all_is_missed():
    assert costs(coco_json({1: []}, NAMES), [detection(1, 1, CAT, 0.9)])["background"] == {"count": 1, "gain": None}
    nothing = costs(coco_json({1: [(1, *CAT)]}, NAMES), [])
    assert nothing["missed"]["count"] == 1 and set(nothing) == set(MEANINGS)


def iou(a, b) -> float:
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    overlap = max(wide, 0) * max(high, 0)
    return overlap / (a[2] * a[3] + b[2] * b[3] - overlap)


def slow_errors(annotations: dict, rows: list) -> tuple[dict, dict, set]:
    """Return, by position, error name of each wrong detection, box it stands for, and the boxes not found."""
    boxes = annotations["annotations"]
    taken, names, stands_for = set(), {}, {}
    for d in sorted(range(len(rows)), key=lambda d: -rows[d]["score"]):
        row = rows[d]
        overlaps = {
            g: iou(row["bbox"], box["bbox"]) for g, box in enumerate(boxes) if box["image_id"] == row["image_id"]
        }
        same = {g: v for g, v in overlaps.items() if boxes[g]["category_id"] == row["category_id"]}
        other = {g: v for g, v in overlaps.items() if g not in same}
        free = {g: v for g, v in same.items() if g not in taken and v >= 0.5}
        if free:
            taken.add(max(free, key=free.get))
        elif 0.1 <= max(same.values(), default=0) < 0.5:
            names[d], stands_for[d] = "localisation", max(same, key=same.get)
        elif max(other.values(), default=0) >= 0.5:
            names[d], stands_for[d] = "classification", max(other, key=other.get)
        elif max(same.values(), default=0) >= 0.5:
            names[d] = "duplicate"
        else:
            names[d] = "background" if max(overlaps.values(), default=0) < 0.1 else "both"
    return names, stands_for, set(range(len(boxes))) - taken


def slow_ap(points: list[tuple[float, int, bool]], num_boxes: dict[int, int]) -> float:
    """Mean AP50 of (score, class, right) points: for each of COCO's recalls the best precision from there on."""
    values = []
    for label, total in num_boxes.items():
        hits, curve = 0, []
        for rank, (_, _, right) in enumerate(
            sorted((p for p in points if p[1] == label), key=lambda p: -p[0]), start=1
        ):
            hits += right
            curve.append((hits / max(total, 1), hits / rank))
        values.append(sum(max((p for r, p in curve if r >= k), default=0) for k in RECALLS) / 101 if total else 0)
    return 100 * sum(values) / len(values)


def slow_gain(annotations: dict, rows: list, name: str) -> float:
    names, stands_for, unfound = slow_errors(annotations, rows)
    boxes = annotations["annotations"]
    labels = [box["category_id"] for box in boxes]
    num_boxes = {label: labels.count(label) for label in set(labels)}
    before = slow_ap([(row["score"], row["category_id"], d not in names) for d, row in enumerate(rows)], num_boxes)
    points, repaired = [], set()
    for d, row in sorted(enumerate(rows), key=lambda pair: -pair[1]["score"]):
        if names.get(d) == name or (d in names and name == "false positives"):
            box = stands_for.get(d)
            if name != "false positives" and box in unfound - repaired:
                repaired.add(box)
                points.append((row["score"], labels[box], True))
        else:
            points.append((row["score"], row["category_id"], d not in names))
    gone = {"missed": unfound - set(stands_for.values()), "false negatives": unfound}.get(name, ())
    for box in gone:
        num_boxes[labels[box]] -= 1
    return slow_ap(points, num_boxes) - before


@pytest.mark.parametrize("seed", range(3))
def test_all_types_and_their_costs_agree_with_the_slow_reading(seed):
    rng = np.random.default_rng(seed)
    boxes = {
        i: [(int(rng.integers(1, 4)), *rng.integers(0, 90, 2), *rng.integers(20, 60, 2)) for _ in range(8)]
        for i in range(1, 7)
    }
    annotations = coco_json(boxes, {1: "cat", 2: "dog", 3: "cow", 4: "nothing"})
    rows = simulated(annotations, seed, crowded=20, clutter=6)
    for number, row in enumerate(rows):
        row["score"] = 0.1 + 0.8 * ((number * 7919) % len(rows)) / len(rows)  # all different
        row["bbox"] = [max(side, 1.0) for side in row["bbox"]]
    names, _, unfound = slow_errors(annotations, rows)
    found, _ = kinds(annotations, rows)
    assert set(found) == {"", *KINDS} and found == [names.get(d, "") for d in range(len(rows))]
    own = costs(annotations, rows)
    assert own["false negatives"]["count"] == len(unfound)
    assert {name: row["gain"] for name, row in own.items()} == pytest.approx(
        {name: slow_gain(annotations, rows, name) for name in MEANINGS}, abs=1e-9
    )


def test_gains_start_from_the_ap50_of_coco(shared):
    annotations = json.loads(shared("data/coco_mini/annotations/instances_val2017.json").read_text())
    truth = ground_truth(annotations)
    found = results(simulated(annotations, seed=0, crowded=300), truth)
    outcome = classify(truth, found).outcome
    counts = np.bincount(truth.labels[~ignored_boxes(truth)], minlength=len(truth.names))
    ap = mean_ap(found, found.labels, outcome == TRUE, outcome != IGNORED, counts, counts > 0)
    assert ap == pytest.approx(coco_metrics(annotations, simulated(annotations, seed=0, crowded=300))["AP50"], abs=1e-9)


def test_average_precision_by_hand():
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision(np.array([], dtype=bool), 2) == 0
