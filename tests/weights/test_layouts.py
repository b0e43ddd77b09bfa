"""Names of other projects become native names, all of them, and back."""

import pytest
import torch
import torchvision
from goldens.recipes import caffe2_shapes
from weights.cases import make_model

from retinanet.errors import UserError
from retinanet.weights import caffe2, detectron2, native
from retinanet.weights import torchvision as tv
from retinanet.weights.export import _DETECTRON2, _TORCHVISION, _rename
from retinanet.weights.read import Contents
from retinanet.weights.recognise import recognise
from retinanet.weights.source import AnchorOrder

FULL_SIZE = ("MODEL.NUM_CLASSES", 80, "MODEL.FPN.CHANNELS", 256, "MODEL.HEAD.NUM_CONVS", 4)
R50 = ("MODEL.BACKBONE.NAME", "R50")


def zeros(shapes: dict) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def assert_native(source, model) -> None:
    """The native names and shapes of a source are exactly those of the model."""
    state = model.state_dict()
    assert source.tensors.keys() == state.keys()
    assert {name: tensor.shape for name, tensor in source.tensors.items()} == {n: t.shape for n, t in state.items()}
    assert source.unknown == []


@pytest.mark.parametrize("fpn_gn", [False, True])
@pytest.mark.parametrize("backbone_gn", [False, True])
def test_caffe2_blobs_are_the_tensors_of_the_model(fpn_gn, backbone_gn):
    source = caffe2.recognise(Contents(zeros(caffe2_shapes(fpn_gn, backbone_gn))))
    norms = ("MODEL.BACKBONE.NORM", "GN" if backbone_gn else "AffineChannel", "MODEL.FPN.NORM", "GN" if fpn_gn else "")
    assert_native(source, make_model(*R50, *FULL_SIZE, *norms))
    assert source.whole
    assert source.channel_order == "BGR"
    assert len(source.folded) == (0 if backbone_gn else 53)
    assert source.stride_in_1x1 is (None if backbone_gn else True)


def test_caffe2_leftovers_are_told_from_unknown_blobs():
    blobs = {"conv1_w": 4, "res2_0_branch2a_w": 4, "conv1_b": 64, "fc1000_w": 3, "pred_b": 3, "lr": 1}
    blobs |= {"conv1_w_momentum": 4, "gpu_0/res2_0_branch2a_bn_s": 64, "rpn_conv_w": 1, "res2_0_branch2a_bn_rm": 64}
    source = caffe2.recognise(Contents({name: torch.zeros(size) for name, size in blobs.items()}))
    assert sorted(source.unused) == ["conv1_b", "conv1_w_momentum", "fc1000_w", "lr", "pred_b"]
    assert source.unknown == ["rpn_conv_w"]
    assert sorted(source.tensors) == [
        "backbone.conv1.weight",
        "backbone.res2.0.conv1.norm.running_mean",
        "backbone.res2.0.conv1.norm.weight",
        "backbone.res2.0.conv1.weight",
    ]
    assert not source.whole


def test_caffe2_spellings_of_batch_norm_are_one():
    for leaf, native_leaf in (("gamma", "weight"), ("beta", "bias"), ("riv", "running_var"), ("rm", "running_mean")):
        blobs = {"conv1_w": torch.zeros(1), "res2_0_branch2a_w": torch.zeros(1), f"res5_2_branch2c_bn_{leaf}": 1}
        source = caffe2.recognise(Contents(blobs))
        assert f"backbone.res5.2.conv3.norm.{native_leaf}" in source.tensors
        assert source.folded == set()


def test_caffe2_resnext_strides_in_the_3x3():
    shapes = caffe2_shapes() | {"res2_0_branch2b_w": [256, 8, 3, 3]}
    assert caffe2.recognise(Contents(zeros(shapes))).stride_in_1x1 is False
    backbone = {n: s for n, s in caffe2_shapes(backbone_gn=True).items() if not n.startswith(("fpn", "retnet"))}
    assert caffe2.recognise(Contents(zeros(backbone))).stride_in_1x1 is False  # R-50-GN.pkl


