"""Detections of several views become one list: torchvision's NMS as the oracle, and hand-made boxes."""

import pytest
import torch
from torchvision.ops import batched_nms

from retinanet.modeling.views import Postprocessor
from retinanet.structures import Batch, Detections


def settings(convention: str = "detectron2", max_dets: int = 100) -> Postprocessor:
    return Postprocessor(0.05, 1000, 0.5, max_dets, convention)


def view(width: int, mirrored: bool = False, count: int = 1) -> Batch:
    """Return a batch of which only the original width and the mirroring matter here."""
    sizes = torch.tensor([[50, width]] * count)
    empty = torch.zeros(count, 0)
    return Batch(torch.zeros(count, 3, 8, 8), sizes, sizes, torch.ones(count, 2), empty, empty, mirrored=mirrored)


def detections(*rows: tuple) -> Detections:
    """Return detections of rows (x1, y1, x2, y2, score, label)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return Detections(boxes=table[:, :4], scores=table[:, 4], labels=table[:, 5].long())


def test_a_box_seen_mirrored_suppresses_its_twin_and_adds_what_only_it_shows():
    straight = detections((10, 5, 30, 25, 0.6, 0), (50, 0, 60, 10, 0.5, 1))
    mirrored = detections((70, 5, 90, 25, 0.9, 0), (0, 30, 10, 40, 0.3, 0))  # of a picture 100 wide
    (found,) = settings().merge([view(100), view(100, True)], [[straight], [mirrored]])
    assert found["boxes"].tolist() == [[10, 5, 30, 25], [50, 0, 60, 10], [90, 30, 100, 40]]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5, 0.3]) and found["labels"].tolist() == [0, 1, 0]


def test_detectrons_boxes_end_on_their_last_pixel():
    (found,) = settings("detectron").merge([view(100, True)], [[detections((0, 0, 9, 9, 0.5, 0))]])
    assert found["boxes"].tolist() == [[90, 0, 99, 9]]


def test_other_classes_suppress_nothing_and_of_equals_the_first_view_wins():
    first, second = detections((0, 0, 10, 10, 0.5, 0)), detections((0, 0, 10, 11, 0.5, 0), (0, 0, 10, 10, 0.5, 1))
    (found,) = settings().merge([view(20), view(20)], [[first], [second]])
    assert found["boxes"].tolist() == [[0, 0, 10, 10], [0, 0, 10, 10]] and found["labels"].tolist() == [0, 1]


def test_images_keep_to_themselves_and_empty_ones_stay_empty():
    box, none = detections((0, 0, 10, 10, 0.5, 0)), detections()
    found = settings().merge([view(20, count=3), view(20, True, 3)], [[box, none, none], [none, box, none]])
    assert [each["boxes"].tolist() for each in found] == [[[0, 0, 10, 10]], [[10, 0, 20, 10]], []]


@pytest.mark.parametrize("max_dets", [5, 100])
def test_equals_torchvisions_nms_of_all_views_together(max_dets):
    generator = torch.Generator().manual_seed(0)
    views, found = [view(80), view(80), view(80)], []
    for _ in views:
        corner, side = torch.rand(60, 2, generator=generator) * 50, torch.rand(60, 2, generator=generator) * 25 + 1
        scores = torch.rand(60, generator=generator).sort(descending=True).values
        labels = torch.randint(3, (60,), generator=generator)
        found.append([Detections(boxes=torch.cat([corner, corner + side], 1), scores=scores, labels=labels)])
    (merged,) = settings(max_dets=max_dets).merge(views, found)
    boxes, scores, labels = (torch.cat([each[0][key] for each in found]) for key in ("boxes", "scores", "labels"))
    keep = batched_nms(boxes, scores, labels, 0.5)[:max_dets]
    assert len(keep) > 4
    for key, column in (("boxes", boxes), ("scores", scores), ("labels", labels)):
        torch.testing.assert_close(merged[key], column[keep], rtol=0, atol=0)
