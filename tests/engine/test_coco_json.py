"""COCO files in, flat arrays out; every mistake in them named."""

import json

import numpy as np
import pytest
from simulated_detections import coco_json, detection

from retinanet.engine.coco_json import ground_truth, read_json, results, write_json
from retinanet.errors import UserError

NAMES = {7: "cat", 3: "dog"}


@pytest.fixture
def annotations() -> dict:
    return coco_json({20: [(7, 0, 0, 10, 20), (3, 5, 5, 2, 2)], 10: []}, NAMES, crowds=[1])


def test_positions_follow_the_sorted_ids_and_rows_keep_their_order(annotations):
    truth = ground_truth(annotations)
    assert (truth.image_ids, truth.category_ids, truth.names) == ([10, 20], [3, 7], ["dog", "cat"])
    assert truth.images.tolist() == [1, 1] and truth.labels.tolist() == [1, 0]
    assert truth.area.tolist() == [200, 4] and truth.crowd.tolist() == [False, True]


def test_annotated_area_wins_over_width_times_height_and_null_does_not(annotations):
    annotations["annotations"][0]["area"] = 55.5
    annotations["annotations"][1]["area"] = None
    assert ground_truth(annotations).area.tolist() == [55.5, 4]


def test_path_and_content_give_the_same(annotations, tmp_path):
    (tmp_path / "gt.json").write_text(json.dumps(annotations))
    (tmp_path / "dt.json").write_text(json.dumps([detection(20, 3, [1, 2, 3, 4], 0.5)]))
    truth = ground_truth(tmp_path / "gt.json")
    np.testing.assert_array_equal(truth.boxes, ground_truth(annotations).boxes)
    found = results(str(tmp_path / "dt.json"), truth)
    assert found.boxes.tolist() == [[1, 2, 3, 4]] and found.scores.tolist() == [0.5]
    assert found.images.tolist() == [1] and found.labels.tolist() == [0]


def test_no_annotations_and_no_detections_are_empty_arrays(annotations):
    del annotations["annotations"]
    truth = ground_truth(annotations)
    assert truth.boxes.shape == (0, 4) and results([], truth).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 11}, r"results: detection 1 \(image_id 11\): image_id 11 is not among the images of .*10, 20"),
        ({"image_id": "20"}, "image_id '20' is not among"),
        ({"image_id": [20]}, "is not among"),
        ({"category_id": 0}, "category_id 0 is not among the categories of annotations .3, 7."),
        ({"score": float("nan")}, "score nan is not a finite number"),
        ({"score": "0.5"}, "score '0.5' is not a finite number"),
        ({"score": True}, "score True is not"),
        ({"bbox": [1, 2, 3]}, r"bbox \[1, 2, 3\] is not four finite numbers"),
        ({"bbox": [1, 2, 3, float("inf")]}, "is not four finite numbers"),
        ({"bbox": None}, "bbox None is not four finite numbers"),
        ({"bbox": ["1", "2", "3", "4"]}, "is not four finite numbers"),
        ({"bbox": [1, 2, -3, 4]}, r"bbox \[1, 2, -3, 4\] must be \[x, y, width >= 0, height >= 0\]"),
    ],
)
def test_wrong_detection_is_named(annotations, change, message):
    rows = [detection(20, 3, [0, 0, 1, 1], 0.5), detection(20, 3, [0, 0, 1, 1], 0.5) | change]
    with pytest.raises(UserError, match=message):
        results(rows, ground_truth(annotations))


@pytest.mark.parametrize("rows", [[detection(20, 3, [0, 0, 1, 1], 0.5), {"image_id": 20}], [3], [None]])
def test_detection_without_a_field_is_named(annotations, rows):
    with pytest.raises(UserError, match=rf"results: detection {len(rows) - 1}.*no 'bbox'"):
        results(rows, ground_truth(annotations))


def test_results_that_are_not_a_list_are_an_error(annotations, tmp_path):
    (tmp_path / "dt.json").write_text('{"annotations": []}')
    with pytest.raises(UserError, match="a list of detections, not an object"):
        results(tmp_path / "dt.json", ground_truth(annotations))


def _box(**changes) -> dict:
    return {"image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1]} | changes


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_changes_nothing(annotations, tmp_path, encoding):
    annotations["categories"][0]["name"] = "Möwe"
    (tmp_path / "gt.json").write_text(json.dumps(annotations, ensure_ascii=False), encoding=encoding)
    assert ground_truth(tmp_path / "gt.json").names == ground_truth(annotations).names


@pytest.mark.parametrize("flag", [None, 0, False])
def test_flags_that_say_no_are_no_crowds(annotations, flag):
    assert ground_truth(annotations | {"annotations": [_box(iscrowd=flag)]}).crowd.tolist() == [False]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("images", [], "no 'images'"),
        ("categories", None, "no 'categories'"),
        ("images", [{"id": 1}, {"id": 1}], "id 1 occurs twice in 'images'"),
        ("images", [{"id": "a"}], "entry 0 of 'images' has no integer 'id'"),
        ("annotations", {"a": 1}, "annotations and detections are lists, not an object"),
        ("annotations", [{"image_id": 10, "category_id": 3}], "annotation 0 .image_id 10.: no 'bbox'"),
        ("annotations", [{"id": 4, "image_id": 9, "category_id": 3, "bbox": [0, 0, 1, 1]}], "id 4, .*image_id 9 is"),
        ("annotations", [{"image_id": 10, "category_id": 4, "bbox": [0, 0, 1, 1]}], "category_id 4 is not among"),
        ("annotations", [{"image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1], "area": "x"}], "area 'x' is not"),
        ("annotations", [_box(area=10**400)], "area 1000.* is not a finite number"),
        ("annotations", [_box(bbox=[0, 0, 10**400, 1])], r"bbox .0, 0, 1000.* is not four finite numbers"),
        ("annotations", [_box(iscrowd="0")], "annotation 0 .image_id 10.: iscrowd '0' is neither 0 nor 1; .*--fix"),
        ("annotations", [_box(iscrowd=2)], "iscrowd 2 is neither"),
        ("images", [{"id": 2**63}], "entry 0 of 'images' has no integer 'id' of 64 bits"),
        ("categories", [{"id": True}], "entry 0 of 'categories' has no integer 'id'"),
        ("categories", [{"id": 1, "name": "\ud800"}], r"category 1 has the name '.ud800'"),
    ],
)
def test_wrong_annotation_file_is_named(annotations, key, value, message):
    with pytest.raises(UserError, match=message):
        ground_truth(annotations | {key: value})


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(UserError, match="annotation file .*gone.json' does not exist"):
        ground_truth(tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"images": [')
    with pytest.raises(UserError, match="half.json' is not valid JSON"):
        ground_truth(tmp_path / "half.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="deep.json' is not valid JSON: nested too deeply"):
        ground_truth(tmp_path / "deep.json")
    with pytest.raises(UserError, match="cannot be read"):
        ground_truth(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="list.json: no 'images'"):
        ground_truth(tmp_path / "list.json")


def test_written_json_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "metrics.json"
    write_json(path, {"AP": None, "AP50": 0.1})
    assert read_json(path, "metrics") == {"AP": None, "AP50": 0.1}
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="metrics.json: cannot be written .No space left on device."):
        write_json(path, {"AP": 1})
    assert read_json(path, "metrics")["AP50"] == 0.1 and [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken/metrics.json: cannot be written"):
        write_json(tmp_path / "taken" / "metrics.json", {})
