"""Caffe2 Detectron's names (facebookresearch/Detectron `modeling/ResNet.py`, `FPN.py`, `retinanet_heads.py`).

Blobs are `{conv}_w`, `{conv}_b`; a frozen batch norm is `{conv}_bn_s`, `{conv}_bn_b` with the statistics folded in
(eps 1e-5, `tools/pickle_caffe_blobs.py`); a group norm `{conv}_gn_s`, `{conv}_gn_b`. detectron2's ImageNet pickles use
the same names with unfolded batch norms: `_bn_gamma`, `_bn_beta`, `_bn_running_mean`, `_bn_running_var`. Blobs of the
head carry the name of the finest level, whose weights all levels share. Images are BGR minus a mean, over nothing.
"""

from torch import Tensor

from retinanet.weights.read import Contents
from retinanet.weights.source import DETECTRON_MEAN, NO_STD, AnchorOrder, NameTable, Source

_MODULES = [
    (r"(?:res_)?conv1", r"backbone.conv1"),
    (r"res([2-5])_(\d+)_branch1", r"backbone.res\1.\2.shortcut"),
    (r"res([2-5])_(\d+)_branch2a", r"backbone.res\1.\2.conv1"),
    (r"res([2-5])_(\d+)_branch2b", r"backbone.res\1.\2.conv2"),
    (r"res([2-5])_(\d+)_branch2c", r"backbone.res\1.\2.conv3"),
    (r"fpn_inner_res([3-5])_\d+_sum(?:_lateral)?", r"fpn.lateral\1"),
    (r"fpn_res([3-5])_\d+_sum", r"fpn.output\1"),
    (r"fpn_([67])", r"fpn.p\1"),
    (r"retnet_cls_conv_n(\d+)_fpn\d", r"head.cls_convs.\1"),
    (r"retnet_bbox_conv_n(\d+)_fpn\d", r"head.box_convs.\1"),
    (r"retnet_cls_pred_fpn\d", r"head.cls_pred"),
    (r"retnet_bbox_pred_fpn\d", r"head.box_pred"),
]
_LEAVES = {
    "_w": ".weight",
    "_b": ".bias",
    **{f"_{norm}_s": ".norm.weight" for norm in ("bn", "gn")},
    **{f"_{norm}_b": ".norm.bias" for norm in ("bn", "gn")},
    "_bn_gamma": ".norm.weight",
    "_bn_beta": ".norm.bias",
    **{f"_bn_{mean}": ".norm.running_mean" for mean in ("running_mean", "rm")},
    **{f"_bn_{var}": ".norm.running_var" for var in ("running_var", "riv")},
}
_UNUSED = [
    r".*_momentum",
    r"(fc\d*|pred|last_out_L\d+)_[wb]",  # the ImageNet classifier
    r"(conv1|res\d_\d+_branch\d[abc]?)_b",  # left from Caffe; Detectron's convs have no bias and ignore these too
    r"lr|iter|optimizer_iteration.*|weight_order",
]
_TABLE = NameTable(_MODULES, _LEAVES, _UNUSED)


def recognise(contents: Contents) -> Source | None:
    """Return the contents under native names when the blobs are Detectron's, else None."""
    blobs = {name.rsplit("/", 1)[-1]: tensor for name, tensor in contents.tensors.items()}  # gpu_0/, __preserve__/
    whole = any(name.startswith("retnet_") for name in blobs)
    if not whole and not {"conv1_w", "res2_0_branch2a_w"} <= blobs.keys():
        return None
    source = Source(
        title="Caffe2 Detectron RetinaNet" if whole else "Caffe2 Detectron backbone",
        channel_order="BGR",
        pixel_mean=DETECTRON_MEAN,
        pixel_std=NO_STD,
        stride_in_1x1=_stride_in_1x1(blobs, whole),
        whole=whole,
        anchors=AnchorOrder("detectron", (1.0, 2.0, 0.5), 3) if whole else None,  # the published YAMLs
        plain_convs=True,
    )
    _TABLE.sort(source, blobs)
    norms = [name.removesuffix(".weight") for name in source.tensors if name.endswith(".norm.weight")]
    source.folded = {name for name in norms if source.origin[f"{name}.weight"].endswith("_bn_s")}
    return source


def _stride_in_1x1(blobs: dict[str, Tensor], whole: bool) -> bool | None:
    """MSRA's ResNets stride in the first 1x1; the ResNeXts and the GN models, trained by Facebook, in the 3x3."""
    middle = blobs.get("res2_0_branch2b_w")
    if middle is not None and middle.dim() == 4 and middle.shape[1] < middle.shape[0]:
        return False
    if any(name.endswith("_gn_s") and name.startswith("res") for name in blobs):
        return None if whole else False  # a whole model may have been trained either way
    return True