@pytest.mark.parametrize(
    ("builder", "name"),
    [
        ("resnet18", "R18"),
        ("resnet34", "R34"),
        ("resnet50", "R50"),
        ("resnet101", "R101"),
        ("resnet152", "R152"),
        ("resnext101_32x8d", "X101_32x8d"),
        ("resnext101_64x4d", "X101_64x4d"),
    ],
)
def test_torchvision_classifiers_are_backbones(builder, name):
    with torch.device("meta"):
        state = torchvision.models.get_model(builder, weights=None).state_dict()
        source = tv.recognise(Contents(state))
        model = make_model("MODEL.BACKBONE.NAME", name, "MODEL.BACKBONE.NORM", "BN")
    backbone = {n: t.shape for n, t in model.state_dict().items() if n.startswith("backbone.")}
    assert {n: t.shape for n, t in source.tensors.items()} == backbone
    assert sorted(source.unused) == ["fc.bias", "fc.weight"]
    assert (source.unknown, source.whole, source.stride_in_1x1, source.channel_order) == ([], False, False, "RGB")


TORCHVISION_NORMS = {
    "retinanet_resnet50_fpn": ("MODEL.FPN.P6_FROM", "P5"),
    "retinanet_resnet50_fpn_v2": ("MODEL.HEAD.NORM", "GN"),
}


def torchvision_state(builder: str) -> dict[str, torch.Tensor]:
    return torchvision.models.get_model(builder, weights=None, weights_backbone=None, num_classes=80).state_dict()


@pytest.mark.parametrize("builder", TORCHVISION_NORMS)
def test_torchvision_retinanets_are_models(builder):
    with torch.device("meta"):
        source = tv.recognise(Contents(torchvision_state(builder)))
        model = make_model(*R50, *FULL_SIZE, "MODEL.BACKBONE.NORM", "BN", *TORCHVISION_NORMS[builder])
    assert_native(source, model)
    assert source.background_row
    assert source.anchors == AnchorOrder("torchvision", (0.5, 1.0, 2.0), 3)


def test_torchvision_names_before_0_13_are_read():
    with torch.device("meta"):
        new = torchvision_state("retinanet_resnet50_fpn")
    old = {}
    for name, tensor in new.items():
        parts = name.split(".")
        if "blocks" in name and parts[-2] == "0":
            del parts[-2]
        elif name.startswith("head.") and ".conv." in name:
            parts[3:5] = [str(2 * int(parts[3]))]
        old[".".join(parts)] = tensor
    assert "head.regression_head.conv.6.bias" in old
    assert "backbone.fpn.inner_blocks.2.weight" in old
    assert tv.recognise(Contents(old)).tensors.keys() == tv.recognise(Contents(new)).tensors.keys()


def detectron2_state(model: torch.nn.Module, head_norm: bool) -> dict[str, torch.Tensor]:
    """Return a model's state under detectron2's names, spelled out here by hand."""
    step, state = (3 if head_norm else 2), {}
    for name, tensor in model.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "backbone":
            new = f"backbone.bottom_up.{'stem.' if rest.startswith('conv1') else ''}{rest}"
        elif part == "fpn":
            new = f"backbone.top_block.{rest}" if rest.startswith("p") else f"backbone.fpn_{rest}"
        elif "_pred" in rest:
            new = "head." + rest.replace("cls_pred", "cls_score").replace("box_pred", "bbox_pred")
        else:
            tower, layer, leaf = rest.split(".", 2)
            place = step * int(layer) + leaf.startswith("norm.")
            leaf = leaf.removeprefix("norm.").removeprefix("levels.")
            new = f"head.{'cls_subnet' if tower == 'cls_convs' else 'bbox_subnet'}.{place}.{leaf}"
        state[new] = tensor
    return state


@pytest.mark.parametrize("head_norm", ["", "GN", "BN"])
def test_detectron2_models_are_models(head_norm):
    norms = ("MODEL.BACKBONE.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN", "MODEL.HEAD.NORM", head_norm)
    model = make_model(*R50, *norms, "MODEL.HEAD.NUM_CONVS", 4)
    state = detectron2_state(model, bool(head_norm))
    source = detectron2.recognise(Contents({**state, "anchor_generator.cell_anchors.0": torch.zeros(9, 4)}))
    assert_native(source, model)
    assert source.unused == ["anchor_generator.cell_anchors.0"]


