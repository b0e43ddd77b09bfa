"""Which four numbers a `bbox` holds: COCO's x, y, width, height in pixels, or what an exporter mistook for that.

One box proves nothing, many do: boxes lie inside their images. So every layout is scored by the share of boxes which
it places inside, and COCO's is given up only for one that explains nearly all boxes when COCO's does not.
"""

from typing import NamedTuple

import numpy as np

COCO_FORM, CORNERS, CENTER = "x, y, width, height", "x1, y1, x2, y2", "center x, center y, width, height"

_FEWEST = 20  # boxes from which shares mean something
_EXPLAINED = 0.99  # share of boxes that another layout has to place inside
# Shares at and below which COCO's layout is given up. Read as x, y, width, height, corners stay inside only where the
# box lies left of and above the middle, about a quarter; centers fail at the right and lower border alone.
_REFUTED = {CORNERS: 0.6, CENTER: 0.95}
_SLACK = 2.0  # pixels by which hand-drawn boxes may reach out
_SLACK_SHARE = 0.005  # the same as a share of the image side, for large images and normalized boxes
_SMALLEST_SIDE = 16  # pixels: in smaller images a box of 1 pixel is nothing special


class Layout(NamedTuple):
    """The order of the numbers, and whether they are shares of the image side instead of pixels."""

    form: str = COCO_FORM
    normalized: bool = False

    def __str__(self) -> str:
        return f"{self.form} {'as shares of the image side (0..1)' if self.normalized else 'in pixels'}"


def guess_layout(boxes: np.ndarray, sizes: np.ndarray) -> Layout:
    """Return the layout of `boxes` (B, 4) float64, all finite, in images of `sizes` (B, 2) (height, width)."""
    if not len(boxes):
        return Layout()
    normalized = _are_shares(boxes, sizes)
    pixels = scale_up(boxes, sizes) if normalized else boxes
    return Layout(_guess_form(pixels, sizes), normalized)


def to_coco(boxes: np.ndarray, sizes: np.ndarray, layout: Layout) -> np.ndarray:
    """Return `boxes` (B, 4) of that layout as (x, y, width, height) in pixels."""
    boxes = scale_up(boxes, sizes) if layout.normalized else boxes
    first, second = boxes[:, :2], boxes[:, 2:]
    if layout.form == CORNERS:
        return np.concatenate([first, second - first], axis=1)
    if layout.form == CENTER:
        return np.concatenate([first - second / 2, second], axis=1)
    return boxes


def scale_up(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return shares of the image side as pixels; boxes (B, 4), sizes (B, 2) (height, width)."""
    return boxes * np.tile(sizes[:, ::-1], 2)


def fits(boxes: np.ndarray, sizes: np.ndarray, form: str) -> np.ndarray:
    """Return (B,) bool: `boxes` (B, 4) in pixels, read in that form, have area and stay inside their image."""
    xywh = to_coco(boxes, sizes, Layout(form))
    sides = sizes[:, ::-1]  # (B, 2) width, height
    slack = np.maximum(_SLACK, _SLACK_SHARE * sides)
    inside = (xywh[:, :2] >= -slack) & (xywh[:, :2] + xywh[:, 2:] <= sides + slack) & (xywh[:, 2:] > 0)
    return inside.all(axis=1)


def _are_shares(boxes: np.ndarray, sizes: np.ndarray) -> bool:
    small = (np.abs(boxes) <= 1 + _SLACK_SHARE).all(axis=1) & (sizes.min(axis=1) >= _SMALLEST_SIDE)
    return bool(small.mean() >= _EXPLAINED and (boxes[small] > 0).any())


def _guess_form(boxes: np.ndarray, sizes: np.ndarray) -> str:
    if len(boxes) < _FEWEST:
        return COCO_FORM
    share = {form: fits(boxes, sizes, form).mean() for form in (COCO_FORM, CORNERS, CENTER)}
    better = [form for form in _REFUTED if share[form] >= _EXPLAINED and share[COCO_FORM] <= _REFUTED[form]]
    return better[0] if len(better) == 1 else COCO_FORM
