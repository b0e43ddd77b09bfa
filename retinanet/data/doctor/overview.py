"""The set as a whole: what it holds, and what that says about training on it."""

from collections.abc import Iterator
from typing import TypedDict

import numpy as np

from retinanet.data.doctor.boxes import Boxes
from retinanet.data.doctor.culprits import on_annotations, on_categories, on_images
from retinanet.data.doctor.findings import Finding
from retinanet.data.doctor.ids import repeated
from retinanet.data.doctor.table import Table
from retinanet.data.json_values import shown

_RARE = 10  # boxes; a class with fewer is hardly learned, and its AP hardly measured
_SMALL, _LARGE = 32.0**2, 96.0**2  # square pixels: COCO's small, medium and large objects
_AREA_SLACK = 0.01  # share of width x height by which an area may exceed it by rounding


class Overview(TypedDict):
    """Counts of one set. classes: category name -> boxes and images with it, most frequent first."""

    images: int
    boxes: int
    crowds: int
    empty_images: int
    small: int
    medium: int
    large: int
    classes: dict[str, dict[str, int]]


def describe(table: Table, boxes: Boxes) -> Overview:
    """Return the counts of what training would use."""
    used = _used(table, boxes)
    area = boxes.clipped[used, 2] * boxes.clipped[used, 3]
    number = max(len(table.images), 1)
    pairs = np.unique(table.labels[used] * number + table.rows[used])  # a number for each image of a category
    per_class = np.bincount(table.labels[used], minlength=len(table.categories))
    images = np.bincount(pairs // number, minlength=len(table.categories))
    order = np.argsort(-per_class, kind="stable").tolist()
    names = _unique_names(table)
    return Overview(
        images=len(table.images),
        boxes=int(used.sum()),
        crowds=int(table.crowds.sum()),
        empty_images=int(_empty(table, used).sum()),
        small=int((area < _SMALL).sum()),
        medium=int(((area >= _SMALL) & (area < _LARGE)).sum()),
        large=int((area >= _LARGE).sum()),
        classes={names[k]: {"boxes": int(per_class[k]), "images": int(images[k])} for k in order},
    )


def check_overview(table: Table, boxes: Boxes) -> Iterator[Finding]:
    """Yield empty images, shares of crowds, rare and unused categories, and areas that contradict their boxes."""
    used = _used(table, boxes)
    if table.images and not used.any():
        yield Finding("no-boxes", "the set has no box that training could use")
    number = len(table.images)
    message = f"of {number} images have no boxes; they train as background (DATALOADER.SKIP_EMPTY True leaves them out)"
    yield from on_images(table, "empty-image", _empty(table, used), message, lambda row: "")
    message = f"of {len(table.annotations)} annotations are crowds: not trained on, ignored by evaluation"
    yield from on_annotations(table, "crowds", table.crowds, message, lambda row: "")
    if used.any():
        per_class = np.bincount(table.labels[used], minlength=len(table.categories))
        message = "categories have no box: their scores train on background alone"
        yield from on_categories(table, "unused-category", per_class == 0, message, lambda row: "")
        message = f"categories have fewer than {_RARE} boxes"
        rare = (per_class > 0) & (per_class < _RARE)
        yield from on_categories(table, "rare-category", rare, message, lambda row: f"has {per_class[row]}")
    yield from _check_areas(table, boxes)


def _used(table: Table, boxes: Boxes) -> np.ndarray:
    return boxes.usable & (table.labels >= 0)


def _empty(table: Table, used: np.ndarray) -> np.ndarray:
    return np.bincount(table.rows[used], minlength=len(table.images)) == 0


def _check_areas(table: Table, boxes: Boxes) -> Iterator[Finding]:
    """An area is that of the mask where there is one, so only a larger one than the box contradicts it."""
    areas = table.column("annotations", "area")
    numbers = np.array([area if type(area) in (int, float) and abs(area) < 1e300 else np.nan for area in areas], float)
    with np.errstate(over="ignore", invalid="ignore"):
        box = boxes.xywh[:, 2] * boxes.xywh[:, 3]
        wrong = boxes.usable & ((numbers > box * (1 + _AREA_SLACK) + 1) | (numbers <= 0))
    message = "annotations whose area is not that of their box or of a mask in it; APs, APm and APl go by it"
    yield from on_annotations(
        table, "area-mismatch", wrong, message, lambda row: f"has area {shown(areas[row])}, its box {box[row]:.1f}"
    )


def _unique_names(table: Table) -> list[str]:
    names = [str(record.get("name", record.get("id"))) for record in table.categories]
    return [
        f"{name} ({table.name_of('categories', row)})" if twice else name
        for row, (name, twice) in enumerate(zip(names, repeated(names), strict=True))
    ]
