"""What is written for torchvision and detectron2 detects there what it detects here."""

import numpy as np
import pytest
import torch
import torchvision
from weights.cases import make_cfg, make_model, write

from retinanet.data.loader import build_image_batcher
from retinanet.engine.evaluate import detect
from retinanet.errors import UserError
from retinanet.modeling.build import build_postprocess
from retinanet.weights.detectron2 import _table
from retinanet.weights.export import to_detectron2, to_torchvision
from retinanet.weights.load import build_inputs, load_weights

TORCHVISION = (
    "MODEL.BACKBONE.NAME", "R50", "MODEL.FPN.CHANNELS", 256, "MODEL.HEAD.NUM_CONVS", 4, "MODEL.NUM_CLASSES", 5,
    "MODEL.BACKBONE.STRIDE_IN_1X1", False, "MODEL.ANCHORS.CONVENTION", "torchvision", "MODEL.BOX.CONVENTION",
    "torchvision", "INPUT.RESIZE", "torchvision", "INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 1333,
    "MODEL.PIXEL_STD", [58.395, 57.12, 57.375], "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "TEST.MAX_DETS", 300,
    "MODEL.CHANNEL_ORDER", "RGB", "TEST.SCORE_THRESH", 0.05,
)  # fmt: skip
VARIANTS = {
    "v1, AffineChannel": ("retinanet_resnet50_fpn", "MODEL.FPN.P6_FROM", "P5", "MODEL.BACKBONE.NORM", "AffineChannel"),
    "v1, FrozenBN without eps": (
        "retinanet_resnet50_fpn", "MODEL.FPN.P6_FROM", "P5", "MODEL.BACKBONE.NORM", "FrozenBN",
        "MODEL.NORM_OPTIONS.FrozenBN.EPS", 0.0),
    "v1, BGR": (
        "retinanet_resnet50_fpn", "MODEL.FPN.P6_FROM", "P5", "MODEL.BACKBONE.NORM", "BN", "MODEL.CHANNEL_ORDER", "BGR",
        "MODEL.PIXEL_STD", [57.375, 57.12, 58.395], "MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
    "v2": ("retinanet_resnet50_fpn_v2", "MODEL.BACKBONE.NORM", "BN", "MODEL.HEAD.NORM", "GN"),
}  # fmt: skip


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Scale the predictions up, so that a random network has detections, and the residuals down, so that it is tame."""
    with torch.no_grad():
        model.head.cls_pred.weight.mul_(8)
        model.head.cls_pred.bias.fill_(-3.0)
        for name, tensor in model.state_dict().items():
            if name.startswith("backbone.res") and ".conv3.norm.weight" in name:
                tensor.mul_(0.2)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchvision_gives_the_same_detections(variant):
    builder, *opts = VARIANTS[variant]
    cfg, model = make_cfg(*TORCHVISION, *opts), lively(make_model(*TORCHVISION, *opts))
    exported = to_torchvision(model, build_inputs(cfg), cfg.MODEL.BOX.CONVENTION)
    oracle = torchvision.models.get_model(
        builder, weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=1333
    )
    oracle.load_state_dict(exported.tensors)
    oracle.eval()
    picture = np.random.RandomState(0).randint(0, 256, (96, 120, 3)).astype(np.uint8)  # BGR
    found = detect(model, build_image_batcher(cfg)([picture]), build_postprocess(cfg))[0]
    with torch.no_grad():
        expected = oracle([torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1) / 255])[0]
    assert len(expected["scores"]) > 20
    assert_same_detections(found, expected)


def assert_same_detections(found: dict, expected: dict) -> None:
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=2e-5)
    left = set(range(len(expected["scores"])))
    for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
        near = [
            rank
            for rank in left
            if expected["labels"][rank] == label
            and abs(expected["scores"][rank] - score) < 2e-5
            and (expected["boxes"][rank] - box).abs().max() < 1e-2
        ]
        assert near, (box, score, label)
        left.remove(near[0])


def test_a_round_trip_through_torchvision_keeps_every_value(tmp_path):
    opts = (*TORCHVISION, "MODEL.BACKBONE.NORM", "BN", "MODEL.HEAD.NORM", "GN")
    cfg, model = make_cfg(*opts), make_model(*opts)
    file = write(tmp_path / "tv.pth", to_torchvision(model, build_inputs(cfg), "torchvision").tensors)
    back = make_model(*opts, "MODEL.HEAD.PRIOR_PROB", 0.3)
    report = load_weights(back, file, inputs=build_inputs(cfg))
    assert report.warnings == []
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("head_norm", ["", "GN", "BN"])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_a_round_trip_through_detectron2_keeps_every_value(norm, head_norm, tmp_path):
    opts = ("MODEL.BACKBONE.NAME", "R18", "MODEL.BACKBONE.NORM", norm, "MODEL.HEAD.NORM", head_norm, "MODEL.FPN.NORM",
            "GN", "MODEL.ANCHORS.ASPECT_RATIOS", [1.0, 0.5, 2.0], "MODEL.HEAD.NUM_CONVS", 2)  # fmt: skip
    cfg, model = make_cfg(*opts), make_model(*opts)
    tensors = to_detectron2(model, build_inputs(cfg), "detectron2").tensors
    table = _table(3 if head_norm else 2)
    assert {table.translate(name) for name in tensors} == set(model.state_dict())
    ratios = ("MODEL.ANCHORS.ASPECT_RATIOS", [0.5, 1.0, 2.0])  # detectron2's order, in which it was written
    back_cfg, back = make_cfg(*opts, *ratios), make_model(*opts, *ratios, "MODEL.HEAD.PRIOR_PROB", 0.3)
    load_weights(back, write(tmp_path / "d2.pth", tensors, iteration=1), inputs=build_inputs(back_cfg))
    for name, tensor in model.state_dict().items():
        found = back.state_dict()[name]
        if "_pred" in name:  # place 0 here was place 1 there
            found = found.unflatten(0, (3, 3, -1))[:, [1, 0, 2]].flatten(0, 2)
        torch.testing.assert_close(found, tensor, rtol=0, atol=0)


def test_affine_channel_becomes_the_frozen_batch_norm_of_detectron2():
    opts = ("MODEL.BACKBONE.NAME", "R18", "MODEL.BACKBONE.NORM", "AffineChannel")
    model = make_model(*opts)
    tensors = to_detectron2(model, build_inputs(make_cfg(*opts)), "detectron2").tensors
    stem = "backbone.bottom_up.stem.conv1.norm"
    x = torch.randn(2, 64, 3, 3)
    statistics = [tensors[f"{stem}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    expected = torch.nn.functional.batch_norm(x, *statistics, eps=1e-5)
    torch.testing.assert_close(model.backbone.conv1.norm(x), expected)


@pytest.mark.parametrize(
    ("opts", "box", "reason"),
    [
        (("MODEL.BACKBONE.STRIDE_IN_1X1", True), "torchvision", "stride in the 3x3"),
        (("MODEL.BACKBONE.NORM", "MABN"), "torchvision", "no counterpart of the norm backbone"),
        (("MODEL.ANCHORS.CONVENTION", "detectron2"), "torchvision", "other anchors"),
        ((), "detectron", r"no \+1 in its box widths"),
    ],
)
def test_what_torchvision_cannot_compute_is_refused(opts, box, reason):
    settings = ("MODEL.BACKBONE.NAME", "R18", "MODEL.BACKBONE.STRIDE_IN_1X1", False)
    settings += ("MODEL.ANCHORS.CONVENTION", "torchvision", *opts)
    with pytest.raises(UserError, match=reason):
        to_torchvision(make_model(*settings), build_inputs(make_cfg(*settings)), box)


def test_the_notes_say_what_to_build():
    cfg, model = make_cfg(*TORCHVISION), make_model(*TORCHVISION, "MODEL.BACKBONE.NORM", "BN")
    notes = to_torchvision(model, build_inputs(cfg), "torchvision").notes
    assert notes[0].startswith("image_mean=[0.485, 0.456, 0.406")
    assert notes[1:] == ["num_classes=5", "P6 from C5 (as in v2)"]
