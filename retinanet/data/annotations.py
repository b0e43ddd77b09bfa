"""COCO json -> flat numpy arrays, checked.

The arrays replace the json's million small Python objects: forked workers share them, because reading an array
touches no reference count and so copies no page. Only `images`, `annotations` and `categories` are read, and of an
annotation only `image_id`, `category_id`, `bbox` and, where present, `iscrowd` and `id`.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retinanet.data.json_values import is_encodable, is_file_name, is_flag, is_whole, parse_json, shown
from retinanet.errors import UserError

logger = logging.getLogger(__name__)
_SHOWN = 5  # culprits that a message lists
_MAX_SIDE = 2**31 - 1  # pixels, what `sizes` can hold
_MAX_FLOAT = sys.float_info.max
_OUTSIDE_NOISE = 0.01  # pixels; COCO rounds coordinates to two decimals, so less than this is no finding


@dataclass(frozen=True)
class Annotations:
    """One json: I images in its order, B boxes sorted by image, K categories sorted by id.

    image_ids: (I,) int64. sizes: (I, 2) int32 (height, width).
    names: all file names in UTF-8, one after another; name_ends: (I,) int64, where each ends.
    boxes: (B, 4) float32 xyxy pixels of the original image, inside it. labels: (B,) int32 in [0, K).
    ends: (I,) int64, where the boxes of each image end.
    category_ids, class_names: K each. num_crowds, num_clipped: annotations left out as crowds, and boxes that
        reached out of their image and were clipped.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    names: bytes
    name_ends: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ends: np.ndarray
    category_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    num_crowds: int
    num_clipped: int


def load_annotations(path: str | Path, plus_one: bool = False, max_degenerate: int = 0) -> Annotations:
    """Return the annotations of a COCO json, minimal ones included; crowds (`iscrowd` 1) are left out of the boxes.

    plus_one: Detectron's x2 = x1 + w - 1 instead of x2 = x1 + w (boxes thinner than a pixel become one pixel).
    max_degenerate: so many boxes without area may be left out, with a line in the log; more are an error. COCO's own
        train2017 has two. The others are mistakes of an export, and to drop them would hide the objects.
    Raises `UserError` that names file, image, annotation, value and remedy for whatever cannot be trained on.
    """
    content = _read_json(path)
    image_ids, sizes, names = _images(path, content["images"])
    category_ids, class_names = _categories(path, content["categories"])
    records = content["annotations"]
    rows = _look_up(path, records, "image_id", image_ids.tolist(), "images")
    labels = _look_up(path, records, "category_id", category_ids, "categories")
    xywh = _bboxes(path, records)
    crowd = _crowds(path, records)
    keep = ~(crowd | _degenerate(path, records, xywh, crowd, max_degenerate))
    order = np.flatnonzero(keep)[np.argsort(rows[keep], kind="stable")]
    boxes, num_clipped = _to_xyxy(path, records, order, xywh[order], sizes[rows[order]], plus_one)
    return Annotations(
        image_ids=image_ids,
        sizes=sizes,
        names=b"".join(names),
        name_ends=np.cumsum([len(name) for name in names]),
        boxes=boxes,
        labels=labels[order].astype(np.int32),
        ends=np.cumsum(np.bincount(rows[order], minlength=len(image_ids))),
        category_ids=tuple(category_ids),
        class_names=tuple(class_names),
        num_crowds=int(crowd.sum()),
        num_clipped=num_clipped,
    )


def _read_json(path: str | Path) -> dict:
    try:
        content = parse_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: the annotation file does not exist") from None
    except OSError as error:
        raise UserError(f"{path}: the annotation file cannot be opened ({error.strerror})") from None
    except RecursionError:
        raise UserError(f"{path}: not valid json: nested too deeply; export or copy the file again") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number with thousands of digits
        raise UserError(f"{path}: not valid json ({error}); export or copy the file again") from None
    for key in ("images", "annotations", "categories"):
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
            raise UserError(
                f"{path}: not a COCO annotation file: it needs an object with the lists 'images', 'annotations' and "
                f"'categories' of objects, and {key!r} is {'missing' if value is None else 'something else'}"
            )
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{path}: {key!r} is empty, there is nothing to learn from; is it the right file?")
    return content


