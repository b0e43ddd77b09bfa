"""Rows of the class layer: which are taken, which are new."""

import json

import pytest
import torch

from retinanet.errors import UserError
from retinanet.weights.classes import COCO, plan_rows, reorder_anchors, take_rows


def test_equal_counts_without_names_are_taken_one_to_one():
    plan = plan_rows(3, 3, [], ["a", "b", "c"])
    assert (plan.rows, plan.is_identity) == ([0, 1, 2], True)


def test_names_on_both_sides_decide_the_rows():
    plan = plan_rows(3, 4, [["cat", "dog", "cow"]], ["dog", "bee", "cat", "ant"])
    assert plan.rows == [1, -1, 0, -1]
    assert "2 of 4 classes are copied by name; new: bee, ant" in plan.note


def test_another_order_of_the_same_names_is_turned():
    plan = plan_rows(2, 2, [["cat", "dog"]], ["dog", "cat"])
    assert (plan.rows, plan.is_identity) == ([1, 0], False)


def test_the_same_names_with_repetitions_are_one_to_one():
    names = ["background", "N/A", "cat", "N/A"]
    assert plan_rows(4, 4, [names], names).is_identity


def test_other_counts_without_names_start_anew():
    plan = plan_rows(80, 3, [], ["a", "b", "c"])
    assert plan.all_new
    assert "the file has 80 classes, the model 3" in plan.note


def test_names_without_one_in_common_start_anew():
    assert plan_rows(2, 2, [["cat", "dog"]], ["car", "bus"]).all_new


def test_a_background_row_is_left_out():
    assert plan_rows(4, 3, [], [], background_row=True).rows == [1, 2, 3]
    assert plan_rows(4, 3, [["a", "b", "c"]], ["c", "a", "x"], background_row=True).rows == [3, 1, -1]


def test_91_rows_give_coco_by_category_id():
    plan = plan_rows(91, 80, [], [], background_row=True)
    assert plan.rows[:12] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13]
    assert plan.rows[-1] == 90
    by_name = plan_rows(91, 2, [list(COCO.values())], ["toothbrush", "stop sign"], background_row=True)
    assert by_name.rows == [90, 13]


def test_a_count_of_names_that_does_not_fit_the_file_is_refused():
    with pytest.raises(UserError, match=r"WEIGHTS_CLASSES: 2 names, but the class layer of the file has 3 classes"):
        plan_rows(3, 2, [["a", "b"]], ["a", "b"])


def test_the_first_names_that_fit_the_file_count():
    assert plan_rows(2, 1, [["only", "for", "91 rows"], [], ["a", "b"]], ["b"]).rows == [1]


def test_rows_are_taken_within_every_anchor():
    held = torch.arange(6.0).view(6, 1)  # two anchors of three classes
    fresh = torch.full((4, 1), -1.0)
    assert take_rows(held, 2, [2, -1], fresh).flatten().tolist() == [2.0, -1.0, 5.0, -1.0]


def test_anchors_move_as_blocks():
    assert reorder_anchors(torch.arange(6.0), [2, 0, 1]).tolist() == [4.0, 5.0, 0.0, 1.0, 2.0, 3.0]


def test_coco_is_what_its_annotations_say(shared):
    rows = json.loads(shared("data/coco_mini/annotations/instances_val2017.json").read_text())["categories"]
    assert {row["id"]: row["name"] for row in rows} == COCO
