"""YOLO txt -> COCO: boxes by hand, a real set there and back, and what goes wrong in real folders."""

import json

import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from retinanet.data.convert.coco_file import read_names
from retinanet.data.convert.yolo import convert_yolo
from retinanet.errors import UserError

NAMES = ["dog", "cat"]


@pytest.fixture
def yolo(tmp_path):
    """Images a.png, inner/b.png (100 x 200) with labels for a alone."""
    for name in ("images/a.png", "images/inner/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((100, 200, 3), np.uint8))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("1 0.5 0.5 0.1 0.2\n\n0 0.25 0.5 0.5 1.0\n")
    return tmp_path


def convert(folder, **options):
    return convert_yolo(folder / "images", folder / "labels", NAMES, **options)


def boxes_of(made) -> list[tuple]:
    names = {entry["id"]: entry["name"] for entry in made.content["categories"]}
    return [(names[r["category_id"]], *r["bbox"]) for r in made.content["annotations"]]


def test_shares_of_the_image_become_pixels_and_class_0_is_the_first_name(yolo):
    made = convert(yolo)
    assert boxes_of(made) == [("cat", 90, 40, 20, 20), ("dog", 0, 0, 100, 100)]
    assert [(e["id"], e["name"]) for e in made.content["categories"]] == [(1, "dog"), (2, "cat")]
    assert [(i["file_name"], i["width"], i["height"]) for i in made.content["images"]] == [
        ("a.png", 200, 100),
        ("inner/b.png", 200, 100),
    ]
    assert made.notes == ["1 without a label file: no objects"]


@pytest.mark.parametrize(
    "line, match",
    [
        ("0 0.5 0.5 0.1", "a.txt line 2: 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "the sixth number is a score"),
        ("2 0.5 0.5 0.1 0.1", "class 2 is not one of 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5 is not one of"),
        ("-1 0.5 0.5 0.1 0.1", "class -1 is not one of"),
        ("dog 0.5 0.5 0.1 0.1", "are not numbers"),
        ("0 0.5 nan 0.1 0.1", "not finite"),
        ("0 100 50 20 20", "reaches out of the image"),
        ("0 0.99 0.5 0.1 0.1", "reaches out of the image"),
        ("0 0.5 0.5 0 0.1", "has no area"),
        ("0 0.5 0.5 -0.1 0.1", "has no area"),
        ("0 0.1 0.1 0.3 0.1 0.2 0.4", "a polygon of 3 points; --polygons box"),
    ],
)
def test_bad_lines_are_named(yolo, line, match):
    (yolo / "labels/a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(UserError, match=match):
        convert(yolo)


def test_polygons_become_the_boxes_around_them_on_request(yolo):
    (yolo / "labels/a.txt").write_text("1 0.1 0.1 0.3 0.1 0.2 0.4\n")
    made = convert(yolo, polygons="box")
    assert boxes_of(made) == [("cat", 20, 10, 40, 30)] and "1 polygons became boxes" in made.notes


def test_rounding_at_the_border_is_clipped_and_counted(yolo):
    (yolo / "labels/a.txt").write_text("0 0.05 0.5 0.1004 0.2\n")
    made = convert(yolo)
    assert boxes_of(made) == [("dog", 0, 40, 20.04, 20)] and "1 boxes clipped to the image" in made.notes


def test_stray_labels_and_images_of_one_name_do_not_pass_in_silence(yolo):
    (yolo / "labels/classes.txt").write_text("dog\ncat\n")
    (yolo / "labels/gone.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    notes = convert(yolo).notes
    assert "1 label files without an image" in notes[-1] and "gone.txt" in notes[-1] and "classes" not in notes[-1]
    cv2.imwrite(str(yolo / "images/a.jpg"), np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(UserError, match="two images of one name, a"):
        convert(yolo)


def test_a_turned_photo_has_the_size_that_viewers_show(yolo):
    image = Image.new("RGB", (200, 100))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(yolo / "images/turned.jpg", exif=exif)
    entry = next(i for i in convert(yolo).content["images"] if i["file_name"] == "turned.jpg")
    assert (entry["width"], entry["height"]) == (100, 200)


def test_names_come_from_text_and_yaml(tmp_path):
    (tmp_path / "names.txt").write_text("dog\n\n traffic light \n")
    assert read_names(tmp_path / "names.txt") == ["dog", "traffic light"]
    for text in ("names: [dog, cat]\nnc: 2\n", "names: {1: cat, 0: dog}\n"):
        (tmp_path / "data.yaml").write_text(text)
        assert read_names(tmp_path / "data.yaml") == ["dog", "cat"]
    for text, match in (
        ("names: {0: dog, 2: cat}\n", "count from 0"),
        ("nc: 2\n", "key `names`"),
        ("names: [dog, dog]\n", "equal names dog"),
        ("names: []\n", "no class name"),
    ):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(UserError, match=match):
            read_names(tmp_path / "data.yaml")


def test_real_boxes_survive_the_way_to_yolo_and_back(shared, tmp_path, monkeypatch, capsys):
    """Blood cells as YOLO files with 6 decimals, made here, through the tool: boxes equal to 1e-3 pixels."""
    folder = shared("data/bccd")
    source = json.loads((folder / "annotations/val.json").read_text())
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for image in source["images"]:
        (tmp_path / "images" / image["file_name"]).symlink_to(folder / "images" / image["file_name"])
        rows = [record for record in source["annotations"] if record["image_id"] == image["id"]]
        lines = []
        for record in rows:
            (x, y, w, h), width, height = record["bbox"], image["width"], image["height"]
            shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(" ".join([str(record["category_id"] - 1), *(f"{share:.6f}" for share in shares)]))
        (tmp_path / "labels" / image["file_name"]).with_suffix(".txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_dataset
    import convert_dataset

    (tmp_path / "data.yaml").write_text("names: [RBC, WBC, Platelets]\n")
    arguments = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    arguments += ["--classes", str(tmp_path / "data.yaml"), "--output", str(tmp_path / "back.json")]
    convert_dataset.main(["yolo", *arguments])
    back = json.loads((tmp_path / "back.json").read_text())
    assert back["categories"] == source["categories"]

    def content(coco):
        files = {image["id"]: image["file_name"] for image in coco["images"]}
        rows = sorted((files[r["image_id"]], r["category_id"], *map(round, r["bbox"])) for r in coco["annotations"])
        exact = sorted((files[r["image_id"]], r["category_id"], *r["bbox"]) for r in coco["annotations"])
        return rows, np.array([row[2:] for row in exact])

    (rows, boxes), (expected_rows, expected) = content(back), content(source)
    assert rows == expected_rows
    assert np.abs(np.sort(boxes, 0) - np.sort(expected, 0)).max() < 1e-3
    check_dataset.main(["--annotations", str(tmp_path / "back.json"), "--images-dir", str(tmp_path / "images")])
    assert "no errors" in capsys.readouterr().out
