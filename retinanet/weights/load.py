"""Loads a file of weights of any known format into a model, strictly, and reports what became of every tensor."""

import logging
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.weights.classes import plan_rows, reorder_anchors, take_rows
from retinanet.weights.compare import Inputs, anchor_order, check_depth, contradictions
from retinanet.weights.download import locate
from retinanet.weights.norms import NormRefused, convert_norm, kind_of_leaves, norms_of
from retinanet.weights.read import read_weights
from retinanet.weights.recognise import recognise
from retinanet.weights.report import Report
from retinanet.weights.source import AnchorOrder, Source

_log = logging.getLogger(__name__)
_PREDICTIONS = ("head.cls_pred.weight", "head.cls_pred.bias", "head.box_pred.weight", "head.box_pred.bias")


def load_weights(
    model: nn.Module,
    path: str,
    *,
    inputs: Inputs | None = None,
    classes: Sequence[str] = (),
    source_classes: Sequence[str] = (),
    prior_prob: float = 0.01,
    allow_missing: bool = False,
) -> Report:
    """Copy the weights of `path` (a file, URL or zoo alias) into `model` and return what was done.

    Changes the parameters and buffers of `model`, and those only when nothing is refused. The colours of the first
    convolution and the order of the anchors are turned to those of `inputs`, which say what the model expects.
    classes, source_classes: names of the model's and of the file's classes in label order; rows of the class layer
    are copied by name where both are known. When the counts differ and names are not known, the class layer starts
    anew, with `prior_prob` as the score of every anchor.
    allow_missing: tolerate absent tensors, wrong shapes, unknown names and norms that cannot use the file's values;
    the tensors concerned keep their present values. Otherwise these raise `UserError`, which names them and a remedy.
    """
    found = locate(path)
    source = recognise(found.file, read_weights(found.file))
    if not allow_missing:
        check_depth(source, model.state_dict())
    loading = _Loading(model, source, Report(source.title, str(path)))
    inputs = inputs or Inputs()
    loading.turn_colours(inputs.channel_order)
    loading.convert_norms()
    loading.turn_anchors(inputs.anchors)
    loading.convert_classes([list(source_classes), source.classes, list(found.classes)], list(classes), prior_prob)
    loading.copy_the_rest()
    loading.report.warnings += contradictions(source, model, inputs)
    loading.finish(allow_missing)
    return loading.report


def build_weights(cfg, model: nn.Module, class_names: Sequence[str] = ()) -> Report | None:
    """Load `MODEL.WEIGHTS` into a model that `build_model(cfg)` made; None when the key is empty.

    class_names: of the model, in label order; "class 1", "class 2", ... stand for names that nobody knows.
    """
    settings = cfg.MODEL
    if not settings.WEIGHTS:
        return None
    if all(re.fullmatch(r"class \d+", name) for name in class_names):
        class_names = ()
    return load_weights(
        model,
        settings.WEIGHTS,
        inputs=build_inputs(cfg),
        classes=class_names,
        source_classes=settings.WEIGHTS_CLASSES,
        prior_prob=settings.HEAD.PRIOR_PROB,
        allow_missing=settings.ALLOW_MISSING_WEIGHTS,
    )


def build_inputs(cfg) -> Inputs:
    """Return what the model of `cfg` expects of images and weights."""
    settings, anchors = cfg.MODEL, cfg.MODEL.ANCHORS
    return Inputs(
        channel_order=settings.CHANNEL_ORDER,
        pixel_mean=settings.PIXEL_MEAN,
        pixel_std=settings.PIXEL_STD,
        stride_in_1x1=settings.BACKBONE.STRIDE_IN_1X1,
        anchors=AnchorOrder(anchors.CONVENTION, tuple(anchors.ASPECT_RATIOS), anchors.SCALES_PER_OCTAVE),
    )


