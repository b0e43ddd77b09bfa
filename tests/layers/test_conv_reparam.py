"""Standardized and centralized convolutions against the authors' traces and by hand."""

import norm_recipes as recipes
import pytest
import torch
from norm_recipes import golden, relative_error, tensor

from retinanet.errors import UserError
from retinanet.layers.conv import CentralizedConv2d, StandardizedConv2d

KINDS = {  # trace, its prefix, how to build it, seed, scale and offset of its weights
    "centralized": ("cenconv2d", "", CentralizedConv2d, {}, 9000000, 0.3, 0.05),
    "eps in the variance": ("ws_conv2d", "bcn_", StandardizedConv2d, {"eps_in": "var"}, 9001000, 0.01, 0.002),
    "eps in the deviation": ("ws_conv2d", "ws_", StandardizedConv2d, {"eps_in": "std"}, 9001000, 0.01, 0.002),
}


def build(kind, case: tuple, weight, bias, dtype: torch.dtype, **options) -> torch.nn.Module:
    inputs, outputs, kernel, stride, padding, dilation, groups, has_bias = case
    conv = kind(inputs, outputs, kernel, stride, padding, dilation, groups, bias=has_bias, **options).to(dtype)
    conv.weight.data = tensor(weight, dtype)
    if has_bias:
        conv.bias.data = tensor(bias, dtype)
    return conv


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("j", range(3))
@pytest.mark.parametrize("name", KINDS)
def test_outputs_and_gradients_are_those_of_the_authors(name, j, dtype, tolerance):
    file, prefix, kind, options, seed, scale, offset = KINDS[name]
    trace, case, seed = golden(file), recipes.CONV_CASES[j], seed + 100 * j
    x, weight, bias = recipes.conv_inputs(seed, case, scale, offset)
    conv, x = build(kind, case, weight, bias, dtype, **options), tensor(x, dtype).requires_grad_()
    y = conv(x)
    (y * tensor(recipes.rounded(recipes.normals(seed + 3, y.shape)), dtype)).sum().backward()
    results = {"y": y, "gx": x.grad, "gw": conv.weight.grad} | ({} if conv.bias is None else {"gb": conv.bias.grad})
    for key, value in results.items():
        assert relative_error(value, trace[f"{prefix}case{j}_{key}"]) <= tolerance, key


@pytest.mark.parametrize("kind", [CentralizedConv2d, StandardizedConv2d])
def test_effective_weight_has_mean_zero_per_output_filter_of_a_grouped_conv(kind):
    conv = kind(4, 6, 3, groups=2)
    with torch.no_grad():
        conv.weight.add_(1.0)
        weight = conv.effective_weight()
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(6), rtol=0, atol=1e-6)
    if kind is StandardizedConv2d:
        torch.testing.assert_close(weight.var((1, 2, 3)), torch.ones(6), rtol=1e-3, atol=0)


@pytest.mark.parametrize("eps_in", ["var", "std"])
def test_channels_last_weights_are_standardized_the_same_and_stay_channels_last(eps_in):
    conv = StandardizedConv2d(4, 6, 3, groups=2, eps_in=eps_in).double()
    expected = conv.effective_weight()
    weight = conv.to(memory_format=torch.channels_last).effective_weight()
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)


def test_both_places_of_eps_by_hand():
    weight = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1) * 0.01  # unbiased variance 2e-4
    for eps_in, root in (("var", (2e-4 + 1e-5) ** 0.5), ("std", 2e-4**0.5 + 1e-5)):
        conv = StandardizedConv2d(2, 1, 1, eps_in=eps_in)
        conv.weight.data = weight
        torch.testing.assert_close(conv.effective_weight(), weight / root)


@pytest.mark.parametrize("eps_in", ["var", "std"])
def test_constant_filter_gives_zero_and_a_finite_gradient(eps_in):
    conv = StandardizedConv2d(2, 1, 3, eps_in=eps_in)
    conv.weight.data.fill_(0.5)
    conv.effective_weight().sum().backward()
    assert conv.effective_weight().abs().max() < 1e-2 and conv.weight.grad.isfinite().all()


def test_weight_is_reparametrized_in_float32_under_autocast():
    conv, x = StandardizedConv2d(8, 4, 3), torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        weight, _, _ = conv.prepare()
        assert weight.dtype == torch.bfloat16 and conv(x).dtype == torch.bfloat16
    torch.testing.assert_close(weight, conv.effective_weight().bfloat16(), rtol=0, atol=0)


def test_unknown_place_of_eps_is_refused():
    with pytest.raises(UserError, match="'variance'; it must be 'var' or 'std'"):
        StandardizedConv2d(3, 4, 3, eps_in="variance")
