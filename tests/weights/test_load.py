"""Loading is strict, says what became of every tensor, and keeps the function of the network."""

import logging
import pickle

import numpy as np
import pytest
import torch
from weights.cases import (
    AFFINE,
    BN,
    FROZEN,
    GN,
    R18,
    R50,
    assert_complete,
    assert_same_function,
    backbone_only,
    checkpoint,
    image,
    make_cfg,
    make_model,
    write,
    write_caffe2,
)

from retinanet.errors import UserError
from retinanet.weights import recognise as recognise_module
from retinanet.weights.compare import Inputs
from retinanet.weights.load import build_weights, load_weights


def test_a_state_dict_of_the_same_model_matches_whole(tmp_path):
    model, fresh = make_model(*R18), make_model(*R18, "MODEL.HEAD.PRIOR_PROB", 0.5)
    report = load_weights(fresh, write(tmp_path / "w.pth", model.state_dict()))
    assert len(report.matched) == len(model.state_dict())
    assert_complete(report, fresh, set(model.state_dict()))
    assert_same_function(fresh, model, rtol=0, atol=0)


@pytest.mark.parametrize("target", [AFFINE, FROZEN])
def test_batch_norm_of_a_checkpoint_becomes_a_fixed_norm_with_the_same_function(target, tmp_path):
    source = make_model(*R18, *BN)
    file = checkpoint(tmp_path / "w.pth", source, make_cfg(*R18, *BN))
    model = make_model(*R18, *target)
    report = load_weights(model, file)
    assert_complete(report, model, set(source.state_dict()))
    assert len(report.converted) == (40 if target is AFFINE else 0)  # 20 norms: weight and bias, or nothing to fold
    assert_same_function(model, source, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_says_what_its_bare_norms_are(tmp_path):
    model = make_model(*R18, *GN)
    file = checkpoint(tmp_path / "affine.pth", make_model(*R18, *AFFINE), make_cfg(*R18, *AFFINE))
    with pytest.raises(UserError, match=r"20 norms cannot use the file: backbone\.conv1\.norm, .*R-50-GN\.pkl"):
        load_weights(model, file)


def test_a_checkpoint_says_how_many_groups_its_norms_have(tmp_path):
    gn = [word for part in ("BACKBONE", "FPN", "HEAD") for word in (f"MODEL.{part}.NORM", "GN")]
    eight = (*R18, *gn, "MODEL.NORM_OPTIONS.GN.GROUPS", 8)
    source = make_model(*eight)
    file = checkpoint(tmp_path / "eight.pth", source, make_cfg(*eight))
    model = make_model(*eight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert_complete(load_weights(model, file), model, set(source.state_dict()))
    assert_same_function(model, source, rtol=0, atol=0)
    with pytest.raises(UserError, match="made for 8 groups, not 32; set MODEL.NORM_OPTIONS.GN.GROUPS 8"):
        load_weights(make_model(*R18, *gn), file)


def test_averaged_weights_are_preferred(tmp_path):
    raw, averaged = make_model(*R18), make_model(*R18)
    for tensor in averaged.state_dict().values():
        tensor.mul_(2)
    ema = {"n_averaged": torch.tensor(3), **{f"module.{n}": t for n, t in averaged.state_dict().items()}}
    file = checkpoint(tmp_path / "w.pth", raw, make_cfg(*R18), ema=ema)
    model = make_model(*R18)
    load_weights(model, file)
    assert_same_function(model, averaged, rtol=0, atol=0)


def test_a_checkpoint_with_a_broken_configuration_still_loads(tmp_path):
    model = make_model(*R18)
    path = write(tmp_path / "w.pth", model.state_dict(), format="retinanet", config="MODEL: [1", classes=None)
    assert len(load_weights(make_model(*R18), path).matched) == len(model.state_dict())


def caffe2_backbone() -> dict[str, np.ndarray]:
    """Return the blobs of a ResNet-50 with AffineChannel, named as in Detectron's R-50.pkl."""
    state = make_model(*R50, *AFFINE).state_dict()
    blobs = {}
    for name, tensor in backbone_only(state).items():
        new = name.removeprefix("backbone.").replace(".shortcut", "_branch1")
        for conv, branch in (("conv1", "2a"), ("conv2", "2b"), ("conv3", "2c")):
            new = new.replace(f".{conv}", f"_branch{branch}") if new.startswith("res") else new
        new = new.replace(".norm.weight", "_bn_s").replace(".norm.bias", "_bn_b").replace(".weight", "_w")
        new = new.replace("conv1_bn", "res_conv1_bn") if new.startswith("conv1_bn") else new.replace(".", "_")
        blobs[new] = tensor.numpy()
    return blobs


@pytest.fixture(scope="module")
def r50_pkl(tmp_path_factory) -> tuple[str, dict]:
    """A file like Detectron's R-50.pkl, and its blobs."""
    blobs = caffe2_backbone()
    assert {"res_conv1_bn_s", "res5_2_branch2c_w", "res2_0_branch1_bn_b"} <= blobs.keys()
    extra = {"conv1_b": np.zeros(64, np.float32), "fc1000_w": np.zeros((4, 8), np.float32), "fc1000_b": np.zeros(4)}
    blobs |= extra
    return write_caffe2(tmp_path_factory.mktemp("caffe2") / "R-50.pkl", blobs, 4), blobs


def test_blobs_without_a_frame_are_read_and_protocol_2_of_python_3(r50_pkl, tmp_path):
    (tmp_path / "flat.pkl").write_bytes(pickle.dumps(r50_pkl[1], 2))
    assert len(load_weights(make_model(*R50, *AFFINE), str(tmp_path / "flat.pkl")).matched) == 159


def test_an_imagenet_file_leaves_fpn_and_head_as_they_start(r50_pkl):
    file, blobs = r50_pkl
    model = make_model(*R50, *AFFINE)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, file)
    assert_complete(report, model, set(blobs))
    assert sorted(report.unused) == ["conv1_b", "fc1000_b", "fc1000_w"]
    assert all(name.startswith(("fpn.", "head.")) for name in report.initialised)
    for name in report.initialised:
        torch.testing.assert_close(model.state_dict()[name], before[name], rtol=0, atol=0)
    assert report.missing == []
    assert "159 matched" in report.summary()  # 53 convolutions with a scale and a shift
    assert "initialised" in report.summary()


def test_folded_statistics_reach_frozen_bn_and_are_refused_by_bn(r50_pkl):
    affine, frozen = make_model(*R50, *AFFINE), make_model(*R50, *FROZEN)
    load_weights(affine, r50_pkl[0])
    load_weights(frozen, r50_pkl[0])
    assert_same_function(frozen, affine, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="53 norms cannot use the file.*already contain the statistics"):
        load_weights(make_model(*R50, *BN), r50_pkl[0])


def test_refused_norms_are_tolerated_on_request_and_keep_their_values(r50_pkl):
    model = make_model(*R50, *GN)
    before = model.backbone.conv1.norm.weight.clone()
    report = load_weights(model, r50_pkl[0], allow_missing=True)
    assert len(report.refused) == 53
    assert "backbone.conv1.norm.weight" in report.missing
    torch.testing.assert_close(model.backbone.conv1.norm.weight, before, rtol=0, atol=0)
    assert_complete(report, model, set(r50_pkl[1]))
    assert "53 norms refused" in report.summary()


def test_a_refused_file_leaves_the_model_untouched(r50_pkl):
    model = make_model(*R50, *GN)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(model, r50_pkl[0])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("norm", [AFFINE, FROZEN, BN])
def test_missing_backbone_weights_are_an_error_with_a_remedy(norm, tmp_path):
    state = make_model(*R18, *norm).state_dict()
    del state["backbone.res3.0.conv1.norm.weight"], state["backbone.res3.0.conv1.norm.bias"]
    file = write(tmp_path / "w.pth", state)
    wanted = r"2 tensors of the model are not in the file: .*res3\.0\.conv1\.norm\.weight.*ALLOW_MISSING_WEIGHTS True"
    with pytest.raises(UserError, match=f"(?s){wanted}"):
        load_weights(make_model(*R18, *norm), file)
    report = load_weights(make_model(*R18, *norm), file, allow_missing=True)
    assert sorted(report.missing) == ["backbone.res3.0.conv1.norm.bias", "backbone.res3.0.conv1.norm.weight"]


def test_missing_parts_of_a_head_are_an_error(tmp_path):
    state = make_model(*R18).state_dict()
    del state["head.box_convs.0.weight"]
    with pytest.raises(UserError, match=r"1 tensors of the model are not in the file: head\.box_convs\.0\.weight"):
        load_weights(make_model(*R18), write(tmp_path / "w.pth", state))


def test_unknown_tensors_of_a_file_are_an_error(tmp_path):
    state = make_model(*R18).state_dict() | {"head.centerness.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"1 tensors of the file have no place in the model: head\.centerness\.weight"):
        load_weights(make_model(*R18), write(tmp_path / "w.pth", state))


def test_other_shapes_are_an_error_that_shows_them(tmp_path):
    file = write(tmp_path / "w.pth", make_model(*R18, "MODEL.FPN.P6_FROM", "P5").state_dict())
    with pytest.raises(
        UserError, match=r"fpn\.p6\.weight \(32, 32, 3, 3\) in the file, \(32, 512, 3, 3\) in the model"
    ):
        load_weights(make_model(*R18), file)
    report = load_weights(make_model(*R18), file, allow_missing=True)
    assert report.missing == ["fpn.p6.weight"]


@pytest.mark.parametrize(("theirs", "ours", "name"), [("R18", "R34", "R18"), ("R50", "R34", "R50")])
def test_another_depth_is_named(theirs, ours, name, tmp_path):
    file = write(tmp_path / "w.pth", make_model("MODEL.BACKBONE.NAME", theirs, *GN).state_dict())
    with pytest.raises(UserError, match=f"set MODEL.BACKBONE.NAME to {name}"):
        load_weights(make_model("MODEL.BACKBONE.NAME", ours, *GN), file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value, tmp_path):
    state = make_model(*R18).state_dict()
    state["fpn.p7.weight"][0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"fpn\.p7\.weight has values that are not finite"):
        load_weights(make_model(*R18), write(tmp_path / "w.pth", state))


def test_half_precision_becomes_float32(tmp_path):
    model = make_model(*R18)
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    load_weights(model, write(tmp_path / "w.pth", half))
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


def torchvision_backbone(tmp_path) -> tuple[str, torch.nn.Module]:
    import torchvision

    torch.manual_seed(3)
    oracle = torchvision.models.resnet18(weights=None).eval()
    return write(tmp_path / "resnet18.pth", oracle.state_dict()), oracle


def test_only_the_published_v1_of_torchvision_has_no_eps(tmp_path, monkeypatch):
    import torchvision

    oracle = torchvision.models.get_model("retinanet_resnet50_fpn", weights=None, weights_backbone=None, num_classes=3)
    oracle.backbone.body.bn1.running_var.mul_(1e-5)
    file = write(tmp_path / "v1.pth", oracle.state_dict())
    opts = (*R50, *AFFINE, "MODEL.FPN.CHANNELS", 256, "MODEL.HEAD.NUM_CONVS", 4, "MODEL.FPN.P6_FROM", "P5")
    for digest, eps in (("eeacb38b1234", 0.0), ("000000001234", 1e-5)):
        monkeypatch.setattr(recognise_module, "file_digest", lambda path, algorithm, digest=digest: digest)
        model = make_model(*opts)
        load_weights(model, file)
        expected = 1 / np.sqrt(1e-5 + eps)
        torch.testing.assert_close(model.backbone.conv1.norm.weight, torch.full((64,), float(expected)))


def test_colours_are_turned_to_those_of_the_model(tmp_path):
    file, oracle = torchvision_backbone(tmp_path)
    model = make_model(*R18, *BN)
    report = load_weights(model, file, inputs=Inputs(channel_order="BGR"))
    assert report.converted == ["backbone.conv1.weight"]
    assert "turned from RGB to BGR" in report.summary()
    with torch.no_grad():
        found = model.backbone.conv1(image().flip(1))
        expected = oracle.bn1(oracle.conv1(image()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "backbone.conv1.weight" in load_weights(model, file, inputs=Inputs(channel_order="RGB")).matched


def test_contradictions_between_configuration_and_weights_are_warned_of(tmp_path, caplog):
    file, _ = torchvision_backbone(tmp_path)
    inputs = Inputs("BGR", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), stride_in_1x1=True)
    with caplog.at_level(logging.WARNING):
        report = load_weights(make_model(*R18, *BN), file, inputs=inputs)
    assert [warning.split(":")[0] for warning in report.warnings] == [
        "MODEL.PIXEL_STD",
        "MODEL.BACKBONE.STRIDE_IN_1X1",
    ]
    assert all(warning in caplog.text for warning in report.warnings)
    fitting = Inputs("BGR", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), stride_in_1x1=False)
    assert load_weights(make_model(*R18, *BN), file, inputs=fitting).warnings == []


def test_plain_convolutions_for_standardized_ones_are_warned_of(tmp_path):
    file, _ = torchvision_backbone(tmp_path)
    report = load_weights(make_model(*R18, *BN, "MODEL.BACKBONE.CONV", "standardized"), file)
    assert report.warnings == ["MODEL.BACKBONE.CONV: the model has StandardizedConv2d, these weights were trained with "
                               "plain ones"]  # fmt: skip


def test_every_name_goes_to_the_log_and_counts_to_the_console(tmp_path, caplog):
    model = make_model(*R18)
    with caplog.at_level(logging.DEBUG, logger="retinanet"):
        report = load_weights(model, write(tmp_path / "w.pth", model.state_dict()))
    info = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    debug = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert info == [report.summary()]
    assert all(name in debug[-1] for name in model.state_dict())


def test_an_empty_key_loads_nothing():
    assert build_weights(make_cfg(), make_model()) is None


def test_the_configuration_reaches_the_loader(tmp_path):
    file, _ = torchvision_backbone(tmp_path)
    cfg = make_cfg(*R18, *BN, "MODEL.WEIGHTS", file, "MODEL.CHANNEL_ORDER", "BGR")
    report = build_weights(cfg, make_model(*R18, *BN))
    assert report.converted == ["backbone.conv1.weight"]
    assert len(report.warnings) == 2  # the default deviation of 1 and stride of Detectron
