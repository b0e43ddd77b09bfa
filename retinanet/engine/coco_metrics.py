"""The COCO detection metrics of a results json, by pycocotools' definitions, and their tables.

Three evaluators give the same numbers: our own (`coco_arrays.py`, the default and the fastest), faster-coco-eval (C++)
and pycocotools (the reference). All fill the same arrays of precision and recall; everything reported here is a mean
over cells of those arrays. COCO looks at
100 detections per image and class whatever `TEST.MAX_DETS` is, so models with 300 detections an image are comparable.
"""

import contextlib
import importlib
import io
from pathlib import Path

import numpy as np

from retinanet.engine.coco_arrays import coco_arrays
from retinanet.engine.coco_json import GroundTruth, Results, ground_truth, results
from retinanet.engine.operating_point import operating_point
from retinanet.errors import UserError, pick

OWN = "numpy"
EVALUATORS = {  # name -> module with COCO, module with the evaluator, its class; None: `coco_arrays`
    OWN: None,
    "faster": ("faster_coco_eval.core.coco", "faster_coco_eval.core.faster_eval_api", "COCOeval_faster"),
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval", "COCOeval"),
}
ALL, SMALL, MEDIUM, LARGE = 0, 1, 2, 3  # area ranges, split at 32^2 and 96^2 pixels of annotated area
# name -> array, index in the IoUs 0.50, 0.55 .. 0.95 (None: mean of all), area range, index in 1, 10, 100 detections
METRICS = {
    "AP": ("precision", None, ALL, 2),
    "AP50": ("precision", 0, ALL, 2),
    "AP75": ("precision", 5, ALL, 2),
    "APs": ("precision", None, SMALL, 2),
    "APm": ("precision", None, MEDIUM, 2),
    "APl": ("precision", None, LARGE, 2),
    "AR1": ("recall", None, ALL, 0),
    "AR10": ("recall", None, ALL, 1),
    "AR100": ("recall", None, ALL, 2),
    "ARs": ("recall", None, SMALL, 2),
    "ARm": ("recall", None, MEDIUM, 2),
    "ARl": ("recall", None, LARGE, 2),
}


def coco_metrics(annotations: Path | str | dict, detections: Path | str | list, evaluator: str = OWN) -> dict:
    """Return the twelve COCO metrics, in percent, with the operating point and the same for every class.

    Keys: those of `METRICS`; `threshold`, `precision`, `recall`, `f1` (see `operating_point`); `per_class`: class name
    -> the twelve metrics, `precision`, `recall`, `f1` at the shared threshold, `best_threshold`, `best_f1`, `num_boxes`
    (without crowds) and `num_detections`. A metric that no annotated box contributes to, which pycocotools calls -1, is
    None, null in JSON; means over classes leave it out.

    Raises `UserError` for files that are not COCO, results for images or categories that are not annotated, numbers
    that are not finite, an unknown evaluator, or one that is not installed.
    """
    truth = ground_truth(annotations)
    found = results(detections, truth)
    arrays = accumulate(truth, found, evaluator)
    point = operating_point(truth, found)
    classes = {}
    for label, (name, tuned) in enumerate(zip(unique_names(truth), point.pop("per_class"), strict=True)):
        cells = {key: array[..., label : label + 1, :, :] for key, array in arrays.items()}
        num_boxes = int(((truth.labels == label) & ~truth.crowd).sum())
        counts = {"num_boxes": num_boxes, "num_detections": int((found.labels == label).sum())}
        classes[name] = {**_summary(cells), **tuned, **counts}
    return {**_summary(arrays), **point, "per_class": classes}


def unique_names(truth: GroundTruth) -> list[str]:
    """Return the class names in the order of the category ids; names that occur twice get their category id."""
    return [
        name if truth.names.count(name) == 1 else f"{name} ({category_id})"
        for name, category_id in zip(truth.names, truth.category_ids, strict=True)
    ]


