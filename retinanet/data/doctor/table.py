"""Any json -> a `Table`: flat arrays with a place for everything that is wrong, so that checks need no `if`.

`annotations.py` refuses what cannot be trained on; this reads it nevertheless. The one promise is that nothing which
json can express raises here.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from retinanet.data.doctor.findings import Finding
from retinanet.data.json_values import LONGEST, is_whole, parse_json, shown

SECTIONS = ("images", "annotations", "categories")
_INT64, _INT32 = 2**63, 2**31
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")  # texts that say a whole number in one way only: "0012" stays a text


def read_json(path: str | Path) -> tuple[object, list[Finding]]:
    """Return the content of a json file and no finding, or None and what is wrong with the file."""
    try:
        return parse_json(Path(path).read_bytes()), []
    except FileNotFoundError:
        message = (
            f"{path}: the annotation file does not exist; put the data there (datasets/README.md lists the folders) or "
            "name your own in the catalog; `make demo` trains on generated data and needs none"
        )
    except OSError as error:
        message = f"{path}: the annotation file cannot be opened ({error.strerror})"
    except RecursionError:
        message = f"{path}: not valid json: nested too deeply"
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number with thousands of digits
        message = f"{path}: not valid json ({error}); export or copy the file again"
    return None, [Finding("json", message)]


def key_of(value) -> int | str | None:
    """Return what an id means: a whole number when `value` is or spells one, another text, or None for anything else.

    The keys of 12, 12.0 and "12" are equal. True and False are no ids.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str):
        text = value.strip()
        return int(text) if _WHOLE.fullmatch(text) else text or None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else None
    return value if -_INT64 <= value < _INT64 else str(value)


def keys_of(values: list) -> list[int | str | None]:
    """Return `key_of` of every value; fast where all are plain whole numbers, as they should be."""
    if all_whole(values):
        return values
    return [key_of(value) for value in values]


def all_whole(values: list) -> bool:
    """Whether every value is a whole number that fits 64 bits."""
    if set(map(type, values)) - {int}:
        return False
    return not values or (-_INT64 <= min(values) and max(values) < _INT64)


def side_of(value) -> int:
    """Return the width or height that `value` states in pixels, 0 when it states none."""
    key = key_of(value)
    return key if isinstance(key, int) and 0 < key < _INT32 else 0


