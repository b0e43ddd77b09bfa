"""Weights that detect: a configuration and a file of weights -> model, class names, score threshold."""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import yaml
from torch import Tensor

from retinanet.data.catalog import load_catalog
from retinanet.data.coco import CocoDataset
from retinanet.deploy.exported import Exported, is_exported
from retinanet.deploy.fold import fold, summary
from retinanet.engine.checkpoint import read_checkpoint
from retinanet.errors import UserError
from retinanet.modeling.build import build_model
from retinanet.modeling.retinanet import RetinaNet
from retinanet.weights.load import build_weights
from retinanet.weights.report import Report

_log = logging.getLogger(__name__)
# What an exported file can no longer change; the sizes of the resize are free.
_EXPORTED_KEYS = (
    "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.CHANNEL_ORDER", "MODEL.BOX.CONVENTION", "INPUT.RESIZE",
    "TEST.SCORE_THRESH", "TEST.PRE_NMS_TOPK", "TEST.NMS_IOU", "TEST.MAX_DETS",
)  # fmt: skip


class Trained(NamedTuple):
    """A model on the CPU with all weights loaded.

    classes: K dicts with the category "id" and the "name" of each label.
    carried: whether the weights name these classes themselves.
    threshold: the score with the highest F1 when these weights were evaluated, or None where that is not known.
    """

    model: RetinaNet | Exported
    classes: list[dict]
    carried: bool
    threshold: float | None


def build_trained(cfg, weights: str | Path | None = None, state: dict | None = None) -> Trained:
    """Return the model of `cfg` with `weights`, by default `MODEL.WEIGHTS`; `state` is its content if already read.

    `TEST.FOLD` folds what can be folded into the convolutions; the log says what. An exported file (.pt2, .onnx) is
    used as it is.
    Raises `UserError` when the weights are missing, do not fit the configuration, or belong to another number of
    classes than `MODEL.NUM_CLASSES` (0: as many as the weights have).
    """
    weights = weights or cfg.MODEL.WEIGHTS
    if not weights:
        raise UserError("MODEL.WEIGHTS: is empty; name a checkpoint, such as output/run/best.pth")
    if is_exported(weights):
        return build_exported(cfg, weights)
    state = state or read_native(weights)
    classes = state["classes"] if state else build_classes(cfg)
    if cfg.MODEL.NUM_CLASSES not in (0, len(classes)):
        raise UserError(
            f"MODEL.NUM_CLASSES: is {cfg.MODEL.NUM_CLASSES}, but {weights} has {len(classes)} classes; set it to 0"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.WEIGHTS = len(classes), str(weights)
    cfg.freeze()
    model = build_model(cfg)
    threshold = None
    if state is None:
        check_whole(build_weights(cfg, model, [entry["name"] for entry in classes]))
    else:
        load_state(model, evaluated_weights(state), weights)
        threshold = state.get("metrics", {}).get("threshold")
    if cfg.TEST.FOLD:
        model, report = fold(model)
        _log.info("%s", summary(report))
    return Trained(model, classes, state is not None, threshold)


def build_exported(cfg, path: str | Path) -> Trained:
    """Return the exported file; `UserError` when the configuration contradicts what is fixed inside it."""
    exported = Exported(path)
    fixed = yaml.safe_load(exported.facts["config"])
    for key in _EXPORTED_KEYS:
        inside, wanted = fixed, cfg
        for part in key.split("."):
            inside, wanted = inside[part], wanted[part]
        if inside != (list(wanted) if isinstance(inside, list) else wanted):
            raise UserError(
                f"{key}: is {wanted}, but {inside} is fixed inside {path}; export again with {key} {wanted}, or leave "
                "the key as it was"
            )
    return Trained(exported, exported.facts["classes"], True, exported.facts["threshold"])


def read_state(path: str | Path) -> dict:
    """Return the "config" (YAML text) and "classes" that a checkpoint of this project or an exported file carries."""
    if is_exported(path):
        facts = Exported(path).facts
        return {"config": facts["config"], "classes": facts["classes"]}
    return read_checkpoint(path)


def check_whole(report: Report) -> None:
    """Raise `UserError` when a file left parts of the detector as they were at the start, as an ImageNet model does."""
    fresh = [*report.initialised, *report.reinitialised, *report.missing, *report.refused]
    if fresh:
        shown = ", ".join(fresh[:4]) + (", ..." if len(fresh) > 4 else "")
        raise UserError(
            f"{report.file}: this {report.source} is no whole detector of MODEL.NUM_CLASSES classes, it lacks {shown}; "
            "train it first (tools/train_net.py), or correct MODEL.NUM_CLASSES and the other keys under MODEL"
        )


def read_native(weights: str | Path) -> dict | None:
    """Return the checkpoint when `weights` is a file in this project's format, else None: aliases, URLs, others."""
    if not Path(weights).is_file():
        return None
    try:
        return read_checkpoint(weights)
    except UserError as error:
        _log.debug("not read as a checkpoint of this project: %s", error)
        return None


def evaluated_weights(state: dict) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that its evaluations used: the averaged ones where there are such."""
    prefix = "module."  # of torch's AveragedModel, which also counts its updates
    averaged = {name[len(prefix) :]: value for name, value in state.get("ema", {}).items() if name.startswith(prefix)}
    return averaged or state["model"]


def load_state(model: RetinaNet, weights: dict[str, Tensor], source: str | Path) -> None:
    """Load all `weights`; `UserError` that lists what does not fit, when another configuration trained them."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(f"{source}: {name} has values that are not finite; use an older checkpoint")
    try:
        model.load_state_dict(weights)  # norms may accept other shapes: MABN's window depends on the batch
    except RuntimeError as error:
        own = model.state_dict()
        wrong = [f"{name} is missing" for name in own if name not in weights]
        wrong += [f"{name} has no place" for name in weights if name not in own]
        wrong += [
            f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}"
            for name, value in weights.items()
            if name in own and value.shape != own[name].shape
        ]
        shown = "; ".join(wrong[:5]) + (f"; ... ({len(wrong)} in all)" if len(wrong) > 5 else "")
        raise UserError(
            f"{source}: does not fit the configuration ({shown}); use the one that it was trained with"
        ) from error


