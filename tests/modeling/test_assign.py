"""Matching by hand, against torchvision's matcher, a transcription of Detectron's rules, and stored matches."""

import numpy as np
import pytest
import torch
import torchvision
from detection_cases import SyncWatch, caffe2_ground_truth, random_boxes, reference
from torchvision.models.detection._utils import Matcher

from retinanet.errors import UserError
from retinanet.modeling import assign as assign_module
from retinanet.modeling.anchors import AnchorGenerator
from retinanet.modeling.assign import LOW_QUALITY, assign
from retinanet.ops.boxes import encode
from retinanet.structures import BACKGROUND, IGNORE, PAD_LABEL, Target, pad_targets

ANCHORS = torch.tensor([[0.0, 0.0, 10.0, 10.0], [6.0, 0.0, 16.0, 10.0], [50.0, 50.0, 60.0, 60.0]])


def one_image(*boxes):
    """Return gt_boxes (1, M, 4) and gt_labels (1, M) of class 0."""
    return torch.tensor([boxes]), torch.zeros(1, len(boxes), dtype=torch.int64)


def random_batch(seed=0, counts=(5, 0, 3)):
    targets = [
        Target(boxes=random_boxes(count, seed=seed + i), labels=torch.arange(count) % 4)
        for i, count in enumerate(counts)
    ]
    return pad_targets(targets)


def detectron_rules(anchors, boxes, fg_iou, bg_iou, plus_one):
    """Detectron's labelling of one image, one anchor and one box at a time, in float32.

    Returns the matched box of each anchor, BACKGROUND or IGNORE, and how many it counts as foreground.
    """
    one = np.float32(1.0 if plus_one else 0.0)

    def iou(a, b):
        width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + one for i in (0, 1))
        if width <= 0 or height <= 0:
            return np.float32(0)
        areas = [(box[2] - box[0] + one) * (box[3] - box[1] + one) for box in (a, b)]
        return width * height / (areas[0] + areas[1] - width * height)

    overlaps = np.array([[iou(a, b) for b in boxes.numpy()] for a in anchors.numpy()], dtype=np.float32)
    best, best_iou = overlaps.argmax(1), overlaps.max(1)
    foreground = (overlaps == overlaps.max(0)).any(1) | (best_iou >= np.float32(fg_iou))
    matched = np.where(foreground, best, IGNORE)
    matched[best_iou < np.float32(bg_iou)] = BACKGROUND
    return torch.from_numpy(matched), int(foreground.sum())


@pytest.mark.parametrize(
    ("fg_iou", "bg_iou", "expected"), [(0.45, 0.4, 0), (0.46, 0.45, IGNORE), (0.5, 0.46, BACKGROUND)]
)
def test_thresholds_separate_positive_ignored_and_background(fg_iou, bg_iou, expected):
    boxes, labels = one_image([0.0, 0.0, 9.0, 5.0])  # IoU 0.45 with the first anchor
    assert assign(ANCHORS, boxes, labels, fg_iou, bg_iou, "none")[0][0, 0].item() == expected


def test_an_anchor_takes_its_best_box_and_the_first_of_equals():
    boxes, labels = one_image([0.0, 0.0, 10.0, 8.0], [0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 9.0])
    assert assign(ANCHORS, boxes, labels, 0.5, 0.4, "none")[0].tolist() == [[1, BACKGROUND, BACKGROUND]]


@pytest.mark.parametrize(
    ("low_quality", "matched", "num_fg"), [("none", -1, 0), ("detectron", -1, 1), ("detectron2", 0, 1)]
)
def test_best_anchor_of_a_small_box_below_the_background_threshold(low_quality, matched, num_fg):
    boxes, labels = one_image([0.0, 0.0, 5.0, 5.0])  # IoU 0.25 with the first anchor alone
    matched_idx, count = assign(ANCHORS, boxes, labels, 0.5, 0.4, low_quality)
    assert matched_idx.tolist() == [[matched, BACKGROUND, BACKGROUND]]
    assert count.tolist() == [num_fg]


@pytest.mark.parametrize(("low_quality", "matched"), [("none", IGNORE), ("detectron", 0), ("detectron2", 0)])
def test_best_anchor_of_a_box_between_the_thresholds(low_quality, matched):
    boxes, labels = one_image([0.0, 0.0, 9.0, 5.0])  # IoU 0.45
    assert assign(ANCHORS, boxes, labels, 0.5, 0.4, low_quality)[0][0, 0].item() == matched


def test_all_anchors_that_tie_for_a_box_are_positive():
    boxes, labels = one_image([7.0, 2.0, 9.0, 4.0])  # inside both of the first two anchors
    assert assign(ANCHORS, boxes, labels, 0.5, 0.4, "detectron2")[0].tolist() == [[0, 0, BACKGROUND]]


