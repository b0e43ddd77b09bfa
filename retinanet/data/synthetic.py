"""The synthetic data set: seeded shapes on textured backgrounds, as images and a COCO json.

Made to be learned by a small network in minutes, and not solved by it: sizes from 16 pixels to half the image,
stretched and turned shapes, overlaps, objects cut by the border, low contrast, clutter that is no object, crowds, empty
images.
Boxes are exact: each is the extent of the pixels of its object that can be seen, as in COCO.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from retinanet.data.shapes import SHAPES, outline
from retinanet.errors import UserError

CATEGORY_IDS = (
    1,
    2,
    3,
    5,
    8,
    13,
)  # with gaps, as in COCO, so that every run shows that ids and labels are not mixed up
DESCRIPTION = "synthetic shapes of the retinanet package"
MIN_SIDE = 48  # pixels of an image; below, half of it is hardly more than the smallest object
MIN_OBJECT = 4  # pixels; a smaller shape has no outline
_SMALLEST = 16.0  # pixels, mean side of the smallest object
_EMPTY_SHARE, _CROWD_SHARE = 0.06, 0.1  # of the images
_MOST_OBJECTS = 7
_TRIES = 8  # places tried for an object before it is given up
# BGR means of the classes' colours, each hidden by a deviation of 40: a hint, as the colour of a real class is
_COLORS = ((60, 60, 200), (200, 120, 50), (70, 180, 90), (60, 190, 210), (190, 70, 170), (220, 220, 220))
_LEAST_CONTRAST = 70.0  # between the mean colour of an object and that of what lies under it
_LEAST_VISIBLE = 0.5  # share of an object's pixels that neither border nor later objects may take


class Thing(NamedTuple):
    """One annotation: label in [0, 6), visible pixels, and the box (x, y, w, h) around them in whole pixels."""

    label: int
    area: int
    bbox: tuple[int, int, int, int]
    is_crowd: bool


def render(
    generator: np.random.Generator, size: tuple[int, int], sides: tuple[float, float] | None = None
) -> tuple[np.ndarray, list[Thing]]:
    """Return an image (H, W, 3) uint8 BGR of `size` (height, width) and what is on it, from `generator` alone.

    sides: pixels, mean side of the smallest and of the largest object; by default 16 and half of the image.
    """
    canvas = _Canvas(_texture(generator, size, 12.0, 28.0))
    for _ in range(generator.integers(1, 5)):
        _draw_clutter(canvas, generator)
    if generator.random() >= _EMPTY_SHARE:
        if generator.random() < _CROWD_SHARE:
            _place_crowd(canvas, generator)
        for _ in range(generator.integers(1, _MOST_OBJECTS + 1)):
            _place_object(canvas, generator, sides)
    return _photograph(canvas.pixels, generator), canvas.things()


class _Canvas:
    """The picture in the making, and for every pixel the number of the thing that owns it (-1: none)."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels  # (H, W, 3) float32
        self.owner = np.full(pixels.shape[:2], -1, np.int32)
        self.full_areas: list[int] = []  # pixels of each thing before anything covered it
        self.kinds: list[tuple[int, bool]] = []  # (label, is_crowd)

    def paint(self, mask: np.ndarray, color: np.ndarray) -> None:
        """Blend `color`, (3,) or (H, W, 3), over the pixels of `mask` (H, W) uint8."""
        rows, columns = _extent(mask > 0)
        alpha = mask[rows, columns, None].astype(np.float32) / 255
        shown = color[rows, columns] if color.ndim == 3 else color
        self.pixels[rows, columns] += alpha * (shown - self.pixels[rows, columns])

    def leaves_others_visible(self, inside: np.ndarray) -> bool:
        """Whether every thing keeps `_LEAST_VISIBLE` of its pixels when those of `inside` (H, W) are covered."""
        visible = np.bincount(self.owner[~inside] + 1, minlength=len(self.kinds) + 1)[1:]
        return bool((visible >= _LEAST_VISIBLE * np.array(self.full_areas)).all())

    def own(self, inside: np.ndarray, label: int, is_crowd: bool, full_area: int) -> None:
        """Give the pixels of `inside` (H, W) to a new thing."""
        self.owner[inside] = len(self.kinds)
        self.full_areas.append(full_area)
        self.kinds.append((label, is_crowd))

    def things(self) -> list[Thing]:
        """Return what can be seen of all things."""
        found = []
        for number, (label, is_crowd) in enumerate(self.kinds):
            visible = self.owner == number
            rows, columns = _extent(visible)
            bbox = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
            found.append(Thing(label, int(visible.sum()), bbox, is_crowd))
        return found


