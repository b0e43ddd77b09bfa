"""Who found what: by hand, and against pycocotools."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from simulated_detections import coco_json, detection, simulated

from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.matching import FALSE, IGNORED, TRUE, match, match_image

NAMES = {1: "cat", 2: "dog"}


def outcomes(annotations: dict, rows: list) -> list[int]:
    truth = ground_truth(annotations)
    return match(truth, results(rows, truth)).outcome.tolist()


def pycocotools_images(annotations: dict, rows: list) -> list[dict]:
    """`COCOeval.evalImgs` of the area range "all": per image and class, ids and matches; the first IoU is 0.5."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = copy.deepcopy(annotations)
        index.createIndex()
        evaluation = COCOeval(index, index.loadRes(copy.deepcopy(rows)), "bbox")
        evaluation.evaluate()
    return [entry for entry in evaluation.evalImgs if entry is not None and entry["aRng"] == [0, 1e10]]


def pycocotools_outcomes(annotations: dict, rows: list) -> np.ndarray:
    """The outcome of each detection; those past the 100th of an image and class are ignored."""
    outcome = np.full(len(rows), IGNORED, dtype=np.int8)
    for entry in pycocotools_images(annotations, rows):
        matched, ignored = entry["dtMatches"][0] > 0, entry["dtIgnore"][0] > 0
        found = np.where(ignored, IGNORED, np.where(matched, TRUE, FALSE))
        outcome[np.array(entry["dtIds"], dtype=int) - 1] = found
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
    monkeypatch.setattr("retinanet.engine.matching.PAIRS_AT_ONCE", 7)
    assert outcomes(annotations, rows) == whole


def xyxy(rows: list) -> np.ndarray:
    boxes = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def test_one_image_by_hand():
    """A box found twice, one missed, one crowd that two detections lie in, one detection of the wrong class."""
    gt_boxes = [[0, 0, 10, 10], [50, 50, 60, 60], [100, 100, 180, 180]]
    boxes = [[0, 0, 10, 9], [0, 0, 10, 10], [110, 110, 120, 120], [130, 130, 150, 150], [50, 50, 60, 60]]
    found = match_image(gt_boxes, [0, 1, 0], [False, False, True], boxes, [0.5, 0.9, 0.8, 0.7, 0.6], [0, 0, 0, 0, 2])
    chosen, ignored, finder = found
    assert chosen.tolist() == [-1, 0, 2, 2, -1]
    assert ignored.tolist() == [False, False, True, True, False]
    assert finder.tolist() == [1, -1, -1]


@pytest.mark.parametrize(("num_boxes", "num_found"), [(0, 0), (2, 0), (0, 2)])
def test_one_image_without_boxes_or_without_detections(num_boxes, num_found):
    side = np.tile([0.0, 0, 10, 10], (2, 1))
    labels, truth = np.zeros(num_found, int), np.zeros(num_boxes, int)
    chosen, ignored, finder = match_image(
        side[:num_boxes], truth, truth > 0, side[:num_found], np.ones(num_found), labels
    )
    assert chosen.tolist() == [-1] * num_found and finder.tolist() == [-1] * num_boxes and not ignored.any()


def test_a_higher_iou_can_be_asked_for():
    chosen, _, _ = match_image([[0, 0, 10, 10]], [0], [False], [[0, 0, 10, 6]], [0.5], [0], iou=0.75)
    assert chosen.tolist() == [-1]


@pytest.mark.parametrize("seed", range(2))
def test_one_image_is_matched_as_pycocotools_matches_it(seed):
    annotations, rows = crowded_case(seed)
    for row in annotations["annotations"]:
        row["area"] = row["bbox"][2] * row["bbox"][3]
    boxes = annotations["annotations"]
    entries = pycocotools_images(annotations, rows)
    for image in (3, 5, 9):
        own = [index for index, row in enumerate(boxes) if row["image_id"] == image]
        theirs = [index for index, row in enumerate(rows) if row["image_id"] == image]
        here, there = [boxes[index] for index in own], [rows[index] for index in theirs]
        chosen, ignored, finder = match_image(
            xyxy(here),
            [row["category_id"] for row in here],
            [row["iscrowd"] == 1 for row in here],
            xyxy(there),
            [row["score"] for row in there],
            [row["category_id"] for row in there],
        )
        for entry in (entry for entry in entries if entry["image_id"] == image):
            for number, box, skipped in zip(entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True):
                at = theirs.index(number - 1)
                assert (own[chosen[at]] + 1 if chosen[at] >= 0 else 0) == box and ignored[at] == bool(skipped)
            for number, found, skipped in zip(entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"], strict=True):
                at = finder[own.index(number - 1)]
                assert at == (theirs.index(found - 1) if found and not skipped else -1)