def test_detectron2_says_its_colours_by_its_mean():
    state = {"backbone.bottom_up.stem.conv1.weight": torch.zeros(64, 3, 7, 7)}
    for mean, std, order, stride in (
        ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0], "BGR", True),
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], "RGB", False),
    ):
        colours = {"pixel_mean": torch.tensor(mean).view(3, 1, 1), "pixel_std": torch.tensor(std).view(3, 1, 1)}
        source = detectron2.recognise(Contents({**state, **colours}))
        assert (source.channel_order, source.stride_in_1x1) == (order, stride)
        assert source.pixel_mean == pytest.approx(mean)
    converted = detectron2.recognise(Contents({"stem.conv1.weight": torch.zeros(1)}, {"__author__": "torchvision"}))
    assert (converted.channel_order, converted.stride_in_1x1) == ("RGB", False)


def test_mabn_layouts_of_detection_and_classification_are_read():
    model = make_model("MODEL.BACKBONE.NAME", "R18", "MODEL.BACKBONE.NORM", "MABN")
    state = {}
    for name, tensor in model.backbone.state_dict().items():
        stage, _, rest = name.partition(".")
        rest = rest.replace("shortcut.norm", "downsample.1").replace("shortcut.", "downsample.0.")
        for n in "12":
            rest = rest.replace(f"conv{n}.norm", f"bn{n}")
        new = f"layer{int(stage[3]) - 1}.{rest}" if stage.startswith("res") else name.replace("conv1.norm", "bn1")
        state[new] = tensor
    assert "layer2.0.downsample.1.buffer_x2" in state
    source = tv.recognise(Contents(state))
    assert source.tensors.keys() == {n for n in model.state_dict() if n.startswith("backbone.")}
    assert (source.title, source.channel_order, source.stride_in_1x1) == ("MABN authors' ResNet", "BGR", None)
    state["bn1.sta_matrix"] = state["bn1.pre_x2"] = torch.zeros(16, 64)
    assert sorted(tv.recognise(Contents(state)).unused) == ["bn1.pre_x2", "bn1.sta_matrix"]


@pytest.mark.parametrize("half", ["bn", "pbn"])
def test_bcn_layouts_are_read(half):
    names = ["conv1.weight", "layer1.0.conv1.weight", f"bn1.{half}.running_mean", f"bn1.{half}.weight", "bn1.weight"]
    source = tv.recognise(Contents({name: torch.zeros(1) for name in names}))
    assert {"backbone.conv1.norm.bn.running_mean", "backbone.conv1.norm.weight"} <= source.tensors.keys()
    assert source.unknown == []


def test_native_state_dicts_need_no_checkpoint_around_them():
    model = make_model()
    source = native.recognise(Contents(model.state_dict()))
    assert source.tensors.keys() == model.state_dict().keys()
    backbone = native.recognise(Contents({**model.backbone.state_dict(), "fc.weight": torch.zeros(1)}))
    assert all(name.startswith("backbone.") for name in backbone.tensors)
    assert backbone.unused == ["fc.weight"]
    assert not backbone.whole


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_wrapped_state_dicts_are_unwrapped(wrapper, tmp_path):
    state = {f"{wrapper}{name}": tensor for name, tensor in make_model().state_dict().items()}
    assert recognise(tmp_path, Contents(state)).title == "state dict in this project's names"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["cls_token", "blocks.0.attn.qkv.weight"], "names of no known layout"),
        (["conv1.0.weight", "layer1.0.conv1.weight"], "deep stem"),
    ],
)
def test_other_networks_are_refused_with_what_is_known(names, found, tmp_path):
    with pytest.raises(UserError, match=found):
        recognise(tmp_path / "x", Contents({name: torch.zeros(1) for name in names}))


@pytest.mark.parametrize("head_norm", ["", "GN"])
def test_export_names_are_the_inverse_of_import_names(head_norm):
    norms = ("MODEL.BACKBONE.NORM", "BN", "MODEL.HEAD.NORM", head_norm, "MODEL.FPN.NORM", "GN")
    names = list(make_model(*R50, *norms, "MODEL.HEAD.NUM_CONVS", 4).state_dict())
    step = 3 if head_norm else 2
    tables = {"torchvision": (_TORCHVISION, tv._TABLE), "detectron2": (_DETECTRON2, detectron2._table(step))}
    for project, (export, table) in tables.items():
        for name in names:
            if project == "detectron2" and name.startswith("head.") and "_pred" not in name:
                continue  # numbered by the head's norm: test_export.py
            assert table.translate(_rename(name, export)) == name
