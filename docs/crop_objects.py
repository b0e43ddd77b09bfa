"""Cut the objects of COCO-format data sets into an image folder that tools/pretrain_backbone.py trains on.

    python docs/crop_objects.py --output datasets/crops --min-side 24 --least 20 --most 600 \\
        IMAGES_FOLDER,ANNOTATIONS.json [IMAGES_FOLDER,ANNOTATIONS.json ...]

A class needs at least `--least` objects, and no more than `--most` of it are taken (the first ones in the file). An
object is cut with a margin of a tenth of its sides, and class `background` gets as many random squares that hold no
part of an object as the largest class has objects. Every fifth object of a class goes into the validation part.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO

MARGIN = 0.1
EVERY = 5  # objects, of which one is for validation
TRIES = 20  # squares looked at in an image for one without an object


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--min-side", type=int, default=24, help="of an object, in pixels (24)")
    parser.add_argument("--least", type=int, default=20, help="objects of a class (20)")
    parser.add_argument("--most", type=int, default=600, help="objects of a class (600)")
    parser.add_argument("--side", type=int, default=96, help="longest side of a cut in pixels (96)")
    parser.add_argument("sets", nargs="+", metavar="IMAGES,JSON")
    args = parser.parse_args()
    objects, background = {}, []
    for pair in args.sets:
        folder, annotations = pair.split(",")
        read(Path(folder), COCO(annotations), args.min_side, objects, background)
    classes = {name: crops[: args.most] for name, crops in sorted(objects.items()) if len(crops) >= args.least}
    classes["background"] = background[: max(map(len, classes.values()))]
    for name, crops in classes.items():
        for number, (file, box) in enumerate(crops):
            part = "val" if number % EVERY == 0 else "train"
            window = with_margin(box) if name in objects else box
            write(args.output / part / name / f"{number:05}.png", file, window, args.side)
        print(f"{name}: {len(crops)}")


def read(folder: Path, coco: COCO, min_side: int, objects: dict, background: list) -> None:
    """Append `(file, (x1, y1, x2, y2))` of every object to its class, and of one empty square of an image, if found."""
    generator = np.random.default_rng(0)
    names = {category["id"]: category["name"] for category in coco.dataset["categories"]}
    for image in coco.dataset["images"]:
        file, boxes = folder / image["file_name"], []
        for annotation in coco.imgToAnns[image["id"]]:
            x, y, width, height = annotation["bbox"]
            boxes.append((x, y, x + width, y + height))
            if min(width, height) >= min_side and not annotation.get("iscrowd"):
                objects.setdefault(names[annotation["category_id"]], []).append((file, boxes[-1]))
        square = empty_square(image, np.array(boxes).reshape(-1, 4), min_side, generator)
        background += [(file, square)] if square else []


def empty_square(image: dict, boxes: np.ndarray, min_side: int, generator) -> tuple | None:
    for _ in range(TRIES):
        side = generator.uniform(min_side, min(image["width"], image["height"]) / 2)
        x, y = generator.uniform(0, image["width"] - side), generator.uniform(0, image["height"] - side)
        apart = (boxes[:, 0] > x + side) | (boxes[:, 2] < x) | (boxes[:, 1] > y + side) | (boxes[:, 3] < y)
        if apart.all():
            return x, y, x + side, y + side
    return None


def with_margin(box: tuple) -> tuple:
    x1, y1, x2, y2 = box
    by_x, by_y = MARGIN * (x2 - x1), MARGIN * (y2 - y1)
    return x1 - by_x, y1 - by_y, x2 + by_x, y2 + by_y


def write(path: Path, file: Path, window: tuple, longest: int) -> None:
    image = cv2.imread(str(file))
    x1, y1, x2, y2 = (max(0, round(value)) for value in window)
    cut = image[y1:y2, x1:x2]
    scale = min(1.0, longest / max(cut.shape[:2]))
    cut = cv2.resize(cut, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cut)


if __name__ == "__main__":
    main()
