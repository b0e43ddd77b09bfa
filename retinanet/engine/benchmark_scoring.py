"""Scoring of made-up detections: ours beside pycocotools, from the two json files to the last number.

ours: `coco_metrics`, which checks the files, and gives the operating point and the same per class on top of the twelve
metrics. faster: the same with faster-coco-eval in it. pycocotools: the twelve metrics alone, as in its own example.
"""

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from retinanet.config.load import load_config_text
from retinanet.engine.benchmark import Settings
from retinanet.engine.benchmark_here import take_turns
from retinanet.engine.benchmark_tasks import Job
from retinanet.engine.coco_metrics import METRICS, coco_metrics
from retinanet.errors import UserError

BOXES_PER_IMAGE = 7.3  # of COCO val2017: 36,781 in 5,000 images
IMAGE_SIDES = (480, 640)  # (height, width)
_FOUND = 0.6  # share of the boxes that are found, each by several detections


def write_case(folder: Path, num_images: int, detections_per_image: int, num_classes: int) -> tuple[Path, Path]:
    """Write annotations.json and detections.json to `folder` and return the two paths; the same every time.

    A fifth of the detections are shaken copies of annotated boxes, most with the right class and higher scores; the
    rest are anywhere, as a detector's are at a score threshold of 0.05.
    """
    rng = np.random.default_rng(0)
    owners = np.sort(rng.integers(0, num_images, int(num_images * BOXES_PER_IMAGE)))
    boxes, classes = _random_boxes(rng, len(owners)), _random_classes(rng, len(owners), num_classes)
    columns = (owners + 1).tolist(), (classes + 1).tolist(), boxes.tolist()
    truth = {
        "images": [{"id": i + 1, "height": IMAGE_SIDES[0], "width": IMAGE_SIDES[1]} for i in range(num_images)],
        "categories": [{"id": k + 1, "name": f"class {k + 1}"} for k in range(num_classes)],
        "annotations": [
            {"id": n, "image_id": image, "category_id": k, "bbox": box, "area": box[2] * box[3], "iscrowd": n % 80 == 0}
            for n, (image, k, box) in enumerate(zip(*columns, strict=True), start=1)
        ],
    }
    total = num_images * detections_per_image
    copied = rng.choice(np.flatnonzero(rng.random(len(owners)) < _FOUND), total // 5)
    images = np.concatenate([owners[copied], rng.integers(0, num_images, total - len(copied))])
    shaken = np.abs(boxes[copied] * (1 + rng.normal(0, 0.1, (len(copied), 4))))
    wrong = rng.random(len(copied)) < 0.1
    labels = np.where(wrong, _random_classes(rng, len(copied), num_classes), classes[copied])
    labels = np.concatenate([labels, _random_classes(rng, total - len(copied), num_classes)])
    scores = np.concatenate([rng.beta(3, 2, len(copied)), 0.05 + 0.5 * rng.beta(1, 6, total - len(copied))])
    places = np.concatenate([shaken, _random_boxes(rng, total - len(copied))])
    columns = (images + 1, labels + 1, np.round(places, 2), np.round(scores, 4))
    order = np.argsort(images, kind="stable")
    found = [
        {"image_id": image, "category_id": k, "bbox": box, "score": score}
        for image, k, box, score in zip(*(column[order].tolist() for column in columns), strict=True)
    ]
    paths = folder / "annotations.json", folder / "detections.json"
    for path, content in zip(paths, (truth, found), strict=True):
        path.write_text(json.dumps(content))
    return paths


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return (count, 4) xywh with sides from 8 to 256 pixels, small ones most often."""
    sides = 8 * 2 ** rng.uniform(0, 5, (count, 2))
    corners = rng.random((count, 2)) * (np.array(IMAGE_SIDES[::-1]) - sides)
    return np.round(np.concatenate([corners, sides], axis=1), 2)


def _random_classes(rng: np.random.Generator, count: int, num_classes: int) -> np.ndarray:
    """Return (count,) classes, the first of them a hundred times as frequent as the last, as in COCO."""
    weights = np.logspace(0, -2, num_classes)
    return rng.choice(num_classes, count, p=weights / weights.sum())


def ours(truth: Path, found: Path, evaluator: str = "numpy") -> dict:
    """Return the twelve metrics in percent (with the operating point and everything per class left out)."""
    metrics = coco_metrics(truth, found, evaluator)
    return {name: metrics[name] for name in METRICS}


def pycocotools_alone(truth: Path, found: Path) -> dict:
    """Return the twelve metrics in percent as pycocotools' own example script computes them."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UserError(f"--scoring: {error}; pip install pycocotools to compare with it") from None
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress there
        index = COCO(str(truth))
        evaluation = COCOeval(index, index.loadRes(str(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, (100 * evaluation.stats).tolist(), strict=True))


def measure_scoring(
    jobs: list[Job], settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> list[dict]:
    """Return a row of `summary` per job, in milliseconds of one scoring; `max_difference` is to pycocotools' numbers.

    jobs: one for each of `VARIANTS`; `batch` is the number of images, `scores` that of detections per image.
    """
    cfg = load_config_text(jobs[0].config, "")
    with tempfile.TemporaryDirectory() as folder:
        progress(f"scoring: writing {jobs[0].batch} images with {jobs[0].scores} detections each")
        paths = write_case(Path(folder), jobs[0].batch, jobs[0].scores, cfg.MODEL.NUM_CLASSES)
        metrics: dict[str, dict] = {}

        def build(variant: str) -> Callable[[int], None]:
            def run(piece: int) -> None:
                metrics[variant] = _SCORERS[variant](*paths)

            return run

        rows = take_turns(jobs, [build(job.variant) for job in jobs], 1, 1, settings, progress)
    reference = metrics["pycocotools"]
    for row in rows:
        found = metrics[row["variant"]]
        row["max_difference"] = max(abs(_number(found[name]) - _number(reference[name])) for name in METRICS)
        row["AP"] = found["AP"]
    return rows


def _number(value: float | None) -> float:
    """Return a metric as pycocotools writes it: -100 percent where nothing is annotated."""
    return -100.0 if value is None else value


_SCORERS = {
    "ours": ours,
    "faster": lambda truth, found: ours(truth, found, "faster"),
    "pycocotools": pycocotools_alone,
}
VARIANTS = tuple(_SCORERS)
