"""Turn Pascal VOC xml or YOLO txt into COCO json, or split a COCO json into training and validation."""

import argparse
from pathlib import Path

import _cli

from retinanet.data.annotations import load_annotations
from retinanet.data.convert.coco_file import CocoFile, check_names, read_names
from retinanet.data.convert.split import split_images
from retinanet.data.convert.voc import CORNERS, DIFFICULT, convert_voc
from retinanet.data.convert.yolo import POLYGONS, convert_yolo
from retinanet.engine.coco_json import read_json, write_json
from retinanet.errors import UserError

EXAMPLES = """  python tools/convert_dataset.py voc --annotations VOC2007/Annotations --images VOC2007/JPEGImages \\
      --image-set VOC2007/ImageSets/Main/trainval.txt --output voc_trainval.json
  python tools/convert_dataset.py yolo --images set/images/train --labels set/labels/train --classes set/data.yaml \\
      --output train.json
  python tools/convert_dataset.py voc --annotations xml --images photos --output photos.json --val-share 0.2
  python tools/convert_dataset.py split --annotations all.json --output all.json --val-share 0.1 --group-by 'clip(\\d+)'

with --val-share, OUT.json becomes OUT_train.json and OUT_val.json. docs/datasets.md states the conventions."""


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES, config=False)
    made.add_argument("source", choices=("voc", "yolo", "split"), help="what --annotations, or --labels, are")
    made.add_argument("--annotations", metavar="PATH", type=Path, help="voc: folder of xml; split: a COCO json")
    made.add_argument("--images", metavar="FOLDER", type=Path, help="voc, yolo: where the images are")
    made.add_argument("--labels", metavar="FOLDER", type=Path, help="yolo: where the txt files are")
    made.add_argument("--classes", metavar="A,B | FILE", help="names in their order, or a text or YAML file of them")
    made.add_argument("--image-set", metavar="FILE", type=Path, help="voc: only the images of this list")
    made.add_argument("--difficult", choices=tuple(DIFFICULT), default="ignore", help="voc (default %(default)s)")
    made.add_argument(
        "--corners", choices=tuple(CORNERS), default="inclusive",
        help="voc: pixels from 1 with the last one, or plain corners from 0 (default %(default)s)",
    )  # fmt: skip
    made.add_argument("--polygons", choices=POLYGONS, default="refuse", help="yolo (default %(default)s)")
    made.add_argument("--output", metavar="OUT.json", type=Path, required=True)
    made.add_argument("--val-share", type=float, metavar="S", help="split, with this share of images for validation")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the split (default %(default)s)")
    made.add_argument("--group-by", default="", metavar="REGEX", help="images with the same match stay together")
    args = made.parse_args(argv)
    if args.output.suffix != ".json":
        raise UserError(f"--output: {args.output} is not called .json")
    if args.source == "split":
        parts = split(args, read_coco(args.annotations))
    else:
        converted = convert(args)
        for note in converted.notes:
            print(f"note: {note}")
        parts = {"": converted.content} if args.val_share is None else split(args, converted.content)
    for suffix, content in parts.items():
        path = args.output.with_stem(args.output.stem + suffix)
        write_json(path, content)
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes{histogram(content)}")
    folder = args.images or "FOLDER"
    print(f"check next: python tools/check_dataset.py --annotations {path} --images-dir {folder} --images")


def convert(args: argparse.Namespace) -> CocoFile:
    """Return what `voc` or `yolo` asks for."""
    names = read_classes(args.classes)
    images = required(args, "images")
    if args.source == "voc":
        annotations = required(args, "annotations")
        return convert_voc(annotations, images, args.image_set, names, args.difficult, args.corners)
    labels = required(args, "labels")
    if names is None:
        raise UserError("--classes is missing: YOLO's txt files hold numbers; give data.yaml or a file of names")
    return convert_yolo(images, labels, names, args.polygons)


def required(args: argparse.Namespace, name: str) -> Path:
    value = getattr(args, name)
    if value is None:
        raise UserError(f"--{name} is missing; {args.source} needs it")
    return value


def read_classes(given: str | None) -> list[str] | None:
    """Return the names of `--classes`: those of a file, or the ones that stand there."""
    if given is None or Path(given).is_file():
        return None if given is None else read_names(given)
    if Path(given).suffix.lower() in (".txt", ".names", ".yaml", ".yml"):
        raise UserError(f"--classes: there is no file {given}")
    return check_names([name.strip() for name in given.split(",")], "--classes")


def read_coco(path: Path | None) -> dict:
    """Return a COCO json that training would accept."""
    if path is None:
        raise UserError("--annotations is missing; split needs a COCO json")
    load_annotations(path)
    return read_json(path, "the COCO json")


def split(args: argparse.Namespace, content: dict) -> dict[str, dict]:
    """Return what is written behind which ending of the name."""
    if args.val_share is None:
        raise UserError("--val-share is missing, such as 0.2")
    train, val, notes = split_images(content, args.val_share, args.seed, args.group_by)
    for note in notes:
        print(f"note: {note}")
    return {"_train": train, "_val": val}


def histogram(content: dict) -> str:
    """Return the boxes of each class, for a handful of classes."""
    counts = {entry["id"]: 0 for entry in content["categories"]}
    for record in content["annotations"]:
        counts[record["category_id"]] += 1
    rows = [f"{entry['name']} {counts[entry['id']]}" for entry in content["categories"]]
    return f" ({', '.join(rows)})" if len(rows) <= 20 else f" in {len(rows)} classes"


if __name__ == "__main__":
    _cli.run(main)
