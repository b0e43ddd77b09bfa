"""Write the synthetic data set: images and COCO json of training and validation, or a folder for each class."""

from functools import partial
from pathlib import Path

import _cli

from retinanet.data.synthetic import write_dataset
from retinanet.data.synthetic_classes import write_folders
from retinanet.errors import UserError

EXAMPLES = """  python tools/make_synthetic.py
  python tools/make_synthetic.py --output /data/shapes --train 2000 --val 500 --size 480 640 --seed 1
  python tools/make_synthetic.py --output /data/tiny --objects 6 18
  python tools/make_synthetic.py --classification --output datasets/shapes --size 32 32"""
DEFAULT = _cli.ROOT / "datasets" / "synthetic"


def main() -> None:
    parser = _cli.parser(__doc__, EXAMPLES, config=False)
    flag = parser.add_argument
    flag("--output", metavar="DIR", type=Path, default=DEFAULT, help=f"folder to write (default {DEFAULT})")
    flag("--train", type=int, default=320, metavar="N", help="images to train on (default %(default)s)")
    flag("--val", type=int, default=80, metavar="N", help="images to evaluate on (default %(default)s)")
    flag("--size", nargs=2, type=int, default=(128, 160), metavar=("H", "W"), help="pixels (default 128 160)")
    flag("--objects", nargs=2, type=float, metavar=("MIN", "MAX"), help="their sides in pixels (default 16, half)")
    flag("--seed", type=int, default=0, metavar="S", help="other seeds give other images (default %(default)s)")
    flag("--classification", action="store_true", help="write train/CLASS/* and val/CLASS/* with one object an image")
    args = parser.parse_args()
    if args.classification and args.output == DEFAULT:
        raise UserError("--classification: name the folder with --output DIR; the default one is the set for detection")
    if args.classification and args.objects:
        raise UserError("--objects: does not go with --classification, where one object fills the image")
    output, sides = args.output.expanduser().resolve(), tuple(args.objects) if args.objects else None
    write = write_folders if args.classification else partial(write_dataset, sides=sides)
    print(f"writing {args.train} + {args.val} images of {args.size[0]} x {args.size[1]} pixels")
    for split, count in (("train", args.train), ("val", args.val)):
        try:
            print(f"  {write(output, split, count, tuple(args.size), args.seed)}")
        except OSError as error:
            raise UserError(f"--output: {output} cannot be written ({error.strerror}); choose another") from error
    if output != DEFAULT and not args.classification:
        print(f"entries for a catalog (DATASETS.CATALOG):\n{_catalog(output)}")


def _catalog(output: Path) -> str:
    entry = "{name}_{split}:\n  images: {output}/{split}\n  annotations: {output}/annotations/{split}.json"
    return "\n".join(entry.format(name=output.name, split=split, output=output) for split in ("train", "val"))


if __name__ == "__main__":
    _cli.run(main)
