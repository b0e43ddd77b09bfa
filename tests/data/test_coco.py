"""COCO json -> targets: minimal files by hand, real files against pycocotools, and every mistake with its message."""

import contextlib
import io
import json
import logging
import pickle
import re

import cv2
import numpy as np
import pytest
import torch

from retinanet.data.annotations import load_annotations
from retinanet.data.coco import CocoDataset
from retinanet.errors import UserError

REAL = [
    ("bccd", "images", "train.json"),
    ("raccoon", "images", "val.json"),
    ("coco_mini", "train2017", "instances_train2017.json"),
    ("coco_mini", "val2017", "instances_val2017.json"),
]


def minimal() -> dict:
    """Two images of 10 x 8 pixels and a class each, with nothing that training does not need."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 10, "height": 8},
            {"id": 3, "file_name": "sub/ü.png", "width": 8, "height": 10},
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 0, "name": "cat"}],
        "annotations": [
            {"image_id": 3, "category_id": 0, "bbox": [1, 2, 3.5, 4]},
            {"image_id": 7, "category_id": 5, "bbox": [0, 0, 10, 8]},
            {"image_id": 3, "category_id": 5, "bbox": [0.5, 0.25, 7, 9]},
        ],
    }


def write(folder, content) -> str:
    (folder / "sub").mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "a.png"), np.full((8, 10, 3), 9, np.uint8))
    (folder / "sub" / "ü.png").write_bytes(cv2.imencode(".png", np.full((10, 8, 3), 7, np.uint8))[1].tobytes())
    path = folder / "x.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def open_minimal(folder, content=None, **options) -> CocoDataset:
    return CocoDataset(folder, write(folder, minimal() if content is None else content), **options)


def message_of(folder, content, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_minimal(folder, content, **options)
    assert "x.json" in str(caught.value)
    return str(caught.value)


def test_minimal_json_gives_boxes_labels_and_files_in_json_order(tmp_path):
    dataset = open_minimal(tmp_path)
    assert len(dataset) == 2 and dataset.image_ids.tolist() == [7, 3]
    assert dataset.category_ids == (0, 5) and dataset.class_names == ("cat", "dog") and dataset.num_classes == 2
    assert dataset.file(1) == tmp_path / "sub" / "ü.png" and dataset.image_size(1) == (10, 8)
    image, target = dataset.read(1)
    assert image.shape == (10, 8, 3) and image.dtype == np.uint8 and image[0, 0].tolist() == [7, 7, 7]
    assert target["boxes"].tolist() == [[1, 2, 4.5, 6], [0.5, 0.25, 7.5, 9.25]]
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [0, 1] and target["labels"].dtype == torch.int64
    assert dataset.box_counts.tolist() == [1, 2] and dataset.box_labels.tolist() == [1, 0, 1]


def test_images_without_annotations_have_empty_targets(tmp_path):
    dataset = open_minimal(tmp_path, minimal() | {"annotations": []})
    target = dataset.target(0)
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,)


def test_writing_into_a_target_leaves_the_data_set_alone(tmp_path):
    dataset = open_minimal(tmp_path)
    dataset.target(0)["boxes"].zero_()
    assert dataset.target(0)["boxes"].tolist() == [[0, 0, 10, 8]]


def test_crowds_are_in_no_target(tmp_path):
    content = minimal()
    content["annotations"][0] |= {"iscrowd": 1, "segmentation": {"counts": [80], "size": [10, 8]}}
    dataset = open_minimal(tmp_path, content)
    assert dataset.target(1)["labels"].tolist() == [1] and dataset.num_crowds == 1


def test_plus_one_boxes_end_at_the_last_pixel_inside(tmp_path):
    content = minimal()
    content["annotations"].append({"image_id": 7, "category_id": 0, "bbox": [4, 4, 0.5, 2]})
    dataset = open_minimal(tmp_path, content, plus_one_boxes=True)
    assert dataset.target(0)["boxes"].tolist() == [[0, 0, 9, 7], [4, 4, 4, 5]]
    assert dataset.target(1)["boxes"].tolist() == [[1, 2, 3.5, 5], [0.5, 0.25, 6.5, 8.25]]


def test_boxes_that_reach_out_are_clipped_counted_and_logged_once(tmp_path, caplog):
    content = minimal()
    content["annotations"] += [
        {"image_id": 7, "category_id": 0, "bbox": [-1, -2, 5, 6]},
        {"image_id": 7, "category_id": 0, "bbox": [8, 6, 4, 2.001]},
        {"image_id": 7, "category_id": 0, "bbox": [1, 1, 9.0000001, 7]},  # noise of rounding: not counted
    ]
    with caplog.at_level(logging.WARNING):
        dataset = open_minimal(tmp_path, content)
    assert dataset.target(0)["boxes"].tolist() == [[0, 0, 10, 8], [0, 0, 4, 4], [8, 6, 10, 8], [1, 1, 10, 8]]
    assert dataset.num_clipped == 2
    assert [record.message for record in caplog.records if "2 of 6 boxes reach out" in record.message]
    assert len(caplog.records) == 1 and "up to 2.0 pixels" in caplog.text


@pytest.mark.parametrize("name, images, annotations", REAL)
def test_real_data_agrees_with_pycocotools(shared, name, images, annotations):
    from pycocotools.coco import COCO

    folder = shared(f"data/{name}")
    dataset = CocoDataset(folder / images, folder / "annotations" / annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "annotations" / annotations))
    assert list(dataset.category_ids) == sorted(coco.getCatIds())
    assert list(dataset.class_names) == [coco.loadCats([number])[0]["name"] for number in dataset.category_ids]
    assert sorted(dataset.image_ids.tolist()) == sorted(coco.getImgIds())
    assert dataset.num_crowds == len(coco.getAnnIds(iscrowd=True))
    for i, image_id in enumerate(dataset.image_ids.tolist()):
        expected = coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=False))
        target = dataset.target(i)
        xywh = torch.tensor([record["bbox"] for record in expected], dtype=torch.float64).reshape(-1, 4)
        xyxy = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1).float()
        torch.testing.assert_close(target["boxes"], xyxy, rtol=0, atol=1e-4)  # the sum may end 1e-5 outside
        ids = [dataset.category_ids[label] for label in target["labels"]]
        assert ids == [record["category_id"] for record in expected]
        assert dataset.file(i).name == coco.loadImgs([image_id])[0]["file_name"]


def test_real_images_have_the_stated_sizes(shared):
    folder = shared("data/raccoon")
    dataset = CocoDataset(folder / "images", folder / "annotations" / "val.json")
    for i in range(0, len(dataset), 8):
        image, target = dataset.read(i)
        height, width = image.shape[:2]
        assert (height, width) == dataset.image_size(i)
        assert (target["boxes"][:, 2:] <= torch.tensor([width, height])).all()


def test_workers_get_arrays_and_not_objects(shared):
    folder = shared("data/coco_mini")
    dataset = CocoDataset(folder / "train2017", folder / "annotations" / "instances_train2017.json")
    copy = pickle.loads(pickle.dumps(dataset))
    torch.testing.assert_close(copy.target(5)["boxes"], dataset.target(5)["boxes"], rtol=0, atol=0)
    values = vars(dataset._data)
    assert {type(value) for value in values.values()} == {np.ndarray, bytes, tuple, int}
    assert all(len(value) == dataset.num_classes for value in values.values() if isinstance(value, tuple))


def _with(key: str, position: int, **changes) -> dict:
    content = minimal()
    content[key][position] |= changes
    return content


def _without(key: str, position: int, field: str) -> dict:
    content = minimal()
    del content[key][position][field]
    return content


MISTAKES = {
    "not json": ("{", "not valid json"),
    "empty file": ("", "not valid json"),
    "a list": ([], "'images' is missing"),
    "no annotations": ({"images": [{}], "categories": [{}]}, "'annotations' is missing"),
    "images as a map": (minimal() | {"images": {"7": {}}}, "'images' is something else"),
    "annotations as numbers": (minimal() | {"annotations": [1]}, "'annotations' is something else"),
    "no images": (minimal() | {"images": []}, "'images' is empty"),
    "no categories": (minimal() | {"categories": []}, "'categories' is empty"),
    "image id twice": (_with("images", 1, id=7), "image ids used twice: image id 7"),
    "image id text": (_with("images", 1, id="3"), "images[1] has id '3'"),
    "category id twice": (_with("categories", 0, id=0), "category ids used twice: category id 0"),
    "image id beyond 64 bits": (_with("images", 0, id=2**63), f"images[0] has id {2**63}"),
    "category id beyond 64 bits": (_with("categories", 1, id=-(2**63) - 1), f"categories[1] has id {-(2**63) - 1}"),
    "image_id beyond 64 bits": (_with("annotations", 0, image_id=2**70), f"has image_id {2**70}"),
    "width beyond 32 bits": (_with("images", 0, width=2**31), f"image 7: width {2**31}, height 8"),
    "file name with half a pair": (_with("images", 1, file_name="\ud800.png"), r"image 3 has '\ud800.png'"),
    "file name with NUL": (_with("images", 1, file_name="a\0.png"), r"image 3 has 'a\x00.png'"),
    "class name with half a pair": (_with("categories", 0, name="\udfff"), r"category 5 has '\udfff'"),
    "crowd as text": (_with("annotations", 2, iscrowd="0"), "annotations[2] (image 3) has iscrowd '0'"),
    "crowd of two": (_with("annotations", 2, iscrowd=2), "annotations[2] (image 3) has iscrowd 2"),
    "crowd as list": (_with("annotations", 2, iscrowd=[]), "annotations[2] (image 3) has iscrowd []"),
    "whole number beyond float64": (_with("annotations", 2, bbox=[1, 2, 10**400, 4]), "has bbox [1, 2, 1000"),
    "too deep": ('{"images": ' + "[" * 100_000, "not valid json: nested too deeply"),
    "no width": (_without("images", 0, "width"), "image 7: width None"),
    "height zero": (_with("images", 0, height=0), "image 7: width 10, height 0"),
    "no file name": (_without("images", 1, "file_name"), "image 3"),
    "unknown image": (_with("annotations", 0, image_id=99, id=12), "annotation 12 (image 99) has image_id 99"),
    "unknown category": (_with("annotations", 1, category_id=1), "annotations[1] (image 7) has category_id 1"),
    "category as text": (_with("annotations", 1, category_id="5"), "has category_id '5'"),
    "no category": (_without("annotations", 1, "category_id"), "has category_id None"),
    "no bbox": (_without("annotations", 2, "bbox"), "annotations[2] (image 3) has bbox None"),
    "three numbers": (_with("annotations", 2, bbox=[1, 2, 3]), "has bbox [1, 2, 3]"),
    "text in bbox": (_with("annotations", 2, bbox=[1, 2, "3", 4]), "has bbox [1, 2, '3', 4]"),
    "not a number": (_with("annotations", 2, bbox=[1, 2, float("nan"), 4]), "has bbox [1, 2, nan, 4]"),
    "infinite": (_with("annotations", 2, bbox=[1, 2, float("inf"), 4]), "has bbox [1, 2, inf, 4]"),
    "zero width": (_with("annotations", 2, bbox=[1, 2, 0, 4], id=8), "annotation 8 (image 3) has bbox [1, 2, 0, 4]"),
    "negative height": (_with("annotations", 2, bbox=[1, 2, 3, -4]), "has bbox [1, 2, 3, -4]"),
    "right of the image": (_with("annotations", 1, bbox=[10, 2, 3, 4]), "has bbox [10, 2, 3, 4] in 10 x 8 pixels"),
    "above the image": (_with("annotations", 1, bbox=[1, -5, 3, 5]), "has bbox [1, -5, 3, 5] in 10 x 8 pixels"),
}


@pytest.mark.parametrize("content, expected", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_mistakes_in_the_json_name_record_and_value(tmp_path, content, expected, plus_one):
    message = message_of(tmp_path, content, plus_one_boxes=plus_one)
    assert expected in message, message
    assert "\n" not in message


def test_degenerate_boxes_are_counted_and_the_tool_is_named(tmp_path):
    content = minimal()
    content["annotations"] += [{"id": n, "image_id": 7, "category_id": 0, "bbox": [1, 1, 0, 1]} for n in range(9)]
    message = message_of(tmp_path, content)
    assert "9 degenerate boxes" in message and "annotation 4 (image 7)" in message and "and 4 more" in message
    assert "annotation 5" not in message and "check_dataset.py --fix" in message


def test_as_many_degenerate_boxes_as_allowed_are_left_out_with_a_log_line(tmp_path, caplog):
    content = minimal()
    content["annotations"][0]["bbox"] = [1, 2, 3, 0]
    with caplog.at_level(logging.WARNING):
        dataset = open_minimal(tmp_path, content, max_degenerate=1)
    assert dataset.target(1)["labels"].tolist() == [1]
    assert "left out 1 degenerate" in caplog.text and "annotations[0] (image 3)" in caplog.text
    content["annotations"][1]["bbox"] = [1, 2, 0, 3]
    assert "2 degenerate boxes" in message_of(tmp_path, content, max_degenerate=1)


def test_degenerate_crowd_does_not_matter(tmp_path):
    content = minimal()
    content["annotations"][0] |= {"iscrowd": 1, "bbox": [0, 0, 0, 0]}
    assert len(open_minimal(tmp_path, content).box_labels) == 2


def test_missing_json_and_missing_folder_say_so(tmp_path):
    path = write(tmp_path, minimal())
    with pytest.raises(UserError, match=r"nothing\.json: the annotation file does not exist"):
        CocoDataset(tmp_path, tmp_path / "nothing.json")
    with pytest.raises(UserError, match="nowhere: the image folder of data set 'mine' does not exist"):
        CocoDataset(tmp_path / "nowhere", path, name="mine")


def test_folder_with_none_of_the_images_is_found_at_once(tmp_path):
    path = write(tmp_path, minimal())
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=re.escape("none of 2 images looked for is in this folder, the first is a.png")):
        CocoDataset(tmp_path / "other", path)


def test_absolute_file_names_are_used_as_they_are_and_named_when_missing(tmp_path):
    content = minimal()
    for record in content["images"]:
        record["file_name"] = str(tmp_path / record["file_name"])
    path = write(tmp_path, content)
    (tmp_path / "other").mkdir()
    assert CocoDataset(tmp_path / "other", path).read(0)[0].shape == (8, 10, 3)
    (tmp_path / "a.png").unlink()
    (tmp_path / "sub" / "ü.png").unlink()
    with pytest.raises(UserError, match=re.escape(f"the first is {tmp_path / 'a.png'};")):
        CocoDataset(tmp_path / "other", path)


@pytest.mark.parametrize("name", ["x" * 5000 + ".png", "a.png/inside.png"])
def test_file_names_that_no_disk_takes_are_missing_files(tmp_path, name):
    content = minimal()
    for record in content["images"]:
        record["file_name"] = name
    assert "none of 2 images looked for" in message_of(tmp_path, content)


@pytest.mark.parametrize("flag", [None, 0, False, 0.0])
def test_flags_that_say_no_are_no_crowds(tmp_path, flag):
    content = _with("annotations", 0, iscrowd=flag)
    assert open_minimal(tmp_path, content).num_crowds == 0


def test_category_without_a_name_is_called_by_its_id(tmp_path):
    content = minimal()
    del content["categories"][0]["name"]
    assert load_annotations(write(tmp_path, content)).class_names == ("cat", "5")
