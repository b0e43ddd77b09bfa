"""`tools/predict.py` on videos, a camera and a list: what is written, and how it ends early."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from predict_cases import write_untrained

from retinanet.data.video import VideoWriter, probe, read_video
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
def clip(tmp_path, monkeypatch) -> Path:
    """A video of 5 frames at 10 per second; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with VideoWriter(tmp_path / "clip.avi.mp4", 10) as writer:
        for _ in range(5):
            writer.write(cv2.resize(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), (320, 240)))
    return tmp_path / "clip.avi.mp4"


def rows() -> list[dict]:
    return json.loads(Path("out/predictions.json").read_text())


def test_a_video_is_drawn_frame_by_frame_with_numbered_results(predict, clip, checkpoint, capsys):
    cv2.imwrite("b.png", np.zeros((240, 320, 3), np.uint8))
    words = [clip.name, "b.png", "--output", "out", "--score", "0", "TEST.MAX_DETS", "2"]
    predict.main(["--weights", str(checkpoint), *words])
    assert "1 picture and 1 video," in (said := capsys.readouterr()).out
    assert "1 picture and 5 frames of video" in said.out and "6/6" in said.err  # progress knows the frames
    assert [(row["file_name"], row.get("frame"), row["image_id"]) for row in rows()[::2]] == [
        *((clip.name, number, number + 1) for number in range(5)),
        ("b.png", None, 6),
    ]
    assert probe(Path("out") / clip.name) == (10.0, 5)
    (_, before), *_ = read_video(clip)
    (_, after), *_ = read_video(Path("out") / clip.name)
    assert after.shape == before.shape and np.abs(after.astype(int) - before).max() > 50


def test_results_of_a_frame_are_those_of_the_frame_as_a_picture(predict, clip, checkpoint):
    import retinanet

    predict.main(["--weights", str(checkpoint), clip.name, "--output", "out", "--score", "0", "--frames", "1"])
    found = retinanet.load(checkpoint)(next(read_video(clip))[1])
    assert [row["score"] for row in rows()] == pytest.approx(found["scores"].tolist(), abs=1e-5)
    assert {row["frame"] for row in rows()} == {0}


def test_a_broken_video_is_reported_and_the_others_are_done(predict, clip, checkpoint, capsys):
    Path("broken.mp4").write_bytes(b"junk" * 50)
    with pytest.raises(UserError, match="1 of 2 inputs could not be read"):
        predict.main(["--weights", str(checkpoint), "broken.mp4", clip.name, "--output", "out", "--score", "0"])
    assert "not read: broken.mp4: not a video that OpenCV can open" in capsys.readouterr().err
    assert {row["file_name"] for row in rows()} == {clip.name} and not Path("out/broken.mp4").exists()


def test_a_list_on_standard_input(predict, clip, checkpoint, monkeypatch):
    cv2.imwrite("a b.png", np.zeros((60, 80, 3), np.uint8))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"a b.png\n{clip.name}\n"))
    predict.main(["--weights", str(checkpoint), "-", "--output", "out", "--score", "0"])
    assert {row["file_name"] for row in rows()} == {"a b.png", clip.name}


def test_a_camera_is_watched_until_ctrl_c_and_that_is_no_failure(predict, clip, checkpoint, monkeypatch, capsys):
    """A file in the place of the camera, and Ctrl-C in the third batch of two frames."""
    opened, calls = cv2.VideoCapture, []
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: opened(str(clip)) if source == 0 else opened(source))
    real = predict.draw_detections

    def draw(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(predict, "draw_detections", draw)
    predict.main(["--weights", str(checkpoint), "--camera", "0", "--output", "out", "--score", "0"])
    assert "interrupted; out holds 3 frames of video" in capsys.readouterr().err
    assert {row["file_name"] for row in rows()} == {"0"} and len({row["frame"] for row in rows()}) == 4
    assert probe(Path("out/camera_0.mp4")).count >= 3


def test_ctrl_c_leaves_a_video_that_plays_and_whole_results(tmp_path, checkpoint):
    """From a shell, with a video that would take minutes."""
    with VideoWriter(tmp_path / "long.mp4", 25) as writer:
        for number in range(3000):
            writer.write(np.full((48, 64, 3), number % 256, np.uint8))
    tool = [sys.executable, str(ROOT / "tools/predict.py"), "--weights", str(checkpoint), "long.mp4", "--score", "0"]
    command = [*tool, "--output", "out", "TEST.IMS_PER_BATCH", "1"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    running = subprocess.Popen(command, cwd=tmp_path, preexec_fn=heard, **pipes)
    video, deadline = tmp_path / "out/long.mp4", time.monotonic() + 100
    while not (video.exists() and video.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=180)
    assert running.returncode == 130 and "Traceback" not in said and "interrupted; out holds " in said
    assert 0 < len(list(read_video(video))) < 3000
    assert json.loads((tmp_path / "out/predictions.json").read_text())[0]["frame"] == 0
