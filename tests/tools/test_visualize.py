"""`tools/visualize.py`: sheets of what training sees, of anchors and of matches."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from conftest import ROOT

from retinanet.data.synthetic import write_dataset
from retinanet.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with 6 synthetic images, a catalog and a configuration that trains and tests on them."""
    path = tmp_path_factory.mktemp("visualize")
    write_dataset(path, "train", 6, (64, 96))
    (path / "catalog.yaml").write_text("shapes: {images: train, annotations: annotations/train.json}")
    (path / "x.yaml").write_text(
        f"_BASE_: {ROOT}/configs/quickstart.yaml\n"
        f"OUTPUT_DIR: {path}/out\n"
        f"DATASETS: {{CATALOG: {path}/catalog.yaml, TRAIN: [shapes], TEST: [shapes]}}\n"
        "DATALOADER: {NUM_WORKERS: 0}\nSOLVER: {IMS_PER_BATCH: 2}\nDEVICE: cpu\n"
    )
    truth = json.loads((path / "annotations/train.json").read_text())["annotations"]
    rows = [{key: row[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in truth]
    (path / "found.json").write_text(json.dumps([row for row in rows if row["image_id"] != 3]))
    return path


@pytest.fixture
def visualize(monkeypatch, folder):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import visualize

    return lambda *words: visualize.main(["--config", str(folder / "x.yaml"), *words])


def sheets(folder: Path) -> dict:
    return {path.name: cv2.imread(str(path)).shape for path in sorted(folder.iterdir())}


def test_truth_fills_sheets_of_twelve(visualize, folder, capsys):
    visualize("--num", "14", "--iteration", "2", "INPUT.AUGMENT.MOSAIC", "0.5", "INPUT.AUGMENT.CROP", "0.5")
    found = sheets(folder / "out/visualize")
    assert list(found) == ["truth_01.jpg", "truth_02.jpg"]
    assert found["truth_01.jpg"][0] > 2 * found["truth_02.jpg"][0]  # three rows, one row
    assert capsys.readouterr().out.splitlines() == [str(folder / "out/visualize" / name) for name in found]


def test_the_seed_and_the_iteration_choose_the_images(visualize, folder, tmp_path):
    contents = []
    for name, words in (("a", ()), ("b", ()), ("c", ("SEED", "1")), ("d", ("--iteration", "1"))):
        visualize("--num", "2", "--output", str(tmp_path / name), *words)
        contents.append((tmp_path / name / "truth_01.jpg").read_bytes())
    assert contents[0] == contents[1] and len(set(contents)) == 3


def test_anchors_have_a_picture_for_each_level(visualize, tmp_path):
    visualize("--show", "anchors", "--num", "3", "--output", str(tmp_path))
    (rows, columns, _), second = sheets(tmp_path).values()
    assert columns // 5 > 500 and rows // 2 > 400 and second[0] < rows  # two images of five levels, then one


def test_detections_show_the_worst_image_first(visualize, folder, tmp_path, capsys, monkeypatch):
    import visualize as tool

    shown = []
    monkeypatch.setattr(tool, "write_sheets", lambda rows, *_: shown.extend(rows))
    visualize("--show", "detections", "--predictions", str(folder / "found.json"), "--num", "2")
    assert shown[0][0].caption.startswith("image 3: ") and shown[0][1].caption.startswith("0 right, 0 false, ")
    assert shown[1][1].caption.endswith("right, 0 false, 0 missed")
    assert "shapes: scores from 0.900: " in capsys.readouterr().out


def test_detections_of_a_model_and_from_a_shell(folder, tmp_path):
    from retinanet.config.load import dump_config, load_config
    from retinanet.engine.checkpoint import write_checkpoint
    from retinanet.modeling.build import build_model

    cfg = load_config(folder / "x.yaml", ["MODEL.NUM_CLASSES", "6"])
    categories = json.loads((folder / "annotations/train.json").read_text())["categories"]
    state = {"model": build_model(cfg).state_dict(), "iteration": 1, "config": dump_config(cfg), "classes": categories}
    write_checkpoint(tmp_path / "model.pth", state)
    tool = [sys.executable, str(ROOT / "tools/visualize.py"), "--config", str(folder / "x.yaml")]
    words = ["--show", "detections", "--score", "0.0", "--num", "1", "--output", "seen"]
    command = [*tool, *words, "MODEL.WEIGHTS", "model.pth", "TEST.SCORE_THRESH", "0.0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert list(sheets(tmp_path / "seen")) == ["detections_01.jpg"]
    done = subprocess.run([*tool, "--num", "0"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num", "0"), "--num: 0 is not a number of images"),
        (("--iteration", "-1"), "--iteration: -1 is no iteration"),
        (("--predictions", "x.json"), "go with --show detections"),
        (("--show", "detections", "--score", "3"), "--score: 3.0 is not between 0 and 1"),
        (("--show", "detections"), "MODEL.WEIGHTS: is empty"),
        (("--show", "detections", "DATASETS.TEST", "()"), "name the one data set"),
        (("--show", "detections", "--predictions", "gone.json"), "gone.json"),
        (("DATASETS.TRAIN", "shape"), "did you mean 'shapes'"),
    ],
)
def test_mistakes_are_named(visualize, words, message):
    with pytest.raises(UserError, match=message):
        visualize(*words)
