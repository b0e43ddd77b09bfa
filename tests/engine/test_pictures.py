"""Pictures of batches, anchors and matches: counts against torchvision and pycocotools, colours by hand."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.confusion import ImageCounts, count_by_image, keep
from retinanet.engine.matching import match
from retinanet.engine.pictures import anchor_pictures, batch_images, comparison, order_images, truth_pictures
from retinanet.modeling.anchors import AnchorGenerator
from retinanet.modeling.loss import Assignment
from retinanet.structures import BACKGROUND, IGNORE, Batch, Target, pad_targets
from retinanet.utils.draw import class_colour

GREEN, RED, ORANGE, GREY = [80, 175, 0], [30, 30, 200], [0, 165, 255], [150, 150, 150]  # BGR


def batch_of(images: torch.Tensor, sizes: list, boxes: list[list[float]], labels: list[int]) -> Batch:
    """Return a batch whose images (N, 3, H, W) have the content `sizes`; the boxes are those of each image."""
    target = Target(boxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))
    gt_boxes, gt_labels = pad_targets([target] * len(images))
    sizes = torch.tensor(sizes)
    return Batch(images, sizes, sizes, torch.ones(len(images), 2), gt_boxes, gt_labels, list(range(len(images))))


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_images_are_those_of_the_batch_without_padding(order):
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    first, second = batch_images(batch_of(images, [(20, 50), (32, 64)], [], []), order)
    expected = images[0, :, :20, :50].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(first, expected if order == "BGR" else expected[..., ::-1])
    assert second.shape == (32, 64, 3) and first.dtype == np.uint8
    floats = batch_images(batch_of(images.float() + 0.3, [(20, 50), (32, 64)], [], []), order)
    np.testing.assert_array_equal(floats[0], first)


def test_boxes_of_a_batch_are_drawn_where_they_are():
    batch = batch_of(torch.zeros(1, 3, 256, 320, dtype=torch.uint8), [(256, 320)], [[40.0, 60, 200, 240]], [1])
    (shown,) = truth_pictures(batch, ["cat", "dog"], "BGR")
    assert shown.caption == "image 0: 1 box, 320 x 256"
    assert shown.image[150, 40].tolist() == shown.image[150, 199].tolist() == [*class_colour(1)]
    assert not shown.image[150, 200].any() and not shown.image[150, 39].any()
    (shown,) = truth_pictures(batch, ["cat", "dog"], "BGR", plus_one=True)  # x2 = 200 is inside
    assert shown.image[150, 200].tolist() == [*class_colour(1)]


def test_anchor_counts_are_those_of_a_plain_iou():
    generator = AnchorGenerator(4.0, 3, [0.5, 1.0, 2.0], "detectron2")
    anchors = generator((256, 320))
    boxes = torch.tensor([[40.0, 60, 84, 100], [100, 20, 300, 220], [5, 5, 7, 7]])
    batch = batch_of(torch.zeros(1, 3, 256, 320, dtype=torch.uint8), [(256, 320)], boxes.tolist(), [0, 1, 0])
    iou, best = box_iou(torch.cat(anchors), boxes).max(1)
    matched = torch.where(iou >= 0.5, best, torch.where(iou >= 0.4, IGNORE, BACKGROUND))
    labels = torch.where(matched >= 0, torch.tensor([0, 1, 0])[matched.clamp(min=0)], matched)
    assignment = Assignment(matched[None], labels[None], (matched >= 0).sum()[None])
    (row,) = anchor_pictures(batch, anchors, assignment, generator.strides, "BGR")
    start, total = 0, 0
    for shown, level, stride in zip(row, anchors, (8, 16, 32, 64, 128), strict=True):
        part = iou[start : start + len(level)]
        start += len(level)
        said = tuple(map(int, re.search(rf"stride {stride}: (\d+) positive, (\d+) ignored", shown.caption).groups()))
        assert said == (int((part >= 0.5).sum()), int(((part >= 0.4) & (part < 0.5)).sum()))
        total += said[0]
        assert shown.image[220, 110].tolist() == [255, 255, 255]  # the second box
        assert (shown.image == class_colour(1)).all(2).any() == bool((labels[start - len(level) : start] == 1).any())
    assert total > 10 and row[0].caption.startswith("image 0, 1 of 3 boxes without anchor; P3")


def coco_case(seed: int):
    """Return a COCO json with crowds and results of 6 images and 3 classes, many of them near a box."""
    rng = np.random.default_rng(seed)
    annotations, rows = [], []
    for image_id in range(1, 7):
        for _ in range(rng.integers(0, 7)):
            x, y, w, h = rng.uniform((0, 0, 10, 10), (60, 60, 40, 40)).tolist()
            category, crowd = int(rng.integers(1, 4)), int(rng.random() < 0.15)
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": [x, y, w, h]}
            annotations.append(entry | {"area": w * h, "iscrowd": crowd})
            for _ in range(rng.integers(0, 3)):
                box = (np.array([x, y, w, h]) + rng.normal(0, 3, 4)).tolist()
                rows.append({"image_id": image_id, "category_id": category, "bbox": box, "score": float(rng.random())})
        box = rng.uniform((0, 0, 5, 5), (60, 60, 40, 40)).tolist()
        rows.append({"image_id": image_id, "category_id": 1, "bbox": box, "score": float(rng.random())})
    images = [{"id": i, "width": 100, "height": 100, "file_name": f"{i}.png"} for i in range(1, 7)]
    categories = [{"id": i, "name": str(i)} for i in range(1, 4)]
    return {"images": images, "annotations": annotations, "categories": categories}, rows


@pytest.mark.parametrize("seed", range(8))
def test_right_false_and_missed_of_each_image_are_those_of_pycocotools(seed):
    content, rows = coco_case(seed)
    truth = ground_truth(content)
    kept = keep(results(rows, truth), 0.4)
    counts = count_by_image(truth, kept, match(truth, kept))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes([row for row in rows if row["score"] >= 0.4]), "bbox")
        judge.params.iouThrs, judge.params.areaRng = np.array([0.5]), [[0, 1e10]]
        judge.params.areaRngLbl, judge.params.maxDets = ["all"], [100]
        judge.evaluate()
    expected = np.zeros((3, 6), int)
    for entry in filter(None, judge.evalImgs):
        place = entry["image_id"] - 1
        scored = ~entry["dtIgnore"][0].astype(bool)
        hit = entry["dtMatches"][0] > 0
        expected[0, place] += (scored & hit).sum()
        expected[1, place] += (scored & ~hit).sum()
        expected[2, place] += ((entry["gtMatches"][0] == 0) & ~np.array(entry["gtIgnore"], bool)).sum()
    np.testing.assert_array_equal(np.stack(counts), expected)
    mistakes = expected[1] + expected[2]
    order = order_images(counts, "mistakes").tolist()
    assert [mistakes[place] for place in order] == sorted(mistakes[order], reverse=True)


def test_ties_go_by_mistakes_by_f1_and_by_image():
    counts = ImageCounts(
        right=np.array([0, 0, 2, 0, 9]), false=np.array([1, 2, 3, 0, 0]), missed=np.array([0, 1, 0, 0, 0])
    )
    assert order_images(counts, "f1").tolist() == [1, 0, 2, 4]  # F1 0, 0 with fewer mistakes, 4/7, 1; 3 has nothing
    assert order_images(counts, "mistakes").tolist() == [1, 2, 0, 4]
    assert order_images(counts, "id").tolist() == [0, 1, 2, 3, 4]


def test_matches_misses_false_alarms_and_crowds_have_their_colours():
    def box(x, y, crowd=0):
        return {"image_id": 1, "category_id": 1, "bbox": [x, y, 40, 40], "iscrowd": crowd}

    annotations = [box(20, 60), box(120, 60), box(220, 60, crowd=1)]
    content = {"images": [{"id": 1, "width": 320, "height": 256}], "annotations": annotations}
    truth = ground_truth(content | {"categories": [{"id": 1, "name": "cat"}]})
    places = [(22, 61), (20, 180), (225, 65)]  # on the first box, on nothing, inside the crowd
    rows = [{"image_id": 1, "category_id": 1, "bbox": [x, y, 40, 40], "score": 0.9} for x, y in places]
    kept = results(rows, truth)
    matches = match(truth, kept)
    counts = count_by_image(truth, kept, matches)
    left, right = comparison(np.zeros((256, 320, 3), np.uint8), truth, kept, matches, counts, 0)
    assert [left.image[80, x].tolist() for x in (20, 120, 220)] == [GREEN, ORANGE, GREY]
    assert [right.image[y + 20, x].tolist() for x, y in places] == [GREEN, RED, GREY]
    assert right.caption == "1 right, 1 false, 1 missed"
