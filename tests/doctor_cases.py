"""A clean data set of four images, and every kind of damage that a json can have, each with its culprits."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

WIDTH, HEIGHT = 120, 100
NAMES = ("a.png", "b.png", "sub/c.png", "sub/ü d.png")


def clean() -> dict:
    """Four images of 120 x 100 pixels with 12 boxes each, 24 of either class; nothing to find."""
    images = [{"id": 10 + i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(NAMES)]
    annotations = []
    for image in images:
        for place in range(12):
            x, y = 4 + 28.5 * (place % 4), 3 + 31.25 * (place // 4)
            w, h = 8 + 1.5 * place, 10 + 1.25 * place + (image["id"] - 10)
            w, h = min(w, 22), min(h, 28)
            annotations.append(
                {
                    "id": 100 * image["id"] + place,
                    "image_id": image["id"],
                    "category_id": (5, 2)[place % 2],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 5, "name": "dog"}, {"id": 2, "name": "cat"}]
    return {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}


def write_images(folder: Path) -> Path:
    """Write the four images of `clean`, each with other pixels."""
    for number, name in enumerate(NAMES):
        write_image(folder / name, WIDTH, HEIGHT, number)
    return folder


def write_image(path: Path, width: int, height: int, seed: int) -> None:
    """Write an image of random pixels; cv2 cannot write every file name itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())


def write_json(path: Path, content) -> Path:
    """Write `content`, or text as it is."""
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


class Damage(NamedTuple):
    """apply: changes a clean content in place. images, annotations: the ids that the finding has to name."""

    kind: str
    apply: Callable[[dict], object]
    images: tuple = ()
    annotations: tuple = ()


def _set(section: str, index: int, **values) -> Callable[[dict], object]:
    return lambda content: content[section][index].update(values)


def _remove(section: str, index: int, key: str) -> Callable[[dict], object]:
    return lambda content: content[section][index].pop(key)


def _append(section: str, **values) -> Callable[[dict], object]:
    """Append a copy of the first record with other values."""
    return lambda content: content[section].append(content[section][0] | values)


def _each_box(change: Callable[[list], list]) -> Callable[[dict], object]:
    return lambda content: [record.update(bbox=change(record["bbox"])) for record in content["annotations"]]


ALL_BOXES = tuple(record["id"] for record in clean()["annotations"])

