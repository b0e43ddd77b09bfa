"""Resize and flip, on images and on their boxes. Every project that we load checkpoints of resizes in its own way.

`RESIZE_MODES`, the values of `INPUT.RESIZE`:

| mode | pixels | size of the result | boxes times | as |
|---|---|---|---|---|
| cv2 | bilinear on uint8 | rounded | result / original, per axis | ours, the fastest |
| cv2_float | bilinear on float32, grid of the one scale | rounded | the one scale | Detectron |
| pil | bilinear, antialiased when it shrinks, uint8 | rounded half up | result / original, per axis | detectron2 |
| torchvision | bilinear on float32 | rounded down | result / original, per axis | torchvision |

Detectron and torchvision normalize before they resize, we after: a bilinear resize is a weighted mean, so the two
orders agree up to float32 rounding (1.5e-5 of 255). The padding is zero after normalization in all of them.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from retinanet.errors import pick


class Geometry(NamedTuple):
    """What a resize does: the new (height, width) and the scales (x, y), resized pixels per original pixel."""

    size: tuple[int, int]
    scales: tuple[float, float]


class Augmentation(NamedTuple):
    """What was drawn for one sample: short side in pixels, and whether it is mirrored."""

    short_side: int
    flip: bool


def draw_augmentation(generator: np.random.Generator, short_sides: tuple[int, ...], flip_prob: float) -> Augmentation:
    """Return one of `short_sides` and a flip with probability `flip_prob`; always draws the same count of numbers."""
    short_side = int(short_sides[generator.integers(len(short_sides))])
    return Augmentation(short_side, bool(generator.random() < flip_prob))


def resize_geometry(size: tuple[int, int], short_side: int, max_size: int, mode: str) -> Geometry:
    """Return how an image of `size` (height, width) comes to `short_side`, its long side capped at `max_size`.

    The rules of the modes differ in the last pixel, see the module docstring; a side never becomes 0.
    """
    return pick(_GEOMETRIES, mode, "INPUT.RESIZE")(size, short_side, max_size)


def _detectron_scale(size, short_side: int, max_size: int) -> float:
    scale = short_side / min(size)
    return max_size / max(size) if round(scale * max(size)) > max_size else scale


def _one_scale(size, short_side: int, max_size: int) -> Geometry:
    scale = _detectron_scale(size, short_side, max_size)
    height, width = (max(round(scale * side), 1) for side in size)  # half to even, as cv2 rounds
    return Geometry((height, width), (scale, scale))


def _rounded(size, short_side: int, max_size: int) -> Geometry:
    return _per_axis(size, _one_scale(size, short_side, max_size).size)


def _half_up(size, short_side: int, max_size: int) -> Geometry:
    scale = short_side / min(size)
    height, width = (short_side if side == min(size) else scale * side for side in size)
    if max(height, width) > max_size:
        shrink = max_size / max(height, width)
        height, width = height * shrink, width * shrink
    return _per_axis(size, (max(int(height + 0.5), 1), max(int(width + 0.5), 1)))


def _floored(size, short_side: int, max_size: int) -> Geometry:
    scale = min(short_side / min(size), max_size / max(size))
    return _per_axis(size, (max(math.floor(size[0] * scale), 1), max(math.floor(size[1] * scale), 1)))


def _per_axis(old, new: tuple[int, int]) -> Geometry:
    return Geometry(new, (new[1] / old[1], new[0] / old[0]))


def resize_into(image: np.ndarray, out: np.ndarray, scales: tuple[float, float], mode: str) -> None:
    """Write `image` (H, W, 3) uint8, resized, into `out` (h, w, 3), which may be a view with gaps between rows.

    `out` is float32 for the modes in `FLOAT_MODES`, else uint8. `scales` (x, y) are those of `resize_geometry`.
    """
    pick(_RESIZERS, mode, "INPUT.RESIZE")(image, out, scales)


def _cv2_into(image: np.ndarray, out: np.ndarray, scales) -> None:
    result = cv2.resize(image, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_LINEAR)
    assert np.shares_memory(result, out), (image.shape, out.shape)


def _cv2_float_into(image: np.ndarray, out: np.ndarray, scales) -> None:
    # With a target size cv2 would sample at original / rounded size; Detectron's grid follows the scale itself.
    # Only a side that rounds to 0 and is kept at 1 pixel needs the target size.
    vanishes = round(scales[0] * image.shape[1]) == 0 or round(scales[1] * image.shape[0]) == 0
    grid = {"dsize": out.shape[1::-1]} if vanishes else {"dsize": None, "fx": scales[0], "fy": scales[1]}
    result = cv2.resize(image.astype(np.float32), dst=out, interpolation=cv2.INTER_LINEAR, **grid)
    assert result.shape == out.shape and np.shares_memory(result, out), (image.shape, result.shape, out.shape)


def _pil_into(image: np.ndarray, out: np.ndarray, scales) -> None:
    from PIL import Image

    out[:] = np.asarray(Image.fromarray(image).resize((out.shape[1], out.shape[0]), Image.Resampling.BILINEAR))


def _torchvision_into(image: np.ndarray, out: np.ndarray, scales) -> None:
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()  # (1, 3, H, W)
    resized = torch.nn.functional.interpolate(pixels, size=out.shape[:2], mode="bilinear", align_corners=False)
    out[:] = resized[0].permute(1, 2, 0).numpy()


_GEOMETRIES = {"cv2": _rounded, "cv2_float": _one_scale, "pil": _half_up, "torchvision": _floored}
_RESIZERS = {
    "cv2": _cv2_into,
    "cv2_float": _cv2_float_into,
    "pil": _pil_into,
    "torchvision": _torchvision_into,
}
RESIZE_MODES = tuple(_RESIZERS)
FLOAT_MODES = ("cv2_float", "torchvision")


def flip_image(image: np.ndarray) -> np.ndarray:
    """Return `image` (H, W, 3) mirrored left to right."""
    return cv2.flip(image, 1)


def flip_boxes(boxes: Tensor, width: int, plus_one: bool = False) -> Tensor:
    """Return `boxes` (M, 4) xyxy pixels of an image of this width, mirrored: x' = width - x.

    plus_one: x' = width - x - 1, where coordinates are pixel indices (Detectron).
    """
    x1, y1, x2, y2 = boxes.unbind(1)
    edge = width - 1 if plus_one else width
    return torch.stack([edge - x2, y1, edge - x1, y2], dim=1)


def scale_boxes(boxes: Tensor, scales: tuple[float, float]) -> Tensor:
    """Return `boxes` (M, 4) xyxy of the original image in pixels of the resized one; scales: (x, y)."""
    return boxes * torch.tensor([*scales, *scales], dtype=torch.float32)
