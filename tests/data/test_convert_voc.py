"""Pascal VOC -> COCO: boxes by hand and by torchvision's reader, and what goes wrong in real folders."""

import json

import cv2
import numpy as np
import pytest
import torchvision
from conftest import ROOT

from retinanet.data.annotations import load_annotations
from retinanet.data.convert.voc import convert_voc
from retinanet.errors import UserError


def write_image(path, height=50, width=80):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((height, width, 3), 99, np.uint8))


def voc_xml(objects: str, filename="a.jpg", size="<size><width>80</width><height>50</height><depth>3</depth></size>"):
    return f"<annotation><filename>{filename}</filename>{size}{objects}</annotation>"


def voc_object(name, box, difficult=0, more=""):
    corners = "".join(f"<{key}>{x}</{key}>" for key, x in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult>{more}<bndbox>{corners}</bndbox></object>"


@pytest.fixture
def voc(tmp_path):
    """A set of a.jpg (dog, difficult cat), b.jpg (nothing) as in VOCdevkit/VOC2012."""
    root = tmp_path / "VOCdevkit/VOC2012"
    for name in ("a.jpg", "b.jpg"):
        write_image(root / "JPEGImages" / name)
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    objects = voc_object("dog", (1, 1, 80, 50), more=part) + voc_object(" cat ", (11, 21, 20, 21), difficult=1)
    (root / "Annotations").mkdir()
    (root / "Annotations/a.xml").write_text(voc_xml(objects))
    (root / "Annotations/b.xml").write_text(voc_xml("", filename="b.jpg"))
    (root / "ImageSets/Main").mkdir(parents=True)
    (root / "ImageSets/Main/val.txt").write_text("b  1\na -1\n")
    (root / "ImageSets/Main/train.txt").write_text("b\na\n")
    return root


def convert(root, **options):
    return convert_voc(root / "Annotations", root / "JPEGImages", **options)


def boxes_of(made) -> list[tuple]:
    names = {entry["id"]: entry["name"] for entry in made.content["categories"]}
    return [(names[r["category_id"]], *r["bbox"], r["iscrowd"]) for r in made.content["annotations"]]


def test_pixels_counted_from_1_with_the_last_become_continuous_ones_from_0(voc):
    """The dog fills the image; the cat is ten columns of one row."""
    made = convert(voc)
    assert boxes_of(made) == [("dog", 0, 0, 80, 50, 0), ("cat", 10, 20, 10, 1, 1)]
    assert [entry["name"] for entry in made.content["categories"]] == ["cat", "dog"]
    assert made.content["annotations"][1]["area"] == 10 and made.notes == ["1 difficult objects: ignore"]
    assert [image["file_name"] for image in made.content["images"]] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("difficult, expected", [("ignore", [0, 1]), ("keep", [0, 0]), ("drop", [0])])
def test_difficult_objects_are_ignored_kept_or_dropped(voc, difficult, expected):
    assert [row[-1] for row in boxes_of(convert(voc, difficult=difficult))] == expected


def test_plain_corners_stay_as_they_are(voc):
    (voc / "Annotations/a.xml").write_text(voc_xml(voc_object("dog", (0, 2, 10.5, 7))))
    assert boxes_of(convert(voc, corners="plain")) == [("dog", 0, 2, 10.5, 5, 0)]


def test_order_of_classes_and_image_set(voc):
    made = convert(voc, names=["dog", "bird", "cat"], image_set=voc / "ImageSets/Main/train.txt")
    assert [(entry["id"], entry["name"]) for entry in made.content["categories"]] == [
        (1, "dog"),
        (2, "bird"),
        (3, "cat"),
    ]
    assert [image["file_name"] for image in made.content["images"]] == ["b.jpg", "a.jpg"]
    assert {record["image_id"] for record in made.content["annotations"]} == {2}
    made = convert(voc, names=["dog"], image_set=voc / "ImageSets/Main/val.txt")  # a -1
    assert [image["file_name"] for image in made.content["images"]] == ["b.jpg"] and not made.content["annotations"]


def test_size_comes_from_the_file_where_the_xml_has_none_or_zeros(voc):
    for size in ("", "<size><width>0</width><height>0</height></size>"):
        (voc / "Annotations/b.xml").write_text(voc_xml("", filename="b.jpg", size=size))
        assert {(i["width"], i["height"]) for i in convert(voc).content["images"]} == {(80, 50)}


def test_a_stated_filename_that_is_not_there_gives_way_to_the_name_of_the_xml(voc):
    (voc / "Annotations/b.xml").write_text(voc_xml("", filename="C:\\old\\photo.jpg"))
    made = convert(voc)
    assert made.content["images"][1]["file_name"] == "b.jpg" and "1 xml files state" in made.notes[1]


@pytest.mark.parametrize(
    "content, match",
    [
        ("<annotation><object>", "a.xml: no valid xml"),
        (voc_xml("<object><name>dog</name></object>"), "a.xml: object 1 .dog. lacks"),
        (voc_xml(voc_object("dog", (1, 1, "x", 5))), "a.xml: object 1 .dog. lacks"),
        (voc_xml(voc_object("dog", (1, 1, "nan", 5))), "a.xml: object 1 .dog. lacks"),
        (voc_xml(voc_object("", (1, 1, 5, 5))), "object 1 .no name."),
        (voc_xml(voc_object("dog", (10, 1, 5, 5))), "1 boxes without area: a.xml object 1 .dog. has 10, 1, 5, 5"),
    ],
)
def test_damaged_files_are_named(voc, content, match):
    (voc / "Annotations/a.xml").write_text(content)
    with pytest.raises(UserError, match=match):
        convert(voc)


def test_mistakes_with_folders_lists_and_names(voc, tmp_path):
    with pytest.raises(UserError, match="cat occur in .* are not among dog"):
        convert(voc, names=["dog"])
    with pytest.raises(UserError, match="no xml files"):
        convert_voc(voc / "JPEGImages", voc / "JPEGImages")
    with pytest.raises(UserError, match="b.xml: its image is not in"):
        (voc / "JPEGImages/b.jpg").unlink()
        convert(voc)
    (voc / "ImageSets/Main/train.txt").write_text("a\nc\n")
    with pytest.raises(UserError, match="1 of its images have no xml: .*c.xml"):
        convert(voc, image_set=voc / "ImageSets/Main/train.txt")
    with pytest.raises(UserError, match="difficult: 'hide' is not one of ignore, keep, drop"):
        convert(voc, difficult="hide")


def test_torchvision_reads_the_same_objects(voc, tmp_path):
    made = convert(voc, image_set=voc / "ImageSets/Main/train.txt", difficult="keep")
    theirs = torchvision.datasets.VOCDetection(str(tmp_path), year="2012", image_set="train")
    expected = []
    for image, target in theirs:
        for entry in target["annotation"].get("object", []):
            x1, y1, x2, y2 = (int(entry["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            assert x2 <= image.width and y2 <= image.height
            expected.append((entry["name"].strip(), x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1, 0))
    assert boxes_of(made) == expected and len(expected) == 2


def test_real_boxes_survive_the_way_to_voc_and_back(shared, tmp_path, monkeypatch, capsys):
    """Blood cells as VOC files, made here, through the tool: equal boxes, classes and images; training accepts it."""
    source = json.loads((shared("data/bccd") / "annotations/val.json").read_text())
    names = {entry["id"]: entry["name"] for entry in source["categories"]}
    rows = {image["id"]: [] for image in source["images"]}
    for record in source["annotations"]:
        x, y, w, h = record["bbox"]
        rows[record["image_id"]].append(voc_object(names[record["category_id"]], (x + 1, y + 1, x + w, y + h)))
    for image in source["images"]:
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height></size>"
        text = voc_xml("".join(rows[image["id"]]), image["file_name"], size)
        (tmp_path / image["file_name"]).with_suffix(".xml").write_text(text)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import convert_dataset

    images = str(shared("data/bccd") / "images")
    arguments = ["--annotations", str(tmp_path), "--images", images, "--classes", ",".join(names.values())]
    convert_dataset.main(["voc", *arguments, "--output", str(tmp_path / "back.json")])
    back = json.loads((tmp_path / "back.json").read_text())
    assert back["categories"] == source["categories"] and len(back["images"]) == 72

    def content(coco):
        files = {image["id"]: image["file_name"] for image in coco["images"]}
        return sorted((files[r["image_id"]], r["category_id"], *r["bbox"]) for r in coco["annotations"])

    assert content(back) == content(source) and len(back["annotations"]) == 945
    assert load_annotations(tmp_path / "back.json").boxes.shape == (945, 4)
    assert "Platelets" in capsys.readouterr().out
