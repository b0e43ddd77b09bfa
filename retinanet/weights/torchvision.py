"""torchvision's names, which timm's ResNets, the MABN authors' weights and the BCN and WS classifiers share.

A ResNet is `conv1`, `bn1`, `layer{1..4}.{i}.conv{n}`, `.bn{n}`, `.downsample.{0,1}` whatever norm the `bn`s are; a
RetinaNet has it under `backbone.body`. Batch norms have eps 1e-5, but torchvision sets it to 0 when it loads its
published RetinaNet v1 (`models/detection/retinanet.py`). Channel 0 of every anchor's 91 classes is a background that
no target ever has. torchvision 0.13 renamed the convolutions of FPN and heads; both names are read.
"""

from retinanet.weights.read import Contents
from retinanet.weights.source import (
    BATCH_NORM_LEAVES,
    DETECTRON_MEAN,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NO_STD,
    AnchorOrder,
    NameTable,
    Source,
)

_BODY = r"(?:backbone\.)?(?:body\.)?"
_TOWERS = {"classification_head": "cls_convs", "regression_head": "box_convs"}


def modules() -> list[tuple[str, str]]:
    """Return (pattern of a name in torchvision, native name) of all modules."""
    pairs = [(rf"{_BODY}conv1", r"backbone.conv1"), (rf"{_BODY}bn1", r"backbone.conv1.norm")]
    for stage in range(1, 5):
        block, ours = rf"{_BODY}layer{stage}\.(\d+)", rf"backbone.res{stage + 1}.\1"
        pairs += [(rf"{block}\.conv(\d)", rf"{ours}.conv\2"), (rf"{block}\.bn(\d)", rf"{ours}.conv\2.norm")]
        pairs += [(rf"{block}\.downsample\.0", rf"{ours}.shortcut")]
        pairs += [(rf"{block}\.downsample\.1", rf"{ours}.shortcut.norm")]
    for place in range(3):
        for theirs, ours in (("inner", f"fpn.lateral{place + 3}"), ("layer", f"fpn.output{place + 3}")):
            block = rf"backbone\.fpn\.{theirs}_blocks\.{place}"
            pairs += [(rf"{block}(?:\.0)?", ours), (rf"{block}\.1", f"{ours}.norm")]
    pairs += [(r"backbone\.fpn\.extra_blocks\.p([67])", r"fpn.p\1")]
    for theirs, ours in _TOWERS.items():
        pairs += [(rf"head\.{theirs}\.conv\.(\d)\.0", rf"head.{ours}.\1")]
        pairs += [(rf"head\.{theirs}\.conv\.(\d)\.1", rf"head.{ours}.\1.norm")]
        pairs += [(rf"head\.{theirs}\.conv\.{2 * layer}", f"head.{ours}.{layer}") for layer in range(8)]  # before 0.13
    pairs += [(r"head\.classification_head\.cls_logits", r"head.cls_pred")]
    return [*pairs, (r"head\.regression_head\.bbox_reg", r"head.box_pred")]


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "estbn_moving_speed")
_LEAVES = {
    **BATCH_NORM_LEAVES,
    **{f".{leaf}": f".{leaf}" for leaf in ("iters", "buffer_x2", "buffer_gz")},  # MABN's detection layer
    # BCN's two halves: `bn` in the authors' README, `pbn` in their ImageNet code
    **{f".{half}.{leaf}": f".bn.{leaf}" for half in ("bn", "pbn") for leaf in ("weight", "bias", *_STATISTICS)},
}
_UNUSED = [
    r"(fc|classifier|head\.fc)\.(weight|bias)",  # the ImageNet classifier
    r".*\.(sta_matrix|pre_x2|pre_gz)",  # windows of MABN's classification layer, over parts of one batch
]
_TABLE = NameTable(modules(), _LEAVES, _UNUSED)


def recognise(contents: Contents) -> Source | None:
    """Return the contents under native names when they are torchvision's, else None."""
    native = {_TABLE.translate(name) for name in contents.tensors}
    if not {"backbone.conv1.weight", "backbone.res2.0.conv1.weight"} <= native:
        return None
    leaves = {name.rsplit(".", 1)[-1] for name in contents.tensors}
    whole = any(name.startswith("head.classification_head.") for name in contents.tensors)
    source = Source(
        title="torchvision RetinaNet" if whole else "torchvision or timm ResNet",
        channel_order="RGB",
        pixel_mean=IMAGENET_MEAN,
        pixel_std=IMAGENET_STD,
        stride_in_1x1=False,
        whole=whole,
        anchors=AnchorOrder("torchvision", (0.5, 1.0, 2.0), 3) if whole else None,
        background_row=whole,
        plain_convs=whole or "running_mean" in leaves,  # without, it may be MABN or GN with standardized weights
    )
    if "running_var" in leaves and "running_mean" not in leaves:  # a second moment: MABN, megvii-model/MABN `cls`
        source.title, source.stride_in_1x1 = "MABN authors' ResNet", None
        source.channel_order, source.pixel_mean, source.pixel_std = "BGR", DETECTRON_MEAN, NO_STD
    return _TABLE.sort(source, contents.tensors)
