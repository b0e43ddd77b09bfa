"""Drawn pictures and videos -> files, under the names that their sources have in the output folder."""

from pathlib import Path

import cv2
import numpy as np

from retinanet.data.inputs import Frame, Source
from retinanet.data.video import VideoWriter
from retinanet.errors import UserError


class Drawn:
    """Writes drawn frames to their pictures and videos; a video is closed when its source ends, or by the `with`."""

    def __init__(self, sources: list[Source], rates: dict[int, float], output: Path):
        """rates: number of a source -> frames per second, for videos and cameras. output: the folder."""
        self.sources, self.rates, self.output = sources, rates, output
        self.pictures, self.video_frames, self._video = 0, 0, None

    def write(self, frame: Frame, image: np.ndarray) -> None:
        """Write `image` (H, W, 3) uint8 BGR where `frame` belongs."""
        source = self.sources[frame.source]
        path = self.output / source.name
        if frame.number is None:
            write_picture(path, image)
            self.pictures += 1
            return
        if self._video is None or self._video.path != path:
            self.close()
            self._video = VideoWriter(path, self.rates[frame.source])
        self._video.write(image, frame.number)
        self.video_frames += 1

    def close(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None

    def __enter__(self) -> "Drawn":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()

    def __str__(self) -> str:
        frames = f"{self.video_frames} frame{'s' * (self.video_frames != 1)} of video"
        if self.video_frames and not self.pictures:
            return frames
        return f"{self.pictures} picture{'s' * (self.pictures != 1)}" + (f" and {frames}" if self.video_frames else "")


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write `image`; `UserError` when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error
