"""The catalog: a YAML file that gives data sets names. One entry: `name: {images: FOLDER, annotations: FILE}`.

Paths are relative to the catalog. `max_degenerate: N` in an entry admits N boxes without area (coco.py).
"""

from bisect import bisect_right
from pathlib import Path
from typing import TypedDict

import numpy as np
import yaml

from retinanet.data.coco import CocoDataset
from retinanet.errors import UserError, nearest, pick
from retinanet.structures import Target

_REQUIRED = ("images", "annotations")
_OPTIONAL = ("max_degenerate",)
_ROOT = Path(__file__).resolve().parents[2]
_SHIPPED = _ROOT / "datasets" / "catalog.yaml"
_EXAMPLE = "for example `my_train: {images: my/images, annotations: my/train.json}`"


class Entry(TypedDict):
    """One data set: image folder, annotation file (absolute) and the admitted number of degenerate boxes."""

    images: Path
    annotations: Path
    max_degenerate: int


def find_catalog(path: str | Path) -> Path:
    """Return the catalog's path: as given, or below this project's folder when the working directory has none."""
    given = Path(path).expanduser()
    for candidate in (given, _ROOT / given):
        if candidate.is_file():
            return candidate.resolve()
    raise UserError(f"DATASETS.CATALOG: the file {given} does not exist; the one that comes along is {_SHIPPED}")


def load_catalog(path: str | Path) -> dict[str, Entry]:
    """Return name -> `Entry` of a catalog file; raises `UserError` for a malformed one. Looks at no data set."""
    path = find_catalog(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the catalog cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: a catalog is a mapping from names to data sets, {_EXAMPLE}")
    return {str(name): _entry(path, str(name), value) for name, value in content.items()}


def _entry(path: Path, name: str, value) -> Entry:
    if not isinstance(value, dict):
        raise UserError(f"{path}: data set {name!r} is {value!r}; write {_EXAMPLE}")
    for key in value:
        if key not in _REQUIRED + _OPTIONAL:
            known = ", ".join(_REQUIRED + _OPTIONAL)
            hint = nearest(key, _REQUIRED + _OPTIONAL)
            raise UserError(f"{path}: data set {name!r} has the key {key!r}, which is not one of {known}{hint}")
    for key in _REQUIRED:
        if not isinstance(value.get(key), str) or not value[key]:
            raise UserError(f"{path}: data set {name!r} needs a path as {key!r} and has {value.get(key)!r}; {_EXAMPLE}")
    allowed = value.get("max_degenerate", 0)
    if not isinstance(allowed, int) or isinstance(allowed, bool) or allowed < 0:
        raise UserError(f"{path}: data set {name!r} has max_degenerate {allowed!r}, not a whole number >= 0")
    images, annotations = (path.parent / Path(value[key]).expanduser() for key in _REQUIRED)
    return Entry(images=images, annotations=annotations, max_degenerate=allowed)


def build_dataset(cfg, names: str | list[str] | tuple[str, ...]) -> "CocoDataset | Concatenated":
    """Return the data set of that name in `DATASETS.CATALOG`, with the boxes of `MODEL.BOX.CONVENTION`."""
    return open_dataset(cfg.DATASETS.CATALOG, names, plus_one_boxes=cfg.MODEL.BOX.CONVENTION == "detectron")


def open_dataset(
    catalog: str | Path, names: str | list[str] | tuple[str, ...], plus_one_boxes: bool = False
) -> "CocoDataset | Concatenated":
    """Return the data set of that name in the catalog file, or several as one.

    Raises `UserError` for an unknown name (with the nearest one), for data that is not there (with what to do about
    it), and when the categories of several data sets differ.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise UserError("DATASETS: no data set is named")
    entries = load_catalog(catalog)
    parts = [_open(find_catalog(catalog), name, pick(entries, name, "DATASETS"), plus_one_boxes) for name in names]
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def _open(catalog: Path, name: str, entry: Entry, plus_one_boxes: bool) -> CocoDataset:
    missing = [
        f"{what} {path}"
        for what, path, there in (
            ("the image folder", entry["images"], entry["images"].is_dir()),
            ("the annotation file", entry["annotations"], entry["annotations"].is_file()),
        )
        if not there
    ]
    if missing:
        raise UserError(
            f"data set {name!r}: {' and '.join(missing)} not found. Put the data there (datasets/README.md lists the "
            f"folders), or name your own data set in {catalog} and set DATASETS.TRAIN and DATASETS.TEST to it; "
            "`make demo` trains on generated data and needs none"
        )
    return CocoDataset(entry["images"], entry["annotations"], name, plus_one_boxes, entry["max_degenerate"])


class Concatenated:
    """Several data sets with the same categories, one after another; the interface of `CocoDataset` for training."""

    def __init__(self, parts: list[CocoDataset]):
        first = parts[0]
        for part in parts[1:]:
            ours = list(zip(first.category_ids, first.class_names, strict=True))
            theirs = list(zip(part.category_ids, part.class_names, strict=True))
            if ours != theirs:
                odd = sorted(set(ours) ^ set(theirs))[:5]
                raise UserError(
                    f"data sets {first.name!r} and {part.name!r} cannot be trained on together, their categories "
                    f"differ, first in {odd}; give both json files the same categories (ids and names)"
                )
        self.parts = parts
        self.name = "+".join(part.name for part in parts)
        self.num_classes, self.plus_one_boxes = first.num_classes, first.plus_one_boxes
        self.category_ids, self.class_names = first.category_ids, first.class_names
        self.image_ids = np.concatenate([part.image_ids for part in parts])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.box_labels = np.concatenate([part.box_labels for part in parts])
        self.box_counts = np.concatenate([part.box_counts for part in parts])
        self._starts = np.cumsum([0] + [len(part) for part in parts[:-1]]).tolist()

    def __len__(self) -> int:
        return len(self.image_ids)

    def _place(self, i: int) -> tuple[CocoDataset, int]:
        number = bisect_right(self._starts, i) - 1
        return self.parts[number], i - self._starts[number]

    def image_size(self, i: int) -> tuple[int, int]:
        """Return (height, width) of image `i`."""
        part, row = self._place(i)
        return part.image_size(row)

    def file(self, i: int) -> Path:
        """Return the path of image `i`."""
        part, row = self._place(i)
        return part.file(row)

    def target(self, i: int) -> Target:
        """Return the ground truth of image `i` in original pixels."""
        part, row = self._place(i)
        return part.target(row)

    def read(self, i: int) -> tuple[np.ndarray, Target]:
        """Return image `i` as (H, W, 3) uint8 BGR and its target."""
        part, row = self._place(i)
        return part.read(row)
