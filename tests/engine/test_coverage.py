"""Anchor coverage: by hand, against all anchors of an input, and proposals that cover what they promise."""

import numpy as np
import pytest
import torch

from retinanet.config import get_cfg
from retinanet.data.doctor import Source, examine
from retinanet.engine.coverage import (
    AnchorSetting,
    Resized,
    best_iou,
    build_anchor_report,
    build_resized,
    build_setting,
    check_coverage,
    measure,
    propose,
    share_below,
)
from retinanet.modeling.anchors import AnchorGenerator
from retinanet.ops.boxes import pairwise_iou

USUAL = AnchorSetting(4.0, 3, (0.5, 1.0, 2.0))


def resized(xyxy, size=(256, 256), plus_one=False) -> Resized:
    boxes = np.asarray(xyxy, dtype=np.float32).reshape(-1, 4)
    areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).astype(np.float64)
    return Resized(boxes, np.tile(np.array([size], dtype=np.int64), (len(boxes), 1)), areas, plus_one)


def random_boxes(count: int, size=(256, 256), seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    sides = np.exp(generator.uniform(np.log(2), np.log(min(size)), (count, 2)))
    first = generator.uniform(0, 1, (count, 2)) * (np.array(size[::-1]) - sides)
    return np.concatenate([first, first + sides], axis=1)


def test_best_iou_by_hand():
    one = AnchorSetting(4.0, 1, (1.0,))  # squares of 32 pixels at the multiples of 8, of 64 at those of 16, ...
    found = best_iou(
        resized(
            [
                [24, 24, 56, 56],  # the anchor at (40, 40)
                [28, 24, 60, 56],  # half way between two: 28 of 36 columns
                [32, 32, 48, 48],  # inside it: a quarter
                [0, 0, 16, 16],  # at the corner, as if the anchor at (8, 8) covered it: a quarter
            ]
        ),
        one,
    )
    np.testing.assert_allclose(found, [1, 28 / 36, 1 / 4, 1 / 4], rtol=1e-6)


@pytest.mark.parametrize("convention", ["detectron", "detectron2", "torchvision"])
@pytest.mark.parametrize("size", [(256, 256), (160, 352), (96, 32)])
def test_best_iou_is_the_maximum_over_all_anchors(convention, size):
    plus_one = convention == "detectron"
    for setting in (USUAL._replace(convention=convention), AnchorSetting(2.5, 2, (0.33, 1.0, 3.0), convention)):
        boxes = resized(random_boxes(300, size), size, plus_one)
        anchors = torch.cat(AnchorGenerator(*setting)(size))
        expected = pairwise_iou(torch.from_numpy(boxes.boxes), anchors, plus_one).max(dim=1).values
        torch.testing.assert_close(torch.from_numpy(best_iou(boxes, setting)), expected, rtol=1e-5, atol=2e-6)


def test_chunks_and_no_boxes_change_nothing():
    boxes = resized(random_boxes(20000))
    many = best_iou(boxes, USUAL)
    np.testing.assert_array_equal(many[17000:], best_iou(boxes.take(np.arange(17000, 20000)), USUAL))
    assert best_iou(resized(np.zeros((0, 4))), USUAL).shape == (0,)


def test_boxes_are_resized_as_for_the_test():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 200, 300
    found = build_resized(cfg, np.array([[10.0, 20, 30, 40], [1, 1, 2, 2]]), np.array([[100, 200], [50, 50]]))
    np.testing.assert_allclose(found.boxes, [[15, 30, 60, 90], [4, 4, 12, 12]])  # times 1.5 (the cap) and 4
    assert found.inputs.tolist() == [[160, 320], [224, 224]] and found.areas.tolist() == [1200, 4]
    cfg.MODEL.BOX.CONVENTION = "detectron"
    found = build_resized(cfg, np.array([[10.0, 20, 30, 40]]), np.array([[100, 200]]))
    np.testing.assert_allclose(found.boxes, [[15, 30, 58.5, 88.5]])
    assert found.plus_one


def test_sizes_are_those_of_the_original_image_and_absent_ones_are_left_out():
    boxes = resized([[0, 0, 31, 31], [0, 0, 32, 32], [0, 0, 95, 95]])
    measured = measure(boxes, USUAL)
    assert {name: one.boxes for name, one in measured.items()} == {"all": 3, "small": 1, "medium": 2}
    iou = best_iou(boxes, USUAL)
    assert measured["all"].above == {0.5: (iou >= 0.5).mean(), 0.4: (iou >= 0.4).mean()}
    assert measured["medium"].mean == pytest.approx(iou[1:].mean())


def test_a_setting_that_fits_is_kept():
    generator = np.random.default_rng(0)
    centers, sides = generator.uniform(60, 196, (400, 1, 2)), generator.uniform(32, 100, (400, 1, 1))
    boxes = resized(np.concatenate([centers - sides / 2, centers + sides / 2], axis=1).reshape(-1, 4))
    assert propose(boxes, USUAL) == USUAL
    assert propose(resized(np.zeros((0, 4))), USUAL) == USUAL


@pytest.mark.parametrize("sides", [(20, 20), (100, 14), (14, 120)])
def test_a_proposal_covers_boxes_that_the_usual_anchors_miss(sides):
    generator = np.random.default_rng(0)
    centers = generator.uniform(70, 180, (300, 2))
    half = np.array(sides) * generator.uniform(0.9, 1.1, (300, 2)) / 2
    boxes = resized(np.concatenate([centers - half, centers + half], axis=1))
    setting = propose(boxes, USUAL)
    before, after = measure(boxes, USUAL), measure(boxes, setting)
    assert before["all"].above[0.5] < 0.5 and after["all"].above[0.5] > 0.95
    assert setting.num_anchors <= USUAL.num_anchors and propose(boxes, setting) == setting
    (finding,) = check_coverage(before, after)
    assert finding.kind == "anchor-coverage" and finding.count > 150
    assert check_coverage(after, after) == []


def test_options_of_a_setting_set_it_in_a_configuration():
    setting = AnchorSetting(2.5, 2, (0.33, 1.0, 3.0))
    cfg = get_cfg()
    for key, value in setting.as_opts():
        cfg.merge_from_list([key, value if "[" in value or "." not in key else value])
    assert build_setting(cfg) == setting


def test_narrow_boxes_are_counted_with_the_convention_of_their_widths():
    assert share_below(resized([[0, 0, 7.5, 90], [0, 0, 8, 8]]), 8) == 0.5
    assert share_below(resized([[0, 0, 7.5, 90], [0, 0, 8, 8]], plus_one=True), 8) == 0
    assert share_below(resized(np.zeros((0, 4))), 8) == 0


def test_real_sets_are_covered_as_all_their_anchors_say(shared):
    cfg = get_cfg()
    report = examine(Source("raccoon", shared("data/raccoon/annotations/val.json")))
    found = build_anchor_report(cfg, [report])
    assert found.proposal == found.current and found.measured["all"].boxes == 63
    boxes = build_resized(cfg, report.boxes.clipped, report.table.box_sizes)
    generator, ious = AnchorGenerator(*found.current), []
    for box, size in zip(boxes.boxes, boxes.inputs.tolist(), strict=True):
        ious.append(pairwise_iou(torch.from_numpy(box[None]), torch.cat(generator(tuple(size)))).max().item())
    assert found.measured["all"].mean == pytest.approx(np.mean(ious), abs=1e-5)
    assert found.measured["all"].above[0.5] == np.mean(np.array(ious) >= 0.5)
    assert build_anchor_report(cfg, []) is None
