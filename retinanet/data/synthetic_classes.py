"""A synthetic set for classification: objects cut out of the scenes of `synthetic.py`, in a folder for each class."""

from pathlib import Path

import cv2
import numpy as np

from retinanet.data.shapes import SHAPES
from retinanet.data.synthetic import Thing, render
from retinanet.errors import UserError

_SCENE = (128, 160)  # (height, width) of the scenes
_LEAST_SIDE = 14  # pixels of an object in its scene; smaller ones cannot be told apart
_MARGIN = 0.25  # of the object's side, on each side of it
LEAST_SIZE = 8  # pixels of an image


def write_folders(
    folder: str | Path, split: str, num_images: int, size: tuple[int, int] = (32, 32), seed: int = 0
) -> Path:
    """Write `folder/split/CLASS/*.jpg`, the classes in turn, and return `folder/split`.

    Image i of a split is a function of (seed, split, i, size) alone. Raises `UserError` for a count, size or seed that
    makes no sense.
    """
    if num_images < len(SHAPES):
        raise UserError(f"{split}: {num_images} images; at least {len(SHAPES)} are needed, one of each class")
    if min(size) < LEAST_SIZE:
        raise UserError(
            f"images of {size[0]} x {size[1]} pixels (height x width): each side needs {LEAST_SIZE} or more"
        )
    if seed < 0:
        raise UserError(f"seed {seed}: a seed is a whole number from 0 on")
    place = Path(folder) / split
    for name in SHAPES:
        (place / name).mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        label = i % len(SHAPES)
        pixels = cv2.resize(_object(label, [seed, *split.encode(), i]), size[::-1], interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes()
        (place / SHAPES[label] / f"{i:06d}.jpg").write_bytes(data)
    return place


def _object(label: int, seed: list[int]) -> np.ndarray:
    """Return (h, w, 3) uint8 BGR: the first scene of this seed with such an object, cut around it."""
    generator = np.random.default_rng(seed)
    while True:
        pixels, things = render(generator, _SCENE)
        fitting = [thing for thing in things if _fits(thing, label)]
        if fitting:
            return _cut(pixels, fitting[0].bbox)


def _fits(thing: Thing, label: int) -> bool:
    return thing.label == label and not thing.is_crowd and min(thing.bbox[2:]) >= _LEAST_SIDE


def _cut(pixels: np.ndarray, bbox: tuple[int, int, int, int]) -> np.ndarray:
    """Return the square around the box, shifted into the picture."""
    x, y, width, height = bbox
    side = min(round(max(width, height) * (1 + 2 * _MARGIN)), *pixels.shape[:2])
    left = int(np.clip(x + width / 2 - side / 2, 0, pixels.shape[1] - side))
    top = int(np.clip(y + height / 2 - side / 2, 0, pixels.shape[0] - side))
    return pixels[top : top + side, left : left + side]
