"""Suppression by hand, against torchvision's operator image by image and class by class, and Caffe2 Detectron."""

import pytest
import torch
from detection_cases import random_boxes, reference, torchvision_nms

from retinanet.ops.nms import nms


def one_image(boxes, labels=None):
    """Return boxes (1, n, 4), labels (1, n) and valid (1, n) of one image whose candidates are all valid."""
    boxes = torch.as_tensor(boxes, dtype=torch.float32).unsqueeze(0)
    labels = torch.zeros(boxes.shape[:2], dtype=torch.int64) if labels is None else torch.tensor([labels])
    return boxes, labels, torch.ones(boxes.shape[:2], dtype=torch.bool)


def test_a_suppressed_box_suppresses_nothing():
    row = [[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]]  # IoU of neighbours 6 / 14, of the ends 2 / 18
    assert nms(*one_image(row), iou_thresh=0.4, max_dets=3).tolist() == [[0, 2, -1]]


def test_classes_do_not_suppress_each_other():
    same = [[0, 0, 10, 10]] * 3
    assert nms(*one_image(same, [2, 7, 2]), iou_thresh=0.5, max_dets=3).tolist() == [[0, 1, -1]]


def test_images_do_not_suppress_each_other():
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0]]] * 2)
    everything = torch.ones(2, 1, dtype=torch.bool)
    assert nms(boxes, torch.zeros(2, 1, dtype=torch.int64), everything, 0.5, 1).tolist() == [[0], [0]]


def test_a_candidate_that_is_not_valid_neither_stays_nor_suppresses():
    boxes, labels, valid = one_image([[0, 0, 10, 10]] * 2)
    valid[0, 0] = False
    assert nms(boxes, labels, valid, 0.5, 2).tolist() == [[1, -1]]


def test_inclusive_suppresses_at_the_threshold():
    half = [[0, 0, 2, 1], [0, 0, 1, 1]]  # IoU 1 / 2, exact in binary
    assert nms(*one_image(half), iou_thresh=0.5, max_dets=2).tolist() == [[0, 1]]
    assert nms(*one_image(half), iou_thresh=0.5, max_dets=2, inclusive=True).tolist() == [[0, -1]]


def test_plus_one_widens_the_overlap():
    corners = [[0, 0, 1, 1], [1, 0, 2, 1]]  # they touch; as pixels, 2 of 6 are shared
    assert nms(*one_image(corners), iou_thresh=0.3, max_dets=2).tolist() == [[0, 1]]
    assert nms(*one_image(corners), iou_thresh=0.3, max_dets=2, plus_one=True).tolist() == [[0, -1]]


@pytest.mark.parametrize("n", [1, 127, 128, 129, 700])
@pytest.mark.parametrize("classes", [1, 6])
@pytest.mark.parametrize("max_dets", [5, 1000])
def test_nms_equals_torchvision_for_each_image_and_class(n, classes, max_dets):
    generator = torch.Generator().manual_seed(n)
    boxes = random_boxes(3, n, seed=n)
    labels = torch.randint(classes, (3, n), generator=generator)
    valid = torch.rand(3, n, generator=generator) > 0.1
    valid[2] = False  # an image without candidates
    expected = torchvision_nms(boxes, labels, valid, 0.5, max_dets)
    assert torch.equal(nms(boxes, labels, valid, 0.5, max_dets), expected)


def test_nms_of_a_few_objects_seen_thousands_of_times():
    objects = random_boxes(2, 12, seed=3, size=2000.0)
    generator = torch.Generator().manual_seed(0)
    seen = torch.randint(12, (2, 3000), generator=generator)
    jitter = torch.randn(2, 3000, 4, generator=generator) * 8
    boxes = objects.gather(1, seen.unsqueeze(2).expand(-1, -1, 4)) + jitter
    everything = torch.ones(2, 3000, dtype=torch.bool)
    expected = torchvision_nms(boxes, seen % 5, everything, 0.5, 100)
    assert torch.equal(nms(boxes, seen % 5, everything, 0.5, 100), expected)
    assert 12 <= int((expected >= 0).sum(1).min()) < 100  # the work did not end early


def test_nms_without_candidates_is_empty():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert nms(torch.zeros(2, 0, 4), nothing, nothing.bool(), 0.5, 3).tolist() == [[-1] * 3] * 2


def test_nms_of_caffe2_detectron():
    arrays = reference("caffe2/boxes")
    order = arrays["nms_dets"][:, 4].argsort(descending=True, stable=True)
    candidates = one_image(arrays["nms_dets"][order, :4])
    kept = nms(*candidates, iou_thresh=0.5, max_dets=80, plus_one=True, inclusive=True)[0]
    assert torch.equal(order[kept[kept >= 0]].sort().values, arrays["nms_keep"])