def _place_object(canvas: _Canvas, generator: np.random.Generator, sides: tuple[float, float] | None = None) -> None:
    """Draw one object where it and the others stay visible; after some tries in vain there is one less."""
    height, width = canvas.owner.shape
    label = int(generator.integers(len(SHAPES)))
    for _ in range(_TRIES):
        side = np.exp(generator.uniform(*np.log(sides or (_SMALLEST, min(height, width) / 2))))
        center = generator.uniform((0, 0), (width, height))
        mask, full_area = _shape_mask(canvas, generator, label, side, center)
        inside = mask >= 128
        if inside.sum() >= _LEAST_VISIBLE * full_area and canvas.leaves_others_visible(inside):
            canvas.paint(mask, _fill(canvas, generator, label, inside))
            canvas.own(inside, label, False, int(inside.sum()))
            return


def _place_crowd(canvas: _Canvas, generator: np.random.Generator) -> None:
    """Draw a group of small objects of one class as one thing, on a canvas that holds no thing yet."""
    height, width = canvas.owner.shape
    label = int(generator.integers(len(SHAPES)))
    reach = min(height, width) / 6
    middle = generator.uniform((reach, reach), (width - reach, height - reach))
    together = np.zeros((height, width), bool)
    for _ in range(generator.integers(8, 15)):
        center = np.clip(generator.normal(middle, reach / 2), 4, (width - 5, height - 5))
        mask, _ = _shape_mask(canvas, generator, label, generator.uniform(8, 12), center)
        canvas.paint(mask, _fill(canvas, generator, label, mask >= 128))
        together |= mask >= 128
    canvas.own(together, label, True, int(together.sum()))


def _shape_mask(canvas: _Canvas, generator, label: int, side: float, center: np.ndarray) -> tuple[np.ndarray, int]:
    """Return a smooth-edged (H, W) uint8 mask of a stretched and turned shape, and its area without the border."""
    stretch = np.exp(generator.uniform(-0.35, 0.35))  # width / height from 0.5 to 2
    parts = outline(SHAPES[label], side * stretch, side / stretch, generator.uniform(0, 2 * np.pi))
    mask = np.zeros(canvas.owner.shape, np.uint8)
    fixed = [np.round((part + center) * 16).astype(np.int32) for part in parts]
    cv2.fillPoly(mask, fixed, 255, lineType=cv2.LINE_AA, shift=4)
    areas = [cv2.contourArea(part.astype(np.float32)) for part in parts]
    return mask, int(max(areas[0] - sum(areas[1:]), 1))  # parts after the first are holes