def four_numbers(value) -> list[float] | None:
    """Return four finite numbers from a list of numbers, or of texts that spell them; else None."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    try:
        numbers = [float(number) for number in value if type(number) in (int, float, str)]
    except (ValueError, OverflowError):
        return None
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


@dataclass(frozen=True)
class Table:
    """What one json says of I images, B annotations and K categories; entries that are no objects are not counted.

    images, annotations, categories: the records themselves, in order; places: section -> (I or B or K,) int64, where
        in the list of the json each record stands.
    image_keys, category_keys: I and K keys (`key_of`).
    rows, labels: (B,) int64, the row of the image and of the category that an annotation means, -1 when there is
        none; the first of several with that id.
    sizes: (I, 2) int64 (height, width), 0 where the json states none that can be used.
    boxes: (B, 4) float64, the four numbers of `bbox`, NaN where there are none.
    crowds: (B,) bool, `iscrowd` is 1.
    """

    images: list[dict]
    annotations: list[dict]
    categories: list[dict]
    places: dict[str, np.ndarray]
    image_keys: list[int | str | None]
    category_keys: list[int | str | None]
    rows: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    crowds: np.ndarray

    @cached_property
    def box_sizes(self) -> np.ndarray:
        """(B, 2) int64 (height, width) of the image of each annotation, 0 where it has none."""
        known = np.append(self.sizes, [[0, 0]], axis=0)
        return known[self.rows]  # row -1 is the last

    def column(self, section: str, key: str) -> list:
        """Return the values under `key` of every record of a section, None where there is none."""
        return [record.get(key) for record in getattr(self, section)]

    def id_of(self, section: str, row: int) -> int | str:
        """Return the id of a record as the json writes it, or its place when it has no usable one."""
        value = getattr(self, section)[row].get("id")
        return value if is_whole(value) or isinstance(value, str) else f"{section}[{self.places[section][row]}]"

    def name_of(self, section: str, row: int) -> str:
        """Return what messages call a record: image 5 (a.jpg), annotation 17 (image 5), category 3 (dog)."""
        record, number = getattr(self, section)[row], self.id_of(section, row)
        singular = {"images": "image", "annotations": "annotation", "categories": "category"}[section]
        detail = {"images": "file_name", "annotations": "image_id", "categories": "name"}[section]
        name = f"{singular} {number}" if "id" in record and number == record["id"] else str(number)
        if detail not in record:
            return name
        value = record[detail]
        plain = isinstance(value, str) and value.isprintable() and len(value) <= LONGEST
        text = f"image {shown(value)}" if section == "annotations" else value if plain else shown(value)
        return f"{name} ({text})"


def tabulate(content) -> Table:
    """Return the table of a json's content, whatever it is."""
    lists, places = {}, {}
    for section in SECTIONS:
        value = content.get(section) if isinstance(content, dict) else None
        value = value if isinstance(value, list) else []
        lists[section] = [record for record in value if isinstance(record, dict)]
        places[section] = np.flatnonzero([isinstance(record, dict) for record in value])
    images, annotations, categories = (lists[section] for section in SECTIONS)
    image_keys = keys_of([record.get("id") for record in images])
    category_keys = keys_of([record.get("id") for record in categories])
    return Table(
        images=images,
        annotations=annotations,
        categories=categories,
        places=places,
        image_keys=image_keys,
        category_keys=category_keys,
        rows=_look_up([record.get("image_id") for record in annotations], image_keys),
        labels=_look_up([record.get("category_id") for record in annotations], category_keys),
        sizes=_sizes(images),
        boxes=_boxes([record.get("bbox") for record in annotations]),
        crowds=_crowds([record.get("iscrowd") for record in annotations]),
    )


def crowd_of(value) -> int | None:
    """Return 0 or 1 for an `iscrowd` that says so (a missing one is 0), None for one that says neither."""
    return 0 if value is None else _CROWD.get(value) if isinstance(value, (bool, int, float, str)) else None


_CROWD = {0: 0, 1: 1, "0": 0, "1": 1, "": 0, "false": 0, "true": 1, "False": 0, "True": 1}  # 0 == False == 0.0


def _crowds(flags: list) -> np.ndarray:
    return np.array([flag == 1 if type(flag) is int else crowd_of(flag) == 1 for flag in flags], dtype=bool)


def _look_up(references: list, keys: Sequence) -> np.ndarray:
    row_of = {}
    for row, key in enumerate(keys):
        row_of.setdefault(key, row)
    row_of.pop(None, None)
    return np.array([row_of.get(key, -1) for key in keys_of(references)], dtype=np.int64)


def _sizes(images: list[dict]) -> np.ndarray:
    sides = [(side_of(record.get("height")), side_of(record.get("width"))) for record in images]
    sizes = np.array(sides, dtype=np.int64).reshape(-1, 2)
    return sizes * (sizes > 0).all(axis=1, keepdims=True)


def _boxes(values: list) -> np.ndarray:
    if not set(map(type, values)) - {list} and not set(map(len, values)) - {4}:
        numbers = list(chain.from_iterable(values))
        if not set(map(type, numbers)) - {int, float}:
            try:
                boxes = np.array(numbers, dtype=np.float64).reshape(-1, 4)
                return np.where(np.isfinite(boxes).all(axis=1, keepdims=True), boxes, np.nan)
            except OverflowError:  # a whole number beyond float64: the slow way tells which
                pass
    nothing = [math.nan] * 4
    return np.array([four_numbers(value) or nothing for value in values], dtype=np.float64).reshape(-1, 4)
