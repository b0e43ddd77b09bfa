"""detectron2's names (facebookresearch/detectron2 `modeling/backbone/resnet.py`, `fpn.py`, `meta_arch/retinanet.py`).

A batch norm keeps its statistics, eps 1e-5; a group norm is weight and bias. In the head, convolutions and norms stand
in a Sequential with ReLUs, so a layer takes two places without a norm and three with one. Norms of the head that keep
statistics are `CycleBatchNormList`s: one set of statistics per level beside a shared weight and bias.
"""

import re

from torch import Tensor

from retinanet.weights.read import Contents
from retinanet.weights.source import BATCH_NORM_LEAVES, AnchorOrder, NameTable, Source

_BOTTOM_UP = r"(?:backbone\.)?(?:bottom_up\.)?"  # absent in files that hold only a backbone
_MODULES = [
    (rf"{_BOTTOM_UP}stem\.conv1", r"backbone.conv1"),
    (rf"{_BOTTOM_UP}stem\.conv1\.norm", r"backbone.conv1.norm"),
    (rf"{_BOTTOM_UP}(res[2-5]\.\d+\.(?:conv\d|shortcut)(?:\.norm)?)", r"backbone.\1"),
    (r"backbone\.fpn_(lateral|output)([3-5](?:\.norm)?)", r"fpn.\1\2"),
    (r"backbone\.top_block\.p([67])", r"fpn.p\1"),
    (r"head\.cls_score", r"head.cls_pred"),
    (r"head\.bbox_pred", r"head.box_pred"),
]
_TOWERS = {"cls_subnet": "cls_convs", "bbox_subnet": "box_convs"}
_LEAVES = BATCH_NORM_LEAVES | {
    f".{level}{leaf}": f".levels.{level}{leaf}"
    for level in range(5)
    for leaf in (".running_mean", ".running_var", ".num_batches_tracked")
}
_UNUSED = [
    r"pixel_(mean|std)",
    r"anchor_generator\..*",
    rf"{_BOTTOM_UP}(stem\.|linear\.)?(fc|linear)?\.?(weight|bias)",  # the ImageNet classifier
]


def recognise(contents: Contents) -> Source | None:
    """Return the contents under native names when they are detectron2's, else None."""
    tensors = contents.tensors
    if not any(re.fullmatch(rf"{_BOTTOM_UP}stem\.conv1\.weight", name) for name in tensors):
        return None
    whole = any(name.startswith("head.cls_subnet.") for name in tensors)
    from_torchvision = contents.extra.get("__author__") == "torchvision"
    order, std = _colours(tensors, from_torchvision)
    source = Source(
        title="detectron2 RetinaNet" if whole else "detectron2 backbone",
        channel_order=order,
        pixel_mean=_numbers(tensors.get("pixel_mean")),
        pixel_std=std,
        # published models of MSRA's ResNets divide by no deviation; torchvision's and the ResNeXts do
        stride_in_1x1=(std == (1.0, 1.0, 1.0)) if std else (False if from_torchvision else None),
        whole=whole,
        anchors=AnchorOrder("detectron2", (0.5, 1.0, 2.0), 3) if whole else None,
        plain_convs=True,
    )
    step = 3 if "head.cls_subnet.1.weight" in tensors else 2
    return _table(step).sort(source, tensors)


def head_modules(step: int) -> list[tuple[str, str]]:
    """Return (name in detectron2, native name) of the head's layers; `step` is 3 with norms in the head, else 2."""
    pairs = []
    for theirs, ours in _TOWERS.items():
        for layer in range(8):
            pairs.append((f"head.{theirs}.{step * layer}", f"head.{ours}.{layer}"))
            if step == 3:
                pairs.append((f"head.{theirs}.{step * layer + 1}", f"head.{ours}.{layer}.norm"))
    return pairs


def _table(step: int) -> NameTable:
    return NameTable([*_MODULES, *((re.escape(theirs), ours) for theirs, ours in head_modules(step))], _LEAVES, _UNUSED)


def _colours(tensors: dict[str, Tensor], from_torchvision: bool) -> tuple[str, tuple[float, ...]]:
    """Return channel order and deviation; red has ImageNet's largest mean, which tells the order."""
    mean = _numbers(tensors.get("pixel_mean"))
    if len(mean) == 3 and mean[0] != mean[2]:
        return ("BGR" if mean[0] < mean[2] else "RGB"), _numbers(tensors.get("pixel_std"))
    return ("RGB" if from_torchvision else "BGR"), _numbers(tensors.get("pixel_std"))


def _numbers(tensor: Tensor | None) -> tuple[float, ...]:
    return () if tensor is None or tensor.numel() != 3 else tuple(tensor.flatten().tolist())
