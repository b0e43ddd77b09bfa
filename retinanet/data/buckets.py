"""A few fixed canvas shapes for training, so that compiled code, CUDA graphs and cuDNN's choices are used again.

Photographs have few aspect ratios: of each common one there is the smallest canvas that holds it, lying and upright,
and one that reaches the cap of the long side. At 800/1333 pixels: 800x1088, 800x1216, 800x1344 and the same upright.
"""

import logging
from collections.abc import Callable

import numpy as np

from retinanet.data.transforms import Geometry

logger = logging.getLogger(__name__)
RATIOS = (4 / 3, 3 / 2, 16 / 9)  # long side / short side of most photographs
SQUARE_SHARE = 0.05  # a square shape pays from this share of square images on
MAX_SHAPES = 20  # each costs a compilation, or a CUDA graph and its memory

Shape = tuple[int, int]  # (height, width) in pixels


class ShapeBuckets:
    """The shapes of a training run and the group of each image; a batch holds images of one group.

    shapes: by rising area; the last is square and holds any image, for batches that no other shape holds.
    groups: (J,) int64, a number for each image.
    padding: pixels of padding per pixel of image, on average, when every batch fills its own shape.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        short_sides: tuple[int, ...],
        max_size: int,
        divisibility: int,
        images_per_step: int,
        geometry: Callable[[tuple[int, int], int], Geometry],
    ):
        """Choose the shapes for images of `sizes` (J, 2) (height, width) in original pixels.

        geometry: (size, short side) -> how an image is resized. images_per_step: a group with fewer images joins the
        one that it shares the smallest canvas with, so that no step is made of copies of the same few images.
        """
        distinct, image_of = np.unique(np.asarray(sizes), axis=0, return_inverse=True)
        image_of = image_of.reshape(-1)  # (J,) places in `distinct`
        with_square = float((distinct[:, 0] == distinct[:, 1])[image_of].mean()) >= SQUARE_SHARE
        needed: set[Shape] = set()
        resized = []
        for side in sorted(set(short_sides), reverse=True):
            ladder = _ladder(side, max_size, divisibility, with_square)
            resized.append(np.array([geometry((int(height), int(width)), side).size for height, width in distinct]))
            own = _smallest(resized[-1], ladder)  # place in the ladder of each distinct size
            if len(resized) == 1:
                self.groups = _join(own[image_of], ladder, images_per_step)
            needed |= {ladder[place] for place in own}
            for group in np.unique(self.groups):
                needed.add(_hold([ladder[place] for place in np.unique(own[image_of[self.groups == group]])]))
        cap = _round_up(max_size, divisibility)
        kept = _merge(needed, MAX_SHAPES - 1)
        self.shapes = tuple(_by_area({*kept, (cap, cap)}))
        self.padding = self._padding(np.concatenate(resized), np.tile(np.bincount(image_of), len(resized)))

    def canvas(self, geometries: list[Geometry]) -> Shape:
        """Return the smallest shape that holds all of these."""
        height, width = (max(geometry.size[axis] for geometry in geometries) for axis in (0, 1))
        return next(shape for shape in self.shapes if shape[0] >= height and shape[1] >= width)

    def _padding(self, resized: np.ndarray, weights: np.ndarray) -> float:
        areas = np.array([_area(shape) for shape in self.shapes])[_smallest(resized, self.shapes)]
        return float((areas * weights).sum() / (resized.prod(axis=1) * weights).sum() - 1)

    def describe(self) -> str:
        """Return the shapes, and how much of them is padding, as a line for people."""
        *fixed, last = (f"{height}x{width}" for height, width in self.shapes)
        return (
            f"shape buckets: {', '.join(fixed)} (height x width), {last} where none of them holds a batch; "
            f"about {100 * self.padding:.1f} % padding"
        )


def _area(shape: Shape) -> int:
    return shape[0] * shape[1]


def _by_area(shapes: set[Shape]) -> list[Shape]:
    return sorted(shapes, key=lambda shape: (_area(shape), shape))


def _round_up(length: float, step: int) -> int:
    return int(-(-length // step) * step)


def _ladder(side: int, max_size: int, step: int, with_square: bool) -> list[Shape]:
    """Return the shapes for one short side by rising area; the last two hold every image that is resized to it."""
    short = _round_up(side, step)
    longs = {_round_up(min(round(side * ratio), max_size), step) for ratio in RATIOS} | {_round_up(max_size, step)}
    squares = {(short, short)} if with_square else set()
    return _by_area({(short, long) for long in longs} | {(long, short) for long in longs} | squares)


def _smallest(sizes: np.ndarray, shapes: list[Shape] | tuple[Shape, ...]) -> np.ndarray:
    """Return (J,) the place of the first of `shapes` that holds each of `sizes` (J, 2)."""
    holds = (sizes[:, None] <= np.array(shapes)[None]).all(axis=2)  # (J, shapes)
    assert holds.any(axis=1).all(), (sizes[~holds.any(axis=1)], shapes)
    return holds.argmax(axis=1)


def _hold(shapes: list[Shape]) -> Shape:
    """Return the smallest shape that holds all of `shapes`."""
    return max(height for height, _ in shapes), max(width for _, width in shapes)


def _join(groups: np.ndarray, ladder: list[Shape], images_per_step: int) -> np.ndarray:
    """Return (J,) int64 groups of at least `images_per_step` images, or one group when there are fewer in all."""
    groups = groups.astype(np.int64)
    shapes = {int(group): ladder[group] for group in set(groups.tolist())}
    while len(shapes) > 1:
        counts = {group: int((groups == group).sum()) for group in shapes}
        least = min(shapes, key=lambda group: (counts[group], group))
        if counts[least] >= images_per_step:
            break
        others = [group for group in shapes if group != least]
        joined = min(others, key=lambda group: (_area(_hold([shapes[group], shapes[least]])), -counts[group], group))
        shapes[joined] = _hold([shapes[joined], shapes.pop(least)])
        groups[groups == least] = joined
    return groups


def _merge(shapes: set[Shape], most: int) -> set[Shape]:
    """Return at most `most` shapes that hold the same images; pairs that differ least in area become one."""
    shapes = set(shapes)
    while len(shapes) > most:
        pairs = [(first, second) for first in shapes for second in shapes if first < second]
        best = min(pairs, key=lambda pair: (2 * _area(_hold([*pair])) - _area(pair[0]) - _area(pair[1]), pair))
        shapes = shapes - {*best} | {_hold([*best])}
    return shapes
