"""COCO annotations and COCO results as flat arrays, checked once, before anything is scored.

Real files lack `area`, `iscrowd` or annotation ids, number categories as they like and start counting at 0, which
pycocotools takes for "unmatched". So every id is replaced by a position: image and category positions follow the
sorted ids, which keeps the order in which pycocotools visits them, and annotations keep the order of the file.
Boxes are xywh here, in float64 pixels of the original image, as in the files.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retinanet.data.json_values import is_encodable, is_flag, is_whole, parse_json, shown
from retinanet.errors import UserError

NUMBERS = {int, float, np.float32, np.float64}


@dataclass
class GroundTruth:
    """Annotations of one data set; G boxes, crowds included.

    source: the file name for messages.
    image_ids, category_ids: sorted ids of the json; `names` are the names of the categories in that order.
    images, labels: (G,) int64 positions in `image_ids` and `category_ids`.
    boxes: (G, 4) xywh; area: (G,) as annotated, else w * h; crowd: (G,) bool.
    """

    source: str
    image_ids: list
    category_ids: list
    names: list[str]
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    area: np.ndarray
    crowd: np.ndarray


@dataclass
class Results:
    """Detections in the order of the file: images, labels (D,) int64 positions, boxes (D, 4) xywh, scores (D,)."""

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def read_json(path: Path | str, what: str):
    """Return the content of a JSON file; a missing or damaged one raises `UserError` that says what it should be."""
    try:
        return parse_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{what} {str(path)!r} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} {str(path)!r} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{what} {str(path)!r} is not valid JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number with thousands of digits
        raise UserError(f"{what} {str(path)!r} is not valid JSON: {error}") from None


def write_json(path: Path, content) -> None:
    """Write `content` to `path`, whole or not at all; raises `UserError` when that fails, as on a full disk."""
    text = json.dumps(content, allow_nan=False, indent=None if isinstance(content, list) else 1)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        if partial.exists():
            partial.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


def ground_truth(annotations: Path | str | dict) -> GroundTruth:
    """Return the annotations of a COCO json, given as a path or as its content.

    Missing `area` is w * h and missing `iscrowd` is 0; boxes without extent stay, and match nothing, as in
    pycocotools. Raises `UserError` for a file without images or categories, an id that occurs twice or nowhere, and
    a box that is not four finite numbers.
    """
    in_memory = isinstance(annotations, dict)
    source = "annotations" if in_memory else str(annotations)
    content = annotations if in_memory else read_json(annotations, "annotation file")
    image_ids = _ids(content, "images", source)
    category_ids = _ids(content, "categories", source)
    names = _names(content["categories"], source)
    rows = content.get("annotations", [])
    place = _place(source, "annotation")
    boxes = _boxes(rows, place)
    return GroundTruth(
        source=source,
        image_ids=image_ids,
        category_ids=category_ids,
        names=[names[category_id] for category_id in category_ids],
        images=_positions(rows, "image_id", image_ids, place, "the images of this file"),
        labels=_positions(rows, "category_id", category_ids, place, "the categories of this file"),
        boxes=boxes,
        area=_areas(rows, boxes, place),
        crowd=_crowds(rows, place),
    )


def results(detections: Path | str | list, truth: GroundTruth) -> Results:
    """Return COCO results, given as a path or as a list of dicts, for the images and categories of `truth`.

    Raises `UserError` when an entry lacks a field, names an image or category that `truth` does not have, has a score
    that is not finite, or a box that is not [x, y, width >= 0, height >= 0].
    """
    in_memory = isinstance(detections, list)
    source = "results" if in_memory else str(detections)
    rows = detections if in_memory else read_json(detections, "results file")
    if not isinstance(rows, list):
        raise UserError(f"{source}: COCO results are a list of detections, not {_kind(rows)}")
    place = _place(source, "detection")
    boxes = _boxes(rows, place)
    if (boxes[:, 2:] < 0).any():
        bad = int((boxes[:, 2:] < 0).any(1).argmax())
        raise UserError(f"{place(rows, bad)}: bbox {rows[bad]['bbox']} must be [x, y, width >= 0, height >= 0]")
    return Results(
        images=_positions(rows, "image_id", truth.image_ids, place, f"the images of {truth.source}"),
        labels=_positions(rows, "category_id", truth.category_ids, place, f"the categories of {truth.source}"),
        boxes=boxes,
        scores=_numbers(rows, "score", place),
    )


Place = Callable[[list, int], str]  # (rows, index) -> where that row stands, for a message


def _place(source: str, what: str) -> Place:
    def place(rows: list, index: int) -> str:
        row = rows[index] if isinstance(rows[index], dict) else {}
        known = [f"{key} {shown(row[key])}" for key in ("id", "image_id") if key in row]
        return f"{source}: {what} {index}" + (f" ({', '.join(known)})" if known else "")

    return place


def _kind(value) -> str:
    return {dict: "an object", str: "a text", list: "a list"}.get(type(value), type(value).__name__)


def _ids(content, key: str, source: str) -> list:
    """Return the sorted ids of `content[key]`, each once."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{source}: no {key!r}; a COCO annotation file lists its images and categories")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not is_whole(entry.get("id")):
            raise UserError(f"{source}: entry {index} of {key!r} has no integer 'id' of 64 bits")
    ids = sorted(entry["id"] for entry in entries)
    for first, second in zip(ids, ids[1:], strict=False):
        if first == second:
            raise UserError(f"{source}: id {first} occurs twice in {key!r}; ids must be unique")
    return ids


