"""Boxes: what is wrong with each, as masks that the checks report and `repair` acts upon."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from retinanet.data.doctor.culprits import on_annotations
from retinanet.data.doctor.findings import ERROR, WARNING, Finding
from retinanet.data.doctor.layout import COCO_FORM, CORNERS, Layout, fits, guess_layout, to_coco
from retinanet.data.doctor.table import Table, four_numbers
from retinanet.data.json_values import is_flag, shown

NOISE = 0.01  # pixels: COCO rounds coordinates to two decimals
_TINY = 1.0  # pixels: a box with a side below this
_SAME = 0.98  # IoU from which two boxes of one image and class are one
_NEIGHBOURS = 64  # boxes that start further right which each box is compared with
_HUGE = 1e300  # an area from here on is no area, and a whole number this long breaks arithmetic with floats
_REACHES_OUT = 0.1  # share of its side by which a suspect of being x1, y1, x2, y2 reaches out of the image


@dataclass(frozen=True)
class Boxes:
    """The B boxes of a table, and masks (B,) bool of what is wrong with them, one reason for each box at most.

    layout: what the numbers of `bbox` mean. xywh: (B, 4) float64 pixels after that reading, NaN where `bbox` is no
    box. clipped: the same within the image. known: boxes of a known image with a stated size; only these and no
    crowds are judged. degenerate: without area. outside: wholly out of the image. suspect: reaches out, but
    would not if its numbers were x1, y1, x2, y2. partly: reaches out otherwise. tiny: a side below a pixel.
    copies: boxes that another one of the image and class before them equals.
    """

    layout: Layout
    xywh: np.ndarray
    clipped: np.ndarray
    known: np.ndarray
    degenerate: np.ndarray
    outside: np.ndarray
    suspect: np.ndarray
    partly: np.ndarray
    tiny: np.ndarray
    copies: np.ndarray

    @property
    def usable(self) -> np.ndarray:
        """(B,) bool: what training would use after clipping, copies included."""
        return self.known & ~self.degenerate & ~self.outside


def judge(table: Table) -> Boxes:
    """Return what is wrong with the boxes of a table."""
    with np.errstate(over="ignore", invalid="ignore"):  # numbers near 1e308 become infinite and count as outside
        return _judge(table)


def _judge(table: Table) -> Boxes:
    sizes = table.box_sizes
    placed = np.isfinite(table.boxes).all(axis=1) & (sizes[:, 0] > 0)
    known = placed & ~table.crowds
    layout = guess_layout(table.boxes[known], sizes[known])
    xywh = np.where(placed[:, None], to_coco(table.boxes, sizes, layout), table.boxes)
    clipped, vanishes = _clip(xywh, sizes)
    excess = np.maximum(-xywh[:, :2], xywh[:, :2] + xywh[:, 2:] - sizes[:, ::-1])  # (B, 2) pixels
    degenerate = known & (xywh[:, 2:] <= 0).any(axis=1)
    sides = sizes[:, ::-1]
    away = (xywh[:, :2] >= sides).any(axis=1) | (xywh[:, :2] + xywh[:, 2:] <= 0).any(axis=1)
    outside = known & ~degenerate & away
    degenerate |= known & ~outside & vanishes
    sound = known & ~degenerate & ~outside
    reaches_out = sound & (excess > NOISE).any(axis=1)
    far_out = (excess > np.maximum(2.0, _REACHES_OUT * xywh[:, 2:])).any(axis=1)
    suspect = reaches_out & far_out & fits(xywh, sizes, CORNERS) & (layout.form == COCO_FORM)
    tiny = sound & (xywh[:, 2:] < _TINY).any(axis=1)
    copies = np.zeros(len(xywh), dtype=bool)
    copies[sound] = find_copies(xywh[sound], table.rows[sound], table.labels[sound])
    return Boxes(layout, xywh, clipped, known, degenerate, outside, suspect, reaches_out & ~suspect, tiny, copies)


def _clip(xywh: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes within their images, and (B,) bool: nothing is left that float32, as training has it, can tell.

    Within `NOISE` of the border a box keeps its numbers.
    """
    limit = np.tile(sizes[:, ::-1].astype(np.float64), 2)  # (B, 4)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    inner = np.clip(corners, 0, limit)
    narrow = inner.astype(np.float32)
    vanishes = (narrow[:, 2:] <= narrow[:, :2]).any(axis=1)
    moved = (np.abs(inner - corners) > NOISE).any(axis=1, keepdims=True)
    clipped = np.concatenate([inner[:, :2], inner[:, 2:] - inner[:, :2]], axis=1)
    return np.where(moved, clipped, xywh), vanishes


