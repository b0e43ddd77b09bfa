"""Files for `tools/test_net.py --predictions` by machine: refused with the place, or scored as pycocotools does."""

import contextlib
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz_profile import count, tried, within
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import test_net as tool  # noqa: E402

from retinanet.engine.coco_metrics import METRICS
from retinanet.errors import UserError

IDS = st.sampled_from([0, 1, 2, 7, -5, 10**6, 2**31, 2**53 + 1, 2**63 - 1])
NAMES = st.sampled_from(["a", "b", "dog", "Hund ü", "犬", "", "a b/c"])
SIDES = st.sampled_from([1, 5, 12.5, 31.99, 32, 33, 95, 96, 200])
PLACES = st.integers(0, 40) | st.floats(0, 300).map(lambda value: round(value, 2))
BOX = st.tuples(PLACES, PLACES, SIDES, SIDES).map(list)
SCORES = st.sampled_from([0, 0.1, 0.5, 0.5, 0.9, 1, 1e-300, 5, -1]) | st.floats(0, 1)


@st.composite
def scenes(draw) -> tuple[dict, list]:
    """Return a whole COCO json and results for it, with ids as users have them; crowds, empty images, no detection."""
    images = draw(st.lists(IDS, min_size=1, max_size=4, unique=True))
    categories = draw(st.lists(IDS, min_size=1, max_size=3, unique=True))
    owner = st.tuples(st.sampled_from(images), st.sampled_from(categories))
    annotations = []
    for number in range(draw(st.integers(0, 8))):
        (image, category), box = draw(owner), draw(BOX)
        row = {"id": number, "image_id": image, "category_id": category, "bbox": box}  # ids from 0: pycocotools errs
        row |= draw(st.sampled_from([{}, {"area": box[2] * box[3]}, {"area": box[2] * box[3] / 2}]))
        annotations.append(row | draw(st.sampled_from([{}, {"iscrowd": 0}, {"iscrowd": 1}])))
    rows = []
    for _ in range(draw(st.integers(0, 12))):
        (image, category), box = draw(owner), draw(BOX)
        if annotations and draw(st.booleans()):
            near = draw(st.sampled_from(annotations))
            image, category, box = near["image_id"], near["category_id"], [*near["bbox"][:3], near["bbox"][3] * 0.9]
        rows.append({"image_id": image, "category_id": category, "bbox": box, "score": draw(SCORES)})
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in images],
        "annotations": annotations,
        "categories": [{"id": i, "name": draw(NAMES)} for i in categories],
    }
    return content, rows


def reference(content: dict, rows: list) -> list[float]:
    """Return pycocotools' twelve numbers in percent, -1 undefined, after filling in what it cannot do without."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    filled = [
        {
            **row,
            "id": number,
            "iscrowd": row.get("iscrowd", 0),
            "area": row.get("area", row["bbox"][2] * row["bbox"][3]),
        }
        for number, row in enumerate(content["annotations"], start=1)
    ]
    found = [
        {**row, "id": number, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
        for number, row in enumerate(rows, start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        sides = []
        for annotations in (filled, found):
            side = COCO()
            side.dataset = {**content, "annotations": annotations}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value > -1 else -1 for value in evaluation.stats]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scores")


def score(folder, content, rows, *flags) -> dict:
    """Run the tool on the two files and return its metrics.json."""
    for name, value in (("truth.json", content), ("found.json", rows)):
        (folder / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    (folder / "metrics.json").unlink(missing_ok=True)
    files = ["--annotations", folder / "truth.json", "--predictions", folder / "found.json", "--output", folder]
    with within(30), contextlib.redirect_stdout(io.StringIO()):
        tool.main([*map(str, files), "--per-class", *flags])
    return json.loads((folder / "metrics.json").read_text())


def assert_as_pycocotools(metrics: dict, content, rows) -> None:
    ours = [-1 if metrics[name] is None else metrics[name] for name in METRICS]
    np.testing.assert_allclose(ours, reference(content, rows), rtol=0, atol=1e-9)


@tried(50)
@given(scene=scenes(), evaluator=st.sampled_from(["faster", "faster", "pycocotools"]))
def test_any_ids_crowds_and_scores_give_the_numbers_of_pycocotools(folder, scene, evaluator):
    metrics = score(folder, *scene, "TEST.EVALUATOR", evaluator)
    assert_as_pycocotools(metrics, *scene)
    assert len(metrics["per_class"]) == len(scene[0]["categories"])
    count("predictions, whole", "right")


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [-1, 0, 3, 99, 2.5, 1.0, 10**30, 10**400, math.nan, math.inf, -math.inf, "1", "", "x", [], {}, [1]]
    ),
    st.lists(st.sampled_from([0, 1, 5, -3, math.nan, math.inf, "2", None, True, 1e200, 10**400]), max_size=5),
)
FIELDS = ["image_id", "category_id", "bbox", "score"]


@tried(50)
@given(
    scene=scenes(), edits=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(FIELDS), ODD), min_size=1, max_size=2)
)
def test_damaged_results_are_refused_with_their_place_or_scored_as_they_stand(folder, scene, edits):
    content, rows = scene
    for place, field, value in edits:
        if rows:
            rows[place % len(rows)] = {**rows[place % len(rows)], field: value}
            if value is None:
                del rows[place % len(rows)][field]
    try:
        metrics = score(folder, content, rows)
    except UserError as error:
        assert "found.json: detection" in str(error)
        count("predictions, damaged", "refused")
    else:
        assert_as_pycocotools(metrics, content, rows)
        count("predictions, damaged", "right")


TRUTH_FIELDS = ["id", "image_id", "category_id", "bbox", "area", "iscrowd"]


@tried(50)
@given(scene=scenes(), place=st.integers(0, 30), field=st.sampled_from(TRUTH_FIELDS), value=ODD)
def test_damaged_annotations_are_refused_or_scored_as_they_stand(folder, scene, place, field, value):
    content, rows = scene
    annotations = content["annotations"]
    if annotations:
        annotations[place % len(annotations)][field] = value
    try:
        metrics = score(folder, content, rows)
    except UserError as error:
        assert "truth.json: annotation" in str(error)
        count("annotations for scoring", "refused")
    else:
        for row in annotations:  # null is what is missing
            for key in ("area", "iscrowd"):
                if row.get(key, 0) is None:
                    del row[key]
        assert_as_pycocotools(metrics, content, rows)
        count("annotations for scoring", "right")


@tried(50)
@given(scene=scenes(), cut=st.floats(0, 1), data=st.binary(max_size=30), place=st.floats(0, 1))
def test_any_bytes_as_results_are_refused_or_scored(folder, scene, cut, data, place):
    whole = json.dumps(scene[1]).encode()
    start = int(place * len(whole))
    for content in (whole[: int(cut * len(whole))], data, whole[:start] + data + whole[start:]):
        try:
            metrics = score(folder, scene[0], content)
        except UserError as error:
            assert "found.json" in str(error)
            count("predictions, bytes", "refused")
        else:
            assert_as_pycocotools(metrics, scene[0], json.loads(content))
            count("predictions, bytes", "right")