def test_an_anchor_that_ties_for_one_box_keeps_its_own_best_box():
    # the first box is best served by anchor 0, which itself overlaps the second box more
    boxes, labels = one_image([0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 10.0, 10.0])
    assert assign(ANCHORS, boxes, labels, 0.5, 0.4, "detectron2")[0][0, 0].item() == 1


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
@pytest.mark.parametrize("plus_one", [False, True])
def test_images_without_boxes_are_background(low_quality, plus_one):
    empty = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)
    padded = torch.zeros(2, 8, 4), torch.full((2, 8), PAD_LABEL)
    for boxes, labels in (empty, padded):
        matched_idx, num_fg = assign(ANCHORS, boxes, labels, 0.5, 0.4, low_quality, plus_one)
        assert matched_idx.tolist() == [[BACKGROUND] * 3] * 2
        assert num_fg.tolist() == [0, 0]


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_padding_takes_no_part_wherever_it_stands(low_quality):
    boxes, labels = one_image([0.0, 0.0, 9.0, 5.0], [50.0, 50.0, 59.0, 60.0])
    holes = torch.zeros(1, 5, 4)  # a box at the origin would overlap the first anchor with Detectron's widths
    holes[:, 1], holes[:, 3] = boxes[:, 0], boxes[:, 1]
    hole_labels = torch.tensor([[PAD_LABEL, 0, PAD_LABEL, 0, PAD_LABEL]])
    expected, count = assign(ANCHORS, boxes, labels, 0.5, 0.4, low_quality, plus_one=True)
    found, found_count = assign(ANCHORS, holes, hole_labels, 0.5, 0.4, low_quality, plus_one=True)
    assert torch.equal(found, torch.where(expected >= 0, 1 + 2 * expected, expected))
    assert torch.equal(found_count, count)


def test_a_box_that_touches_no_anchor_makes_all_of_them_positive_in_detectron2():
    boxes, labels = one_image([0.0, 0.0, 10.0, 10.0], [900.0, 900.0, 920.0, 920.0])
    assert assign(ANCHORS, boxes, labels, 0.5, 0.4, "detectron2")[0].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_matches_equal_torchvision(seed):
    anchors = torch.cat(AnchorGenerator(4, 3, (0.5, 1, 2), "torchvision")((96, 128)))
    boxes, labels = random_batch(seed)
    for allow, low_quality in ((False, "none"), (True, "detectron2")):
        matched_idx, num_fg = assign(anchors, boxes, labels, 0.5, 0.4, low_quality)
        matcher = Matcher(0.5, 0.4, allow_low_quality_matches=allow)
        for image in (0, 2):
            real = boxes[image, labels[image] != PAD_LABEL]
            expected = matcher(torchvision.ops.box_iou(real, anchors))
            assert torch.equal(matched_idx[image], expected)
            assert num_fg[image] == (expected >= 0).sum()


@pytest.mark.parametrize("plus_one", [False, True])
def test_matches_equal_detectron_rules(plus_one):
    anchors = torch.cat(AnchorGenerator(4, 2, (1, 2), "detectron")((32, 64)))
    boxes, labels = random_batch(counts=(4, 3))
    boxes = boxes * 0.3  # small boxes: many ties and overwritten positives
    matched_idx, num_fg = assign(anchors, boxes, labels, 0.5, 0.4, "detectron", plus_one)
    overwritten = 0
    for image in range(2):
        real = boxes[image, labels[image] != PAD_LABEL]
        expected, counted = detectron_rules(anchors, real, 0.5, 0.4, plus_one)
        assert torch.equal(matched_idx[image], expected)
        assert num_fg[image] == counted
        overwritten += counted - int((expected >= 0).sum())
    assert overwritten > 0