DAMAGES = {
    "section missing": Damage("structure", lambda content: content.pop("annotations")),
    "section of wrong type": Damage("structure", lambda content: content.update(annotations={"1": {}})),
    "entry that is no object": Damage("structure", lambda content: content["annotations"].append("box")),
    "image without id": Damage("no-id", _remove("images", 0, "id"), ("images[0]",)),
    "category with null as id": Damage("no-id", _set("categories", 1, id=None)),
    "image id as text": Damage("id-type", _set("images", 0, id="10"), ("10",)),
    "image id as word": Damage(
        "id-type",
        lambda content: [
            content["images"][0].update(id="first"),
            *(record.update(image_id="first") for record in content["annotations"] if record["image_id"] == 10),
        ],
        ("first",),
    ),
    "image id as fraction": Damage("id-type", _set("images", 1, id=11.0), ("images[1]",)),
    "image id beyond 64 bits": Damage("id-type", _set("images", 1, id=10**30), ("images[1]",)),
    "category id as text": Damage("id-type", _set("categories", 0, id="5")),
    "reference as text": Damage("id-type", _set("annotations", 0, image_id="10"), (10,), (1000,)),
    "two images of one id": Damage("duplicate-image-id", _set("images", 1, id=10), (10, 10)),
    "one image twice": Damage("duplicate-image-id", _append("images"), (10, 10)),
    "two categories of one id": Damage("duplicate-category-id", _set("categories", 1, id=5)),
    "annotation id twice": Damage("duplicate-annotation-id", _set("annotations", 1, id=1000), (10,), (1000,)),
    "category name twice": Damage("duplicate-category-name", _append("categories", id=9, name="Dog ")),
    "annotation of no image": Damage("unknown-image", _set("annotations", 0, image_id=99), (), (1000,)),
    "annotation with a list as image": Damage("unknown-image", _set("annotations", 0, image_id=[10]), (), (1000,)),
    "annotation with true as image": Damage("unknown-image", _set("annotations", 0, image_id=True), (), (1000,)),
    "annotation of no category": Damage("unknown-category", _set("annotations", 0, category_id=7), (10,), (1000,)),
    "annotation without category": Damage("unknown-category", _remove("annotations", 0, "category_id"), (10,), (1000,)),
    "image without width": Damage("image-size", _remove("images", 0, "width"), (10,)),
    "image of height 0": Damage("image-size", _set("images", 2, height=0), (12,)),
    "image height as text": Damage("image-size", _set("images", 2, height="100"), (12,)),
    "image width as fraction": Damage("image-size", _set("images", 2, width=120.0), (12,)),
    "image without name": Damage("file-name", _remove("images", 0, "file_name"), (10,)),
    "image with half a character as name": Damage("file-name", _set("images", 0, file_name="\ud800.png"), (10,)),
    "image with NUL in its name": Damage("file-name", _set("images", 0, file_name="a\0.png"), (10,)),
    "file listed twice": Damage("duplicate-file-name", _append("images", id=77), (10, 77)),
    "bbox missing": Damage("bbox", _remove("annotations", 0, "bbox"), (10,), (1000,)),
    "bbox with a text": Damage("bbox", _set("annotations", 0, bbox=["4", 3, 8, "10.5"]), (10,), (1000,)),
    "bbox with a word": Damage("bbox", _set("annotations", 0, bbox=["left", 3, 8, 10]), (10,), (1000,)),
    "bbox of three numbers": Damage("bbox", _set("annotations", 0, bbox=[4, 3, 8]), (10,), (1000,)),
    "bbox with NaN": Damage("bbox", _set("annotations", 0, bbox=[4, 3, math.nan, 10]), (10,), (1000,)),
    "bbox with infinity": Damage("bbox", _set("annotations", 0, bbox=[4, 3, math.inf, 10]), (10,), (1000,)),
    "bbox with true": Damage("bbox", _set("annotations", 0, bbox=[4, 3, True, 10]), (10,), (1000,)),
    "bbox with null": Damage("bbox", _set("annotations", 0, bbox=[4, 3, None, 10]), (10,), (1000,)),
    "bbox beyond float64": Damage("bbox", _set("annotations", 0, bbox=[4, 3, 10**400, 10]), (10,), (1000,)),
    "corners": Damage("box-format", _each_box(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])),
    "centers": Damage("box-format", _each_box(lambda b: [b[0] + b[2] / 2, b[1] + b[3] / 2, b[2], b[3]])),
    "shares": Damage("box-format", _each_box(lambda b: [b[0] / WIDTH, b[1] / HEIGHT, b[2] / WIDTH, b[3] / HEIGHT])),
    "corners as shares": Damage(
        "box-format",
        _each_box(lambda b: [b[0] / WIDTH, b[1] / HEIGHT, (b[0] + b[2]) / WIDTH, (b[1] + b[3]) / HEIGHT]),
    ),
    "box of width 0": Damage("degenerate-box", _set("annotations", 0, bbox=[4, 3, 0, 10]), (10,), (1000,)),
    "box of negative height": Damage("degenerate-box", _set("annotations", 0, bbox=[4, 3, 5, -1]), (10,), (1000,)),
    "box too thin for float32": Damage("degenerate-box", _set("annotations", 0, bbox=[4, 3, 1e-9, 9]), (10,), (1000,)),
    "box right of the image": Damage("outside-box", _set("annotations", 0, bbox=[120, 3, 5, 5]), (10,), (1000,)),
    "box left of the image": Damage("outside-box", _set("annotations", 0, bbox=[-5, 3, 5, 5]), (10,), (1000,)),
    "box reaching out": Damage("partly-outside-box", _set("annotations", 0, bbox=[-2, 3, 9, 9]), (10,), (1000,)),
    "box that may be corners": Damage("xyxy-suspect", _set("annotations", 0, bbox=[80, 70, 110, 95]), (10,), (1000,)),
    "box below a pixel": Damage("tiny-box", _set("annotations", 0, bbox=[4, 3, 0.5, 9]), (10,), (1000,)),
    "box twice": Damage("duplicate-box", _append("annotations", id=5000), (10,), (5000,)),
    "box nearly twice": Damage("duplicate-box", _append("annotations", id=5000, bbox=[4.05, 3, 8, 10]), (10,), (5000,)),
    "iscrowd 2": Damage("iscrowd", _set("annotations", 0, iscrowd=2), (10,), (1000,)),
    "iscrowd as text": Damage("iscrowd", _set("annotations", 0, iscrowd="0"), (10,), (1000,)),
    "area as text": Damage("area-value", _set("annotations", 0, area="80"), (10,), (1000,)),
    "area NaN": Damage("area-value", _set("annotations", 0, area=math.nan), (10,), (1000,)),
    "area of two boxes": Damage("area-mismatch", _set("annotations", 0, area=160), (10,), (1000,)),
    "no annotations": Damage("no-boxes", lambda content: content.update(annotations=[])),
    "image without boxes": Damage("empty-image", _append("images", id=77, file_name="e.png"), (77,)),
    "crowd": Damage("crowds", _set("annotations", 0, iscrowd=1), (10,), (1000,)),
    "category without boxes": Damage("unused-category", _append("categories", id=9, name="cow")),
    "category with one box": Damage(
        "rare-category",
        lambda content: [
            content["categories"].append({"id": 9, "name": "cow"}),
            content["annotations"][0].update(category_id=9),
        ],
    ),
}
