"""`tools/test_net.py`: a results json, a model on eight pictures, and the mistakes of its users."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from html_pages import checked
from simulated_detections import coco_json, detection, simulated

from retinanet.engine.coco_metrics import METRICS, coco_metrics
from retinanet.errors import UserError

NAMES = {3: "cat", 9: "dog"}


@pytest.fixture
def main(monkeypatch):
    """The tool's `main(argv)` in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import test_net

    return lambda *arguments: test_net.main(list(map(str, arguments)))


@pytest.fixture
def files(tmp_path):
    """A catalog with one set, a configuration that names it, and simulated results."""
    annotations = coco_json({i: [(3, 5, 5, 20, 20), (9, 40, 40, 30, 50)] for i in range(1, 9)}, NAMES)
    (tmp_path / "gt.json").write_text(json.dumps(annotations))
    (tmp_path / "dt.json").write_text(json.dumps(simulated(annotations, seed=0, crowded=0, clutter=2)))
    (tmp_path / "catalog.yaml").write_text("small: {images: nowhere, annotations: gt.json}\n")
    datasets = f"{{CATALOG: {tmp_path}/catalog.yaml, TEST: [small]}}"
    (tmp_path / "config.yaml").write_text(f"OUTPUT_DIR: {tmp_path}/out\nDATASETS: {datasets}\n")
    return tmp_path


def test_predictions_are_scored_without_model_and_images(main, files, capsys):
    main("--config", files / "config.yaml", "--predictions", files / "dt.json", "--per-class")
    written = json.loads((files / "out/inference/small/metrics.json").read_text())
    assert written == coco_metrics(files / "gt.json", files / "dt.json")
    printed = capsys.readouterr().out
    for word in (*METRICS, "cat", "dog", "precision", f"{written['AP']:.2f}", f"{written['threshold']:.3f}"):
        assert word in printed


def test_annotations_flag_needs_no_configuration(main, files, monkeypatch):
    monkeypatch.chdir(files)
    paths = ["--annotations", "gt.json", "--predictions", "dt.json", "--output", "here"]
    main(*paths, "TEST.EVALUATOR", "pycocotools")
    written = json.loads((files / "here/metrics.json").read_text())
    assert written["AP"] == pytest.approx(coco_metrics(files / "gt.json", files / "dt.json", "faster")["AP"], abs=1e-9)


def test_plots_are_drawn_without_a_screen(main, files):
    config, folder = files / "config.yaml", files / "plots"
    main("--config", config, "--predictions", files / "dt.json", "--plots", "--output", folder)
    picture = cv2.imread(str(folder / "precision_recall.png"))
    assert picture.shape[0] > 400 and picture.std() > 5


def test_report_of_a_results_file_shows_images_where_it_knows_them(main, files):
    """The catalog's folder does not exist; --images names one that does."""
    results = ["--predictions", files / "dt.json", "--report", "--output", files / "page"]
    main("--config", files / "config.yaml", *results)
    page = checked(files / "page/report.html")
    assert str(files / "dt.json") in page.text and "the folder with the images is not known" in page.text
    for number in range(1, 9):
        cv2.imwrite(str(files / f"{number}.jpg"), np.zeros((100, 100, 3), np.uint8))
    main("--annotations", files / "gt.json", "--images", files, *results)
    assert checked(files / "page/report.html").tags.count("img") >= 8
    assert "report_files/worst-1.jpg" in (files / "page/report.md").read_text()


