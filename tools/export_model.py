"""Export a trained model to torch.export (.pt2) and ONNX, and check that the files detect what the model detects."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import _cli
import numpy as np
import torch

from retinanet.config.check import check_config
from retinanet.config.load import load_config, load_config_text
from retinanet.data.catalog import build_dataset
from retinanet.data.image import read_image
from retinanet.data.loader import build_image_batcher, build_test_loader
from retinanet.deploy.export import FORMATS, NMS, PACKAGES, build_facts, export, require
from retinanet.deploy.exported import Exported, is_exported
from retinanet.engine.checkpoint import read_checkpoint, write_atomically
from retinanet.engine.coco_metrics import coco_metrics
from retinanet.engine.evaluate import detect, predict
from retinanet.engine.parity import AP_TOLERANCE, Parity, made_up_pictures
from retinanet.engine.trained import Trained, build_trained, check_classes
from retinanet.errors import UserError, pick
from retinanet.modeling.build import build_postprocess

EXAMPLES = """  python tools/export_model.py --weights output/demo/best.pth
  python tools/export_model.py --weights output/demo/best.pth --formats onnx --nms inside --images photos/ --evaluate
  python tools/export_model.py --config configs/caffe2/retinanet_R50_FPN.yaml MODEL.WEIGHTS model.pkl --output exported

