"""What a person names on a command line -> images and videos, and those -> frames, one after another.

A word is a file, a folder, a pattern, or "-" for a list of these on standard input, one a line.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retinanet.data.image import ImageError, read_image
from retinanet.data.video import VIDEO_SUFFIXES, WRITTEN_SUFFIX, VideoError, read_video
from retinanet.errors import UserError, nearest

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
WRITABLE = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Source(NamedTuple):
    """An image or video file, or the index of a camera; name: of its output, inside the output folder."""

    path: Path | int
    name: Path

    @property
    def is_video(self) -> bool:
        """Whether it has many frames; what has no suffix of a video is an image."""
        return isinstance(self.path, int) or self.path.suffix.lower() in VIDEO_SUFFIXES


class Frame(NamedTuple):
    """source: number of its source. number: of the frame in a video from 0, else None. image_id: counts from 1.

    image: (H, W, 3) uint8 BGR, or why there is none.
    """

    source: int
    number: int | None
    image_id: int
    image: np.ndarray | UserError


def find_sources(words: Iterable[str], recursive: bool) -> list[Source]:
    """Return the images and videos that `words` stand for, each file once, in the order of the words.

    Below a folder its sub-folders are kept in the names; a name that is taken already gets a number. Raises
    `UserError` for a word that stands for nothing.
    """
    found: dict[Path, Path] = {}
    taken: set[Path] = set()
    for word in words:
        for file, name in _expand(word, recursive):
            if file in found:
                continue
            name = name.with_suffix(_written_suffix(name.suffix.lower())) if _changes(name) else name
            numbered, count = name, 1
            while numbered in taken:
                count += 1
                numbered = name.with_stem(f"{name.stem}_{count}")
            found[file] = numbered
            taken.add(numbered)
    return [Source(file, name) for file, name in found.items()]


def _changes(name: Path) -> bool:
    return _written_suffix(name.suffix.lower()) != name.suffix.lower()


def _written_suffix(suffix: str) -> str:
    """Return the suffix that the drawn version of a file with `suffix` has."""
    if suffix in VIDEO_SUFFIXES:
        return WRITTEN_SUFFIX
    return suffix if suffix in WRITABLE else ".png"


def _expand(word: str, recursive: bool) -> list[tuple[Path, Path]]:
    """Return the (file, name) pairs that one word stands for; `UserError` when there is none."""
    path = Path(word)
    if path.is_dir():
        return _folder(path, recursive)
    if not path.exists() and glob.has_magic(word):
        files = [Path(match) for match in sorted(glob.glob(word, recursive=True))]
        if not files:
            raise UserError(f"{word}: no file matches this pattern")
        return [(file, Path(file.name)) for file in files if file.is_file()]
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{word}: no such file or folder{nearest(path.name, names)}")
    return [(path, Path(path.name))]


def _folder(path: Path, recursive: bool) -> list[tuple[Path, Path]]:
    if not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path}: no permission to look into this folder")
    files = sorted(path.rglob("*") if recursive else path.glob("*"))
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and file.is_file()]
    if not files:
        hint = "" if recursive else "; --recursive looks into the folders inside"
        known = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise UserError(f"{path}: no image files or videos ({known}) in this folder{hint}")
    return [(file, file.relative_to(path)) for file in files]


def listed(words: Iterable[str], lines: Iterable[str]) -> list[str]:
    """Return `words` with every "-" replaced by the non-empty `lines`; `UserError` when these name nothing."""
    result = []
    for word in words:
        if word != "-":
            result.append(word)
            continue
        names = [line.rstrip("\r\n") for line in lines]
        names = [name for name in names if name.strip()]
        if not names:
            raise UserError(
                "-: standard input names no file; give one path a line, as `find photos -name '*.jpg'` does"
            )
        result += names
    return result


def read_frames(sources: list[Source], limit: int | None = None) -> Iterator[Frame]:
    """Yield the frames of all sources, of each video at most `limit`; a source that cannot be read is a frame too."""
    image_id = 0
    for number, source in enumerate(sources):
        try:
            if source.is_video:
                for place, image in read_video(source.path, limit):
                    image_id += 1
                    yield Frame(number, place, image_id, image)
            else:
                image_id += 1
                yield Frame(number, None, image_id, read_image(source.path))
        except (ImageError, VideoError) as error:
            yield Frame(number, None, image_id, error)


def in_batches(frames: Iterable[Frame], size: int) -> Iterator[list[Frame]]:
    """Yield up to `size` frames at a time, of one video or of images, and each that could not be read by itself."""
    batch: list[Frame] = []
    for frame in frames:
        unlike = batch and (batch[0].number is None) != (frame.number is None)
        other_video = batch and frame.number is not None and batch[0].source != frame.source
        broken = isinstance(frame.image, UserError)
        if batch and (unlike or other_video):
            yield batch
            batch = []
        if broken:
            yield [frame]
            continue
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
