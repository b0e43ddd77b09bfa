"""Folded models against the models they come from, the authors' folded weights, and what the report says."""

import copy

import norm_recipes as recipes
import pytest
import torch
from norm_recipes import golden, relative_error, tensor
from torch import nn

from retinanet.config.defaults import get_cfg
from retinanet.deploy.fold import NOTHING, PART, WHOLE, fold, summary
from retinanet.layers.conv import CONVS, CentralizedConv2d, Conv2d, StandardizedConv2d
from retinanet.layers.norm import BCN, GN, MABN, NORMS, make_norm
from retinanet.modeling.build import build_model, build_postprocess
from retinanet.structures import Batch

SEED = 11000000
NOT_WHOLE = {"GN": NOTHING, "BCN": PART}


def inputs(offset: int, shape, scale: float = 1.0, base: float = 0.0) -> torch.Tensor:
    return tensor(recipes.rounded(scale * recipes.normals(SEED + offset, shape) + base))


def positive(offset: int, shape) -> torch.Tensor:
    return tensor(recipes.rounded(0.3 + abs(recipes.normals(SEED + offset, shape))))


def detector(norm: str, conv: str = "auto") -> nn.Module:
    """Return a small RetinaNet with `norm` everywhere, and statistics and affines that are not those of the start."""
    torch.manual_seed(0)
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = 3, "R18", 0
    cfg.MODEL.FPN.CHANNELS, cfg.MODEL.HEAD.NUM_CONVS, cfg.TEST.SCORE_THRESH = 32, 2, 0.0
    cfg.MODEL.NORM_OPTIONS.GN.GROUPS = cfg.MODEL.NORM_OPTIONS.BCN.GROUPS = 4
    for part in ("BACKBONE", "FPN", "HEAD"):
        cfg.MODEL[part].NORM, cfg.MODEL[part].CONV = norm, conv
    model = build_model(cfg)
    for name, value in model.state_dict().items():
        if "norm" in name and value.is_floating_point():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.3)
            elif name.endswith("weight"):
                value.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                value.normal_(0, 0.3)
    return model, build_postprocess(cfg)


def random_images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def outputs_of(model: nn.Module, images: torch.Tensor) -> dict:
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", ["", *NORMS])
def test_whole_detector_gives_the_same_outputs_and_detections(norm, memory_format):
    model, postprocess = detector(norm)
    images = random_images(2, 96, 128).contiguous(memory_format=memory_format)
    folded, report = fold(model)
    expected, result = outputs_of(model, images), outputs_of(folded, images)
    for kind in ("logits", "deltas"):
        for a, b in zip(result[kind], expected[kind], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    sizes = torch.tensor([[96, 128], [96, 128]])
    none = torch.zeros(2, 8, 4)
    batch = Batch(images, sizes, sizes, torch.ones(2, 2), none, none[..., 0].long())
    for a, b in zip(postprocess(result, batch), postprocess(expected, batch), strict=True):
        torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=1e-5)
        assert len(b["scores"]) == 100
    assert {entry.outcome for entry in report if entry.norm} == ({NOT_WHOLE.get(norm, WHOLE)} if norm else set())