writes NAME.pt2, NAME_raw.pt2, NAME.onnx and NAME_raw.onnx; the raw ones leave NMS to you. docs/deployment.md describes
inputs and outputs. Every file is opened again and compared with the model, on --images or else on made-up pictures, in
batches of one to three of different sizes; with --evaluate also by AP on DATASETS.TEST. Exit status 1: they differ."""
SUFFIX = {"inside": "", "outside": "_raw"}
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MOST_IMAGES = 12


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--weights", metavar="FILE", help="a checkpoint; default: MODEL.WEIGHTS of the configuration")
    made.add_argument("--output", metavar="FOLDER", help="default: a folder `exported` beside the weights")
    made.add_argument("--formats", metavar="A,B", default=",".join(FORMATS), help="default: %(default)s")
    made.add_argument("--nms", metavar="A,B", default=",".join(NMS), help="default: %(default)s")
    made.add_argument("--images", metavar="PATH", help=f"compare on this picture, or {MOST_IMAGES} of this folder")
    made.add_argument("--evaluate", action="store_true", help="also compare AP on DATASETS.TEST")
    args = _cli.parse(made, argv)
    kinds = [pick(dict.fromkeys(FORMATS, kind), kind, "--formats") and kind for kind in args.formats.split(",")]
    places = [pick(dict.fromkeys(NMS, place), place, "--nms") and place for place in args.nms.split(",")]
    for kind in kinds:
        require(PACKAGES[kind] + (("onnxruntime",) if kind == "onnx" else ()), f"export to {kind}, with its check,")
    cfg, weights, trained = load(args)
    pictures = load_pictures(args.images)
    check = Check(cfg, trained, pictures, args.evaluate)
    folder = Path(args.output or Path(weights).parent / "exported")
    print(f"{'file':28} {'MB':>6} {'detections':>10} {'unmatched':>9} {'box px':>8} {'score':>8}  result")
    failed = []
    for kind in kinds:
        for place in places:
            path = folder / f"{Path(weights).stem}{SUFFIX[place]}.{kind}"
            facts = build_facts(cfg, trained.classes, trained.threshold, place)
            write, folded = export(trained.model, facts, build_postprocess(cfg), kind)
            write_atomically(path, write)
            if not check(path):
                failed.append(path.name)
    print(folded)
    print(f"{check.images} images compared; written to {folder}")
    if failed:
        print(f"error: {', '.join(failed)}: not equal to the model, do not use them", file=sys.stderr)
        sys.exit(1)


def load(args: argparse.Namespace) -> tuple[object, str, Trained]:
    """Return the configuration with its classes counted, the name of the weights, and the model as it was trained."""
    state = None
    if args.config:
        cfg = load_config(args.config, args.opts)
    elif args.weights:
        if is_exported(args.weights):
            raise UserError(f"--weights: {args.weights} is exported already; give the checkpoint that it came from")
        state = read_checkpoint(args.weights)
        cfg = load_config_text(state["config"], f"the configuration in {args.weights}", args.opts)
    else:
        raise UserError("--weights FILE is missing, or --config FILE with MODEL.WEIGHTS")
    check_config(cfg, False, _cli.NORMS, _cli.BACKBONES)
    cfg.defrost()
    cfg.TEST.FOLD = False  # export folds, and the comparison shall be with the model as it was trained
    trained = build_trained(cfg, args.weights, state)
    cfg.MODEL.NUM_CLASSES = len(trained.classes)
    cfg.freeze()
    trained.model.eval()
    return cfg, str(args.weights or cfg.MODEL.WEIGHTS), trained


def load_pictures(path: str | None) -> list[list[np.ndarray]]:
    """Return pictures in batches of one, two, three, one, ...; made-up ones without a path."""
    if path is None:
        return made_up_pictures()
    folder = Path(path)
    files = [folder] if folder.is_file() else sorted(folder.glob("*")) if folder.is_dir() else []
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES][:MOST_IMAGES]
    if not files:
        raise UserError(f"--images: {path} is no picture and no folder with some ({' '.join(IMAGE_SUFFIXES)})")
    return list(in_batches([read_image(file) for file in files]))


def in_batches(pictures: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    size = 1
    while pictures:
        yield pictures[:size]
        pictures, size = pictures[size:], size % 3 + 1


class Check:
    """What the model detects, and the comparison of a file with it."""

    def __init__(self, cfg, trained: Trained, pictures: list[list[np.ndarray]], evaluate: bool):
        self.cfg, self.postprocess = cfg, build_postprocess(cfg)
        batcher = build_image_batcher(cfg)
        self.batches = [batcher(batch) for batch in pictures]
        self.images = sum(map(len, self.batches))
        self.expected = [detect(trained.model, batch, self.postprocess) for batch in self.batches]
        self.datasets = [build_dataset(cfg, name) for name in cfg.DATASETS.TEST] if evaluate else []
        if evaluate and not self.datasets:
            raise UserError("--evaluate: DATASETS.TEST is empty; name a data set of DATASETS.CATALOG")
        for dataset in self.datasets:
            check_classes(trained, dataset)
        self.ap = self.evaluate(trained.model)

    def __call__(self, path: Path) -> bool:
        """Print a line about the file; whether it detects what the model detects."""
        exported, parity = Exported(path), Parity()
        for batch, expected in zip(self.batches, self.expected, strict=True):
            parity.add(expected, detect(exported, batch, self.postprocess))
        equal, notes = parity.equal, []
        if not parity.expected:
            notes.append("nothing was detected, so nothing was compared: give --images or --evaluate")
        for name, ap in self.evaluate(exported).items():
            equal = equal and abs(ap - self.ap[name]) <= AP_TOLERANCE
            notes.append(f"AP on {name} {ap:.4f}, of the model {self.ap[name]:.4f}")
        size, verdict = path.stat().st_size / 1e6, "equal" if equal else "DIFFERENT"
        figures = f"{parity.expected:10} {parity.unmatched:9} {parity.box:8.1g} {parity.score:8.1g}"
        print(f"{path.name:28} {size:6.1f} {figures}  {'; '.join([verdict, *notes])}", flush=True)
        return equal

    def evaluate(self, model) -> dict[str, float]:
        """Return the AP of a model or file on each data set, in percent."""
        found = {}
        for dataset in self.datasets:
            loader = build_test_loader(self.cfg, dataset)
            results = predict(
                model, loader, self.postprocess, torch.device("cpu"), dataset.category_ids,
                plus_one=dataset.plus_one_boxes,
            )  # fmt: skip
            found[dataset.name] = coco_metrics(dataset.annotations_file, results, self.cfg.TEST.EVALUATOR)["AP"]
        return found


if __name__ == "__main__":
    _cli.run(main)