def check_classes(trained: Trained, dataset: CocoDataset) -> None:
    """Raise `UserError` when label k of the weights is not label k of `dataset`: every detection would be of another
    class."""
    ours = [entry["name"] for entry in trained.classes]
    theirs = list(dataset.class_names)
    if len(ours) != len(theirs):
        raise UserError(f"{dataset.name}: has {len(theirs)} categories, the weights have {len(ours)} classes")
    for label, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if trained.carried and own.lower() != other.lower():
            raise UserError(
                f"{dataset.name}: its category number {label + 1} by id is {other!r}, in the weights it is {own!r}; "
                "evaluate on a data set with the categories of the training set, in the same order of ids"
            )


def build_classes(cfg) -> list[dict]:
    """Return the classes of weights that do not carry them: {"id", "name"} for each label.

    From `MODEL.WEIGHTS_CLASSES` and, for the ids, from the first of `DATASETS.TEST` when its annotations are there;
    else numbers from 1 on, as many as `MODEL.NUM_CLASSES`. When that is 0, a data set whose classes are all among
    those of the weights decides: the other rows are left out.
    """
    listed, known = list(cfg.MODEL.WEIGHTS_CLASSES), build_categories(cfg)
    if not cfg.MODEL.NUM_CLASSES and known and {entry["name"] for entry in known} <= set(listed):
        return known  # torchvision's 91 rows hold COCO's 80 classes
    count = cfg.MODEL.NUM_CLASSES or len(listed) or len(known)
    if not count:
        raise UserError("MODEL.NUM_CLASSES: is 0 and these weights do not tell; set it, or MODEL.WEIGHTS_CLASSES")
    if len(known) == count and listed in ([], [entry["name"] for entry in known]):
        return known
    names = listed if len(listed) == count else [f"class {number}" for number in range(1, count + 1)]
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


def build_categories(cfg) -> list[dict]:
    """Return the categories of the first of `DATASETS.TEST`, by id; empty when its annotations are not there."""
    if not cfg.DATASETS.TEST:
        return []
    try:
        entry = load_catalog(cfg.DATASETS.CATALOG)[cfg.DATASETS.TEST[0]]
        rows = json.loads(entry["annotations"].read_bytes())["categories"]
        return sorted(({"id": row["id"], "name": str(row.get("name", row["id"]))} for row in rows), key=_id)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        _log.debug("no class names from DATASETS.TEST: %s", error)
        return []


def _id(entry: dict) -> int:
    return entry["id"]
