"""Structure, ids and references of a json, and what it states about its images."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from retinanet.data.doctor.culprits import on_annotations, on_categories, on_images
from retinanet.data.doctor.findings import SHOWN, Finding
from retinanet.data.doctor.table import SECTIONS, Table, all_whole
from retinanet.data.json_values import is_file_name, is_whole, shown


def check_structure(content) -> Iterator[Finding]:
    """Yield what keeps a json's content from being a COCO annotation file."""
    if not isinstance(content, dict):
        what = "a list, as COCO results are" if isinstance(content, list) else f"{shown(content)}"
        message = f"the file holds {what}; annotations are an object with the lists {', '.join(SECTIONS)}"
        yield Finding("json", message)
        return
    for section in SECTIONS:
        value = content.get(section)
        if not isinstance(value, list):
            what = "missing" if section not in content else f"{shown(value)} and no list"
            yield Finding("structure", f"{section!r} is {what}")
            continue
        odd = [f"{section}[{i}] is {shown(record)}" for i, record in enumerate(value) if not isinstance(record, dict)]
        if odd:
            message = f"{len(odd)} entries of {section!r} are no objects"
            yield Finding("structure", message, len(odd), examples=tuple(odd[:SHOWN]))


def check_content(table: Table) -> Iterator[Finding]:
    """Yield what makes a set impossible to learn from."""
    for section in ("images", "categories"):
        if not getattr(table, section):
            message = f"there is no entry in {section!r}, so nothing to learn from; is it the right file?"
            yield Finding("nothing", message)


def check_ids(table: Table) -> Iterator[Finding]:
    """Yield ids that are missing, of a wrong type, used twice, or that point to nothing."""
    for section, keys, on in (
        ("images", table.image_keys, on_images),
        ("categories", table.category_keys, on_categories),
    ):
        ids = table.column(section, "id")
        missing = [key is None for key in keys]
        yield from on(table, "no-id", missing, f"entries of {section!r} without an id", _has(ids, "id"))
        loose = [key is not None and not is_whole(value) for key, value in zip(keys, ids, strict=True)]
        message = f"entries of {section!r} whose id is not a whole number"
        yield from on(table, "id-type", loose, message, _has(ids, "id"))
    yield from on_images(
        table, "duplicate-image-id", repeated(table.image_keys), "images share their id with another image", _nothing
    )
    message = "categories share their id with another category"
    yield from on_categories(table, "duplicate-category-id", repeated(table.category_keys), message, _nothing)
    yield from _check_annotation_ids(table)
    yield from _check_references(table)
    yield from _check_category_names(table)


def _nothing(row: int) -> str:
    return ""


def _has(values: list, key: str):
    return lambda row: f"has {key} {shown(values[row])}"


def repeated(keys: list) -> list[bool]:
    """Return for each key whether another one equals it; None equals nothing."""
    if len(set(keys)) == len(keys):
        return [False] * len(keys)
    counts = Counter(keys)
    return [key is not None and counts[key] > 1 for key in keys]


def later_copies(keys: list) -> list[bool]:
    """Return for each key whether an earlier one equals it; None equals nothing."""
    if len(set(keys)) == len(keys):
        return [False] * len(keys)
    seen, copies = {None}, []
    for key in keys:
        copies.append(key in seen and key is not None)
        seen.add(key)
    return copies


def whole(values: list) -> np.ndarray:
    """Return (len(values),) bool: the value is a whole number as it should be; fast where all are."""
    if all_whole(values):
        return np.ones(len(values), dtype=bool)
    return np.array([is_whole(value) for value in values], dtype=bool)


def annotation_keys(table: Table) -> list:
    """Return the ids of the annotations, None for those without a whole number or a text."""
    ids = table.column("annotations", "id")
    if all_whole(ids):
        return ids
    return [value if is_whole(value) or isinstance(value, str) else None for value in ids]


def _check_annotation_ids(table: Table) -> Iterator[Finding]:
    copies = later_copies(annotation_keys(table))
    message = "annotations repeat the id of an earlier one; COCO tools then count one of them twice"
    yield from on_annotations(table, "duplicate-annotation-id", copies, message, _nothing)


def _check_references(table: Table) -> Iterator[Finding]:
    for kind, key, known, section in (
        ("unknown-image", "image_id", table.rows, "images"),
        ("unknown-category", "category_id", table.labels, "categories"),
    ):
        values = table.column("annotations", key)
        message = f"annotations whose {key} is not in {section!r}{_off_by_one(table, key, known)}"
        yield from on_annotations(table, kind, known < 0, message, _has(values, key))
        loose = ~whole(values) & (known >= 0)
        message = f"annotations whose {key} is not a whole number"
        yield from on_annotations(table, "id-type", loose, message, _has(values, key))


def _off_by_one(table: Table, key: str, known: np.ndarray) -> str:
    """Return a hint when the categories count from 1 and the annotations from 0, or the other way round."""
    if key != "category_id" or not (known < 0).any():
        return ""
    there = {value for value in table.category_keys if isinstance(value, int)}
    used = {value for value in table.column("annotations", key) if is_whole(value)}
    for shift in (1, -1):
        if used - there and {value + shift for value in used} <= there:
            way = "larger" if shift > 0 else "smaller"
            return f"; all would be there if they were {way} by 1, so correct them first"
    return ""


def _check_category_names(table: Table) -> Iterator[Finding]:
    names = [str(record.get("name", record.get("id"))).strip().casefold() for record in table.categories]
    unique = [None if copy else name for name, copy in zip(names, later_copies(table.category_keys), strict=True)]
    message = "categories share their name with another category; merge them if they are the same class"
    yield from on_categories(table, "duplicate-category-name", repeated(unique), message, _nothing)


def check_images(table: Table) -> Iterator[Finding]:
    """Yield images whose stated size or file name cannot be used, and files that are listed twice."""
    wrong = [not is_size(record) for record in table.images]
    message = "images whose width and height are not positive whole numbers"
    yield from on_images(table, "image-size", wrong, message, lambda row: _size_of(table.images[row]))
    names = table.column("images", "file_name")
    wrong = [not is_file_name(name) for name in names]
    yield from on_images(table, "file-name", wrong, "images without a usable file_name", _has(names, "file_name"))
    message = "images are the file of another image: each trains the objects of the other as background"
    yield from on_images(table, "duplicate-file-name", repeated(file_keys(table)), message, _nothing)


def _size_of(image: dict) -> str:
    return f"has width {shown(image.get('width'))}, height {shown(image.get('height'))}"


def is_size(image: dict) -> bool:
    """Whether an image states width and height as training reads them: positive whole numbers of 32 bits."""
    return all(is_whole(image.get(key)) and 0 < image[key] < 2**31 for key in ("width", "height"))


def file_keys(table: Table) -> list[str | None]:
    """Return the file names; None for unusable ones and for images whose id an earlier image has too."""
    names = table.column("images", "file_name")
    copies = later_copies(table.image_keys)
    return [name if is_file_name(name) and not copy else None for name, copy in zip(names, copies, strict=True)]
