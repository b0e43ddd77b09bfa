"""Whole files of another kind where a json is expected, and values that are odd but right, through the tools."""

import contextlib
import gzip
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from doctor_cases import write_image
from fuzz_profile import within
from tiny_backbone import TINY, TinyBackbone

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import check_dataset  # noqa: E402
import test_net  # noqa: E402
import train_net  # noqa: E402

from retinanet.errors import UserError  # noqa: E402
from retinanet.modeling.backbone import BACKBONES  # noqa: E402

CATEGORIES = [{"id": 0, "name": "Hund ü"}, {"id": 2**40, "name": "犬"}, {"id": 7, "name": "a cat"}]
FILES = ["a b.png", "sub folder/ü.png", "sub folder/深/c.png", "d.e.png", "empty.png", "%41#?.png"]
IMAGE_IDS = [0, 2**62, 5, 2**53 + 1, -3, 10**12]


def odd_but_right() -> dict:
    """Return a whole COCO json with ids of 0, beyond 2^53 and below 0, odd file names, a crowd, an empty image."""
    images = [{"id": i, "file_name": name, "width": 60, "height": 48} for i, name in zip(IMAGE_IDS, FILES, strict=True)]
    annotations = []
    for number, image in enumerate(image for image in images if image["file_name"] != "empty.png"):
        for k, category in enumerate(CATEGORIES):
            box = [3.5 + 14 * k, 4 + number, 12, 14 + k]
            row = {"id": len(annotations), "image_id": image["id"], "category_id": category["id"], "bbox": box}
            annotations.append(row | {"area": box[2] * box[3], "iscrowd": int(number == 2 and k == 1)})
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("odd")
    for number, name in enumerate(FILES):
        write_image(path / "images" / name, 60, 48, number)
    (path / "x.json").write_text(json.dumps(odd_but_right()))
    (path / "catalog.yaml").write_text("odd: {images: images, annotations: x.json}\n")
    return path


WHOLE = json.dumps(odd_but_right())
WRONG = {
    "gzip": gzip.compress(WHOLE.encode()),
    "empty": b"",
    "cut off": WHOLE.encode()[:-20],
    "two documents": (WHOLE + WHOLE).encode(),
    "latin 1": json.dumps(odd_but_right(), ensure_ascii=False).encode("cp1252", "replace"),
    "deep nesting": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "a number of 10,000 digits": b"9" * 10_000,
    "NUL bytes": b"\0" * 100,
    "an image": b"\x89PNG\r\n\x1a\n",
    "a list": b"[]",
    "null": b"null",
    "a text": b'"images"',
    "python": repr(odd_but_right()).encode(),
    "comment": b"// made by x\n" + WHOLE.encode(),
}


def refused(tool, *arguments) -> str:
    """Return the message with which the tool refuses its arguments."""
    with within(30), pytest.raises(UserError) as caught, contextlib.redirect_stdout(io.StringIO()):
        tool.main([str(argument) for argument in arguments])
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", WRONG)
def test_files_of_another_kind_are_refused_by_every_tool(folder, tmp_path, kind):
    (tmp_path / "x.json").write_bytes(WRONG[kind])
    (tmp_path / "catalog.yaml").write_text(f"odd: {{images: {folder / 'images'}, annotations: x.json}}\n")
    assert "error" in refused(check_dataset, "--annotations", tmp_path / "x.json")
    assert "x.json" in refused(test_net, "--annotations", tmp_path / "x.json", "--predictions", folder / "x.json")
    if kind != "a list":  # no detections, which scores 0
        assert "x.json" in refused(test_net, "--annotations", folder / "x.json", "--predictions", tmp_path / "x.json")
    cfg = ["--config", "configs/quickstart.yaml", "DATASETS.CATALOG", tmp_path / "catalog.yaml", "OUTPUT_DIR", tmp_path]
    assert "x.json" in refused(train_net, *cfg, "DATASETS.TRAIN", "odd", "DATASETS.TEST", "odd")


@pytest.mark.parametrize("path", ["", "no.json", "catalog.yaml/x.json", "a" * 5000, "\0"])
def test_paths_that_are_no_files_are_refused(folder, path):
    for tool in (check_dataset, test_net):
        where = folder / path
        assert refused(tool, "--annotations", where, *(["--predictions", where] if tool is test_net else []))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_encodings_of_json_are_read(folder, tmp_path, encoding):
    (tmp_path / "x.json").write_bytes(json.dumps(odd_but_right(), ensure_ascii=False).encode(encoding))
    with contextlib.redirect_stdout(io.StringIO()):
        check_dataset.main(["--annotations", str(tmp_path / "x.json"), "--images-dir", str(folder / "images")])


def test_odd_ids_and_names_train_and_are_scored_as_pycocotools_scores_them(folder, tmp_path, monkeypatch):
    """The whole way: doctor, training with workers, evaluation, results with the ids of the json."""
    monkeypatch.setitem(BACKBONES, "R50", TinyBackbone)
    (tmp_path / "x.yaml").write_text("SOLVER: {MAX_ITER: 3, WARMUP_ITERS: 1}\n")
    sets = ["DATASETS.TRAIN", "odd", "DATASETS.TEST", "odd", "DATASETS.CATALOG", str(folder / "catalog.yaml")]
    config = ["--config", str(tmp_path / "x.yaml"), *TINY, *sets, "OUTPUT_DIR", str(tmp_path / "run")]
    config += ["TEST.SCORE_THRESH", "0.0", "DATALOADER.NUM_WORKERS", "2"]
    with within(120), contextlib.redirect_stdout(io.StringIO()) as said:
        check_dataset.main([*config, "--images"])
        train_net.main(config)
    assert "no errors" in said.getvalue()
    rows = json.loads((tmp_path / "run/inference/odd/predictions.json").read_text())
    assert {row["image_id"] for row in rows} == set(IMAGE_IDS)
    assert {row["category_id"] for row in rows} <= {entry["id"] for entry in CATEGORIES}
    metrics = json.loads((tmp_path / "run/inference/odd/metrics.json").read_text())
    assert set(metrics["per_class"]) == {entry["name"] for entry in CATEGORIES}
    with contextlib.redirect_stdout(io.StringIO()):
        test_net.main([*config, "--predictions", str(tmp_path / "run/inference/odd/predictions.json"), "--output",
                       str(tmp_path / "again"), "TEST.EVALUATOR", "pycocotools"])  # fmt: skip
    again = json.loads((tmp_path / "again/metrics.json").read_text())
    np.testing.assert_allclose([again[key] for key in ("AP50", "AR100")], [metrics[key] for key in ("AP50", "AR100")])
    crowd = odd_but_right()["annotations"][2 * len(CATEGORIES) + 1]
    assert crowd["iscrowd"] == 1 and metrics["per_class"]["犬"]["num_boxes"] == 4  # of 5 images with boxes
