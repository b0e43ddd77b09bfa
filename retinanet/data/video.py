"""Video files and cameras as frames, and drawn frames as a video file, by OpenCV with its FFmpeg; no window is opened.

The headless OpenCV wheels decode what FFmpeg decodes, and encode MPEG-4, Motion JPEG, VP8 and VP9; an H.264 encoder
(avc1) is not in them. Written is MPEG-4 in .mp4, which every player knows and browsers do not.
"""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from retinanet.errors import UserError

VIDEO_SUFFIXES = {".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
WRITTEN_SUFFIX, _CODEC = ".mp4", "mp4v"
_DEFAULT_RATE, _MAX_RATE = 25.0, 240.0  # frames per second, where the file or camera states nothing possible


class VideoError(UserError):
    """A video file or camera that cannot be read; the message names it."""


class VideoInfo(NamedTuple):
    """What a video states: frames per second, and its number of frames or None where that is unknown."""

    rate: float
    count: int | None


def quiet() -> None:
    """Keep OpenCV and FFmpeg from writing to the terminal about files that our own messages are about."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def probe(source: Path | int) -> VideoInfo:
    """Return what a video file, or the camera of that index, states; `VideoError` when it cannot be opened."""
    capture = _open(source)
    try:
        return _info(capture)
    finally:
        capture.release()


def read_video(source: Path | int, limit: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of the frame from 0, frame (H, W, 3) uint8 BGR), up to `limit` frames, turned as the file says.

    A camera's frames are numbered by the time at which they came, at the rate that it states, so numbers are left out
    when they are read more slowly. Raises `VideoError` when there is not a single frame.
    """
    capture = _open(source)
    live, rate, start, number = isinstance(source, int), _info(capture).rate, time.monotonic(), -1
    count = 0
    try:
        while limit is None or count < limit:
            found, frame = capture.read()
            if not found:
                break
            number = max(number + 1, int((time.monotonic() - start) * rate)) if live and count else number + 1
            count += 1
            yield number, frame
    finally:
        capture.release()
    if count == 0:
        raise VideoError(f"{_name(source)}: not one frame can be decoded; is it a whole video? `ffmpeg -i` tells more")


def _open(source: Path | int) -> cv2.VideoCapture:
    if isinstance(source, Path):
        if not source.is_file():
            raise VideoError(f"{source}: the video file does not exist")
        if source.stat().st_size == 0:
            raise VideoError(f"{source}: the video file is empty (0 bytes)")
    capture = cv2.VideoCapture(str(source) if isinstance(source, Path) else source)
    if capture.isOpened():
        return capture
    capture.release()
    if isinstance(source, int):
        there = sorted(path.name for path in Path("/dev").glob("video*")) if os.name == "posix" else []
        known = f"this machine has {', '.join(there)}" if there else "this machine shows none (no /dev/video*)"
        raise VideoError(f"camera {source}: cannot be opened; {known}, or another program is using it")
    raise VideoError(
        f"{source}: not a video that OpenCV can open, or one that was cut off; repair it, or write it anew, for "
        "example by `ffmpeg -i IN OUT.mp4`"
    )


def _info(capture: cv2.VideoCapture) -> VideoInfo:
    rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    possible = math.isfinite(rate) and 0 < rate <= _MAX_RATE
    known = math.isfinite(count) and 0 < count < 2**40
    return VideoInfo(rate if possible else _DEFAULT_RATE, int(count) if known else None)


def _name(source: Path | int) -> str:
    return f"camera {source}" if isinstance(source, int) else str(source)


class VideoWriter:
    """Writes frames of one size to an .mp4 file; use it in a `with`, whose end makes the file playable."""

    def __init__(self, path: Path, rate: float):
        """rate: frames per second. The file is made by the first frame."""
        self.path, self.rate, self.count = path, rate, 0
        self._writer, self._last = None, None

    def write(self, frame: np.ndarray, number: int | None = None) -> None:
        """Append `frame` (H, W, 3) uint8 BGR as frame `number`; the one before it stays on screen until then.

        An odd height or width grows by a pixel: OpenCV would cut one off, for MPEG-4 wants even sides.
        """
        height, width = frame.shape[:2]
        frame = cv2.copyMakeBorder(frame, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            self._writer, self._last = self._start(frame), frame
        assert frame.shape == self._last.shape, (frame.shape, self._last.shape)
        while number is not None and self.count < number:
            self._append(self._last)
        self._append(frame)
        self._last = frame

    def _append(self, frame: np.ndarray) -> None:
        self._writer.write(frame)
        self.count += 1

    def _start(self, frame: np.ndarray) -> cv2.VideoWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another --output") from error
        code = cv2.VideoWriter_fourcc(*_CODEC)
        writer = cv2.VideoWriter(str(self.path), code, self.rate, (frame.shape[1], frame.shape[0]))
        if not writer.isOpened():
            raise UserError(
                f"{self.path}: cannot be written, or OpenCV lacks the codec {_CODEC}; choose another folder"
            )
        return writer

    def close(self) -> None:
        """Finish the file. Raises `UserError` when nothing came to the disk, as on a full one."""
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        if not self.path.is_file() or self.path.stat().st_size == 0:
            raise UserError(f"{self.path}: could not be written; is the disk full?")

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()
