"""Video files: what is written is read again, and what cannot be read or written says so."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from retinanet.data import video
from retinanet.data.video import VideoError, VideoWriter, probe, read_video
from retinanet.errors import UserError


@pytest.fixture(autouse=True)
def no_chatter():
    video.quiet()


def frame(number: int, size=(48, 64)) -> np.ndarray:
    """Return a grey frame that tells its number even after compression."""
    return np.full((*size, 3), 10 + 20 * number, np.uint8)


def numbers(path: Path) -> list[int]:
    return [round((float(image.mean()) - 10) / 20) for _, image in read_video(path)]


@pytest.mark.parametrize("size", [(48, 64), (49, 65), (240, 320)])
def test_frames_and_rate_survive(tmp_path, size):
    with VideoWriter(tmp_path / "more/x.mp4", 12.5) as writer:
        for number in range(6):
            writer.write(frame(number, size))
    assert probe(tmp_path / "more/x.mp4") == (12.5, 6)
    found = list(read_video(tmp_path / "more/x.mp4"))
    assert [number for number, _ in found] == list(range(6))
    even = tuple(side + side % 2 for side in size)
    assert all(image.shape == (*even, 3) for _, image in found) and numbers(tmp_path / "more/x.mp4") == list(range(6))
    assert len(list(read_video(tmp_path / "more/x.mp4", limit=2))) == 2


def test_a_frame_stays_until_the_number_of_the_next(tmp_path):
    with VideoWriter(tmp_path / "x.mp4", 10) as writer:
        for number in (0, 1, 4):
            writer.write(frame(number), number)
    assert numbers(tmp_path / "x.mp4") == [0, 1, 1, 1, 4]


def test_an_exception_leaves_a_video_that_plays(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "x.mp4", 10) as writer:
        writer.write(frame(3))
        raise KeyboardInterrupt
    assert numbers(tmp_path / "x.mp4") == [3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.mp4: the video file does not exist"),
        (b"", "x.mp4: the video file is empty"),
        (b"junk" * 100, "x.mp4: not a video that OpenCV can open"),
    ],
)
def test_unreadable_files_say_why(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.mp4").write_bytes(content)
    for read in (probe, lambda path: list(read_video(path))):
        with pytest.raises(VideoError, match=message):
            read(tmp_path / "x.mp4")


def test_a_file_that_was_cut_off_is_told(tmp_path):
    with VideoWriter(tmp_path / "x.mp4", 10) as writer:
        for number in range(6):
            writer.write(frame(number))
    data = (tmp_path / "x.mp4").read_bytes()
    (tmp_path / "x.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match="cut off"):
        probe(tmp_path / "x.mp4")


def test_a_missing_camera_is_told():
    with pytest.raises(VideoError, match="camera 77: cannot be opened"):
        probe(77)


def test_a_camera_counts_by_the_time_that_passes(tmp_path, monkeypatch):
    """A file in the place of a camera with 10 frames per second, of which one is read in 0.25 seconds."""
    with VideoWriter(tmp_path / "x.avi.mp4", 10) as writer:
        for number in range(4):
            writer.write(frame(number))
    opened, clock = cv2.VideoCapture, iter([0.0, 0.25, 0.5, 0.75, 1.0])
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: opened(str(tmp_path / "x.avi.mp4")))
    monkeypatch.setattr(video.time, "monotonic", lambda: next(clock))
    assert [number for number, _ in read_video(0)] == [0, 2, 5, 7]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="x.mp4: cannot be written"), VideoWriter(tmp_path / "file/x.mp4", 10) as writer:
        writer.write(frame(0))


def test_a_rate_that_is_none_becomes_25(monkeypatch):
    class Capture:
        def isOpened(self):  # noqa: N802  OpenCV's name
            return True

        def get(self, _key):
            return float("nan")

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoCapture", lambda _source: Capture())
    assert probe(0) == (25.0, None)