def test_a_plot_that_cannot_be_written_is_named(main, files):
    config, folder = files / "config.yaml", files / "plots"
    (folder / "precision_recall.png").mkdir(parents=True)
    with pytest.raises(UserError, match=r"precision_recall\.png: cannot be written"):
        main("--config", config, "--predictions", files / "dt.json", "--plots", "--output", folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "gone.json"], "results file 'gone.json' does not exist"),
        (["--predictions", "wrong.json"], "image_id 77 is not among the images of"),
        (["--predictions", "dt.json", "DATASETS.TEST", "smal"], "DATASETS.TEST: 'smal' is not one of small; did you"),
        (["--predictions", "dt.json", "DATASETS.TEST", "()"], "name the one data set that the predictions are of"),
        (["--predictions", "dt.json", "TEST.EVALUATOR", "fast"], "TEST.EVALUATOR: 'fast' is not one of"),
        (["--annotations", "gt.json"], "--annotations: needs --predictions"),
        (["--images", "pictures"], "--images: needs --annotations"),
        (
            ["--annotations", "gt.json", "--images", "gone", "--predictions", "dt.json"],
            "--images: gone is not a folder",
        ),
        (["DATASETS.TEST", "()"], "DATASETS.TEST: is empty"),
        (["DATASETS.TEST", "small,more", "--output", "x"], "--output: is one folder, DATASETS.TEST names 2 sets"),
    ],
)
def test_mistakes_are_named(main, files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    (files / "wrong.json").write_text(json.dumps([detection(77, 3, [0, 0, 1, 1], 0.5)]))
    with pytest.raises(UserError, match=message.replace("(", "[(]")):
        main("--config", "config.yaml", *arguments)


TINY = """
MODEL:
  NUM_CLASSES: 2
  BACKBONE: {NAME: R18, NORM: GN, FREEZE_AT: 0}
  FPN: {CHANNELS: 32}
  HEAD: {NUM_CONVS: 0, PRIOR_PROB: 0.3}
INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
DATALOADER: {NUM_WORKERS: 0}
TEST: {SCORE_THRESH: 0.0, MAX_DETS: 5, IMS_PER_BATCH: 3}
DEVICE: cpu
"""


@pytest.fixture
def model(files):
    """In addition: eight pictures, and a checkpoint of an untrained model for the two classes."""
    from retinanet.config.load import dump_config, load_config_text
    from retinanet.engine.checkpoint import write_checkpoint
    from retinanet.modeling.build import build_model

    rng = np.random.default_rng(0)
    (files / "images").mkdir()
    for number in range(1, 9):
        cv2.imwrite(str(files / f"images/{number}.jpg"), rng.integers(0, 256, (100, 100, 3), dtype=np.uint8))
    (files / "catalog.yaml").write_text("small: {images: images, annotations: gt.json}\n")
    (files / "config.yaml").write_text(f"{TINY}\n{(files / 'config.yaml').read_text()}")
    cfg = load_config_text(TINY, "test")
    torch.manual_seed(0)
    classes = [{"id": number, "name": name} for number, name in NAMES.items()]
    state = {"model": build_model(cfg).state_dict(), "iteration": 1, "config": dump_config(cfg), "classes": classes}
    write_checkpoint(files / "model.pth", state)
    return files


def test_model_is_scored_on_what_it_detects(main, model, capsys):
    """The results are the detections of `retinanet.load` on the same files, under the data set's category ids."""
    import retinanet

    main("--config", model / "config.yaml", "--report", "MODEL.WEIGHTS", model / "model.pth")
    folder = model / "out/inference/small"
    assert str(model / "model.pth") in checked(folder / "report.html").text
    rows = json.loads((folder / "predictions.json").read_text())
    assert json.loads((folder / "metrics.json").read_text()) == coco_metrics(model / "gt.json", rows)
    assert [row["image_id"] for row in rows] == sorted(5 * list(range(1, 9)))
    assert "AP50" in capsys.readouterr().out
    found = retinanet.load(model / "model.pth", device="cpu")([model / f"images/{i}.jpg" for i in range(1, 9)])
    for index, row in enumerate(rows):
        own, place = found[index // 5], index % 5
        assert row["score"] == pytest.approx(float(own["scores"][place]), abs=1e-5)
        assert row["category_id"] == [3, 9][int(own["labels"][place])]


def test_weights_of_other_classes_are_refused(main, model):
    annotations = json.loads((model / "gt.json").read_text())
    annotations["categories"][0]["name"] = "cow"
    (model / "gt.json").write_text(json.dumps(annotations))
    with pytest.raises(UserError, match="its category number 1 by id is 'cow', in the weights it is 'cat'"):
        main("--config", model / "config.yaml", "MODEL.WEIGHTS", model / "model.pth")


def test_from_a_shell_in_another_folder(files):
    """Status 0 and nothing on standard error, and status 2 with one message."""
    tool = [sys.executable, str(ROOT / "tools/test_net.py"), "--annotations", "gt.json", "--predictions"]
    for results, status in (("dt.json", 0), ("gone.json", 2)):
        done = subprocess.run([*tool, results], capture_output=True, text=True, cwd=files, timeout=120, check=False)
        assert done.returncode == status, done.stderr
        assert done.stderr.startswith("error: results file 'gone.json'") if status else not done.stderr
        assert "Traceback" not in done.stderr
