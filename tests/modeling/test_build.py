"""What `build.py` makes of the configuration."""

import pytest
import torch
from model_cases import small_cfg

from retinanet.errors import UserError
from retinanet.layers.conv import CentralizedConv2d, Conv2d, StandardizedConv2d
from retinanet.layers.norm import NORMS, PerLevelNorm
from retinanet.modeling.build import (
    build_backbone,
    build_conv,
    build_loss,
    build_model,
    build_postprocess,
    norm_options,
)
from retinanet.structures import Batch

PARTS = ("BACKBONE", "FPN", "HEAD")


def build(*opts):
    torch.manual_seed(0)
    return build_model(small_cfg(*opts))


@pytest.mark.parametrize("norm", ["", *NORMS])
def test_every_norm_builds_in_every_part_and_trains(norm):
    model = build("NORMS", [norm] * 3).train()
    outputs = model(torch.randn(2, 3, 64, 64))
    sum(level.square().mean() for level in (*outputs["logits"], *outputs["deltas"])).backward()
    kinds = {type(module).__name__ for module in model.modules()}
    assert not norm or NORMS[norm].__name__ in kinds
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    per_level = [module for module in model.modules() if isinstance(module, PerLevelNorm)]
    assert len(per_level) == (2 if norm and NORMS[norm].has_statistics else 0)  # one conv in each tower of the head


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "conv, norm, kind",
    [
        ("auto", "", Conv2d),
        ("auto", "GN", Conv2d),
        ("auto", "MABN", CentralizedConv2d),
        ("auto", "BCN", StandardizedConv2d),
        ("plain", "MABN", Conv2d),
        ("standardized", "GN", StandardizedConv2d),
        ("centralized", "", CentralizedConv2d),
    ],
)
def test_conv_is_what_the_key_says_or_the_norms_paper_uses(part, conv, norm, kind):
    made = build_conv(small_cfg(f"MODEL.{part}.NORM", norm, f"MODEL.{part}.CONV", conv), part)(32, 64, 3, stride=2)
    assert type(made) is kind
    assert made(torch.randn(2, 32, 9, 9), level=0 if made.takes_level else None).shape == (2, 64, 5, 5)


def test_each_part_has_its_own_norm():
    model = build("NORMS", ["BN", "GN", "AffineChannel"])
    names = [type(conv.norm).__name__ for conv in (model.backbone.conv1, model.fpn.lateral3, model.head.cls_convs[0])]
    assert names == ["BN", "GN", "AffineChannel"]
    assert model.fpn.p6.norm is None and model.head.cls_pred.norm is None


def test_norm_options_reach_the_norms():
    cfg = small_cfg(
        "NORMS", ["GN", "SyncBN", "MABN"], "MODEL.NORM_OPTIONS.GN.GROUPS", 8, "MODEL.NORM_OPTIONS.BN.UPDATE_RATE", 0.5,
        "MODEL.NORM_OPTIONS.MABN.SIMULATED_BATCH", 16, "SOLVER.IMS_PER_BATCH", 4,
    )  # fmt: skip
    model = build_model(cfg)
    assert model.backbone.conv1.norm.groups == 8
    assert model.fpn.lateral3.norm.momentum == 0.5  # SyncBN takes the options of BN
    assert model.head.cls_convs[0].norm.levels[0].window == 4  # 16 images in micro-batches of 4
    assert norm_options(cfg, "AffineChannel") == {"learnable": False}
    assert norm_options(cfg, "") == {}


def test_affine_channel_is_learnable_when_asked_for():
    backbones = [build_backbone(small_cfg("MODEL.NORM_OPTIONS.AffineChannel.LEARNABLE", on)) for on in (False, True)]
    names = [{name for name, _ in backbone.named_parameters()} for backbone in backbones]
    assert names[1] - names[0] >= {"conv1.norm.weight", "res5.1.conv2.norm.bias"}
    assert not [name for name in names[0] if "norm" in name]


