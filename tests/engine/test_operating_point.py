"""Matching by pycocotools' rules, and the threshold that maximizes F1."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from simulated_detections import coco_json, detection, simulated

from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.operating_point import FALSE, IGNORED, TRUE, curves, match, operating_point

NAMES = {1: "cat", 2: "dog"}


def outcomes(annotations: dict, rows: list) -> list[int]:
    truth = ground_truth(annotations)
    return match(truth, results(rows, truth)).tolist()


def point(annotations: dict, rows: list) -> dict:
    truth = ground_truth(annotations)
    return operating_point(truth, results(rows, truth))


def pycocotools_outcomes(annotations: dict, rows: list) -> np.ndarray:
    """The same by `COCOeval.evaluateImg`: area range "all", IoU 0.5; detections past the 100th are ignored."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = copy.deepcopy(annotations)
        index.createIndex()
        evaluation = COCOeval(index, index.loadRes(copy.deepcopy(rows)), "bbox")
        evaluation.evaluate()
    outcome = np.full(len(rows), IGNORED, dtype=np.int8)
    for entry in evaluation.evalImgs:
        if entry is not None and entry["aRng"] == [0, 1e10]:
            matched, ignored = entry["dtMatches"][0] > 0, entry["dtIgnore"][0] > 0
            outcome[np.array(entry["dtIds"], dtype=int) - 1] = np.where(
                ignored, IGNORED, np.where(matched, TRUE, FALSE)
            )
    return outcome


def test_second_detection_of_a_box_is_false_and_the_higher_score_wins():
    annotations = coco_json({1: [(1, 0, 0, 10, 10)]}, NAMES)
    rows = [detection(1, 1, [0, 0, 10, 10], 0.4), detection(1, 1, [0, 0, 10, 9], 0.6)]
    assert outcomes(annotations, rows) == [FALSE, TRUE]


def test_iou_of_exactly_a_half_matches_and_less_does_not():
    annotations = coco_json({1: [(1, 0, 0, 10, 10), (1, 50, 50, 10, 10)]}, NAMES)
    rows = [detection(1, 1, [0, 0, 10, 5], 0.4), detection(1, 1, [50, 50, 10, 4.99], 0.6)]
    assert outcomes(annotations, rows) == [TRUE, FALSE]


def test_image_and_class_must_agree():
    annotations = coco_json({1: [(1, 0, 0, 10, 10)], 2: []}, NAMES)
    rows = [detection(2, 1, [0, 0, 10, 10], 0.4), detection(1, 2, [0, 0, 10, 10], 0.6)]
    assert outcomes(annotations, rows) == [FALSE, FALSE]


def test_detections_in_a_crowd_are_ignored_however_many_but_a_real_box_comes_first():
    annotations = coco_json({1: [(1, 0, 0, 80, 80), (1, 0, 0, 10, 10)]}, NAMES, crowds=[0])
    rows = [detection(1, 1, [0, 0, 10, 9], 0.9)] + [detection(1, 1, [20, 20, 10, 10], 0.5)] * 3
    assert outcomes(annotations, rows) == [TRUE, IGNORED, IGNORED, IGNORED]
    found = point(annotations, rows)
    assert (found["precision"], found["recall"], found["f1"]) == (100, 100, 100)


def test_threshold_with_the_highest_f1_by_hand():
    """Scores .9 right, .8 wrong, .7 right, .6 wrong; two boxes. F1: 2/3, 1/2, 4/5, 2/3."""
    annotations = coco_json({1: [(1, 0, 0, 10, 10), (2, 40, 40, 10, 10)]}, NAMES)
    boxes = [(1, [0, 0, 10, 10], 0.9), (2, [0, 0, 10, 10], 0.8), (2, [40, 40, 10, 10], 0.7), (2, [0, 50, 9, 9], 0.6)]
    found = point(annotations, [detection(1, *box) for box in boxes])
    cat, dog = found.pop("per_class")
    assert found == pytest.approx({"threshold": 0.7, "precision": 200 / 3, "recall": 100, "f1": 80})
    assert cat == pytest.approx({"precision": 100, "recall": 100, "f1": 100, "best_threshold": 0.9, "best_f1": 100})
    f1 = 200 / 3
    assert dog == pytest.approx({"precision": 50, "recall": 100, "f1": f1, "best_threshold": 0.7, "best_f1": f1})


def test_equal_scores_are_kept_together():
    """Two right and one wrong at one score cannot be separated: F1 = 4 / 5, not 1."""
    annotations = coco_json({1: [(1, 0, 0, 10, 10), (1, 40, 40, 10, 10)]}, NAMES)
    boxes = [[0, 0, 10, 10], [40, 40, 10, 10], [80, 80, 10, 10]]
    assert point(annotations, [detection(1, 1, box, 0.5) for box in boxes])["f1"] == pytest.approx(80)


