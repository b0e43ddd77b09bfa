"""What the doctor finds in a json: nothing in a clean one, and every kind of damage with the ids of its culprits."""

import json
import random

import numpy as np
import pytest
from doctor_cases import ALL_BOXES, DAMAGES, clean, write_images, write_json

from retinanet.data.coco import CocoDataset
from retinanet.data.doctor import KINDS, Source, errors, examine, quick_check
from retinanet.data.doctor.boxes import find_copies
from retinanet.data.doctor.layout import CENTER, COCO_FORM, CORNERS, Layout, guess_layout
from retinanet.data.doctor.table import key_of, tabulate
from retinanet.engine.coco_json import ground_truth
from retinanet.errors import UserError

OF_FILES = {"missing-file", "renamed-file", "unlisted-file", "empty-file", "broken-image", "size-mismatch"}
OF_FILES |= {"exif-turned", "exif-unclear", "duplicate-image", "images-dir"}
OF_SEVERAL = {"leakage", "possible-leakage", "different-categories", "anchor-coverage"}
WITHOUT_REMEDY = {"json", "nothing"}


@pytest.fixture(scope="module")
def images_dir(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def report_of(tmp_path, content, images_dir=None, **options):
    return examine(Source("set", write_json(tmp_path / "x.json", content), images_dir, **options))


def test_a_clean_set_has_no_findings(tmp_path, images_dir):
    report = report_of(tmp_path, clean(), images_dir)
    assert report.findings == []
    assert report.overview == {
        "images": 4,
        "boxes": 48,
        "crowds": 0,
        "empty_images": 0,
        "small": 48,
        "medium": 0,
        "large": 0,
        "classes": {"dog": {"boxes": 24, "images": 4}, "cat": {"boxes": 24, "images": 4}},
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_with_the_ids_of_its_culprits(tmp_path, name):
    damage, content = DAMAGES[name], clean()
    damage.apply(content)
    found = [finding for finding in report_of(tmp_path, content).findings if finding.kind == damage.kind]
    finding = found[0]
    assert finding.image_ids == damage.images and finding.annotation_ids == damage.annotations
    assert finding.severity == KINDS[damage.kind].severity
    named = [*map(str, damage.annotations), *map(str, damage.images)]
    assert not named or named[0] in finding.examples[0]


def test_every_kind_has_a_case():
    assert {damage.kind for damage in DAMAGES.values()} | OF_FILES | OF_SEVERAL | WITHOUT_REMEDY == set(KINDS)


@pytest.mark.parametrize("name", DAMAGES)
def test_what_training_or_evaluation_refuses_is_an_error_and_nothing_else_stops_them(tmp_path, images_dir, name):
    content = clean()
    DAMAGES[name].apply(content)
    path = write_json(tmp_path / "x.json", content)
    wrong = errors(examine(Source("set", path)).findings)
    try:
        CocoDataset(images_dir, path)
        ground_truth(path)
        refused = False
    except (UserError, ArithmeticError, UnicodeError):
        refused = True
    # errors that load all the same and train on nonsense: boxes of another format, "0" taken for true
    nonsense = {finding.kind for finding in wrong} <= {"box-format", "iscrowd", "file-name"}
    assert refused == bool(wrong) or (wrong and nonsense)


@pytest.mark.parametrize(
    "content, kind",
    [
        ("", "json"),
        ('{"images": [', "json"),
        ("\x00", "json"),
        ("[" * 100_000, "json"),
        ("[]", "json"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}]', "json"),
        ("null", "json"),
        ("3", "json"),
        ("{}", "structure"),
        ('{"images": [], "annotations": [], "categories": []}', "nothing"),
    ],
)
def test_a_file_that_holds_no_annotations_says_so(tmp_path, content, kind):
    assert kind in {finding.kind for finding in errors(report_of(tmp_path, content).findings)}


def test_a_missing_file_is_a_finding(tmp_path):
    (finding,) = examine(Source("set", tmp_path / "x.json")).findings
    assert finding.kind == "json" and "does not exist" in finding.message


def test_ids_that_spell_one_number_mean_the_same():
    assert [key_of(value) for value in (12, 12.0, "12", " 12 ")] == [12] * 4
    assert [key_of(value) for value in ("012", "1e1", "-0", "dog")] == ["012", "1e1", 0, "dog"]
    assert [key_of(value) for value in (None, True, 1.5, [1], {}, "", float("nan"), 1e300)] == [None] * 8


def test_a_table_places_everything_that_is_usable():
    content = clean()
    content["annotations"] = [
        {"image_id": 13, "category_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 1},
        {"image_id": 99, "category_id": 5, "bbox": ["1", "2", "3", "4"]},
        {"image_id": "11", "bbox": None},
        7,
    ]
    table = tabulate(content)
    assert table.rows.tolist() == [3, -1, 1] and table.labels.tolist() == [1, 0, -1]
    np.testing.assert_array_equal(table.boxes, [[1, 2, 3, 4], [1, 2, 3, 4], [np.nan] * 4])
    assert table.crowds.tolist() == [True, False, False]
    assert table.box_sizes.tolist() == [[100, 120], [0, 0], [100, 120]]
    assert table.name_of("annotations", 1) == "annotations[1] (image 99)"


def test_categories_counted_from_0_and_from_1_are_explained(tmp_path):
    content = clean()
    content["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    for record in content["annotations"]:
        record["category_id"] = int(record["category_id"] == 2)
    (finding,) = (one for one in report_of(tmp_path, content).findings if one.kind == "unknown-category")
    assert finding.count == 24 and "if they were larger by 1" in finding.message


@pytest.mark.parametrize("form", ["corners", "centers", "shares", "corners as shares"])
def test_boxes_of_another_format_are_read_as_what_they_are(tmp_path, form):
    content, right = clean(), report_of(tmp_path, clean()).boxes
    DAMAGES[form].apply(content)
    boxes = report_of(tmp_path, content).boxes
    np.testing.assert_allclose(boxes.xywh, right.xywh, rtol=1e-12)
    assert boxes.usable.all() and not boxes.partly.any()


def test_large_boxes_at_the_middle_are_not_taken_for_corners(tmp_path):
    # x < w and y < h everywhere, as in x1, y1, x2, y2; a few reach out by some pixels, as hand-drawn boxes do
    content, generator = clean(), np.random.default_rng(0)
    for record in content["annotations"]:
        x, y = generator.uniform(1, 15, 2)
        record["bbox"] = [x, y, generator.uniform(80, 110), generator.uniform(60, 90)]
    report = report_of(tmp_path, content)
    assert report.boxes.layout.form == "x, y, width, height"
    assert "box-format" not in {finding.kind for finding in report.findings}


def test_few_boxes_prove_no_format(tmp_path):
    content = clean()
    content["annotations"] = content["annotations"][36:]
    DAMAGES["corners"].apply(content)
    kinds = {finding.kind for finding in report_of(tmp_path, content).findings}
    assert "box-format" not in kinds and "xyxy-suspect" in kinds


def test_real_sets_have_no_errors_and_keep_their_format(shared):
    for name in ("bccd/annotations/train", "raccoon/annotations/val", "coco_mini/annotations/instances_train2017"):
        report = examine(Source(name, shared(f"data/{name}.json")))
        assert not errors(report.findings) and report.boxes.layout.form == "x, y, width, height"


def test_real_boxes_are_recognised_in_every_format(shared, tmp_path):
    for name in ("bccd/annotations/train", "raccoon/annotations/train", "coco_mini/annotations/instances_val2017"):
        content = json.loads(shared(f"data/{name}.json").read_text())
        right = report_of(tmp_path, content).boxes
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for record in content["annotations"]:
            (x, y, w, h), (width, height) = record["bbox"], sizes[record["image_id"]]
            record["bbox"] = [x / width, y / height, (x + w) / width, (y + h) / height]
        boxes = report_of(tmp_path, content).boxes
        assert str(boxes.layout) == "x1, y1, x2, y2 as shares of the image side (0..1)"
        np.testing.assert_allclose(boxes.xywh, right.xywh, atol=1e-9)


@pytest.mark.parametrize("form", [COCO_FORM, CORNERS, CENTER])
@pytest.mark.parametrize("name", ["bccd/annotations/train", "raccoon/annotations/train"])
def test_samples_of_real_sets_show_their_format(shared, name, form):
    table = tabulate(json.loads(shared(f"data/{name}.json").read_text()))
    generator, sizes = np.random.default_rng(0), table.box_sizes
    x, y, w, h = table.boxes.T
    written = {COCO_FORM: [x, y, w, h], CORNERS: [x, y, x + w, y + h], CENTER: [x + w / 2, y + h / 2, w, h]}[form]
    boxes = np.stack(written, axis=1)
    for _ in range(40):
        rows = generator.permutation(len(boxes))[:60]
        assert guess_layout(boxes[rows], sizes[rows]) == Layout(form)


def test_crowds_are_judged_for_nothing_but_their_numbers(tmp_path):
    content = clean()
    content["annotations"][0] |= {"iscrowd": 1, "bbox": [-500, 0, 0, 0]}
    assert [finding.kind for finding in report_of(tmp_path, content).findings] == ["crowds"]


def test_degenerate_boxes_that_the_catalog_admits_are_a_warning(tmp_path):
    content = clean()
    content["annotations"][0]["bbox"][2] = 0
    content["annotations"][1]["bbox"][3] = 0
    for allowed, severity in ((2, "warning"), (1, "error")):
        (finding,) = report_of(tmp_path, content, max_degenerate=allowed).findings
        assert (finding.kind, finding.severity, finding.count) == ("degenerate-box", severity, 2)


def test_copies_agree_with_a_loop_over_all_pairs():
    generator = np.random.default_rng(3)
    xywh = np.concatenate([generator.uniform(0, 50, (150, 2)), generator.uniform(5, 60, (150, 2))], axis=1)
    xywh = np.concatenate([xywh, xywh + generator.uniform(-0.4, 0.4, xywh.shape), xywh[:40]])
    rows, labels = generator.integers(0, 2, len(xywh)), generator.integers(0, 2, len(xywh))
    rows[150:300], labels[150:300] = rows[:150], labels[:150]

    def iou(a, b):
        w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
        h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
        common = max(w, 0) * max(h, 0)
        return common / (a[2] * a[3] + b[2] * b[3] - common)

    expected = [
        any(rows[i] == rows[j] and labels[i] == labels[j] and iou(xywh[i], xywh[j]) >= 0.98 for j in range(i))
        for i in range(len(xywh))
    ]
    assert 30 < sum(expected) < 200
    assert find_copies(xywh, rows, labels).tolist() == expected


def test_the_first_of_equal_boxes_is_kept_and_no_boxes_have_no_copies():
    box = np.array([[1.0, 2, 3, 4]])
    zeros = np.zeros(1000, dtype=np.int64)
    assert find_copies(np.repeat(box, 1000, axis=0), zeros, zeros).tolist() == [False] + [True] * 999
    assert find_copies(np.zeros((0, 4)), zeros[:0], zeros[:0]).tolist() == []


def test_boxes_of_different_classes_or_images_are_no_copies(tmp_path):
    content = clean()
    content["annotations"][1]["bbox"] = list(content["annotations"][0]["bbox"])  # dog and cat
    content["annotations"][12]["bbox"] = list(content["annotations"][0]["bbox"])  # two images
    assert not report_of(tmp_path, content).boxes.copies.any()


def test_the_short_form_has_errors_and_warnings_and_no_infos(tmp_path, images_dir):
    content = clean()
    content["annotations"][0]["area"] = 1000  # info
    content["annotations"][1]["bbox"] = [-2, 3, 9, 9]  # warning
    content["annotations"][2]["bbox"] = [-2, 3, 1, 9]  # error
    found = quick_check(Source("set", write_json(tmp_path / "x.json", content), images_dir))
    assert {finding.severity for finding in found} == {"error", "warning"}


def test_findings_of_many_boxes_name_all_ids_and_show_few(tmp_path):
    content = clean()
    for record in content["annotations"]:
        record["area"] = 99999
    (finding,) = report_of(tmp_path, content).findings
    assert finding.annotation_ids == ALL_BOXES and len(finding.examples) == 5
    assert str(finding).endswith("and 43 more")
    assert json.loads(json.dumps(finding.as_dict()))["count"] == 48


def test_order_of_records_changes_no_finding(tmp_path):
    content = clean()
    content["annotations"][0]["bbox"] = [-2, 3, 9, 9]
    first = report_of(tmp_path, content).findings
    random.Random(0).shuffle(content["annotations"])
    assert report_of(tmp_path, content).findings == first