class _Loading:
    """One file on its way into one model: `state` grows by native names, `left` of the source shrinks."""

    def __init__(self, model: nn.Module, source: Source, report: Report):
        self.model, self.source, self.report = model, source, report
        self.wanted = model.state_dict()
        self.left = dict(source.tensors)
        self.turned: set[str] = set()  # native names whose values in `left` are no longer those of the file
        self.state: dict[str, Tensor] = {}
        self.misfits: list[str] = []
        report.unused, report.unexpected = list(source.unused), list(source.unknown)

    def turn_colours(self, channel_order: str) -> None:
        name = "backbone.conv1.weight"
        weight, theirs = self.left.get(name), self.source.channel_order
        if weight is not None and weight.dim() == 4 and channel_order and theirs and channel_order != theirs:
            self._turn(name, weight.flip(1))
            self.report.notes.append(f"first convolution: turned from {theirs} to {channel_order}")

    def convert_norms(self) -> None:
        for prefix, norm in norms_of(self.model).items():
            names = [name for name in self.left if name.startswith(f"{prefix}.")]
            leaves = {name.removeprefix(f"{prefix}."): self.left[name] for name in names}
            if not leaves:
                continue
            kind = kind_of_leaves(leaves, prefix in self.source.folded, self.source.bare_norm)
            try:
                converted = convert_norm(leaves, kind, norm, self.source.eps, self.source.groups)
            except (NormRefused, RuntimeError) as refused:  # tensors of shapes that do not belong together
                self.report.refused[prefix] = str(refused)
                self._drop(names)
                continue
            self.turned |= {f"{prefix}.{leaf}" for leaf in converted if converted[leaf] is not leaves.get(leaf)}
            for leaf, tensor in converted.items():
                if f"{prefix}.{leaf}" in self.wanted:
                    self._put(f"{prefix}.{leaf}", tensor)
            self._use(names)

    def turn_anchors(self, anchors: AnchorOrder | None) -> None:
        order = anchor_order(self.source.anchors, anchors)
        for name in _PREDICTIONS if order else ():
            tensor = self.left.get(name)
            if tensor is not None and tensor.dim() and tensor.shape[0] % len(order) == 0:
                self._turn(name, reorder_anchors(tensor, order))
        if order:
            self.report.notes.append(f"head: anchors brought from the file's order into the model's {order}")

    def convert_classes(self, candidates: list[list[str]], names: list[str], prior_prob: float) -> None:
        """candidates: names that the file's classes may have, the first that fit the file count."""
        weight, bias, _, box_bias = _PREDICTIONS
        if not all(name in self.wanted and name in self.left for name in _PREDICTIONS):
            return
        num_anchors = self.wanted[box_bias].numel() // 4
        rows = [tensors[bias].numel() for tensors in (self.left, self.wanted)]
        fits = self.left[weight].shape == (rows[0], *self.wanted[weight].shape[1:]) and self.left[bias].dim() == 1
        if self.left[box_bias].numel() != num_anchors * 4 or rows[0] % num_anchors or not fits:
            return  # another head: `copy_the_rest` finds that the shapes differ
        held, wanted = (count // num_anchors for count in rows)
        plan = plan_rows(held, wanted, candidates, names, self.source.background_row)
        if plan.is_identity:
            return
        self.report.notes.append(plan.note)
        fresh = torch.empty_like(self.wanted[weight], device="cpu").normal_(std=0.01)  # RetinaNet, section 4.1
        prior = torch.full((rows[1],), -math.log((1 - prior_prob) / prior_prob))
        for name, new in ((weight, fresh), (bias, prior)):
            if plan.all_new:
                self.state[name] = new
                self.report.reinitialised.append(name)
                self._drop([name])
            else:
                self._turn(name, take_rows(self.left[name], num_anchors, plan.rows, new))

    def copy_the_rest(self) -> None:
        for name, wanted in self.wanted.items():
            if name not in self.left or name in self.state:
                continue
            tensor = self.left[name]
            if tensor.shape == wanted.shape or tensor.squeeze().shape == wanted.squeeze().shape:
                self._put(name, tensor)
                self._use([name])
            else:
                self.misfits.append(_misfit(name, tensor, wanted))
                self._drop([name])

    def finish(self, allow_missing: bool) -> None:
        """Sort what is left over, refuse the file or change the model, and log."""
        report = self.report
        report.unexpected += [self.source.origin[name] for name in self.left]
        parts = {name.split(".")[0] for name in self.source.tensors}
        for name in self.wanted:
            if name not in self.state:
                is_there = name.startswith("backbone.") or name.split(".")[0] in parts
                (report.missing if is_there else report.initialised).append(name)
        if not allow_missing:
            refuse_misfit(report, self.misfits)
        for name, tensor in self.state.items():
            if not tensor.isfinite().all():
                raise UserError(f"{report.file}: {name} has values that are not finite; the file is of no use")
        try:
            self.model.load_state_dict(self.wanted | self.state)
        except RuntimeError as error:
            raise UserError(f"{report.file}: {error}") from error
        _log.info("%s", report.summary())
        _log.debug("%s", report.details())
        for warning in report.warnings:
            _log.warning("%s: %s", report.file, warning)

    def _put(self, name: str, tensor: Tensor) -> None:
        listed = self.report.converted if name in self.turned else self.report.matched
        wanted = self.wanted[name]
        if tensor.shape != wanted.shape or self.source.tensors.get(name, tensor).shape != wanted.shape:
            listed = self.report.reshaped
            tensor = tensor.reshape(wanted.shape) if tensor.numel() == wanted.numel() else tensor
            if tensor.shape[1:] != wanted.shape[1:] or (tensor.dim() < 2 and tensor.shape != wanted.shape):
                # but for the length of a window, which its norm adapts
                self.misfits.append(_misfit(name, tensor, wanted))
                return
        self.state[name] = tensor.to(wanted.dtype)
        listed.append(name)

    def _turn(self, name: str, tensor: Tensor) -> None:
        self.left[name] = tensor
        self.turned.add(name)

    def _use(self, names: list[str]) -> None:
        self.report.used += [self.source.origin[name] for name in names]
        for name in names:
            del self.left[name]

    def _drop(self, names: list[str]) -> None:
        self.report.unused += [self.source.origin[name] for name in names]
        for name in names:
            del self.left[name]


def _misfit(name: str, tensor: Tensor, wanted: Tensor) -> str:
    return f"{name} {tuple(tensor.shape)} in the file, {tuple(wanted.shape)} in the model"


def refuse_misfit(report: Report, misfits: list[str]) -> None:
    """Raise `UserError` when anything of the model or of the file found no counterpart."""
    reasons = [f"{len(report.refused)} norms cannot use the file: {first[0]}, {first[1]}"
               for first in list(report.refused.items())[:1]]  # fmt: skip
    refused = tuple(f"{name}." for name in report.refused)
    absent = [name for name in report.missing if not name.startswith(refused)] if refused else report.missing
    shaped = {misfit.split(" ")[0] for misfit in misfits}
    for what, names in (
        ("have another shape", misfits),
        ("of the model are not in the file", [name for name in absent if name not in shaped]),
        ("of the file have no place in the model", report.unexpected),
    ):
        if names:
            reasons.append(f"{len(names)} tensors {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    if reasons:
        raise UserError(
            f"{report.file} ({report.source}) does not fit the model:\n  " + "\n  ".join(reasons) + "\nUse weights of "
            "this architecture, or change MODEL.BACKBONE, MODEL.FPN and MODEL.HEAD to that of the weights; "
            "MODEL.ALLOW_MISSING_WEIGHTS True takes what fits and leaves the rest at its start values"
        )