def test_architecture_keys_reach_the_parts():
    model = build(
        "MODEL.BACKBONE.NAME", "R50", "MODEL.BACKBONE.STRIDE_IN_1X1", False, "MODEL.BACKBONE.FREEZE_AT", 2,
        "MODEL.FPN.P6_FROM", "P5", "MODEL.HEAD.NUM_CONVS", 2, "MODEL.HEAD.PRIOR_PROB", 0.5,
        "MODEL.ANCHORS.SCALES_PER_OCTAVE", 2, "MODEL.ANCHORS.ASPECT_RATIOS", [1.0],
    )  # fmt: skip
    block = model.backbone.res3[0]
    assert (block.conv1.stride, block.conv2.stride) == (1, 2)
    assert not any(parameter.requires_grad for parameter in model.backbone.res2.parameters())
    assert model.fpn.p6.weight.shape == (32, 32, 3, 3)
    assert len(model.head.cls_convs) == len(model.head.box_convs) == 2
    assert model.head.cls_pred.weight.shape[0] == 2 * 3 and model.head.box_pred.weight.shape[0] == 2 * 4
    assert model.head.cls_pred.bias.tolist() == [0.0] * 6  # the logit of one half


def test_same_seed_same_weights():
    first, second = build().state_dict(), build().state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MODEL.NUM_CLASSES", 0, "MODEL.NUM_CLASSES: 0 .* data set"),
        ("MODEL.FPN.NORM", "GroupNrom", "MODEL.FPN.NORM: 'GroupNrom' is not one of AffineChannel, FrozenBN, BN"),
        ("MODEL.HEAD.CONV", "centred", "MODEL.HEAD.CONV: 'centred' is not one of auto, plain, .*mean 'centralized'"),
        ("MODEL.BACKBONE.NAME", "R51", "MODEL.BACKBONE.NAME: 'R51' is not one of R18, .*R50"),
    ],
)
def test_wrong_name_is_an_error_that_lists_the_choices(key, value, message):
    with pytest.raises(UserError, match=message):
        build(key, value)


def test_groups_that_do_not_fit_the_channels_are_an_error():
    with pytest.raises(UserError, match="GN: 48 channels do not divide into 32 groups"):
        build("NORMS", ["", "GN", ""], "MODEL.FPN.CHANNELS", 48)


def test_loss_and_postprocess_take_what_the_model_gives():
    cfg = small_cfg("NORMS", ["GN", "GN", "GN"], "TEST.SCORE_THRESH", 0.0, "TEST.MAX_DETS", 7)
    model, loss, postprocess = build_model(cfg), build_loss(cfg), build_postprocess(cfg)
    batch = Batch(
        images=torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8),
        image_sizes=torch.tensor([[64, 96], [60, 80]]),
        original_sizes=torch.tensor([[128, 192], [120, 160]]),
        scales=torch.full((2, 2), 0.5),
        gt_boxes=torch.tensor([[[8.0, 8.0, 40.0, 40.0], [0, 0, 0, 0]]] * 2),
        gt_labels=torch.tensor([[2, -1], [-1, -1]]),  # the second image is empty
        image_ids=[1, 2],
    )
    outputs = model(model.normalize(batch.images, batch.image_sizes))
    losses = loss(outputs, batch.gt_boxes, batch.gt_labels)
    assert list(losses) == ["loss_cls", "loss_box"]
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    detections = postprocess(outputs, batch)
    assert [len(found["scores"]) for found in detections] == [7, 7]
    for found, (height, width) in zip(detections, batch.original_sizes.tolist(), strict=True):
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height] * 2)).all()


def test_settings_reach_the_loss():
    opts = ["MODEL.LOSS.GAMMA", 1.5, "MODEL.LOSS.BOX", "giou", "MODEL.LOSS.NORMALIZER", "ema"]
    loss = build_loss(small_cfg(*opts, "MODEL.MATCHER.FG_IOU", 0.6, "MODEL.BOX.CONVENTION", "detectron"))
    assert (loss.gamma, loss.box, loss.normalizer) == (1.5, "giou", "ema")
    assert loss.matching["fg_iou"] == 0.6 and loss.matching["plus_one"] is True
