"""Damage by machine: whatever a json holds, the doctor answers, and what it repairs can be trained and scored on."""

import copy
import json

import numpy as np
import pytest
from doctor_cases import clean, write_images, write_json
from fuzz_profile import count, tried
from hypothesis import given
from hypothesis import strategies as st

from retinanet.data.coco import CocoDataset
from retinanet.data.doctor import Source, errors, examine, quick_check, repair, write_repaired
from retinanet.engine.coco_json import ground_truth
from retinanet.errors import UserError

NUMBERS = st.one_of(
    st.integers(-3, 130),
    st.sampled_from([0, 5, 2, 10, 11, 1000, 2**31, 2**63, -(2**63), 10**30, 10**400]),
    st.floats(-10, 130),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=4), NUMBERS.map(str))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
BOXES = st.lists(NUMBERS, min_size=4, max_size=4)
KEYS = {
    "images": ["id", "file_name", "width", "height"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd"],
    "categories": ["id", "name"],
}


@st.composite
def damaged(draw) -> dict:
    """Return the clean set after one to six edits: a value replaced or removed, a record copied, replaced or moved."""
    content = clean()
    content["annotations"] = content["annotations"][:: draw(st.integers(1, 12))]
    for _ in range(draw(st.integers(1, 6))):
        section = draw(st.sampled_from(list(KEYS)))
        records = content.get(section)
        if not isinstance(records, list) or not records:
            continue
        row = draw(st.integers(0, len(records) - 1))
        key = draw(st.sampled_from(KEYS[section]))
        edit = draw(st.sampled_from(["replace", "replace", "remove", "copy", "junk", "section"]))
        if edit == "section":
            content[section] = draw(VALUES)
        elif edit == "junk":
            records.insert(row, draw(VALUES))
        elif isinstance(records[row], dict):
            record = copy.deepcopy(records[row]) if edit == "copy" else records[row]
            record[key] = draw(BOXES if key == "bbox" and draw(st.booleans()) else VALUES)
            if edit == "copy":
                records.append(record)
            if edit == "remove":
                del record[key]
    return content


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_images(folder / "images")
    return folder


def answer(place, content):
    """Examine `content`; with no errors it has to load, after a repair too unless that is refused for a reason."""
    path = write_json(place / "x.json", content)
    source = Source("x", path, place / "images")
    report = examine(source)
    assert len(json.dumps(report.as_dict())) > 0 and all(str(finding) for finding in report.findings)
    assert [str(one) for one in quick_check(source)] == [str(one) for one in report.findings if one.severity != "info"]
    if not errors(report.findings):
        check_usable(place, path)
        count("COCO json, values", "right")
    else:
        count("COCO json, values", "refused")
    try:
        repair(report)
    except UserError as error:
        assert "cannot be repaired" in str(error)
        count("COCO json, --fix", "refused")
        return
    count("COCO json, --fix", "right")
    write_repaired(report, place / "fixed.json")
    again = examine(Source("fixed", place / "fixed.json", place / "images"))
    assert not errors(again.findings) and not any(finding.fix for finding in again.findings)
    check_usable(place, place / "fixed.json")
    assert repair(again) == []


def check_usable(place, path):
    """What is loaded equals what a few lines of Python read in the json: boxes in their order, clipped, no crowds."""
    dataset, content = CocoDataset(place / "images", path), json.loads(path.read_bytes())
    labels = {number: label for label, number in enumerate(sorted(entry["id"] for entry in content["categories"]))}
    for i, image in enumerate(content["images"]):
        target, sides = dataset.target(i), np.array([image["width"], image["height"]] * 2)
        rows = [row for row in content["annotations"] if row["image_id"] == image["id"] and not row.get("iscrowd")]
        xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        corners = np.clip(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1), 0, sides)
        np.testing.assert_array_equal(target["boxes"].numpy(), corners.astype(np.float32))
        assert target["labels"].tolist() == [labels[row["category_id"]] for row in rows]
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
    ground_truth(path)


@tried(150)
@given(content=damaged())
def test_damaged_sets_are_answered_and_repaired(place, content):
    answer(place, content)


@tried(150)
@given(content=VALUES | st.dictionaries(st.sampled_from([*KEYS, "info"]), VALUES | st.lists(VALUES, max_size=4)))
def test_any_json_is_answered(place, content):
    answer(place, content)


@tried(60)
@given(data=st.binary(max_size=60), cut=st.integers(0, 4000), at=st.integers(0, 4000), flip=st.integers(0, 255))
def test_any_bytes_are_answered(place, data, cut, at, flip):
    text = bytearray(json.dumps(clean()).encode())
    text[at] = flip
    for content in (data, text[:cut] + data, bytes(text)):
        (place / "b.json").write_bytes(content)
        report = examine(Source("b", place / "b.json", place / "images"))
        assert json.dumps(report.as_dict())
        count("COCO json, bytes", "refused" if errors(report.findings) else "right")
