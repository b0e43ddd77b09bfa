"""Find objects in pictures: drawn pictures and a COCO results json come out."""

import argparse
import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import _cli
import cv2
import numpy as np
from tqdm import tqdm

from retinanet.config.defaults import get_cfg
from retinanet.config.load import load_config, load_config_text
from retinanet.data.image import ImageError, read_image
from retinanet.engine.checkpoint import read_checkpoint
from retinanet.engine.coco_json import write_json
from retinanet.engine.detector import Detector, build_detector
from retinanet.engine.evaluate import to_coco
from retinanet.errors import UserError, nearest
from retinanet.utils.draw import draw_detections

EXAMPLES = """  python tools/predict.py --weights output/run/best.pth photo.jpg
  python tools/predict.py --weights output/run/best.pth photos/ --recursive --output drawn --score 0.4 --classes dog,cat
  python tools/predict.py --config configs/retinanet_R50_gn_fpn.yaml --weights model.pth 'photos/*.png' DEVICE cpu

A folder stands for its image files in the order of their names, a pattern for what it matches. Every picture is written
to the output folder under its own name, with its detections drawn; predictions.json there holds the same detections
as COCO results with "file_name", image ids counted from 1. A file that cannot be read is reported, the others are
done, and the exit status is 2."""

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
WRITABLE = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
DEFAULT_SCORE = 0.5
MIN_SIDE = 240  # pixels: smaller pictures are enlarged, or their labels would cover them


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES, config=False)
    made.add_argument("inputs", nargs="+", metavar="PATH | KEY VALUE", help="files, folders, patterns; keys to change")
    made.add_argument("--config", metavar="FILE", help="a YAML file; not needed with a checkpoint of this project")
    made.add_argument("--weights", metavar="FILE", help="default: MODEL.WEIGHTS of the configuration")
    made.add_argument("--output", metavar="FOLDER", default="output/predictions", help="default: output/predictions")
    made.add_argument("--score", type=float, help="lowest score; default: the one of the highest F1 if known, else 0.5")
    made.add_argument("--classes", metavar="A,B", help="only these classes")
    made.add_argument("--recursive", action="store_true", help="look into folders inside folders")
    args = _cli.parse(made, argv)
    if args.score is not None and not 0 <= args.score <= 1:
        raise UserError(f"--score: {args.score} is not between 0 and 1")
    inputs, opts = split_inputs(args.inputs)
    pictures = find_pictures(inputs, args.recursive)
    output = Path(args.output)
    protect(pictures, output)
    detector, plus_one = load_detector(args, opts)
    labels = choose_classes(args.classes, detector.names)
    score = args.score if args.score is not None else detector.threshold
    score = DEFAULT_SCORE if score is None else score
    print(f"{len(pictures)} pictures, detections with a score of {score:.3f} or more")

    rows, unreadable = [], []
    for numbers, names, images in tqdm(chunks(pictures, detector.batch_size, unreadable), unit="batch"):
        found = [keep(one, labels) for one in detector(images, score)]
        rows += with_names(to_coco(found, numbers, [entry["id"] for entry in detector.classes], plus_one), pictures)
        for name, image, one in zip(names, images, found, strict=True):
            drawn = draw_detections(image, one["boxes"], one["labels"], one["scores"], detector.names, MIN_SIDE)
            write_picture(output / name, drawn)
    write_json(output / "predictions.json", rows)
    print(f"{len(rows)} detections in {len(pictures) - len(unreadable)} pictures: {output}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(pictures)} pictures could not be read, see above")


def split_inputs(words: list[str]) -> tuple[list[str], list[str]]:
    """Return paths, and `KEY VALUE` pairs: a word that begins like a configuration key and is no file, and the next."""
    paths, opts, sections = [], [], set(get_cfg())
    remaining = iter(words)
    for word in remaining:
        if word.split(".")[0] in sections and not Path(word).exists():
            opts += [word, *(value for value in [next(remaining, None)] if value is not None)]
        else:
            paths.append(word)
    if not paths:
        raise UserError("no picture is named; give files, folders or patterns")
    return paths, opts


