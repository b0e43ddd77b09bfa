"""The threshold that maximizes F1, and the rates there."""

import numpy as np
import pytest
from simulated_detections import coco_json, detection

from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.operating_point import counts_by_threshold, curves, operating_point

NAMES = {1: "cat", 2: "dog"}


def point(annotations: dict, rows: list) -> dict:
    truth = ground_truth(annotations)
    return operating_point(truth, results(rows, truth))


def test_detections_in_a_crowd_lower_no_rate():
    annotations = coco_json({1: [(1, 0, 0, 80, 80), (1, 0, 0, 10, 10)]}, NAMES, crowds=[0])
    rows = [detection(1, 1, [0, 0, 10, 9], 0.9)] + [detection(1, 1, [20, 20, 10, 10], 0.5)] * 3
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


def test_counts_at_even_thresholds_by_hand():
    """Scores 0.9 right, 0.5 wrong; two boxes. Thresholds 0, 0.5 and 1; a score equal to the threshold is kept."""
    annotations = coco_json({1: [(1, 0, 0, 10, 10), (1, 40, 40, 10, 10)]}, NAMES)
    rows = [detection(1, 1, [0, 0, 10, 10], 0.9), detection(1, 2, [0, 0, 10, 10], 0.5)]
    truth = ground_truth(annotations)
    together, cat, dog = counts_by_threshold(truth, results(rows, truth), num=3)
    assert {key: value.tolist() for key, value in together.items()} == {
        "true": [1, 1, 0],
        "false": [1, 1, 0],
        "missed": [1, 1, 2],
    }
    assert cat["false"].tolist() == [0, 0, 0] and dog["missed"].tolist() == [0, 0, 0]