def _names(entries: list[dict], source: str) -> dict[int, str]:
    """Return category id -> name; a category without a name is called by its id."""
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in entries}
    for number, name in names.items():
        if not is_encodable(name):
            raise UserError(f"{source}: category {number} has the name {shown(name)}, which holds half of a pair")
    return names


def _crowds(rows: list, place: Place) -> np.ndarray:
    """Return the (rows,) bool flags under `iscrowd`; missing ones are False."""
    flags = [row.get("iscrowd") for row in rows]
    for index, flag in enumerate(flags):
        if not is_flag(flag):
            raise UserError(
                f"{place(rows, index)}: iscrowd {shown(flag)} is neither 0 nor 1; write a number, or "
                "tools/check_dataset.py --fix OUT.json"
            )
    return np.array([bool(flag) for flag in flags], dtype=bool)


def _column(rows: list, key: str, place: Place) -> list:
    try:
        return [row[key] for row in rows]
    except (KeyError, TypeError, IndexError):
        bad = next(i for i, row in enumerate(rows) if not isinstance(row, dict) or key not in row)
        raise UserError(f"{place(rows, bad)}: no {key!r}") from None


def _positions(rows: list, key: str, ids: list, place: Place, where: str) -> np.ndarray:
    """Return the (rows,) positions in `ids` of the ids under `key`."""
    position = {value: index for index, value in enumerate(ids)}
    try:
        return np.array([position[value] for value in _column(rows, key, place)], dtype=np.int64)
    except (KeyError, TypeError):  # TypeError: a list or an object in place of an id
        values = _column(rows, key, place)
        bad = next(i for i, value in enumerate(values) if not isinstance(value, int | float) or value not in position)
        known = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
        message = f"{place(rows, bad)}: {key} {shown(values[bad])} is not among {where} ({known})"
        raise UserError(message) from None


def _numbers(rows: list, key: str, place: Place) -> np.ndarray:
    """Return the (rows,) float64 numbers under `key`, all finite."""
    values = _column(rows, key, place)
    for index, value in enumerate(values):
        if type(value) not in NUMBERS or not abs(value) <= sys.float_info.max:
            raise UserError(f"{place(rows, index)}: {key} {shown(value)} is not a finite number")
    return np.array(values, dtype=np.float64)


def _boxes(rows: list, place: Place) -> np.ndarray:
    """Return the (rows, 4) float64 boxes, all finite."""
    if not isinstance(rows, list):
        raise UserError(f"annotations and detections are lists, not {_kind(rows)}")
    values = _column(rows, "bbox", place)
    boxes = _four_numbers(values, len(values))
    if boxes is None or np.isnan(boxes).any():
        bad = next(i for i, value in enumerate(values) if (box := _four_numbers(value)) is None or np.isnan(box).any())
        box = shown(values[bad])
        raise UserError(f"{place(rows, bad)}: bbox {box} is not four finite numbers [x, y, width, height]")
    return boxes


def _four_numbers(value, count: int = 1) -> np.ndarray | None:
    """Return `value` as (count, 4) float64, infinities as NaN; None when it is anything else."""
    if count == 0:
        return np.zeros((0, 4))
    try:
        boxes = np.array(value)
    except ValueError:  # rows of unequal length
        return None
    if boxes.dtype.kind not in "iuf" or boxes.size != 4 * count or boxes.shape[-1] != 4:
        return None
    boxes = boxes.reshape(count, 4).astype(np.float64)
    return np.where(np.isfinite(boxes), boxes, np.nan)


def _areas(rows: list, boxes: np.ndarray, place: Place) -> np.ndarray:
    """Return the annotated areas, which are mask areas in COCO; w * h where a row has none."""
    sides = (boxes[:, 2] * boxes[:, 3]).tolist()
    filled = [{**row, "area": side} if row.get("area") is None else row for row, side in zip(rows, sides, strict=True)]
    return _numbers(filled, "area", place)