def find_pictures(inputs: list[str], recursive: bool) -> list[tuple[Path, Path]]:
    """Return (file, name of its output inside the output folder), each file once, in the order of `inputs`.

    Below a folder its sub-folders are kept; a name that is taken already gets a number.
    """
    found: dict[Path, Path] = {}
    taken: set[Path] = set()
    for word in inputs:
        for file, name in expand(word, recursive):
            if file in found:
                continue
            name = name if name.suffix.lower() in WRITABLE else name.with_suffix(".png")
            numbered, count = name, 1
            while numbered in taken:
                count += 1
                numbered = name.with_stem(f"{name.stem}_{count}")
            found[file] = numbered
            taken.add(numbered)
    return list(found.items())


def protect(pictures: list[tuple[Path, Path]], output: Path) -> None:
    """Raise `UserError` when a drawn picture would replace one of the pictures themselves."""
    originals = {file.resolve() for file, _ in pictures}
    for _, name in pictures:
        if (output / name).resolve() in originals:
            raise UserError(f"--output: {output / name} is one of the pictures themselves; choose another folder")


def expand(word: str, recursive: bool) -> list[tuple[Path, Path]]:
    """Return the files that one word of the command line stands for; `UserError` when there is none."""
    path = Path(word)
    if path.is_dir():
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"{word}: no permission to look into this folder")
        files = sorted(path.rglob("*") if recursive else path.glob("*"))
        files = [file for file in files if file.suffix.lower() in SUFFIXES and file.is_file()]
        if not files:
            hint = "" if recursive else "; --recursive looks into the folders inside"
            raise UserError(f"{word}: no image files ({' '.join(sorted(SUFFIXES))}) in this folder{hint}")
        return [(file, file.relative_to(path)) for file in files]
    if not path.exists() and glob.has_magic(word):
        files = [Path(match) for match in sorted(glob.glob(word, recursive=True))]
        if not files:
            raise UserError(f"{word}: no file matches this pattern")
        return [(file, Path(file.name)) for file in files if file.is_file()]
    if not path.exists():
        raise UserError(f"{word}: no such file or folder{nearest(path.name, siblings(path))}")
    return [(path, Path(path.name))]


def siblings(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []


def load_detector(args: argparse.Namespace, opts: list[str]) -> tuple[Detector, bool]:
    """Return the detector and whether its boxes are Detectron's, with x2 inside the box."""
    state = None
    if args.config:
        cfg = load_config(args.config, opts)
    elif args.weights:
        state = read_checkpoint(args.weights)
        cfg = load_config_text(state["config"], f"the configuration in {args.weights}", opts)
    else:
        raise UserError("--weights FILE is missing, or --config FILE with MODEL.WEIGHTS")
    return build_detector(cfg, args.weights, cfg.DEVICE, state), cfg.MODEL.BOX.CONVENTION == "detectron"


def choose_classes(wanted: str | None, names: list[str]) -> set[int]:
    """Return the labels of the comma-separated names, of all classes when None."""
    if wanted is None:
        return set(range(len(names)))
    for name in wanted.split(","):
        if name not in names:
            raise UserError(f"--classes: {name!r} is not one of {', '.join(names)}{nearest(name, names)}")
    return {names.index(name) for name in wanted.split(",")}


def chunks(
    pictures: list[tuple[Path, Path]], size: int, unreadable: list[Path]
) -> Iterator[tuple[list[int], list[Path], list[np.ndarray]]]:
    """Yield (numbers from 1, output names, images) of up to `size` pictures; report what cannot be read."""
    chunk: list[tuple[int, Path, np.ndarray]] = []
    for number, (file, name) in enumerate(pictures, start=1):
        try:
            chunk.append((number, name, read_image(file)))
        except ImageError as error:
            unreadable.append(file)
            tqdm.write(f"not read: {error}", file=sys.stderr)
        if len(chunk) == size or (number == len(pictures) and chunk):
            numbers, names, images = map(list, zip(*chunk, strict=True))
            yield numbers, names, images
            chunk = []


def keep(found: dict, labels: set[int]) -> dict:
    """Return the detections whose label is one of `labels`."""
    kept = [index for index, label in enumerate(found["labels"].tolist()) if label in labels]
    return {key: found[key][kept] for key in ("boxes", "scores", "labels")}


def with_names(rows: list[dict], pictures: list[tuple[Path, Path]]) -> list[dict]:
    return [{"file_name": str(pictures[row["image_id"] - 1][0]), **row} for row in rows]


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write `image`; `UserError` when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error


if __name__ == "__main__":
    _cli.run(main)