def accumulate(truth: GroundTruth, found: Results, evaluator: str = OWN) -> dict[str, np.ndarray]:
    """Return pycocotools' arrays: `precision` (10 IoUs, 101 recalls, K, 4 areas, 3 counts), `recall` (10, K, 4, 3).

    Values are in [0, 1], or -1 in cells without annotated boxes.
    """
    modules = pick(EVALUATORS, evaluator, "TEST.EVALUATOR")
    if modules is None:
        return coco_arrays(truth, found)
    coco_module, eval_module, class_name = modules
    index = _import(coco_module, evaluator).COCO
    quiet = {} if evaluator == "pycocotools" else {"print_function": lambda *_: None}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        truth_index = _fill(index(), truth, _annotations(truth))
        found_index = _fill(index(), truth, _detections(found))
        made = getattr(_import(eval_module, evaluator), class_name)(truth_index, found_index, iouType="bbox", **quiet)
        made.evaluate()
        made.accumulate()
    return {key: np.asarray(made.eval[key], dtype=np.float64) for key in ("precision", "recall")}


def _import(module: str, evaluator: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"TEST.EVALUATOR {evaluator}: {error}; install requirements.txt, or use TEST.EVALUATOR {OWN}"
        ) from None


def _fill(index, truth: GroundTruth, annotations: list[dict]):
    """Return `index`, a COCO object of either library, holding `annotations`; ids are positions counted from 1."""
    index.dataset = {
        "images": [{"id": i + 1} for i in range(len(truth.image_ids))],
        "categories": [{"id": i + 1} for i in range(len(truth.category_ids))],
        "annotations": annotations,
    }
    index.createIndex()
    return index


def _annotations(truth: GroundTruth) -> list[dict]:
    rows = _rows(truth.images, truth.labels, truth.boxes, truth.area)
    for row, crowd in zip(rows, truth.crowd.tolist(), strict=True):
        row["iscrowd"] = int(crowd)
    return rows


def _detections(found: Results) -> list[dict]:
    rows = _rows(found.images, found.labels, found.boxes, found.boxes[:, 2] * found.boxes[:, 3])
    for row, score in zip(rows, found.scores.tolist(), strict=True):
        row["score"] = score
        row["iscrowd"] = 0
    return rows


def _rows(images: np.ndarray, labels: np.ndarray, boxes: np.ndarray, areas: np.ndarray) -> list[dict]:
    columns = ((images + 1).tolist(), (labels + 1).tolist(), boxes.tolist(), areas.tolist())
    return [
        {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area}
        for number, (image, category, box, area) in enumerate(zip(*columns, strict=True), start=1)
    ]


def _summary(arrays: dict[str, np.ndarray]) -> dict[str, float | None]:
    """Return the twelve metrics in percent: means over the cells that hold a number."""
    values = {}
    for name, (key, iou, area, count) in METRICS.items():
        cells = arrays[key][..., area, count]
        cells = cells if iou is None else cells[iou]
        cells = cells[cells > -1]
        values[name] = 100 * float(cells.mean()) if cells.size else None
    return values


def format_metrics(metrics: dict) -> str:
    """Return the twelve metrics and the operating point as a table of text."""
    heads, cells = list(METRICS), [_number(metrics[name]) for name in METRICS]
    lines = [_columns(heads, width=7), _columns(cells, width=7)]
    if metrics["threshold"] is None:
        lines.append("no detection matches a box at IoU 0.5")
    else:
        lines.append(
            f"at score >= {metrics['threshold']:.3f} (highest F1, IoU 0.5): precision {_number(metrics['precision'])}, "
            f"recall {_number(metrics['recall'])}, F1 {_number(metrics['f1'])}"
        )
    return "\n".join(lines)


def format_per_class(metrics: dict) -> str:
    """Return a table with one line per class: counts, AP by IoU and by size, precision and recall at the threshold."""
    keys = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "precision", "recall", "best_threshold"]
    heads = ["boxes", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "prec", "recall", "best at"]
    wide = max([len("class"), *map(len, metrics["per_class"])])
    lines = ["class".ljust(wide) + _columns(heads, width=8)]
    for name, row in metrics["per_class"].items():
        cells = [str(row["num_boxes"]), *[_number(row[key]) for key in keys[:-1]], _number(row["best_threshold"], 3)]
        lines.append(name.ljust(wide) + _columns(cells, width=8))
    return "\n".join(lines)


def _columns(cells: list[str], width: int) -> str:
    return "".join(cell.rjust(width) for cell in cells)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
