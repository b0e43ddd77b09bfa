"""Damage by machine: whatever a json holds, the doctor answers, and what it repairs can be trained and scored on."""

import copy
import json

import pytest
from doctor_cases import clean, write_images, write_json
from fuzz_profile import tried
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
    try:
        repair(report)
    except UserError as error:
        assert "cannot be repaired" in str(error)
        return
    write_repaired(report, place / "fixed.json")
    again = examine(Source("fixed", place / "fixed.json", place / "images"))
    assert not errors(again.findings) and not any(finding.fix for finding in again.findings)
    check_usable(place, place / "fixed.json")
    assert repair(again) == []


def check_usable(place, path):
    dataset = CocoDataset(place / "images", path)
    for i in range(len(dataset)):
        boxes, (height, width) = dataset.target(i)["boxes"], dataset.image_size(i)
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
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
