"""Repairs: a clean set stays as it is, every repairable damage goes away, and what is dropped is what was damaged."""

import copy
import json

import pytest
from doctor_cases import DAMAGES, HEIGHT, WIDTH, clean, write_image, write_images, write_json

from retinanet.data.coco import CocoDataset
from retinanet.data.doctor import Source, errors, examine, repair, write_repaired
from retinanet.engine.coco_json import ground_truth
from retinanet.errors import UserError

REAL = [
    ("bccd", "annotations/train.json", "images"),
    ("raccoon", "annotations/val.json", "images"),
    ("coco_mini", "annotations/instances_val2017.json", "val2017"),
]


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp("images"))
    write_image(folder / "e.png", WIDTH, HEIGHT, 9)
    return folder


def repaired(tmp_path, content, images_dir=None, open_files=False):
    """Return the repaired content, the changes and the findings in it."""
    report = examine(Source("set", write_json(tmp_path / "x.json", content), images_dir), open_files)
    changes = repair(report)
    write_repaired(report, tmp_path / "out" / "fixed.json")
    again = examine(Source("set", tmp_path / "out" / "fixed.json", images_dir), open_files)
    assert again.content == report.content
    return again.content, changes, again.findings


def test_a_clean_set_is_not_changed(tmp_path, images_dir):
    content, changes, findings = repaired(tmp_path, clean(), images_dir)
    assert content == clean() and changes == [] and findings == []


@pytest.mark.parametrize("name, annotations, images", REAL)
def test_real_sets_are_not_changed(shared, tmp_path, name, annotations, images):
    original = json.loads(shared(f"data/{name}/{annotations}").read_text())
    content, changes, _ = repaired(tmp_path, original, shared(f"data/{name}/{images}"))
    assert content == original and changes == []


@pytest.mark.parametrize("name", DAMAGES)
def test_a_repaired_set_has_no_errors_loads_and_needs_no_second_repair(tmp_path, images_dir, name):
    content = clean()
    DAMAGES[name].apply(content)
    found = examine(Source("set", write_json(tmp_path / "x.json", content), images_dir)).findings
    content, changes, findings = repaired(tmp_path, content, images_dir)
    assert not errors(findings) and not any(finding.fix for finding in findings)
    assert {change.kind for change in changes} == {finding.kind for finding in found if finding.fix}
    dataset = CocoDataset(images_dir, tmp_path / "out" / "fixed.json")
    assert dataset.read(len(dataset) - 1)[0].shape == (HEIGHT, WIDTH, 3)
    ground_truth(tmp_path / "out" / "fixed.json")
    assert repaired(tmp_path, content, images_dir)[:2] == (content, [])


@pytest.mark.parametrize(
    "name", ["annotation of no image", "bbox with NaN", "box of width 0", "box right of the image", "box twice"]
)
def test_only_the_damaged_annotation_is_dropped(tmp_path, name):
    content = clean()
    DAMAGES[name].apply(content)
    lost = DAMAGES[name].annotations
    expected = [record for record in content["annotations"] if record["id"] not in lost]
    fixed, changes, _ = repaired(tmp_path, content)
    assert fixed == {**content, "annotations": expected}
    assert sum(change.count for change in changes) == 1


@pytest.mark.parametrize("name", ["image id as text", "image id as fraction", "category id as text"])
def test_ids_that_spell_a_number_become_it(tmp_path, name):
    content = clean()
    DAMAGES[name].apply(content)
    assert repaired(tmp_path, content)[0] == clean()


def test_ids_that_are_words_become_free_numbers(tmp_path):
    content = clean()
    DAMAGES["image id as word"].apply(content)
    expected = json.loads(
        json.dumps(clean()).replace('"image_id": 10,', '"image_id": 1,').replace('"id": 10,', '"id": 1,')
    )
    assert repaired(tmp_path, content)[0] == expected


@pytest.mark.parametrize("form", ["corners", "centers", "shares", "corners as shares"])
def test_boxes_of_another_format_are_written_as_coco_has_them(tmp_path, form):
    content = clean()
    DAMAGES[form].apply(content)
    fixed, changes, _ = repaired(tmp_path, content)
    assert [(change.kind, change.count) for change in changes] == [("box-format", 48)]
    for new, old in zip(fixed["annotations"], clean()["annotations"], strict=True):
        assert new["bbox"] == pytest.approx(old["bbox"], abs=1e-5)


def test_an_area_that_was_width_times_height_follows_the_box_and_a_mask_area_stays(tmp_path):
    content = clean()
    content["annotations"][0] |= {"bbox": [-2, 3, 9, 9], "area": 81}
    content["annotations"][1] |= {"bbox": [-3, 40, 9, 8], "area": 30}
    fixed, _, _ = repaired(tmp_path, content)
    assert (fixed["annotations"][0]["bbox"], fixed["annotations"][0]["area"]) == ([0, 3, 7, 9], 63)
    assert (fixed["annotations"][1]["bbox"], fixed["annotations"][1]["area"]) == ([0, 40, 6, 8], 30)


