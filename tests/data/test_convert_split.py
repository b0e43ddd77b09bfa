"""Training and validation out of one json: no image on both sides, every class on both where it can be."""

import json

import pytest
from conftest import ROOT

from retinanet.data.convert.split import split_images
from retinanet.errors import UserError


def coco(classes: list[list[int]], names=None) -> dict:
    """Return a set with an image for each list of category ids."""
    images = [{"id": 10 + i, "file_name": (names or [f"{i}.jpg" for i in range(99)])[i]} for i in range(len(classes))]
    annotations = [
        {"id": 100 * i + j, "image_id": 10 + i, "category_id": label, "bbox": [0, 0, 5, 5], "iscrowd": 0}
        for i, labels in enumerate(classes)
        for j, label in enumerate(labels)
    ]
    ids = sorted({label for labels in classes for label in labels})
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label, "name": f"class {label}"} for label in ids],
    }


def ids(part: dict) -> set[int]:
    return {image["id"] for image in part["images"]}


def labels(part: dict) -> set[int]:
    return {record["category_id"] for record in part["annotations"]}


def test_parts_are_disjoint_whole_and_repeatable():
    whole = coco([[1], [1, 2], [], [2], [1], [1], [2], [1], [], [1]])
    train, val, notes = split_images(whole, 0.3, seed=1)
    assert len(val["images"]) == 3 and not ids(train) & ids(val) and ids(train) | ids(val) == ids(whole)
    for part in (train, val):
        assert {record["image_id"] for record in part["annotations"]} <= ids(part)
        assert part["categories"] == whole["categories"]
    assert len(train["annotations"]) + len(val["annotations"]) == len(whole["annotations"]) and not notes
    assert split_images(whole, 0.3, seed=1)[0] == train
    assert any(ids(split_images(whole, 0.3, seed=seed)[1]) != ids(val) for seed in range(2, 6))


@pytest.mark.parametrize("seed", range(20))
def test_a_class_of_two_images_is_on_both_sides(seed):
    """Of 20 images two hold class 7 and two class 8; a plain draw of 4 has both in 13 % of the cases."""
    whole = coco([[1]] * 16 + [[7]] * 2 + [[8]] * 2)
    train, val, notes = split_images(whole, 0.2, seed)
    assert labels(train) == labels(val) == {1, 7, 8} and len(val["images"]) == 4 and not notes


def test_a_class_of_one_image_is_named():
    _, _, notes = split_images(coco([[1]] * 9 + [[1, 5]]), 0.2)
    assert len(notes) == 1 and "has no box of class 5" in notes[0]


def test_images_of_a_group_stay_together():
    names = [f"clip{i // 5}_{i}.jpg" for i in range(20)]
    whole = coco([[1]] * 20, names)
    train, val, _ = split_images(whole, 0.25, group_by=r"clip(\d+)_")
    assert len(val["images"]) == 5 and len({image["file_name"][:5] for image in val["images"]}) == 1
    with pytest.raises(UserError, match="does not match the image 'clip0_0.jpg'"):
        split_images(whole, 0.25, group_by="video")
    with pytest.raises(UserError, match="no regular expression"):
        split_images(whole, 0.25, group_by="(")
    with pytest.raises(UserError, match="in 1 group cannot be split"):
        split_images(whole, 0.25, group_by="clip")


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_each_side_gets_an_image(share):
    train, val, _ = split_images(coco([[1], [1]]), share)
    assert len(train["images"]) == len(val["images"]) == 1


def test_shares_outside_0_to_1_and_single_images_are_refused():
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            split_images(coco([[1], [1]]), share)
    with pytest.raises(UserError, match="cannot be split"):
        split_images(coco([[1]]), 0.5)


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import convert_dataset

    return convert_dataset.main


def test_tool_writes_both_parts(tool, tmp_path, capsys):
    whole = coco([[1], [2], [1], [2]])
    for image in whole["images"]:
        image |= {"width": 10, "height": 10}
    (tmp_path / "all.json").write_text(json.dumps(whole))
    arguments = ["split", "--annotations", str(tmp_path / "all.json"), "--output", str(tmp_path / "my.json")]
    tool([*arguments, "--val-share", "0.5"])
    parts = [json.loads((tmp_path / f"my_{name}.json").read_text()) for name in ("train", "val")]
    assert [len(part["images"]) for part in parts] == [2, 2] and labels(parts[0]) == labels(parts[1]) == {1, 2}
    assert "my_val.json: 2 images, 2 boxes (class 1 1, class 2 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["yolo", "--images", "x", "--labels", "y"], "--classes is missing"),
        (["yolo", "--images", "x"], "--labels is missing"),
        (["voc", "--images", "x"], "--annotations is missing"),
        (["split"], "--annotations is missing"),
        (["voc", "--annotations", "x", "--images", "x", "--classes", "none.txt"], "there is no file none.txt"),
        (["voc", "--annotations", "x", "--images", "x", "--classes", "a,,b"], "an empty or no class name"),
    ],
)
def test_tool_names_what_is_missing(tool, arguments, match):
    with pytest.raises(UserError, match=match):
        tool([*arguments, "--output", "out.json"])


def test_tool_writes_json_only(tool):
    with pytest.raises(UserError, match="not called .json"):
        tool(["split", "--annotations", "x.json", "--output", "out", "--val-share", "0.5"])
