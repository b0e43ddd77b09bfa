"""Our own arrays of precision and recall, cell by cell and bit by bit those of pycocotools."""

import numpy as np
import pytest
from simulated_detections import coco_json, detection

from retinanet.engine.coco_arrays import coco_arrays
from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.coco_metrics import accumulate

NAMES = {3: "ant", 7: "bee", 8: "cow"}


def assert_equal_to_pycocotools(annotations: dict, rows: list) -> dict:
    truth = ground_truth(annotations)
    found = results(rows, truth)
    own, reference = coco_arrays(truth, found), accumulate(truth, found, "pycocotools")
    for key, cells in reference.items():
        np.testing.assert_array_equal(own[key], cells)
    return own


def crowded_case(seed: int, num_images: int, boxes: int, dets: int, grid: int):
    """Boxes on a coarse grid: equal IoUs, equal scores, boxes without extent, crowds, all size ranges."""
    rng = np.random.default_rng(seed)
    sides = np.array([0, 4, 8, 16, 31, 32, 33, 64, 96, 97, 200])

    def box():
        return [*(rng.integers(0, grid, 2) * 8).tolist(), *rng.choice(sides, 2).tolist()]

    truth = {
        i: [(int(rng.choice([*NAMES])), *box()) for _ in range(rng.integers(0, boxes + 1))] for i in range(num_images)
    }
    count = sum(map(len, truth.values()))
    annotations = coco_json(truth, NAMES, crowds=np.flatnonzero(rng.random(count) < 0.2).tolist())
    known = [(row["image_id"], row["category_id"], row["bbox"]) for row in annotations["annotations"]]
    rows = []
    for _ in range(dets):
        if known and rng.random() < 0.6:
            image, category, place = known[rng.integers(len(known))]
            place = [place[0], place[1], place[2] * rng.choice([0.5, 0.8, 1, 1.25]), place[3]]
        else:
            image, category, place = int(rng.integers(num_images)), int(rng.choice([*NAMES])), box()
        rows.append(detection(image, category, place, round(float(rng.random()), 1)))
    return annotations, rows


@pytest.mark.parametrize("seed", range(12))
def test_ties_crowds_and_empty_boxes(seed):
    assert_equal_to_pycocotools(*crowded_case(seed, num_images=5, boxes=8, dets=120, grid=4))


@pytest.mark.parametrize("seed", [20, 21])
def test_more_than_a_hundred_detections_of_an_image_and_class(seed):
    assert_equal_to_pycocotools(*crowded_case(seed, num_images=1, boxes=30, dets=700, grid=12))


def test_a_second_detection_of_a_box_is_false_and_a_second_one_of_a_crowd_is_not():
    truth = {1: [(3, 0, 0, 50, 50)], 2: [(3, 0, 0, 50, 50), (3, 100, 100, 50, 50)]}
    rows = [detection(1, 3, [0, 0, 50, 50], 0.9), detection(1, 3, [0, 0, 50, 50], 0.8)]
    rows += [detection(2, 3, [0, 0, 50, 50], 0.7)] * 2 + [detection(2, 3, [100, 100, 50, 50], 0.5)]
    own = assert_equal_to_pycocotools(coco_json(truth, NAMES, crowds=[1]), rows)
    # two boxes to find: right, wrong, (crowd, crowd), right -> precision 1 up to recall 0.5, then 2/3
    assert own["precision"][0, :, 0, 0, 2] == pytest.approx([1] * 51 + [2 / 3] * 50)
    assert own["recall"][:, 0, 0, :].tolist() == [[0.5, 1, 1]] * 10  # alone, image 2's first finds the crowd


def test_no_detections_and_no_boxes():
    own = assert_equal_to_pycocotools(coco_json({1: [(3, 0, 0, 9, 9)], 2: []}, NAMES), [])
    assert own["precision"][:, :, 0, 0].max() == 0 and (own["precision"][:, :, 1] == -1).all()
    own = assert_equal_to_pycocotools(coco_json({1: []}, NAMES), [detection(1, 3, [0, 0, 9, 9], 0.5)])
    assert (own["recall"] == -1).all()