def find_copies(xywh: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (B,) bool: an earlier box of the same image (`rows`) and class (`labels`) has an IoU of 0.98 or more.

    Boxes of one image and class are sorted by their left side, and each is compared with those that start close
    enough to reach that IoU, so that the work grows with the boxes and not with their pairs. Every chain of equals
    keeps its first box in the order given.
    """
    order = np.lexsort((xywh[:, 0], labels, rows))
    x, y, w, h = xywh[order].T
    group = rows[order], labels[order]
    copies = np.zeros(len(order), dtype=bool)
    near = np.arange(len(order))
    for step in range(1, _NEIGHBOURS + 1):
        near = near[near + step < len(order)]
        ahead = near + step
        same = (group[0][near] == group[0][ahead]) & (group[1][near] == group[1][ahead])
        near = near[same & (x[ahead] - x[near] <= (1 - _SAME) * w[near])]
        if not len(near):
            break
        ahead = near + step
        pairs = _iou(x, y, w, h, near, ahead) >= _SAME
        copies[np.maximum(order[near[pairs]], order[ahead[pairs]])] = True
    return copies


def _iou(x, y, w, h, a, b) -> np.ndarray:
    width = np.minimum(x[a] + w[a], x[b] + w[b]) - np.maximum(x[a], x[b])
    height = np.minimum(y[a] + h[a], y[b] + h[b]) - np.maximum(y[a], y[b])
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    return intersection / (w[a] * h[a] + w[b] * h[b] - intersection)


def check_boxes(table: Table, boxes: Boxes, max_degenerate: int = 0) -> Iterator[Finding]:
    """Yield the findings about the boxes; so many degenerate ones as the catalog allows are only a warning."""
    yield from _check_values(table)
    if boxes.layout != Layout():
        number = int(boxes.known.sum())
        message = f"bbox holds {boxes.layout} in this file, instead of {Layout()}; the checks below read it so"
        yield Finding("box-format", message, number, examples=_examples(table, boxes.known))
    few = int(boxes.degenerate.sum()) <= max_degenerate
    for kind, mask, message, severity in (
        ("degenerate-box", boxes.degenerate, "boxes without area", WARNING if few else ERROR),
        ("outside-box", boxes.outside, "boxes wholly outside their image", ""),
        ("partly-outside-box", boxes.partly, "boxes reach out of their image; training clips them", ""),
        (
            "xyxy-suspect",
            boxes.suspect,
            "boxes reach far out of their image, and would not if bbox were x1, y1, x2, y2 here; training clips them, "
            "correct them by hand if they are",
            "",
        ),
        ("tiny-box", boxes.tiny, "boxes have a side below 1 pixel", ""),
        ("duplicate-box", boxes.copies, f"boxes repeat another one of image and category (IoU >= {_SAME})", ""),
    ):
        yield from on_annotations(table, kind, mask, message, _with_size(table), severity)


def _with_size(table: Table):
    def show(row: int) -> str:
        height, width = table.box_sizes[row]
        return f"has bbox {shown(table.annotations[row].get('bbox'))} in {width} x {height} pixels"

    return show


def _examples(table: Table, mask: np.ndarray) -> tuple[str, ...]:
    return tuple(f"{table.name_of('annotations', row)} {_with_size(table)(row)}" for row in np.flatnonzero(mask)[:2])


def _check_values(table: Table) -> Iterator[Finding]:
    values = table.column("annotations", "bbox")
    message = "annotations whose bbox is not four finite numbers [x, y, width, height]"
    yield from on_annotations(table, "bbox", not_numbers(table), message, lambda row: f"has bbox {shown(values[row])}")
    flags = table.column("annotations", "iscrowd")
    message, show = "annotations whose iscrowd is neither 0 nor 1", lambda row: f"has iscrowd {shown(flags[row])}"
    yield from on_annotations(table, "iscrowd", wrong_crowds(flags), message, show)
    areas = table.column("annotations", "area")
    message = "annotations whose area is not a finite number, which evaluation refuses"
    yield from on_annotations(table, "area-value", wrong_areas(areas), message, lambda row: f"has area {areas[row]!r}")


def not_numbers(table: Table) -> np.ndarray:
    """Return (B,) bool: `bbox` is not a list of four finite numbers; texts that spell numbers count as wrong too."""
    values = table.column("annotations", "bbox")
    if not np.isnan(table.boxes).any() and not set(map(type, values)) - {list}:
        flat = {type(number) for value in values for number in value}
        if not flat - {int, float}:
            return np.zeros(len(values), dtype=bool)
    strict = [four_numbers(value) is not None and not any(type(n) is str for n in value) for value in values]
    return ~np.array(strict, dtype=bool)


def wrong_crowds(flags: list) -> np.ndarray:
    """Return (B,) bool: `iscrowd` is given and not the number 0 or 1 (or true or false)."""
    if not set(map(type, flags)) - {int, bool, type(None)} and not set(flags) - {0, 1, None}:
        return np.zeros(len(flags), dtype=bool)
    return np.array([not is_flag(flag) for flag in flags], dtype=bool)


def wrong_areas(areas: list) -> list[bool]:
    """Return for each `area` whether it is given and not a finite number."""
    return [area is not None and (type(area) not in (int, float) or not abs(area) < _HUGE) for area in areas]
