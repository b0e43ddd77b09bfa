"""Look at the data as training sees it, at the anchors that learn each box, or at detections beside the truth."""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import _cli
import cv2
import numpy as np
from tqdm import tqdm

from retinanet.data.catalog import build_dataset
from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_test_loader, build_train_loader
from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.confusion import count_by_image, keep
from retinanet.engine.evaluate import build_amp, predict
from retinanet.engine.matching import match
from retinanet.engine.operating_point import operating_point
from retinanet.engine.pictures import Shown, anchor_pictures, comparison, order_images, truth_pictures
from retinanet.engine.run import choose_device, resolve_num_classes
from retinanet.engine.trained import build_trained, check_classes
from retinanet.errors import UserError
from retinanet.modeling.build import build_anchors, build_loss, build_postprocess
from retinanet.structures import Batch
from retinanet.utils.draw import tile

EXAMPLES = """  python tools/visualize.py --config configs/quickstart.yaml
  python tools/visualize.py --config configs/quickstart.yaml --iteration 500 --num 32 INPUT.AUGMENT.MOSAIC 0.5 SEED 7
  python tools/visualize.py --config configs/quickstart.yaml --show anchors --num 4
  python tools/visualize.py --config configs/quickstart.yaml --show detections MODEL.WEIGHTS output/quickstart/best.pth
  python tools/visualize.py --config configs/quickstart.yaml --show detections --predictions results.json --by mistakes

truth       images and boxes of the training batches from --iteration on, resized, flipped and augmented as the
            configuration and its SEED say, without normalization and padding
anchors     the same, a picture for each level: positive anchors in the colour of their class, ignored ones grey, boxes
            white
detections  of the data set in DATASETS.TEST, left the ground truth, right what was found. Green: matched at IoU 0.5 by
            COCO's rules. Orange: missed. Red: false alarm. Grey: a crowd, or inside one. Shown are scores from --score
            on, by default from the score of the highest F1. The worst images come first: by F1, of equals the one with
            more mistakes (--by mistakes: the other way round), then by image id

writes contact sheets, SHOW_01.jpg and so on, to OUTPUT_DIR/visualize"""

CELL = (420, 560)  # (height, width) of a picture on a sheet, pixels
PER_SHEET = 12  # pictures
QUALITY = 92  # of the JPEGs


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--show", choices=("truth", "anchors", "detections"), default="truth", help="default: truth")
    made.add_argument("--num", type=int, default=12, metavar="N", help="images (default: %(default)s)")
    made.add_argument("--iteration", type=int, default=0, metavar="N", help="first training batch (default: 0)")
    made.add_argument("--predictions", metavar="FILE", help="show these COCO results instead of those of MODEL.WEIGHTS")
    made.add_argument("--score", type=float, help="lowest score of detections; default: the one of the highest F1")
    made.add_argument("--by", choices=("f1", "mistakes", "id"), default="f1", help="order of detections (default: f1)")
    made.add_argument("--output", metavar="FOLDER", help="write there instead of OUTPUT_DIR/visualize")
    args = _cli.parse(made, argv)
    cfg, _ = _cli.load(args, training=False)
    if args.num < 1:
        raise UserError(f"--num: {args.num} is not a number of images; give 1 or more")
    if args.iteration < 0:
        raise UserError(f"--iteration: {args.iteration} is no iteration; the first is 0")
    if args.show != "detections" and (args.predictions or args.score is not None):
        raise UserError("--predictions and --score: go with --show detections")
    if args.score is not None and not 0 <= args.score <= 1:
        raise UserError(f"--score: {args.score} is not between 0 and 1")
    folder = Path(args.output or Path(cfg.OUTPUT_DIR) / "visualize")
    rows = {"truth": build_truth, "anchors": build_anchor_rows, "detections": build_comparisons}[args.show](cfg, args)
    write_sheets(rows, folder, args.show)


