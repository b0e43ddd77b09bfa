"""Model + data set -> COCO results -> metrics, on one process or many. COCO's xywh and category ids begin here."""

import itertools
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_test_loader
from retinanet.deploy.exported import Exported
from retinanet.engine.coco_metrics import format_metrics
from retinanet.engine.prefetch import prefetched
from retinanet.engine.scoring import Counts, PendingEvaluation, Scored, Scoring, count_results, score_results
from retinanet.modeling.build import build_postprocess
from retinanet.modeling.retinanet import RetinaNet
from retinanet.structures import Batch, Detections, HeadOutputs
from retinanet.utils import distributed
from retinanet.utils.draw import draw_detections, tile
from retinanet.utils.log import MetricsWriter

Postprocess = Callable[[HeadOutputs, Batch], list[Detections]]
Progress = Callable[[Iterable], Iterable]  # such as `tqdm.tqdm`

_log = logging.getLogger(__name__)
_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_PAGE_IMAGES = 6  # pictures on the page that an evaluation adds to TensorBoard
_CURVES = 20  # classes up to which each has a precision-recall curve there
_PAGE_SCORE = 0.3  # score from which boxes are drawn there while no threshold is known yet
OVERLAP_FROM = 20_000  # detections that take as long to score as a process for it takes to start, a quarter of a second


def build_amp(cfg, device: torch.device) -> str:
    """Return the precision of inference, off, bf16 or fp16, that `TEST.AMP` asks for on `device`.

    "auto" is `SOLVER.AMP` on a GPU, and float32 on a CPU, where reduced precision is mostly slower.
    """
    if cfg.TEST.AMP != "auto":
        return cfg.TEST.AMP
    return cfg.SOLVER.AMP if device.type == "cuda" else "off"


def dtype_of(amp: str) -> torch.dtype:
    """Return the dtype that convolutions run in under `SOLVER.AMP` off, bf16 or fp16."""
    return _DTYPES[amp] or torch.float32


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Return the context of `SOLVER.AMP` off, bf16 or fp16 on `device`."""
    return torch.autocast(device.type, dtype=_DTYPES[amp], enabled=_DTYPES[amp] is not None)


def detect(model: RetinaNet | Exported, batch: Batch, postprocess: Postprocess, amp: str = "off") -> list[Detections]:
    """Return the detections of each image of `batch`, in pixels of the original images, from all of its views.

    The model is in evaluation mode and on the device of the batch. Gradients are off, but not by inference mode:
    anchors that are cached here serve training afterwards. An exported file and CUDA graphs bring their own
    post-processing, and the graphs their own precision.
    """
    views, found = [batch, *batch.views], []
    with torch.no_grad():
        for view in views:
            if not hasattr(model, "normalize"):
                found.append(model(view))
                continue
            with autocast(view.images.device, amp):
                outputs = model(model.normalize(view.images, view.image_sizes))
            found.append(postprocess(outputs, view))
        return postprocess.merge(views, found) if batch.views else found[0]


def predict(
    model: RetinaNet,
    loader: Iterable[Batch],
    postprocess: Postprocess,
    device: torch.device,
    category_ids: tuple[int, ...],
    amp: str = "off",
    plus_one: bool = False,
    progress: Progress | None = None,
) -> list[dict]:
    """Return the COCO results of all images of `loader`: dicts of `image_id`, `category_id`, `bbox` xywh and `score`.

    category_ids: (K,) the data set's category id of each label. plus_one: w = x2 - x1 + 1, for Detectron's box
    convention. progress: wraps the loader, to show how far it is.
    Every module is in evaluation mode meanwhile and in its own mode afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    results = []
    try:
        for batch in prefetched(loader if progress is None else progress(loader), device):
            found = detect(model, batch.to(device), postprocess, amp)
            results += to_coco(found, batch.image_ids, category_ids, plus_one)
    finally:
        _restore(modes)
    return results


