"""`tools/predict.py`: which files it takes, what it writes, and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from predict_cases import write_untrained

from retinanet.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("weights") / "model.pth")


@pytest.fixture
def predict(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import predict

    return predict


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """photos/b.png, photos/a.JPG, photos/notes.txt, photos/more/a.png; the working directory is beside them."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos/more").mkdir(parents=True)
    for name in ("photos/b.png", "photos/a.JPG", "photos/more/a.png"):
        image = rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)
        (tmp_path / name).write_bytes(cv2.imencode(Path(name).suffix, image)[1].tobytes())
    (tmp_path / "photos/notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def test_keys_are_told_from_paths(predict, photos):
    Path("TEST.png").write_bytes(b"")
    words = ["photos", "TEST.MAX_DETS", "3", "TEST.png", "DEVICE", "cpu"]
    assert predict.split_inputs(words) == (["photos", "TEST.png"], ["TEST.MAX_DETS", "3", "DEVICE", "cpu"])


def test_pictures_and_results_are_written(predict, photos, checkpoint, capsys):
    predict.main(["--weights", str(checkpoint), "photos", "--recursive", "--output", "out", "DEVICE", "cpu"])
    rows = json.loads(Path("out/predictions.json").read_text())
    assert "0.125" in capsys.readouterr().out  # the threshold of the checkpoint
    assert {row["file_name"]: row["image_id"] for row in rows} == {
        "photos/a.JPG": 1,
        "photos/b.png": 2,
        "photos/more/a.png": 3,
    }
    assert {row["category_id"] for row in rows} <= {3, 8} and all(row["score"] >= 0.125 for row in rows)
    for row in rows:
        x, y, width, height = row["bbox"]
        assert 0 <= x <= x + width <= 400 and 0 <= y <= y + height <= 300
    for name in ("a.JPG", "b.png", "more/a.png"):
        before, after = cv2.imread(f"photos/{name}"), cv2.imread(f"out/{name}")
        assert after.shape == before.shape and np.abs(after.astype(int) - before).max() > 50


def test_results_equal_those_of_the_detector(predict, photos, checkpoint):
    import retinanet

    predict.main(["--weights", str(checkpoint), "photos/b.png", "--output", "out", "--score", "0"])
    rows = json.loads(Path("out/predictions.json").read_text())
    found = retinanet.load(checkpoint)("photos/b.png")
    assert [row["score"] for row in rows] == pytest.approx(found["scores"].tolist(), abs=1e-6)
    boxes = np.array([row["bbox"] for row in rows])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, found["boxes"], atol=1e-3)


def test_only_the_wanted_classes_and_keys_of_the_command_line_apply(predict, photos, checkpoint):
    common = ["--weights", str(checkpoint), "photos/b.png", "--output", "out", "--score", "0"]
    counts = []
    for classes, dets in (("cat,dog", "4"), ("cat", "4"), ("dog", "4")):
        predict.main([*common, "--classes", classes, "TEST.MAX_DETS", dets])
        rows = json.loads(Path("out/predictions.json").read_text())
        assert {row["category_id"] for row in rows} <= {{"cat": 3, "dog": 8}[name] for name in classes.split(",")}
        counts.append(len(rows))
    assert counts[0] == 4 == counts[1] + counts[2]


def test_unreadable_picture_is_reported_and_the_others_are_done(predict, photos, checkpoint, capsys):
    (photos / "b.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="1 of 2 pictures could not be read"):
        predict.main(["--weights", str(checkpoint), "photos", "--output", "out", "--score", "0"])
    said = [line for line in capsys.readouterr().err.splitlines() if "not read: photos/b.png" in line]
    assert len(said) == 1 and "MAX_BAD_IMAGES" not in said[0]  # nobody trains here
    rows = json.loads(Path("out/predictions.json").read_text())
    assert {row["file_name"] for row in rows} == {"photos/a.JPG"}
    assert Path("out/a.JPG").is_file() and not Path("out/b.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photos"], "--weights FILE is missing"),
        (["--weights", "gone.pth", "photos"], "gone.pth: there is no such checkpoint"),
        (["--weights", "MODEL", "photo"], "photo: no such file or folder; did you mean 'photos'"),
        (["--weights", "MODEL", "photos/*.tif"], "no file matches this pattern"),
        (["--weights", "MODEL", "empty"], "empty: no image files .*--recursive looks"),
        (["--weights", "MODEL", "photos", "--classes", "cat,dgo"], "--classes: 'dgo' is not one of cat, dog; did you"),
        (["--weights", "MODEL", "photos", "--output", "photos"], "a.JPG is one of the inputs themselves"),
        (["--weights", "MODEL", "photos", "TEST.MAXDETS", "3"], "TEST.MAXDETS"),
        (["--weights", "MODEL", "photos", "--score", "nan"], "--score: nan is not between 0 and 1"),
        (["--weights", "MODEL", "photos", "--score", "40"], "--score: 40.0 is not between 0 and 1"),
        (["--weights", "MODEL", "DEVICE", "cpu"], "no picture is named"),
        (["--config", "gone.yaml", "photos"], "gone.yaml"),
        (["--weights", "MODEL", "photos", "--frames", "0"], "--frames: 0 is not a number of frames"),
        (["--weights", "MODEL", "photos", "--camera", "0"], "--camera: files are named as well"),
        (["--weights", "MODEL", "--camera", "-1"], "--camera: -1 is not the number of a camera"),
        (["--weights", "MODEL", "--camera", "77"], "camera 77: cannot be opened"),
    ],
)
def test_mistakes_are_named(predict, photos, checkpoint, arguments, message):
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        predict.main([str(checkpoint) if word == "MODEL" else word for word in arguments])
    assert not Path("output").exists()


def test_a_folder_without_permission_is_not_called_empty(predict, photos, checkpoint, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may run as root, who may read everything
    with pytest.raises(UserError, match="photos: no permission to look into this folder"):
        predict.main(["--weights", str(checkpoint), "photos"])


def test_from_a_shell(photos, checkpoint):
    tool = [sys.executable, str(ROOT / "tools/predict.py"), "--weights", str(checkpoint)]
    for picture, status in (("photos/b.png", 0), ("photos/notes.txt", 2)):
        done = subprocess.run([*tool, picture], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
    assert Path("output/predictions/b.png").is_file()
