"""Repairs of lists, ids, references and images."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from retinanet.data.doctor.draft import Draft
from retinanet.data.doctor.files import TURNED, look, read_header
from retinanet.data.doctor.ids import annotation_keys, file_keys, is_size, later_copies, repeated
from retinanet.data.doctor.table import SECTIONS, side_of
from retinanet.data.json_values import is_file_name, is_whole


def repair_structure(draft: Draft) -> None:
    """Make every section a list of objects."""
    for section in SECTIONS:
        if not isinstance(draft.content.get(section), list):
            draft.content[section] = []
            draft.log("structure", f"missing list {section!r} added, empty", 1)
        odd = [not isinstance(record, dict) for record in draft.content[section]]
        draft.drop(section, odd, "structure", f"entries of {section!r} that are no objects dropped")


def repair_categories(draft: Draft) -> None:
    """Give every category an id of its own; copies are joined, and their annotations keep them."""
    no_id = [key is None for key in draft.table.category_keys]
    draft.drop("categories", no_id, "no-id", "categories without an id dropped")
    keys = draft.table.category_keys
    groups = defaultdict(list)
    for key, record in zip(keys, draft.content["categories"], strict=True):
        groups[key].append(record)
    for records in groups.values():
        names = list(dict.fromkeys(str(record.get("name", record["id"])) for record in records))
        if len(names) > 1:
            records[0]["name"] = " / ".join(names)
    message = "categories joined with the one of the same id"
    draft.drop("categories", later_copies(keys), "duplicate-category-id", message)


def repair_images(draft: Draft) -> None:
    """Give every image an id of its own; images that share one and differ cannot be told apart, and are dropped."""
    no_id = [key is None for key in draft.table.image_keys]
    draft.drop("images", no_id, "no-id", "images without an id dropped")
    keys = draft.table.image_keys
    copies = later_copies(keys)
    first: dict = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    images = draft.table.images
    equal = [copy and _say_the_same(images[row], images[first[keys[row]]]) for row, copy in enumerate(copies)]
    draft.drop("images", equal, "duplicate-image-id", "equal copies of images dropped")
    draft.drop_images(repeated(draft.table.image_keys), "duplicate-image-id")


def _say_the_same(one: dict, other: dict) -> bool:
    return all(repr(one.get(key)) == repr(other.get(key)) for key in ("file_name", "width", "height"))


def repair_references(draft: Draft) -> None:
    """Make ids and references whole numbers, and drop annotations that mean nothing there is."""
    message = "annotations of images that are not there dropped"
    draft.drop("annotations", draft.table.rows < 0, "unknown-image", message)
    message = "annotations of categories that are not there dropped"
    draft.drop("annotations", draft.table.labels < 0, "unknown-category", message)
    table, loose = draft.table, 0
    for section, keys in (("images", table.image_keys), ("categories", table.category_keys)):
        new = _fresh({key for key in keys if isinstance(key, int)})
        for record, key in zip(draft.content[section], keys, strict=True):
            if not is_whole(record["id"]):
                record["id"] = key if isinstance(key, int) else next(new)
                loose += 1
    for key, section, rows in (("image_id", "images", table.rows), ("category_id", "categories", table.labels)):
        for record, row in zip(draft.content["annotations"], rows.tolist(), strict=True):
            if not is_whole(record[key]):
                record[key] = draft.content[section][row]["id"]
                loose += 1
    draft.log("id-type", "ids and references written as whole numbers", loose)
    _renumber(draft)


def _fresh(used: set[int]) -> Iterator[int]:
    return (number for number in count(1) if number not in used)


def _renumber(draft: Draft) -> None:
    keys = annotation_keys(draft.table)
    new = _fresh({key for key in keys if isinstance(key, int)})
    copies = later_copies(keys)
    for record, copy in zip(draft.content["annotations"], copies, strict=True):
        if copy:
            record["id"] = next(new)
    draft.log("duplicate-annotation-id", "annotations given a new id", sum(copies))


def repair_files(draft: Draft, images_dir: Path | None, problems: dict[str, str]) -> None:
    """Correct or drop images whose name, size or file cannot be used.

    problems: file name -> kind of finding, of files that were opened and cannot be used.
    """
    draft.drop_images([not is_file_name(name) for name in draft.table.column("images", "file_name")], "file-name")
    _repair_sizes(draft, images_dir)
    if images_dir is not None and images_dir.is_dir():
        presence = look(draft.table, images_dir)
        for row, name in presence.renamed.items():
            draft.table.images[row]["file_name"] = name
        gone = set(presence.missing)
        draft.log("renamed-file", "file names corrected", len(presence.renamed))
        draft.drop_images([row in gone for row in range(len(draft.table.images))], "missing-file")
    for kind in sorted(set(problems.values())):
        bad = [problems.get(name) == kind for name in draft.table.column("images", "file_name")]
        draft.drop_images(bad, kind)
    _join_files(draft)


def _repair_sizes(draft: Draft, images_dir: Path | None) -> None:
    corrected, lost = 0, []
    for record in draft.table.images:
        if not is_size(record):
            height, width = side_of(record.get("height")), side_of(record.get("width"))
            if not (height and width):
                height, width = _size_of_file(record, images_dir)
            if height and width:
                record["height"], record["width"] = height, width
                corrected += 1
        lost.append(not is_size(record))
    draft.log("image-size", "sizes of images corrected", corrected)
    draft.drop_images(lost, "image-size")


def _size_of_file(record: dict, images_dir: Path | None) -> tuple[int, int]:
    """Return (height, width) of the file, (0, 0) when there is none or an EXIF note leaves open how it is turned."""
    if images_dir is None:
        return 0, 0
    orientation, size = read_header(images_dir / record["file_name"])
    return size if orientation not in TURNED else (0, 0)


def _join_files(draft: Draft) -> None:
    """Make images of one file and size one, with the annotations of all."""
    table = draft.table
    sizes = map(tuple, table.sizes.tolist())
    keys = [None if name is None else (name, size) for name, size in zip(file_keys(table), sizes, strict=True)]
    copies = np.array(later_copies(keys), dtype=bool)
    if copies.any():
        first: dict = {}
        for key, record in zip(keys, table.images, strict=True):
            first.setdefault(key, record["id"])
        moved = np.flatnonzero(np.append(copies, False)[table.rows])
        for row in moved.tolist():
            table.annotations[row]["image_id"] = first[keys[table.rows[row]]]
        draft.drop("images", copies, "duplicate-file-name", "images joined with the one of the same file")
