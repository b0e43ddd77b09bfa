"""Box arithmetic against hand-made numbers, torchvision's operators and the three original projects."""

import math

import pytest
import torch
import torchvision
from detection_cases import random_boxes, reference

from retinanet.ops.boxes import MAX_LOG_SCALE, box_area, clip, decode, encode, matched_iou, pairwise_iou


def test_area_with_plus_one_counts_the_border_pixels():
    box = torch.tensor([[2.0, 3.0, 5.0, 8.0]])
    assert box_area(box).tolist() == [15.0]
    assert box_area(box, plus_one=True).tolist() == [24.0]


def test_iou_of_shifted_squares():
    squares = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 15.0, 15.0], [20.0, 20.0, 30.0, 30.0]])
    torch.testing.assert_close(pairwise_iou(squares[:1], squares), torch.tensor([[1.0, 25 / 175, 0.0]]))


def test_iou_with_plus_one_is_that_of_boxes_one_pixel_larger():
    inclusive = torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 5.0, 14.0, 14.0], [10.0, 0.0, 19.0, 9.0]])
    torch.testing.assert_close(pairwise_iou(inclusive[:1], inclusive, plus_one=True), torch.tensor([[1.0, 1 / 7, 0.0]]))


def test_boxes_that_touch_have_no_overlap():
    assert pairwise_iou(torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[4.0, 0.0, 8.0, 4.0]])).item() == 0.0


def test_pairwise_iou_equals_torchvision_on_strided_boxes():
    a, b = random_boxes(4, 17).transpose(0, 1)[::2], random_boxes(1, 23, seed=1)
    expected = torch.stack([torchvision.ops.box_iou(boxes, b[0]) for boxes in a])
    torch.testing.assert_close(pairwise_iou(a, b), expected, rtol=1e-6, atol=0)


def test_pairwise_iou_without_boxes_is_empty():
    assert pairwise_iou(torch.zeros(2, 0, 4), random_boxes(5)).shape == (2, 0, 5)


def test_matched_iou_is_the_diagonal_of_pairwise_iou():
    a, b = random_boxes(6), random_boxes(6, seed=1)
    torch.testing.assert_close(matched_iou(a, b), pairwise_iou(a, b).diagonal())


def test_encode_by_hand():
    anchor = torch.tensor([[10.0, 10.0, 30.0, 20.0]])  # centre (20, 15), size 20 x 10
    box = torch.tensor([[20.0, 10.0, 40.0, 30.0]])  # centre (30, 20), size 20 x 20
    torch.testing.assert_close(encode(box, anchor), torch.tensor([[0.5, 0.5, 0.0, math.log(2)]]))


@pytest.mark.parametrize("plus_one", [False, True])
def test_decode_undoes_encode(plus_one):
    boxes, anchors = random_boxes(3, 9), random_boxes(3, 9, seed=1)
    back = decode(encode(boxes, anchors, plus_one), anchors, plus_one)
    torch.testing.assert_close(back, boxes, rtol=0, atol=2e-4)


@pytest.mark.parametrize("plus_one", [False, True])
def test_zero_deltas_give_the_anchor(plus_one):
    anchors = random_boxes(5)
    torch.testing.assert_close(decode(torch.zeros(5, 4), anchors, plus_one), anchors)


def test_growth_is_capped_and_shrinking_is_not():
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    box = decode(torch.tensor([[0.0, 0.0, 50.0, -50.0]]), anchor)
    torch.testing.assert_close(box[:, 2] - box[:, 0], torch.tensor([1000.0]))
    assert (box[:, 3] - box[:, 1]).item() == pytest.approx(16 * math.exp(-50), abs=1e-6)
    assert math.exp(MAX_LOG_SCALE) == pytest.approx(62.5)


def test_bfloat16_deltas_decode_in_float32():
    deltas, anchors = torch.randn(7, 4).bfloat16(), random_boxes(7)
    boxes = decode(deltas, anchors)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, decode(deltas.float(), anchors), rtol=0, atol=0)


def test_clip_uses_the_size_of_each_image():
    boxes = torch.tensor([[-5.0, -5.0, 50.0, 50.0]]).repeat(2, 1, 1)
    sizes = torch.tensor([[20, 30], [40, 10]])
    assert clip(boxes, sizes).tolist() == [[[0, 0, 30, 20]], [[0, 0, 10, 40]]]
    assert clip(boxes, sizes, plus_one=True).tolist() == [[[0, 0, 29, 19]], [[0, 0, 9, 39]]]


def test_clip_moves_a_box_outside_onto_the_border():
    assert clip(torch.tensor([[50.0, -9.0, 60.0, -3.0]]), torch.tensor([20, 30])).tolist() == [[30, 0, 30, 0]]


def test_clip_equals_torchvision():
    boxes = random_boxes(50)
    expected = torchvision.ops.clip_boxes_to_image(boxes, (90, 120))
    assert torch.equal(clip(boxes, torch.tensor([90, 120])), expected)


def test_caffe2_detectron_boxes():
    arrays = reference("caffe2/boxes")
    boxes, deltas, gt = arrays["bt_boxes"], arrays["bt_deltas"], arrays["bo_gt"]
    torch.testing.assert_close(pairwise_iou(boxes, gt, plus_one=True), arrays["bo_iou"], rtol=0, atol=1e-7)
    torch.testing.assert_close(encode(gt, boxes[:7], plus_one=True), arrays["bi_targets"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decode(deltas, boxes, plus_one=True), arrays["bt_pred"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("project", ["detectron2", "torchvision"])
def test_boxes_of_detectron2_and_torchvision(project):
    arrays = reference(f"{project}/units")
    anchors = arrays["anchors"]
    torch.testing.assert_close(pairwise_iou(arrays["match_boxes"], anchors), arrays["iou"], rtol=0, atol=1e-7)
    torch.testing.assert_close(encode(arrays["gt"], anchors), arrays["encoded"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(decode(arrays["deltas"], anchors), arrays["decoded"], rtol=1e-6, atol=1e-5)