@pytest.mark.parametrize("kind", CONVS)
def test_reparametrized_weights_are_baked_in(kind):
    model, _ = detector("BN", conv=kind)
    folded, report = fold(model)
    images = random_images(1, 64, 64)
    for a, b in zip(outputs_of(folded, images)["logits"], outputs_of(model, images)["logits"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    convs = [module for module in folded.modules() if isinstance(module, Conv2d)]
    assert all(type(conv) is Conv2d and conv.norm is None and conv.bias is not None for conv in convs)
    assert all(("reparametrized" in entry.why) == (kind != "plain") for entry in report if entry.norm)


def test_folded_weights_of_mabn_are_those_of_the_reference():
    trace = golden("folding")
    conv = CentralizedConv2d(4, 6, 3, padding=1, bias=True, norm=MABN(6)).double()
    conv.weight.data, conv.bias.data = inputs(0, (6, 4, 3, 3), 0.3, 0.05), inputs(1, 6, 0.1)
    conv.norm.weight.data, conv.norm.bias.data = inputs(2, 6, 0.2, 1.0), inputs(3, 6, 0.1)
    conv.norm.running_var.copy_(positive(4, (1, 6, 1, 1)))
    folded, _ = fold(conv)
    assert relative_error(folded.weight, trace["mabn_folded_weight"]) <= 1e-12
    assert relative_error(folded.bias, trace["mabn_folded_bias"]) <= 1e-12
    x = inputs(5, (2, 4, 9, 8))
    for layer in (folded, conv.eval()):
        assert relative_error(layer(x), trace["mabn_y"]) <= 1e-9


def test_folded_weights_of_bcn_are_those_of_the_reference():
    trace = golden("folding")
    conv = StandardizedConv2d(4, 8, 3, padding=1, bias=True, norm=BCN(8, 4)).double()
    conv.weight.data, conv.bias.data = inputs(20, (8, 4, 3, 3), 0.3, 0.05), inputs(21, 8, 0.1)
    norm, bn = conv.norm, conv.norm.bn
    bn.weight.data, bn.bias.data = inputs(22, 8, 0.2, 1.0), inputs(23, 8, 0.1)
    bn.running_mean.copy_(inputs(24, 8, 0.2))
    bn.running_var.copy_(positive(25, 8))
    norm.weight.data, norm.bias.data = inputs(26, (1, 4, 1), 0.2, 1.0), inputs(27, (1, 4, 1), 0.1)
    folded, (entry,) = fold(conv)
    assert relative_error(folded.weight, trace["bcn_folded_weight"]) <= 1e-12
    assert relative_error(folded.bias, trace["bcn_folded_bias"]) <= 1e-12
    assert entry.outcome == PART and "ChannelNorm" in entry.why
    x = inputs(28, (2, 4, 9, 8))
    for layer in (folded, conv.eval()):
        assert relative_error(layer(x), trace["bcn_y"]) <= 1e-9


def test_shared_conv_with_norms_per_level_gets_a_weight_per_level():
    model, _ = detector("MABN")
    folded, report = fold(model)
    entry = next(entry for entry in report if entry.name == "head.cls_convs.0")
    assert entry.outcome == WHOLE and "one weight for each of 5 levels" in entry.why
    norm, conv = model.head.cls_convs[0].norm, model.head.cls_convs[0]
    for level, plain in zip(norm.levels, folded.head.cls_convs[0].levels, strict=True):
        scale = norm.weight / (level.running_var.flatten() + level.eps).sqrt()
        torch.testing.assert_close(plain.weight, conv.effective_weight() * scale.view(-1, 1, 1, 1))


def test_model_stays_in_training_and_the_random_generator_where_it_was():
    model, _ = detector("MABN")
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    folded, _ = fold(model)
    assert model.training and not folded.training and not any(p.requires_grad for p in folded.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)


def test_grouped_strided_and_half_precision_convs_fold():
    conv = Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, norm=make_norm("BN", 6)).bfloat16()
    folded, _ = fold(conv)
    assert folded.weight.dtype == torch.bfloat16 and folded.bias.dtype == torch.bfloat16
    wide, x = copy.deepcopy(conv).double().eval(), torch.randn(1, 4, 9, 8).double()
    torch.testing.assert_close(fold(wide)[0](x), wide(x), rtol=1e-12, atol=1e-12)


def test_norm_without_a_convolution_before_it_is_reported():
    model = nn.Sequential(nn.ReLU(), MABN(4), Conv2d(4, 4, 1, norm=GN(4, 2)))
    _, report = fold(model)
    assert [(entry.name, entry.norm) for entry in report] == [("1", "MABN"), ("2", "GN")]
    assert {entry.outcome for entry in report} == {NOTHING}
    assert "no convolution" in report[0].why and "its own input" in report[1].why


def test_summary_counts_by_kind_and_says_why():
    _, report = fold(nn.Sequential(Conv2d(4, 4, 1, norm=MABN(4)), Conv2d(4, 4, 1, norm=MABN(4)), Conv2d(4, 4, 1)))
    assert summary(report) == "folded: 2 MABN whole (its statistics are constants)"
    assert summary([]) == "folded: the model has no norms"