def test_suspects_of_being_corners_are_left_to_the_user(tmp_path):
    content = clean()
    content["annotations"][0]["bbox"] = [80, 70, 110, 95]
    assert repaired(tmp_path, content)[:2] == (content, [])


def test_images_of_one_id_that_differ_are_dropped_with_their_annotations(tmp_path):
    content = clean()
    content["images"][1]["id"] = 10
    fixed, changes, _ = repaired(tmp_path, content)
    assert [image["id"] for image in fixed["images"]] == [12, 13]
    assert {record["image_id"] for record in fixed["annotations"]} == {12, 13}
    assert [(change.kind, change.count) for change in changes] == [
        ("duplicate-image-id", 2),
        ("duplicate-image-id", 12),
        ("unknown-image", 12),  # those of image 11, which no image has now
    ]


def test_images_of_one_file_are_joined_and_have_the_boxes_of_all_once(tmp_path):
    content = clean()
    content["images"].append(content["images"][0] | {"id": 77})
    same, new = copy.deepcopy(content["annotations"][0]), copy.deepcopy(content["annotations"][0])
    content["annotations"] += [
        same | {"id": 1, "image_id": 77},
        new | {"id": 2, "image_id": 77, "bbox": [50, 50, 9, 9]},
    ]
    fixed, changes, _ = repaired(tmp_path, content)
    assert fixed["images"] == clean()["images"]
    assert fixed["annotations"] == [*clean()["annotations"], new | {"id": 2, "image_id": 10, "bbox": [50, 50, 9, 9]}]
    assert [(change.kind, change.count) for change in changes] == [("duplicate-file-name", 1), ("duplicate-box", 1)]


def test_categories_of_one_id_keep_their_boxes_under_both_names(tmp_path):
    content = clean()
    content["categories"][1]["id"] = 5
    for record in content["annotations"]:
        record["category_id"] = 5
    fixed, _, _ = repaired(tmp_path, content)
    assert fixed["categories"] == [{"id": 5, "name": "dog / cat"}] and len(fixed["annotations"]) == 48


def test_other_keys_of_the_file_and_of_its_records_are_kept(tmp_path):
    content = clean() | {"licenses": [{"id": 1}]}
    content["annotations"][0] |= {"segmentation": [[1, 2, 3, 4, 5, 6]], "score": 0.5, "bbox": [-1, 3, 9, 9]}
    fixed, _, _ = repaired(tmp_path, content)
    assert fixed["licenses"] == [{"id": 1}] and fixed["info"] == {"year": 2017}
    assert fixed["annotations"][0]["segmentation"] == [[1, 2, 3, 4, 5, 6]] and fixed["annotations"][0]["score"] == 0.5


def test_a_missing_size_is_taken_from_the_file_else_the_image_is_dropped(tmp_path, images_dir):
    content = clean()
    del content["images"][0]["width"]
    assert repaired(tmp_path, content, images_dir)[0]["images"] == [
        content["images"][0] | {"width": WIDTH},
        *clean()["images"][1:],
    ]
    assert [image["id"] for image in repaired(tmp_path, content)[0]["images"]] == [11, 12, 13]


def test_several_damages_at_once_are_repaired_at_once(tmp_path, images_dir):
    content = clean()
    skipped = {"section missing", "section of wrong type", "no annotations", "corners", "centers", "shares"}
    for name in DAMAGES.keys() - skipped - {"corners as shares", "image id as word", "image without id"}:
        record = copy.deepcopy(content)
        try:
            DAMAGES[name].apply(record)
        except (KeyError, TypeError, IndexError):
            continue
        content = record
    _, changes, findings = repaired(tmp_path, content, images_dir)
    assert not errors(findings) and len(changes) >= 8


def test_the_input_is_never_overwritten(tmp_path):
    path = write_json(tmp_path / "x.json", clean())
    report = examine(Source("set", path))
    link = tmp_path / "link.json"
    link.symlink_to(path)
    for out in (path, link, tmp_path / "." / "x.json"):
        with pytest.raises(UserError, match="never overwritten"):
            write_repaired(report, out)
    assert json.loads(path.read_text()) == clean()


def test_a_copy_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    report = examine(Source("set", write_json(tmp_path / "x.json", clean())))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_repaired(report, tmp_path / "file" / "fixed.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_repaired(report, tmp_path / "folder.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json", "x.json"]


@pytest.mark.parametrize("content", ["", "[]", "null"])
def test_a_file_without_annotations_cannot_be_repaired(tmp_path, content):
    with pytest.raises(UserError, match="cannot be repaired"):
        repaired(tmp_path, content)


def test_a_repair_that_would_leave_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing would be left in 'images': .*missing-file.* 4 images dropped"):
        repaired(tmp_path, clean(), tmp_path)
    with pytest.raises(UserError, match="nothing would be left in 'categories'"):
        repaired(tmp_path, clean() | {"categories": []})