def _restore(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def to_coco(
    detections: list[Detections], image_ids: list[int], category_ids: tuple[int, ...], plus_one: bool = False
) -> list[dict]:
    """Return the detections of N images as COCO results, image by image, by falling score."""
    extra = 1.0 if plus_one else 0.0
    counts = [len(found["scores"]) for found in detections]
    owners = [image_id for image_id, count in zip(image_ids, counts, strict=True) for _ in range(count)]
    boxes = _to_host(detections, "boxes").double()
    boxes[:, 2:] += extra - boxes[:, :2]  # in float64: rounded once, by the reader
    # Detectron's boxes thinner than a pixel turn inside out when a shrunk image is scaled back; they match nothing
    boxes[:, 2:].clamp_(min=0)
    labels, scores = _to_host(detections, "labels").tolist(), _to_host(detections, "scores").double().tolist()
    assert all(0 <= label < len(category_ids) for label in labels), (len(category_ids), max(labels))
    return [
        {"image_id": int(image_id), "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for image_id, label, box, score in zip(owners, labels, boxes.tolist(), scores, strict=True)
    ]


def _to_host(detections: list[Detections], key: str) -> Tensor:
    """Return one column of all images on the CPU; one copy, so the device is waited for once."""
    return torch.cat([found[key] for found in detections]).cpu()


def merge(parts: list[list[dict]]) -> list[dict]:
    """Return the results of all processes by rising image id, so that the file is the same for any number of them.

    An image that two processes saw counts once, from the first of them: a sampler that deals out equal shares repeats
    some, and their detections would count as false.
    """
    owner: dict[int, int] = {}
    for rank, part in enumerate(parts):
        for row in part:
            owner.setdefault(row["image_id"], rank)
    own = [row for rank, part in enumerate(parts) for row in part if owner[row["image_id"]] == rank]
    return sorted(own, key=lambda row: row["image_id"])


def score(results: list[dict], dataset: CocoDataset, folder: Path, evaluator: str = "numpy") -> dict:
    """Return `coco_metrics` of `results`; write them and the results to `folder`, each file whole or not at all.

    In a distributed job `results` matter in the first process alone; every process gets the metrics.
    """
    is_main = distributed.is_main()
    metrics = score_results(dataset.annotations_file, results, folder, evaluator) if is_main else None
    return distributed.gather_objects(metrics)[0]


def evaluate(
    model: RetinaNet,
    loader: Iterable[Batch],
    postprocess: Postprocess,
    device: torch.device,
    dataset: CocoDataset,
    folder: Path,
    evaluator: str = "numpy",
    amp: str = "off",
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[dict, list[dict]] | None:
    """Return the metrics of `model` on `dataset`, in every process, and the results of all processes together.

    loader: this process's share of `dataset`. folder: where `predictions.json` and `metrics.json` go.
    stop: asked before each batch; once it is true in any process the evaluation ends in all of them, and returns None.
    """
    results = predict_all(model, loader, postprocess, device, dataset, amp, progress, stop)
    return None if results is None else (score(results, dataset, folder, evaluator), results)


def predict_all(
    model: RetinaNet,
    loader: Iterable[Batch],
    postprocess: Postprocess,
    device: torch.device,
    dataset: CocoDataset,
    amp: str,
    progress: Progress | None,
    stop: Callable[[], bool] | None,
) -> list[dict] | None:
    """Return the results of all processes together, in every process; arguments and None as in `evaluate`."""
    asked = itertools.takewhile(lambda _: not stop(), loader) if stop else loader
    own = predict(model, asked, postprocess, device, dataset.category_ids, amp, dataset.plus_one_boxes, progress)
    parts = distributed.gather_objects((own, bool(stop and stop())))
    return None if any(stopped for _, stopped in parts) else merge([part for part, _ in parts])


def build_evaluation(
    cfg,
    datasets: list[CocoDataset],
    device: torch.device,
    folder: Path,
    writer: MetricsWriter | None = None,
    progress: Progress | None = None,
    stop: Callable[[], bool] | None = None,
) -> Callable[[RetinaNet, int], dict | PendingEvaluation | None]:
    """Return what evaluates a model on all `datasets`: (model, iteration) -> metrics, or None once `stop()` is true.

    The metrics are those of the first data set, and "NAME/AP" and so on of the others. Files go to
    `folder`/inference/NAME, tables to the log, pictures and curves (see `show`) to `writer`. Under
    `TEST.OVERLAP_SCORING` a set with `OVERLAP_FROM` detections is scored in another process; what is returned then
    waits for it. Only the first process of a job has something to wait for.
    """
    postprocess, amp = build_postprocess(cfg), build_amp(cfg, device)
    loaders = [build_test_loader(cfg, dataset, distributed.rank(), distributed.world_size()) for dataset in datasets]

    def overlaps(rows: list[dict]) -> bool:  # the same in every process
        return cfg.TEST.OVERLAP_SCORING and len(rows) >= OVERLAP_FROM

    def scores(dataset: CocoDataset, rows: list[dict]) -> Scored | Scoring:
        place = folder / "inference" / dataset.name
        if not overlaps(rows):
            metrics = score(rows, dataset, place, cfg.TEST.EVALUATOR)
            return Scored(metrics, count_results(dataset.annotations_file, rows) if writer is not None else None)
        if not distributed.is_main():
            return Scored({}, None)
        return Scoring(dataset.annotations_file, rows, place, cfg.TEST.EVALUATOR, writer is not None)

    def run(model: RetinaNet, iteration: int) -> dict | PendingEvaluation | None:
        parts, waits = [], False
        for dataset, loader in zip(datasets, loaders, strict=True):
            rows = predict_all(model, loader, postprocess, device, dataset, amp, progress, stop)
            if rows is None:
                PendingEvaluation([scoring for *_, scoring in parts], dict).cancel()
                _log.info("%s at iteration %d: the evaluation was stopped", dataset.name, iteration)
                return None
            parts.append((dataset, rows_of_page(dataset, rows), scores(dataset, rows)))
            waits |= overlaps(rows)
        finish = partial(_finish, writer, iteration, parts)
        return PendingEvaluation([scoring for *_, scoring in parts], finish) if waits else finish()

    return run


def _finish(
    writer: MetricsWriter | None, iteration: int, parts: list[tuple[CocoDataset, list[dict], Scored | Scoring]]
) -> dict:
    """Wait for the scores of each data set, tell them, and return the metrics of all."""
    combined = {}
    for dataset, rows, scoring in parts:
        metrics, counts = scoring.result()
        if not metrics:
            continue
        _log.info("%s at iteration %d:\n%s", dataset.name, iteration, format_metrics(metrics))
        if writer is not None:
            show(writer, iteration, dataset, rows, metrics, counts)
        combined |= {f"{dataset.name}/{key}": value for key, value in metrics.items()} if combined else metrics
    return combined


def show(
    writer: MetricsWriter, iteration: int, dataset: CocoDataset, rows: list[dict], metrics: dict, counts: Counts
) -> None:
    """Add to TensorBoard pictures, ground truth beside detections, and precision-recall curves: of all classes
    together, and of each where they are few."""
    page = picture_page(dataset, rows, metrics["threshold"])
    writer.image(iteration, f"detections/{dataset.name}", np.ascontiguousarray(page[..., ::-1]))
    together, *classes = counts
    writer.precision_recall(iteration, f"{dataset.name}/all classes", together)
    for name, found in zip(metrics["per_class"], classes if len(classes) <= _CURVES else [], strict=False):
        writer.precision_recall(iteration, f"{dataset.name}/{name}", found)


def rows_of_page(dataset: CocoDataset, rows: list[dict]) -> list[dict]:
    """Return those of `rows` that `picture_page` shows."""
    shown = {int(image_id) for image_id in dataset.image_ids[:_PAGE_IMAGES]}
    return [row for row in rows if row["image_id"] in shown]


def picture_page(dataset: CocoDataset, results: list[dict], threshold: float | None) -> np.ndarray:
    """Return a sheet (H, W, 3) uint8 BGR: the first images of `dataset`, ground truth at the left of detections.

    Shown are detections with a score of `threshold` or more; None: 0.3.
    """
    label_of = {category_id: label for label, category_id in enumerate(dataset.category_ids)}
    threshold = _PAGE_SCORE if threshold is None else threshold
    pictures, captions = [], []
    for index in range(min(_PAGE_IMAGES, len(dataset))):
        image, target = dataset.read(index)
        image_id = int(dataset.image_ids[index])
        rows = [row for row in results if row["image_id"] == image_id and row["score"] >= threshold]
        boxes = np.array([row["bbox"] for row in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels, scores = [label_of[row["category_id"]] for row in rows], [row["score"] for row in rows]
        names = dataset.class_names
        pictures.append(draw_detections(image, target["boxes"].numpy(), target["labels"].tolist(), names=names))
        pictures.append(draw_detections(image, boxes, labels, scores, names))
        captions += [f"{image_id}: ground truth", f"detections from {threshold:.2f}"]
    return tile(pictures, columns=4, captions=captions)
