"""Our own names: checkpoints of this project, and bare state dicts of its models or backbones.

A checkpoint carries its configuration, so that everything is known about its tensors; a bare state dict says nothing
beyond its names.
"""

import yaml
from torch import Tensor

from retinanet.layers.norm import NORMS
from retinanet.weights.read import Contents
from retinanet.weights.source import AnchorOrder, Source

_PARTS = {"BACKBONE": "backbone.", "FPN": "fpn.", "HEAD": "head."}


def recognise(contents: Contents) -> Source | None:
    """Return the contents when their names are native, else None.

    The averaged weights ("ema") of a checkpoint are preferred to the raw ones: its evaluations used them.
    """
    tensors = _averaged(contents) or contents.tensors
    if {"conv1.weight", "res2.0.conv1.weight"} <= tensors.keys():  # the state dict of a backbone alone
        origin = {name if name.startswith("fc.") else f"backbone.{name}": name for name in tensors}
    elif {"backbone.conv1.weight", "backbone.res2.0.conv1.weight"} <= tensors.keys():
        origin = {name: name for name in tensors}
    else:
        return None
    is_checkpoint = contents.extra.get("format") == "retinanet"
    source = Source(
        title="checkpoint of this project" if is_checkpoint else "state dict in this project's names",
        origin={native: name for native, name in origin.items() if not native.startswith("fc.")},
        unused=[name for native, name in origin.items() if native.startswith("fc.")],  # an ImageNet classifier
        whole=any(name.startswith("head.") for name in tensors),
        bare_norm="",
    )
    source.tensors = {native: tensors[name] for native, name in source.origin.items()}
    if is_checkpoint:
        _describe(source, contents.extra)
    return source


def _averaged(contents: Contents) -> dict[str, Tensor]:
    averaged = contents.extra.get("ema")
    if contents.extra.get("format") != "retinanet" or not isinstance(averaged, dict):
        return {}
    return {name.removeprefix("module."): value for name, value in averaged.items() if name.startswith("module.")}


def _describe(source: Source, extra: dict) -> None:
    """Fill in what the checkpoint's configuration and classes say."""
    source.classes = [entry["name"] for entry in extra.get("classes") or []]
    try:
        model = yaml.safe_load(extra["config"])["MODEL"]
        norms = {prefix: model[part]["NORM"] for part, prefix in _PARTS.items()}
        anchors = model["ANCHORS"]
    except (KeyError, TypeError, AttributeError, yaml.YAMLError):
        return  # written by hand, or by another release: then its tensors alone must do
    source.bare_norm = "group"
    for name in source.tensors:
        prefix = name.split(".", 1)[0] + "."
        if name.endswith(".norm.weight") and getattr(NORMS.get(norms.get(prefix)), "folds_in_training", False):
            source.folded.add(name.removesuffix(".weight"))
    source.eps = model["NORM_OPTIONS"].get(norms["backbone."], {}).get("EPS", source.eps)
    source.groups = model["NORM_OPTIONS"].get("GN", {}).get("GROUPS", source.groups)
    source.channel_order = model["CHANNEL_ORDER"]
    source.pixel_mean, source.pixel_std = tuple(model["PIXEL_MEAN"]), tuple(model["PIXEL_STD"])
    source.stride_in_1x1 = model["BACKBONE"]["STRIDE_IN_1X1"]
    source.anchors = AnchorOrder(
        anchors["CONVENTION"], tuple(anchors["ASPECT_RATIOS"]), anchors["SCALES_PER_OCTAVE"], True
    )