def test_curves_pass_through_the_operating_point_and_are_empty_without_boxes():
    annotations = coco_json({1: [(1, 0, 0, 10, 10), (1, 40, 40, 10, 10)]}, {1: "cat", 2: "dog", 3: "cow"})
    boxes = [(1, [0, 0, 10, 10], 0.9), (2, [0, 0, 10, 10], 0.8), (1, [40, 40, 10, 10], 0.7)]
    truth = ground_truth(annotations)
    together, cat, dog, cow = curves(truth, results([detection(1, *box) for box in boxes], truth))
    np.testing.assert_allclose(together["threshold"], [0.9, 0.8, 0.7])
    np.testing.assert_allclose(together["precision"], [100, 50, 200 / 3])
    np.testing.assert_allclose(together["recall"], [50, 50, 100])
    np.testing.assert_allclose(together["f1"], [200 / 3, 50, 80])
    np.testing.assert_allclose(cat["precision"], [100, 100])
    assert all(len(column) == 0 for curve in (dog, cow) for column in curve.values())


def test_undefined_rates_are_none():
    annotations = coco_json({1: [(1, 0, 0, 10, 10)]}, NAMES)
    nothing = point(annotations, [])
    assert nothing["per_class"][0]["recall"] == 0 and nothing["per_class"][1]["recall"] is None
    assert (nothing["threshold"], nothing["precision"], nothing["recall"], nothing["f1"]) == (None, None, 0, 0)
    empty = point(coco_json({1: []}, NAMES), [detection(1, 1, [0, 0, 1, 1], 0.5)])
    assert (empty["threshold"], empty["recall"], empty["f1"]) == (None, None, None)
    wrong = point(annotations, [detection(1, 1, [50, 50, 1, 1], 0.5)])
    assert (wrong["threshold"], wrong["recall"], wrong["f1"]) == (None, 0, 0)


def crowded_case(seed: int) -> tuple[dict, list]:
    """Boxes on a coarse grid, so that IoUs and scores tie; a quarter of them crowds, some with an area beyond COCO's
    range; about 150 detections an image and class."""
    rng = np.random.default_rng(seed)
    cells = {i: zip(rng.integers(1, 3, 12), rng.integers(0, 9, (12, 2)) * 5, strict=True) for i in (3, 5, 9)}
    boxes = {i: [(int(label), *corner, 20, 20) for label, corner in pairs] for i, pairs in cells.items()}
    annotations = coco_json(boxes, NAMES, crowds=rng.choice(36, 9, replace=False))
    for number, row in enumerate(annotations["annotations"], start=1):
        row.update(id=number, area=float(rng.choice([400, 2e10, -1], p=[0.8, 0.1, 0.1])))
        row.setdefault("iscrowd", 0)
    corners, sides = rng.integers(0, 18, (900, 2)) * 2.5, rng.integers(2, 5, (900, 2)) * 7.5
    images, labels = rng.choice([3, 5, 9], 900).tolist(), rng.integers(1, 3, 900).tolist()
    columns = zip(images, labels, np.hstack([corners, sides]), rng.random(900).round(1).tolist(), strict=True)
    return annotations, [detection(*column) for column in columns]


@pytest.mark.parametrize("seed", range(3))
def test_matches_are_those_of_pycocotools_on_crowded_random_boxes(seed):
    annotations, rows = crowded_case(seed)
    expected = pycocotools_outcomes(annotations, rows)
    assert {FALSE, TRUE, IGNORED} <= set(expected.tolist())
    np.testing.assert_array_equal(outcomes(annotations, rows), expected)


def test_matches_are_those_of_pycocotools_on_coco(shared):
    annotations = json.loads(shared("data/coco_mini/annotations/instances_val2017.json").read_text())
    rows = simulated(annotations, seed=0, crowded=300)
    np.testing.assert_array_equal(outcomes(annotations, rows), pycocotools_outcomes(annotations, rows))


def test_pairs_are_matched_alike_in_parts(monkeypatch):
    annotations = coco_json({i: [(1, 5 * j, 0, 10, 10) for j in range(9)] for i in range(1, 4)}, NAMES)
    rows = simulated(annotations, seed=1)
    whole = outcomes(annotations, rows)
    monkeypatch.setattr("retinanet.engine.operating_point.PAIRS_AT_ONCE", 7)
    assert outcomes(annotations, rows) == whole