def _images(path, records: list[dict]) -> tuple[np.ndarray, np.ndarray, list[bytes]]:
    """Return ids (I,), sizes (I, 2) and encoded file names of the images."""
    ids = _ids(path, records, "image", "images")
    bad = [
        f"image {record['id']}: width {shown(record.get('width'))}, height {shown(record.get('height'))}"
        for record in records
        if not (_is_side(record.get("width")) and _is_side(record.get("height")))
    ]
    _fail_on(path, bad, "images whose width and height are not positive whole numbers", "write the true sizes there")
    names = [record.get("file_name") for record in records]
    bad = [f"image {i} has {shown(name)}" for i, name in zip(ids, names, strict=True) if not is_file_name(name)]
    _fail_on(path, bad, "images without a usable file_name", "name the file inside the image folder")
    sizes = np.array([(record["height"], record["width"]) for record in records], dtype=np.int32)
    return np.array(ids, dtype=np.int64), sizes, [name.encode() for name in names]


def _categories(path, records: list[dict]) -> tuple[list[int], list[str]]:
    """Return ids and names of the categories in the order of the ids; a category without a name gets its id as one."""
    ids = _ids(path, records, "category", "categories")
    pairs = sorted((number, str(record.get("name", number))) for number, record in zip(ids, records, strict=True))
    bad = [f"category {number} has {shown(name)}" for number, name in pairs if not is_encodable(name)]
    _fail_on(path, bad, "names of categories that no file can hold (half of a surrogate pair)", "rename them")
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _ids(path, records: list[dict], singular: str, plural: str) -> list[int]:
    ids = [record.get("id") for record in records]
    bad = [f"{plural}[{row}] has id {shown(number)}" for row, number in enumerate(ids) if not is_whole(number)]
    _fail_on(path, bad, f"{plural} without a whole number of 64 bits as id", "give each its own whole number")
    seen, twice = set(), []
    for number in ids:
        (twice.append(f"{singular} id {number}") if number in seen else seen.add(number))
    _fail_on(path, twice, f"{singular} ids used twice", "give each its own id, or remove the copies")
    return ids


def _look_up(path, records: list[dict], key: str, known: list[int], where: str) -> np.ndarray:
    """Return (len(records),) int64: the row in `known` of every record's `key`."""
    row_of = {number: row for row, number in enumerate(known)}
    rows = [row_of.get(value) if is_whole(value := record.get(key)) else None for record in records]
    bad = [f"{_name(records, i)} has {key} {shown(records[i].get(key))}" for i, row in enumerate(rows) if row is None]
    _fail_on(path, bad, f"annotations whose {key} is not in {where!r}", f"add it to {where!r} or remove them")
    return np.array(rows, dtype=np.int64)


def _bboxes(path, records: list[dict]) -> np.ndarray:
    """Return (len(records), 4) float64 (x, y, w, h)."""
    values = [record.get("bbox") for record in records]
    bad = [f"{_name(records, i)} has bbox {shown(box)}" for i, box in enumerate(values) if not _is_four_numbers(box)]
    remedy = "write [x, y, width, height] in pixels"
    _fail_on(path, bad, "annotations whose bbox is not four finite numbers", remedy)
    return np.array(values, dtype=np.float64).reshape(-1, 4)


def _crowds(path, records: list[dict]) -> np.ndarray:
    """Return (len(records),) bool: which annotations are crowds."""
    flags = [record.get("iscrowd") for record in records]
    bad = [f"{_name(records, i)} has iscrowd {shown(flag)}" for i, flag in enumerate(flags) if not is_flag(flag)]
    remedy = "write a number, or tools/check_dataset.py --fix OUT.json"
    _fail_on(path, bad, "annotations whose iscrowd is neither 0 nor 1", remedy)
    return np.array([bool(flag) for flag in flags], dtype=bool)