def _fill(canvas: _Canvas, generator, label: int, inside: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) paint: the colour that the class often has, kept off what lies under `inside`, with texture."""
    under = canvas.pixels[inside].mean(axis=0) if inside.any() else np.full(3, 128.0)
    color = np.clip(np.array(_COLORS[label]) + generator.normal(0, 40, 3), 0, 255)
    apart = np.linalg.norm(color - under) + 1e-3
    color = under + (color - under) * max(_LEAST_CONTRAST / apart, 1)
    grain = generator.uniform(2, 14)
    return color.astype(np.float32) + _noise(generator, inside.shape, grain, generator.uniform(2, 12))


def _draw_clutter(canvas: _Canvas, generator: np.random.Generator) -> None:
    """Draw something that is no object: a line, an arc, or a ragged patch."""
    height, width = canvas.owner.shape
    mask = np.zeros((height, width), np.uint8)
    points = generator.uniform((0, 0), (width, height), (2, 2)).astype(int).tolist()
    kind = generator.integers(3)
    thickness = int(generator.integers(1, 4))
    if kind == 0:
        cv2.line(mask, points[0], points[1], 255, thickness, cv2.LINE_AA)
    elif kind == 1:
        axes = generator.uniform(6, min(height, width) / 4, 2).astype(int).tolist()
        start = generator.uniform(0, 360)
        cv2.ellipse(mask, points[0], axes, start, 0, generator.uniform(60, 200), 255, thickness, cv2.LINE_AA)
    else:
        angles = np.sort(generator.uniform(0, 2 * np.pi, 9))
        radii = generator.uniform(3, min(height, width) / 8, 9)
        ragged = points[0] + radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(mask, [np.round(ragged).astype(np.int32)], 255, lineType=cv2.LINE_AA)
    if mask.any():
        canvas.paint(mask, generator.uniform(0, 255, 3).astype(np.float32))


def _texture(generator, size: tuple[int, int], coarse: float, contrast: float) -> np.ndarray:
    """Return (H, W, 3) float32: a colour, large blotches and finer ones."""
    base = generator.uniform(40, 215, 3).astype(np.float32)
    return base + _noise(generator, size, max(size) / 3, contrast) + _noise(generator, size, coarse, contrast / 2)


def _noise(generator, size: tuple[int, int], grain: float, contrast: float) -> np.ndarray:
    """Return (H, W, 3) float32 smooth noise with blotches of about `grain` pixels and standard deviation `contrast`."""
    cells = (max(int(size[0] / grain), 1) + 1, max(int(size[1] / grain), 1) + 1, 3)
    coarse = generator.normal(0, contrast, cells).astype(np.float32)
    return cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def _photograph(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the picture as a camera would: light, blur and sensor noise."""
    blur = generator.uniform(0, 0.9)
    pixels = cv2.GaussianBlur(pixels, (0, 0), blur) if blur > 0.3 else pixels
    noise = generator.normal(0, generator.uniform(1, 7), pixels.shape).astype(np.float32)
    return np.clip(pixels * np.float32(generator.uniform(0.8, 1.15)) + noise, 0, 255).astype(np.uint8)


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns that hold all of `mask` (H, W) bool; empty slices for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def write_dataset(
    folder: str | Path,
    split: str,
    num_images: int,
    size: tuple[int, int] = (160, 160),
    seed: int = 0,
    sides: tuple[float, float] | None = None,
) -> Path:
    """Write `folder/split/*.jpg` and `folder/annotations/split.json`; return the path of the json.

    Image i of a split is a function of (seed, split, i, size, sides) alone; sides: see `render`. The json comes last
    and whole, so that its presence means that the images are complete. Raises `UserError` for a count, size, side or
    seed that makes no sense, and rather than replace a json that this function has not written.
    """
    folder, target = Path(folder), Path(folder) / "annotations" / f"{split}.json"
    if num_images < 1:
        raise UserError(f"{split}: {num_images} images; at least 1 is needed")
    if min(size) < MIN_SIDE:
        raise UserError(f"images of {size[0]} x {size[1]} pixels (height x width): each side needs {MIN_SIDE} or more")
    if sides is not None and not MIN_OBJECT <= sides[0] <= sides[1] <= min(size) / 2:
        most = min(size) / 2
        raise UserError(f"objects of {sides[0]:g} to {sides[1]:g} pixels: give {MIN_OBJECT} to {most:g}, smaller first")
    if seed < 0:
        raise UserError(f"seed {seed}: a seed is a whole number from 0 on")
    if target.exists() and DESCRIPTION not in target.read_text(errors="replace")[:200]:
        raise UserError(f"{target} exists and is no synthetic data set; give another folder")
    content = {
        "info": {"description": DESCRIPTION, "seed": seed},
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, SHAPES, strict=True)],
        "images": [],
        "annotations": [],
    }
    (folder / split).mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        pixels, things = render(np.random.default_rng([seed, *split.encode(), i]), size, sides)
        name = f"{i:06d}.jpg"
        (folder / split / name).write_bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])[1].tobytes())
        content["images"].append({"id": i + 1, "file_name": name, "width": size[1], "height": size[0]})
        content["annotations"] += [_record(i + 1, thing) for thing in things]
    for number, record in enumerate(content["annotations"], start=1):
        record["id"] = number  # evaluators want them unique and not 0
    partial = target.with_suffix(".json.partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, target)
    return target


def _record(image_id: int, thing: Thing) -> dict:
    return {
        "image_id": image_id,
        "category_id": CATEGORY_IDS[thing.label],
        "bbox": list(thing.bbox),
        "area": thing.area,
        "iscrowd": int(thing.is_crowd),
    }
