"""The confusion matrix and the ranking of images, by hand and by their sums."""

import json

import numpy as np
import pytest
from simulated_detections import coco_json, detection, simulated

from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.coco_metrics import coco_metrics
from retinanet.engine.confusion import confusion_matrix, count_by_image, keep, rank_images
from retinanet.engine.matching import match

NAMES = {1: "cat", 2: "dog"}
CAT, DOG, FAR = [0, 0, 100, 100], [300, 300, 50, 50], [600, 600, 20, 20]


def matrix(annotations: dict, rows: list, threshold: float | None = 0.0) -> list[list[int]]:
    truth = ground_truth(annotations)
    return confusion_matrix(truth, keep(results(rows, truth), threshold)).tolist()


def test_right_confused_missed_and_invented():
    annotations = coco_json({1: [(1, *CAT), (2, *DOG), (1, *FAR)]}, NAMES)
    rows = [detection(1, 1, CAT, 0.5), detection(1, 1, DOG, 0.4), detection(1, 2, [900, 0, 9, 9], 0.3)]
    assert matrix(annotations, rows) == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert matrix(annotations, rows, threshold=0.5) == [[1, 0, 1], [0, 0, 1], [0, 0, 0]]
    assert matrix(annotations, rows, threshold=None) == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]


def test_a_wrong_class_with_a_higher_score_does_not_take_the_box_of_the_right_one():
    annotations = coco_json({1: [(1, *CAT)]}, NAMES)
    rows = [detection(1, 2, CAT, 0.9), detection(1, 1, CAT, 0.5)]
    assert matrix(annotations, rows) == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_crowds_and_what_lies_in_them_count_nowhere():
    annotations = coco_json({1: [(1, *CAT)]}, NAMES, crowds=[0])
    assert matrix(annotations, [detection(1, 1, [10, 10, 20, 20], 0.9)]) == [[0] * 3] * 3


def test_sums_are_boxes_and_detections_and_the_diagonal_is_that_of_the_operating_point(shared):
    annotations = json.loads(shared("data/coco_mini/annotations/instances_val2017.json").read_text())
    annotations["annotations"] = [row for row in annotations["annotations"] if not row["iscrowd"]]
    rows = simulated(annotations, seed=3, crowded=0)
    metrics = coco_metrics(annotations, rows)
    truth = ground_truth(annotations)
    found = keep(results(rows, truth), metrics["threshold"])
    counts = confusion_matrix(truth, found)
    np.testing.assert_array_equal(counts.sum(1)[:-1], np.bincount(truth.labels, minlength=80))
    np.testing.assert_array_equal(counts.sum(0)[:-1], np.bincount(found.labels, minlength=80))
    assert 100 * np.trace(counts) / len(truth.labels) == pytest.approx(metrics["recall"])
    assert 100 * np.trace(counts) / len(found.labels) == pytest.approx(metrics["precision"])


def test_images_are_ranked_by_f1_then_by_mistakes():
    """1: one of two found. 2: nothing found of two. 3: perfect. 4: one false. 5: empty, left out. 6: perfect, more."""
    annotations = coco_json(
        {1: [(1, *CAT), (2, *DOG)], 2: [(1, *CAT), (2, *DOG)], 3: [(1, *CAT)], 4: [], 5: [], 6: [(1, *CAT), (2, *DOG)]},
        NAMES,
    )
    rows = [detection(image, 1, CAT, 0.5) for image in (1, 3, 4, 6)] + [detection(6, 2, DOG, 0.5)]
    truth = ground_truth(annotations)
    found = results(rows, truth)
    counts = count_by_image(truth, found, match(truth, found))
    assert counts.right.tolist() == [1, 0, 1, 0, 0, 2]
    assert counts.false.tolist() == [0, 0, 0, 1, 0, 0]
    assert counts.missed.tolist() == [1, 2, 0, 0, 0, 0]
    np.testing.assert_allclose(counts.f1(), [2 / 3, 0, 1, 0, np.nan, 1])
    assert [truth.image_ids[place] for place in rank_images(counts)] == [2, 4, 1, 3, 6]