def _degenerate(path, records, xywh: np.ndarray, crowd: np.ndarray, allowed: int) -> np.ndarray:
    """Return the mask of boxes without area that may be left out; more than `allowed` of them raise."""
    mask = ((xywh[:, 2:] <= 0).any(axis=1)) & ~crowd
    found = [f"{_name(records, i)} has bbox {records[i]['bbox']}" for i in np.flatnonzero(mask)]
    if len(found) > allowed:
        _fail_on(
            path,
            found,
            "degenerate boxes (width or height not above 0)",
            "repair them, write a copy without them by tools/check_dataset.py --fix OUT.json, or allow so many by "
            "'max_degenerate' of this data set in the catalog",
        )
    if found:
        logger.warning("%s: left out %d degenerate boxes, as the catalog allows: %s", path, len(found), _some(found))
    return mask


def _to_xyxy(path, records, order, xywh: np.ndarray, sizes: np.ndarray, plus_one: bool) -> tuple[np.ndarray, int]:
    """Return (B, 4) float32 xyxy inside the images and how many boxes were clipped; row b is `records[order[b]]`."""
    extent = np.maximum(xywh[:, 2:] - 1, 0) if plus_one else xywh[:, 2:]
    raw = np.concatenate([xywh[:, :2], xywh[:, :2] + extent], axis=1)  # (B, 4)
    limit = np.tile(sizes[:, ::-1].astype(np.float64), 2) - (1 if plus_one else 0)  # (B, 4) largest x, y, x, y
    boxes = np.clip(raw, 0, limit).astype(np.float32)
    outside = (xywh[:, :2] >= sizes[:, ::-1]).any(1) | (xywh[:, :2] + xywh[:, 2:] <= 0).any(1)
    if not plus_one:
        outside |= (boxes[:, 2:] <= boxes[:, :2]).any(1)  # less of it inside than float32 can tell
    bad = [
        f"{_name(records, order[b])} has bbox {records[order[b]]['bbox']} in {sizes[b, 1]} x {sizes[b, 0]} pixels"
        for b in np.flatnonzero(outside)
    ]
    remedy = "correct them, or tools/check_dataset.py --fix OUT.json"
    _fail_on(path, bad, "boxes entirely outside their image", remedy)
    excess = np.maximum(-raw, raw - limit).max(axis=1, initial=0)  # (B,) pixels
    clipped = int((excess > _OUTSIDE_NOISE).sum())
    if clipped:
        logger.warning(
            "%s: %d of %d boxes reach out of their image, by up to %.1f pixels, and were clipped. If bbox holds x1, "
            "y1, x2, y2 here instead of x, y, width, height: tools/check_dataset.py tells and repairs it",
            path,
            clipped,
            len(boxes),
            excess.max(),
        )
    return boxes, clipped


def _fail_on(path, culprits: list[str], what: str, remedy: str) -> None:
    if culprits:
        raise UserError(f"{path}: {len(culprits)} {what}: {_some(culprits)}; {remedy}")


def _some(culprits: list[str]) -> str:
    more = len(culprits) - _SHOWN
    return "; ".join(culprits[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _name(records: list[dict], i: int) -> str:
    """Name an annotation for a message; minimal files give it no id, so its place in the list helps."""
    record = records[i]
    number = f"annotation {shown(record['id'])}" if "id" in record else f"annotations[{i}]"
    return f"{number} (image {shown(record.get('image_id'))})"


def _is_side(value) -> bool:
    return is_whole(value) and 0 < value <= _MAX_SIDE


def _is_four_numbers(value) -> bool:
    """Whether `value` is a list of four numbers within the range of float64."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(type(number) in (int, float) and abs(number) <= _MAX_FLOAT for number in value)
