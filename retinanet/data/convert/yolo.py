"""YOLO txt -> COCO json.

A label file has a line for each object: class from 0, then center x, center y, width, height as shares of the image as
a viewer shows it. Segmentation labels have a polygon behind the class instead.
Source: the format as Ultralytics documents it.
"""

import math
from pathlib import Path

from retinanet.data.convert.coco_file import CocoFile, image_size, list_images, read_text, some
from retinanet.errors import UserError, pick

POLYGONS = ("refuse", "box")
_NO_LABELS = {"classes.txt", "obj.names.txt", "train.txt", "val.txt", "test.txt"}  # lists that lie beside labels
_SLACK = 1e-3  # shares beyond 0..1 that rounding explains: six decimals, sums of two of them, and old tools with three


def convert_yolo(images: Path, labels: Path, names: list[str], polygons: str = "refuse") -> CocoFile:
    """Return a folder of images with its label files as a COCO json, in the order of the image names.

    labels: the folder with `a/b.txt` for the image `a/b.jpg`. An image without one has no objects. names: the classes,
    number 0 first. polygons: "refuse" raises at the first polygon; "box" takes the box around it.
    Raises `UserError` that names file and line for everything that cannot be converted.
    """
    pick(dict.fromkeys(POLYGONS), polygons, "polygons")
    if not labels.is_dir():
        raise UserError(f"{labels}: the folder of label files does not exist")
    made, files, used = CocoFile(names, "YOLO"), list_images(images), set()
    counts = {"without a label file: no objects": 0, "polygons became boxes": 0, "boxes clipped to the image": 0}
    for file in files:
        size = image_size(file, turned=True)
        made.add_image(file.relative_to(images).as_posix(), size)
        label = labels / file.relative_to(images).with_suffix(".txt")
        if label in used:
            raise UserError(f"{label}: two images of one name, {file.stem}, would share it; rename one")
        used.add(label)
        if not label.is_file():
            counts["without a label file: no objects"] += 1
            continue
        for number, line in enumerate(read_text(label).splitlines(), start=1):
            if line.strip():
                name, box, is_polygon = _row(f"{label} line {number}", line.split(), names, polygons)
                clipped = [min(max(value, 0.0), 1.0) for value in box]
                counts["polygons became boxes"] += is_polygon
                counts["boxes clipped to the image"] += clipped != box
                made.add_box(name, _pixels(clipped, size))
    made.notes += [f"{count} {what}" for what, count in counts.items() if count]
    stray = sorted(file for file in labels.rglob("*.txt") if file not in used and file.name not in _NO_LABELS)
    if stray:
        made.notes.append(f"{len(stray)} label files without an image were left out: {some(stray)}")
    return made


def _row(where: str, words: list[str], names: list[str], polygons: str) -> tuple[str, list[float], bool]:
    """Return class name, box (x1, y1, x2, y2) in shares, and whether it was a polygon."""
    try:
        label, *values = map(float, words)
    except ValueError:
        raise UserError(f"{where}: {' '.join(words)[:80]!r} are not numbers") from None
    if not label.is_integer() or not 0 <= label < len(names):
        raise UserError(f"{where}: class {words[0]} is not one of 0 to {len(names) - 1}, the {len(names)} names")
    if not all(map(math.isfinite, values)):
        raise UserError(f"{where}: {' '.join(words)[:80]!r} holds a number that is not finite")
    is_polygon = len(values) >= 6 and len(values) % 2 == 0
    if is_polygon and polygons == "refuse":
        raise UserError(f"{where}: a polygon of {len(values) // 2} points; --polygons box takes the boxes around them")
    if not is_polygon and len(values) != 4:
        hint = "; the sixth number is a score, so these are predictions" if len(values) == 5 else ""
        raise UserError(f"{where}: {len(words)} numbers; class, center x, center y, width, height are meant{hint}")
    if is_polygon:
        box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
    else:
        x, y, width, height = values
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if min(box) < -_SLACK or max(box) > 1 + _SLACK:
        raise UserError(f"{where}: {' '.join(words)[:80]!r} reaches out of the image; shares from 0 to 1 are meant")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise UserError(f"{where}: {' '.join(words)[:80]!r} has no area; correct or remove the line")
    return names[int(label)], box, is_polygon


def _pixels(box: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return x, y, width, height in pixels of a box x1, y1, x2, y2 in shares of `size` (height, width)."""
    height, width = size
    x1, y1, x2, y2 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    return x1, y1, x2 - x1, y2 - y1