def build_truth(cfg, args: argparse.Namespace) -> list[list[Shown]]:
    """Return the augmented training images, one in each row."""
    dataset = build_dataset(cfg, cfg.DATASETS.TRAIN)
    plus_one, order = dataset.plus_one_boxes, cfg.MODEL.CHANNEL_ORDER
    batches = build_batches(cfg, dataset, args)
    shown = [each for batch in batches for each in truth_pictures(batch, dataset.class_names, order, plus_one)]
    return [[each] for each in shown[: args.num]]


def build_anchor_rows(cfg, args: argparse.Namespace) -> list[list[Shown]]:
    """Return a row for each training image, a picture for each level."""
    dataset = build_dataset(cfg, cfg.DATASETS.TRAIN)
    cfg = resolve_num_classes(cfg, dataset)
    generator, loss = build_anchors(cfg), build_loss(cfg)
    plus_one, order = dataset.plus_one_boxes, cfg.MODEL.CHANNEL_ORDER
    rows = []
    for batch in build_batches(cfg, dataset, args):
        anchors = generator(tuple(batch.images.shape[-2:]))
        assignment = loss.assign(anchors, batch.gt_boxes, batch.gt_labels)
        rows += anchor_pictures(batch, anchors, assignment, generator.strides, order, plus_one)
    return rows[: args.num]


def build_batches(cfg, dataset, args: argparse.Namespace) -> Iterator[Batch]:
    """Return as many of the batches that training would get from `--iteration` on as hold `--num` images."""
    count = -(-args.num // cfg.SOLVER.IMS_PER_BATCH)
    return islice(build_train_loader(cfg, dataset, args.iteration), count)


def build_comparisons(cfg, args: argparse.Namespace) -> list[list[Shown]]:
    """Return a row for each evaluated image, its ground truth and its detections, and print what is kept."""
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(f"DATASETS.TEST: is {cfg.DATASETS.TEST}; name the one data set to look at")
    dataset = build_dataset(cfg, cfg.DATASETS.TEST[0])
    truth = ground_truth(dataset.annotations_file)
    found = results(args.predictions or build_predictions(cfg, dataset), truth)
    threshold = operating_point(truth, found)["threshold"] if args.score is None else args.score
    kept = keep(found, threshold)
    matches = match(truth, kept)
    counts = count_by_image(truth, kept, matches)
    said = "no detection is right at any score" if threshold is None else f"scores from {threshold:.3f}"
    totals = f"{counts.right.sum()} right, {counts.false.sum()} false, {counts.missed.sum()} missed"
    print(f"{dataset.name}: {said}: {totals}")
    rows = {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}
    places = order_images(counts, args.by)[: args.num].tolist()
    images = (dataset.read(rows[truth.image_ids[place]])[0] for place in places)
    return [comparison(image, truth, kept, matches, counts, place) for image, place in zip(images, places, strict=True)]


def build_predictions(cfg, dataset: CocoDataset) -> list[dict]:
    """Return the COCO results of `MODEL.WEIGHTS` on all of `dataset`."""
    device = choose_device(cfg.DEVICE)
    trained = build_trained(cfg)
    check_classes(trained, dataset)
    return predict(
        trained.model.to(device),
        build_test_loader(cfg, dataset),
        build_postprocess(cfg),
        device,
        dataset.category_ids,
        build_amp(cfg, device),
        dataset.plus_one_boxes,
        progress=lambda batches: tqdm(batches, unit="batch"),
    )


def write_sheets(rows: list[list[Shown]], folder: Path, name: str) -> None:
    """Write the rows as sheets of about `PER_SHEET` pictures; those of one image stay together."""
    if not rows:
        raise UserError(f"--show {name}: there is nothing to show: no image has a box or a detection")
    width = len(rows[0])
    per_sheet = max(1, PER_SHEET // width)
    for number, start in enumerate(range(0, len(rows), per_sheet), start=1):
        shown = [each for row in rows[start : start + per_sheet] for each in row]
        columns = width if width > 2 else 4 if len(shown) > 3 else len(shown)
        sheet = tile([each.image for each in shown], columns, CELL, captions=[each.caption for each in shown])
        path = folder / f"{name}_{number:02d}.jpg"
        write_sheet(path, sheet)
        print(path)


def write_sheet(path: Path, sheet: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error


if __name__ == "__main__":
    _cli.run(main)
