"""From a model of this project to the state dicts of torchvision's and detectron2's RetinaNet.

The names are those that `torchvision.py` and `detectron2.py` of this package read. A batch norm is written for the eps
of 1e-5 that both projects build with, so that it computes what it computes here.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.weights.classes import reorder_anchors
from retinanet.weights.compare import Inputs
from retinanet.weights.detectron2 import head_modules
from retinanet.weights.norms import kind_of, norms_of
from retinanet.weights.source import AnchorOrder

_EPS = 1e-5  # of the batch norms that torchvision and detectron2 build
_PREDICTIONS = ("head.cls_pred.", "head.box_pred.")
_TORCHVISION = [
    (r"backbone\.conv1\.norm\.(.+)", r"backbone.body.bn1.\1"),
    (r"backbone\.conv1\.(.+)", r"backbone.body.conv1.\1"),
    *(
        (rf"backbone\.res{level}\.(\d+)\.{ours}", rf"backbone.body.layer{level - 1}.\1.{theirs}")
        for level in range(2, 6)
        for ours, theirs in (
            (r"conv(\d)\.norm\.(.+)", r"bn\2.\3"),
            (r"shortcut\.norm\.(.+)", r"downsample.1.\2"),
            (r"shortcut\.(.+)", r"downsample.0.\2"),
            (r"(conv\d\..+)", r"\2"),
        )
    ),
    *(
        (rf"fpn\.{ours}{level}\.{norm}(.+)", rf"backbone.fpn.{theirs}_blocks.{level - 3}.{place}.\1")
        for level in range(3, 6)
        for ours, theirs in (("lateral", "inner"), ("output", "layer"))
        for norm, place in ((r"norm\.", 1), ("", 0))
    ),
    (r"fpn\.(p[67]\..+)", r"backbone.fpn.extra_blocks.\1"),
    *(
        (rf"head\.{ours}\.(\d)\.{norm}(.+)", rf"head.{theirs}.conv.\1.{place}.\2")
        for ours, theirs in (("cls_convs", "classification_head"), ("box_convs", "regression_head"))
        for norm, place in ((r"norm\.", 1), ("", 0))
    ),
    (r"head\.cls_pred\.(.+)", r"head.classification_head.cls_logits.\1"),
    (r"head\.box_pred\.(.+)", r"head.regression_head.bbox_reg.\1"),
]
_DETECTRON2 = [
    (r"backbone\.(conv1\..+)", r"backbone.bottom_up.stem.\1"),
    (r"backbone\.(res\d\..+)", r"backbone.bottom_up.\1"),
    (r"fpn\.(lateral|output)(\d\..+)", r"backbone.fpn_\1\2"),
    (r"fpn\.(p[67]\..+)", r"backbone.top_block.\1"),
    (r"head\.cls_pred\.(.+)", r"head.cls_score.\1"),
    (r"head\.box_pred\.(.+)", r"head.bbox_pred.\1"),
]


@dataclass
class Exported:
    """tensors: by the other project's names. notes: what its model must be built with, one sentence each."""

    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def to_torchvision(model: nn.Module, inputs: Inputs, box_convention: str) -> Exported:
    """Return the state dict that torchvision's `retinanet_resnet50_fpn` (v1 or v2) loads.

    inputs: what the model expects; BGR is turned to RGB and the anchors to torchvision's order.
    Raises `UserError` for what torchvision's RetinaNet cannot compute.
    """
    _refuse("torchvision", model, inputs, box_convention, {"batch", "frozen", "affine", "group"})
    if inputs.stride_in_1x1:
        raise UserError("torchvision's ResNets stride in the 3x3 convolution; MODEL.BACKBONE.STRIDE_IN_1X1 is True")
    state = _state(model, inputs.anchors, "torchvision")
    mean, std = list(inputs.pixel_mean), list(inputs.pixel_std)
    if inputs.channel_order == "BGR":
        state["backbone.conv1.weight"] = state["backbone.conv1.weight"].flip(1)
        mean, std = mean[::-1], std[::-1]
    tensors = {_rename(name, _TORCHVISION): tensor for name, tensor in state.items()}
    p6 = state["fpn.p6.weight"].shape[1]
    notes = [
        f"image_mean={[value / 255 for value in mean]}, image_std={[value / 255 for value in std]}",
        f"num_classes={state['head.cls_pred.bias'].numel() // len(_anchors(inputs).pairs())}",
        f"P6 from {'P5 (as in v1)' if p6 == state['fpn.p7.weight'].shape[1] else 'C5 (as in v2)'}",
    ]
    return Exported(tensors, notes)