@pytest.mark.parametrize("case", ["a", "b", "ab"])
def test_labels_and_targets_of_caffe2_detectron(case):
    arrays = reference("caffe2/targets")
    boxes, gt_labels = caffe2_ground_truth(case)
    levels = AnchorGenerator(4, 3, (1, 2, 0.5), "detectron")((128, 256))
    matched_idx, num_fg = assign(levels, boxes, gt_labels, 0.5, 0.4, "detectron", plus_one=True)
    assert (num_fg + 1).sum() == arrays[f"{case}/retnet_fg_num"].item()
    matched = boxes.gather(1, matched_idx.clamp(min=0).unsqueeze(2).expand(-1, -1, 4))
    targets = encode(matched, torch.cat(levels), plus_one=True)
    classes = gt_labels.gather(1, matched_idx.clamp(min=0)) + 1  # 0 is background there, -1 ignored
    classes = torch.where(matched_idx >= 0, classes, torch.where(matched_idx == BACKGROUND, 0, -1))
    start = 0
    for level, anchors in enumerate(levels, start=3):
        expected = arrays[f"{case}/retnet_cls_labels_fpn{level}"].permute(0, 2, 3, 1)  # (N, H, W, A)
        here = slice(start, start + len(anchors))
        assert torch.equal(classes[:, here].view(expected.shape), expected.long())
        image, channel, row, column = arrays[f"{case}/retnet_roi_fg_bbox_locs_fpn{level}"].long().unbind(1)
        found = targets[:, here].view(*expected.shape, 4)[image, row, column, channel // 4]
        wanted = arrays[f"{case}/retnet_roi_bbox_targets_fpn{level}"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        start += len(anchors)


@pytest.mark.parametrize(
    ("project", "size", "boxes"),
    [
        ("detectron2", (128, 160), [[5.0, 8.0, 100.0, 90.0]]),
        ("torchvision", (128, 192), [[6.382978439331055, 10.239999771118164, 127.6595687866211, 115.19999694824219]]),
    ],
)
def test_matches_of_detectron2_and_torchvision_in_training(project, size, boxes):
    first = torch.tensor([[12.0, 20.0, 76.0, 84.0], [90.5, 30.25, 150.0, 118.0], [40.0, 60.0, 64.0, 100.0]])
    targets = [Target(boxes=b, labels=torch.zeros(len(b), dtype=torch.int64)) for b in (first, torch.tensor(boxes))]
    anchors = AnchorGenerator(4, 3, (0.5, 1, 2), project)(size)
    matched_idx, _ = assign(anchors, *pad_targets(targets), 0.5, 0.4, "detectron2")
    arrays = reference(f"{project}/matches")
    for image, matched in enumerate(matched_idx):
        positive = torch.where(matched >= 0)[0]
        assert torch.equal(positive, arrays[f"match/{image}/pos_anchor"].long())
        assert torch.equal(matched[positive], arrays[f"match/{image}/pos_gt"].long())
        assert torch.equal(torch.where(matched == IGNORE)[0], arrays[f"match/{image}/ignored_anchor"].long())


@pytest.mark.parametrize("project", ["detectron2", "torchvision"])
@pytest.mark.parametrize(("count", "name"), [(5, "match"), (6, "match_with_unreachable_box")])
def test_match_units_of_detectron2_and_torchvision(project, count, name):
    arrays = reference(f"{project}/units")
    boxes, labels = arrays["match_boxes"][None, :count], torch.zeros(1, count, dtype=torch.int64)
    assert torch.equal(assign(arrays["anchors"], boxes, labels, 0.5, 0.4, "detectron2")[0][0], arrays[name].long())


@pytest.mark.parametrize("low_quality", LOW_QUALITY)
def test_pieces_do_not_change_the_matches(low_quality, monkeypatch):
    anchors, (boxes, labels) = random_boxes(61, seed=9), random_batch(counts=(7, 2))
    expected = assign(anchors, boxes, labels, 0.5, 0.4, low_quality)
    for piece, num_boxes in ((1, 1), (40, 3), (10**6, 3)):
        monkeypatch.setattr(assign_module, "_CPU_PIECE", piece)
        monkeypatch.setattr(assign_module, "_BOXES_PER_PIECE", num_boxes)
        found = assign(anchors, boxes, labels, 0.5, 0.4, low_quality)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_crowded_images_need_bounded_memory_and_no_synchronization():
    anchors, boxes = random_boxes(20_000, seed=1), random_boxes(2, 600)
    with SyncWatch() as watch:
        matched_idx, _ = assign(anchors, boxes, torch.zeros(2, 600, dtype=torch.int64), 0.5, 0.4, "detectron2")
    assert not watch.waits
    assert watch.largest <= 2**17 < boxes.shape[1] * len(anchors)
    assert (matched_idx >= 0).any() and (matched_idx == BACKGROUND).any()


def test_matching_compiles_into_one_graph():
    anchors, (boxes, labels) = random_boxes(50, seed=9), random_batch()
    compiled = torch.compile(assign, backend="aot_eager", fullgraph=True)
    found = compiled(anchors, boxes, labels, 0.5, 0.4, "detectron2")
    expected = assign(anchors, boxes, labels, 0.5, 0.4, "detectron2")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_unknown_rule_lists_the_choices():
    with pytest.raises(UserError, match="MODEL.MATCHER.LOW_QUALITY: 'best' is not one of none, detectron, detectron2"):
        assign(ANCHORS, *one_image([0.0, 0.0, 1.0, 1.0]), 0.5, 0.4, "best")
