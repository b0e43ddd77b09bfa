"""Augmentation beyond resize and flip: random crop, scale jitter, mosaic and colours, on images and on their boxes.

A sample is planned before any image is read, from sizes and the numbers that follow from (seed, step, place in the
step), so that every process knows how large all samples of a step are. Each kind draws from a generator of its own:
switching one on changes neither the others nor the order, sizes and flips.

The geometry is cuts and resizes, which the collator does anyway, straight into the batch. A box is cut with its image.
When less than a stated share of its area remains it is dropped: its pixels stay and count as background.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retinanet.data.colour import Colour, draw_colour, recolour
from retinanet.data.transforms import FLOAT_MODES, Geometry, resize_into, scale_boxes
from retinanet.structures import Target

_CROP, _JITTER, _MOSAIC, _COLOUR = 1, 2, 3, 4  # the last part of each generator's seed
_CENTER = (0.25, 0.75)  # where the four images of a mosaic meet, as a share of its sides

Rectangle = tuple[int, int, int, int]  # (left, top, right, bottom) in whole pixels, right and bottom outside


class Settings(NamedTuple):
    """What is drawn; the defaults change nothing.

    crop: the smallest share of each side that a crop keeps; each side's is uniform from here to 1 (as detectron2's
        `relative_range`). jitter: the least and the most factor of the size, uniform between them; a smaller image is
        padded like any other, of a larger one a random cut of the usual size stays (large-scale jitter, arXiv
        2012.07177, section 3, but without its fixed square canvas). mosaic: probability that a sample is made of four
        images (YOLOv4, arXiv 2004.10934, section 3.3); it is neither cropped nor jittered.
    colour: see `draw_colour`. min_visible: the share of its area from which a cut box is kept.
    """

    crop: float = 1.0
    jitter: tuple[float, float] = (1.0, 1.0)
    mosaic: float = 0.0
    colour: float = 0.0
    min_visible: float = 0.0


class Piece(NamedTuple):
    """`window` of the image in `row` of the data set fills `place` of the sample."""

    row: int
    window: Rectangle
    place: Rectangle


class Plan(NamedTuple):
    """How a sample is made. size: its (height, width) before the resize of the collator to `short_side`."""

    pieces: list[Piece]
    size: tuple[int, int]
    short_side: int
    colour: Colour | None


class Augmenter:
    """Plans samples and makes them.

    rows: (J,) rows of the data set to choose the images of mosaics from. image_size: row -> (height, width).
    geometry: (size, short side) -> how the collator resizes. mode: a value of `INPUT.RESIZE`. plus_one: x2 and y2 are
    inside the box (Detectron).
    """

    def __init__(
        self,
        settings: Settings,
        seed: int,
        rows: np.ndarray,
        image_size: Callable[[int], tuple[int, int]],
        geometry: Callable[[tuple[int, int], int], Geometry],
        mode: str,
        plus_one: bool = False,
    ):
        self.settings, self.seed, self.rows = settings, seed, rows
        self.image_size, self.geometry, self.mode, self.plus_one = image_size, geometry, mode, plus_one

    def plan(self, row: int, step: int, position: int, short_side: int, replace: Callable[[int], int]) -> Plan:
        """Return how the image in `row` becomes sample `position` of `step`; replace: row -> a row that can be read.

        The size of the plan depends on the image in `row` alone, a mosaic having the size that this image would have.
        """
        settings = self.settings
        key = [self.seed, step, position]
        colour = draw_colour(np.random.default_rng([*key, _COLOUR]), settings.colour) if settings.colour else None
        height, width = self.image_size(row)
        if settings.mosaic:
            generator = np.random.default_rng([*key, _MOSAIC])
            frame = self.geometry((height, width), short_side).size
            if generator.random() < settings.mosaic and min(frame) > 1:
                return Plan(self._mosaic(generator, row, frame, replace), frame, min(frame), colour)
        window = (0, 0, width, height)
        if settings.crop < 1:
            generator = np.random.default_rng([*key, _CROP])
            window = _inside(window, generator.uniform(settings.crop, 1, 2), generator.random(2))
        if settings.jitter != (1.0, 1.0):
            generator = np.random.default_rng([*key, _JITTER])
            scale = generator.uniform(*settings.jitter)
            if scale > 1:
                window = _inside(window, np.full(2, 1 / scale), generator.random(2))
            else:
                short_side = max(1, round(scale * min(self.geometry(_size(window), short_side).size)))
        height, width = _size(window)
        return Plan([Piece(row, window, (0, 0, width, height))], (height, width), short_side, colour)

    def _mosaic(self, generator, row: int, frame: tuple[int, int], replace: Callable[[int], int]) -> list[Piece]:
        """Return four pieces that fill `frame` (height, width), the image in `row` and three others, in random order.

        Each image is as small as it can be to cover its quarter, and is cut where it reaches out of it.
        """
        others = [replace(int(other)) for other in generator.choice(self.rows, 3)]
        y, x = (min(max(round(side * generator.uniform(*_CENTER)), 1), side - 1) for side in frame)
        quarters = [(0, 0, x, y), (x, 0, frame[1], y), (0, y, x, frame[0]), (x, y, frame[1], frame[0])]
        pieces = []
        for owner, place in zip(generator.permutation([row, *others]).tolist(), quarters, strict=True):
            sides, wanted = np.array(self.image_size(owner)), np.array(_size(place))
            shares = wanted / sides / (wanted / sides).max()  # (y, x)
            whole = (0, 0, int(sides[1]), int(sides[0]))
            pieces.append(Piece(owner, _inside(whole, shares[::-1], generator.random(2)), place))
        return pieces

    def make(self, plan: Plan, read: Callable[[int], tuple[np.ndarray, Target]]) -> tuple[np.ndarray, Target]:
        """Return the sample: image (H, W, 3) BGR of `plan.size`, and its target in pixels of this image.

        read: row -> image (H, W, 3) uint8 BGR and target. A mosaic is float32 where the resize mode is.
        """
        if len(plan.pieces) == 1:
            (piece,) = plan.pieces
            image, target = read(piece.row)
            if _size(piece.window) != image.shape[:2]:
                left, top, right, bottom = piece.window
                image, target = image[top:bottom, left:right], self._cut(target, piece)
        else:
            image, target = self._paste(plan, read)
        return (image if plan.colour is None else recolour(image, plan.colour)), target

    def _paste(self, plan: Plan, read) -> tuple[np.ndarray, Target]:
        sample = np.empty((*plan.size, 3), np.float32 if self.mode in FLOAT_MODES else np.uint8)
        targets = []
        for piece in plan.pieces:
            image, target = read(piece.row)
            (left, top, right, bottom), (x1, y1, x2, y2) = piece.window, piece.place
            resize_into(image[top:bottom, left:right], sample[y1:y2, x1:x2], _scales(piece), self.mode)
            targets.append(self._cut(target, piece))
        boxes, labels = (torch.cat([target[key] for target in targets]) for key in ("boxes", "labels"))
        return sample, Target(boxes=boxes, labels=labels)

    def _cut(self, target: Target, piece: Piece) -> Target:
        """Return the target of the image as one of the sample: what lies in the window, at its place."""
        boxes, kept = cut_boxes(target["boxes"], piece.window, self.settings.min_visible, self.plus_one)
        boxes = scale_boxes(boxes, _scales(piece)) + torch.tensor(piece.place[:2] * 2, dtype=torch.float32)
        return Target(boxes=boxes, labels=target["labels"][kept])


def cut_boxes(boxes: Tensor, window: Rectangle, min_visible: float, plus_one: bool = False) -> tuple[Tensor, Tensor]:
    """Return the boxes (m, 4) that are kept, cut to `window` and in its pixels, and which are kept (M,) bool.

    boxes: (M, 4) xyxy pixels of the image. A box is kept when it reaches into the window with at least the share
    `min_visible` of its area. plus_one: x2 and y2 are inside the box (Detectron).
    """
    extra = 1.0 if plus_one else 0.0
    origin = torch.tensor(window[:2] * 2, dtype=torch.float32)
    far = torch.tensor(window[2:] * 2, dtype=torch.float32) - extra
    cut = boxes.clamp(min=origin).minimum(far)
    sides = boxes[:, 2:].minimum(far[2:]) - boxes[:, :2].maximum(origin[:2]) + extra  # negative outside
    area = (boxes[:, 2:] - boxes[:, :2] + extra).prod(1)
    kept = (sides > 0).all(1) & (sides.prod(1) >= min_visible * area)
    return (cut - origin)[kept], kept


def _size(rectangle: Rectangle) -> tuple[int, int]:
    left, top, right, bottom = rectangle
    return bottom - top, right - left


def _scales(piece: Piece) -> tuple[float, float]:
    (height, width), (new_height, new_width) = _size(piece.window), _size(piece.place)
    return new_width / width, new_height / height


def _inside(window: Rectangle, shares: np.ndarray, places: np.ndarray) -> Rectangle:
    """Return a part of `window`; shares, places: (x, y) of its sides and of the room left over, each in [0, 1]."""
    old = np.array(window[2:]) - window[:2]
    new = np.clip(np.rint(old * shares), 1, old).astype(int)
    start = np.array(window[:2]) + np.minimum(places * (old - new + 1), old - new).astype(int)
    return tuple(map(int, (*start, *(start + new))))