def to_detectron2(model: nn.Module, inputs: Inputs, box_convention: str) -> Exported:
    """Return the state dict that detectron2's RetinaNet loads; raises `UserError` for what that cannot compute."""
    _refuse("detectron2", model, inputs, box_convention, {"batch", "frozen", "affine", "group"})
    state = _state(model, inputs.anchors, "detectron2")
    has_norm = any(name.startswith("head.") and ".norm." in name for name in state)
    head = [(rf"{re.escape(ours)}\.(?:levels\.)?((?:\d\.)?\w+)", rf"{theirs}.\1")
            for theirs, ours in head_modules(3 if has_norm else 2)]  # fmt: skip
    tensors = {_rename(name, [*_DETECTRON2, *head]): tensor for name, tensor in state.items()}
    notes = [
        f"INPUT.FORMAT {inputs.channel_order}, MODEL.PIXEL_MEAN {list(inputs.pixel_mean)}, MODEL.PIXEL_STD "
        f"{list(inputs.pixel_std)}, MODEL.RESNETS.STRIDE_IN_1X1 {inputs.stride_in_1x1}",
        f"MODEL.RETINANET.NUM_CLASSES {state['head.cls_pred.bias'].numel() // len(_anchors(inputs).pairs())}",
    ]
    return Exported(tensors, notes)


def _anchors(inputs: Inputs) -> AnchorOrder:
    assert inputs.anchors is not None, "an export needs the order of the anchors"
    return inputs.anchors


def _refuse(project: str, model: nn.Module, inputs: Inputs, box_convention: str, allowed: set[str]) -> None:
    if box_convention == "detectron":
        raise UserError(
            f"{project} has no +1 in its box widths; MODEL.BOX.CONVENTION detectron would give other boxes there"
        )
    if _anchors(inputs).convention != project:
        raise UserError(
            f"{project} has other anchors than MODEL.ANCHORS.CONVENTION {_anchors(inputs).convention}; train or "
            f"fine-tune with {project} to export to it"
        )
    for name, norm in norms_of(model).items():
        if kind_of(norm) not in allowed:
            raise UserError(f"{project} has no counterpart of the norm {name} ({type(norm).__name__})")


def _state(model: nn.Module, anchors: AnchorOrder | None, convention: str) -> dict[str, Tensor]:
    """Return the native state with its batch norms written for the eps of 1e-5 and its anchors in their order."""
    assert anchors is not None
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    for prefix, norm in norms_of(model).items():
        state |= {f"{prefix}.{leaf}": tensor for leaf, tensor in _batch_norm(norm).items()}
    ours = anchors.pairs()
    theirs = AnchorOrder(convention, tuple(sorted(anchors.ratios)), anchors.octaves).pairs()
    order = [ours.index(pair) for pair in theirs]
    for name in [name for name in state if name.startswith(_PREDICTIONS)]:
        state[name] = reorder_anchors(state[name], order)
    return state


def _batch_norm(norm: nn.Module) -> dict[str, Tensor]:
    """Return the entries that differ from the norm's own state when its eps has to be 1e-5."""
    kind = kind_of(norm)
    if kind == "affine":
        zero = torch.zeros_like(norm.weight.detach().cpu())
        return {"running_mean": zero, "running_var": zero + 1 - _EPS}
    if kind in ("batch", "frozen"):
        more = (norm.levels[0] if hasattr(norm, "levels") else norm).eps - _EPS
        variances = {n: t for n, t in norm.state_dict().items() if n.endswith("running_var")}
        return {name: (value.cpu().double() + more).float() for name, value in variances.items()} if more else {}
    return {}


def _rename(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, theirs in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(theirs)
    raise AssertionError(f"no foreign name for {name}")
