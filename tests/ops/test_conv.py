"""One call for convolution, bias, addition and ReLU: the numbers of the parts, and what each device is asked for."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from retinanet.ops import conv as conv_module
from retinanet.ops.conv import ConvReLU, conv2d

NHWC = torch.channels_last
SHAPES = [(64, 32, 1, 1, 1), (16, 32, 3, 2, 1), (32, 32, 3, 1, 4)]  # in, out, kernel, stride, groups


def inputs(channels, out, kernel, groups, dtype=torch.float32, grad=False):
    torch.manual_seed(0)
    x = torch.randn(2, channels, 13, 10, dtype=dtype).to(memory_format=NHWC)
    weight = torch.randn(out, channels // groups, kernel, kernel, dtype=dtype) * 0.1
    return [x.requires_grad_(grad), weight.requires_grad_(grad), torch.randn(out, dtype=dtype).requires_grad_(grad)]


def by_parts(x, weight, bias, stride, groups, residual, relu):
    y = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, 1, groups)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("with_residual", "relu", "with_bias"), list(itertools.product([True, False], repeat=3)))
def test_one_call_equals_its_parts(shape, with_residual, relu, with_bias):
    channels, out, kernel, stride, groups = shape
    x, weight, bias = inputs(channels, out, kernel, groups)
    bias = bias if with_bias else None
    plain = by_parts(x, weight, bias, stride, groups, None, False)
    residual = torch.randn_like(plain) if with_residual else None
    kept = None if residual is None else residual.clone()
    y = conv2d(x, weight, bias, stride, kernel // 2, 1, groups, residual, relu)
    torch.testing.assert_close(y, by_parts(x, weight, bias, stride, groups, residual, relu), rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=NHWC)
    assert kept is None or residual.equal(kept)  # it may be needed elsewhere


def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(conv_module, "_onednn", lambda *args: seen.append("onednn"))
    monkeypatch.setattr(ConvReLU, "apply", lambda *args: seen.append("cudnn"))
    return seen


def test_onednn_takes_what_needs_no_gradient_in_channels_last(monkeypatch):
    seen, (x, weight, bias) = calls(monkeypatch), inputs(16, 16, 1, 1)
    conv2d(x, weight, bias, relu=True)
    assert seen == ["onednn"]
    conv2d(x, weight, bias)  # nothing to add
    conv2d(x.contiguous(), weight, bias, relu=True)
    conv2d(x, weight.clone().requires_grad_(), bias, relu=True)
    conv2d(x.bfloat16(), weight.bfloat16().requires_grad_(), bias.bfloat16(), relu=True)
    assert seen == ["onednn"]
    with torch.no_grad():
        conv2d(x, weight.clone().requires_grad_(), bias, relu=True)
    assert seen == ["onednn"] * 2


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (1, 2, 0), (1, 1, 0), (3, 1, 0)])
def test_a_large_weight_on_a_small_map_multiplies_matrices(monkeypatch, kernel, stride, padding, with_bias):
    torch.manual_seed(0)
    seen, product = [], conv_module._product
    monkeypatch.setattr(conv_module, "_product", lambda *args: seen.append(0) or product(*args))
    x = torch.randn(2, 512, 4, 5, dtype=torch.float64).to(memory_format=NHWC).requires_grad_()
    weight = torch.randn(512, 512, kernel, kernel, dtype=torch.float64).requires_grad_()
    bias = torch.randn(512, dtype=torch.float64).requires_grad_() if with_bias else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    y, exact = conv2d(x, weight, bias, stride, padding), F.conv2d(x, weight, bias, stride, padding)
    assert len(seen) == 1 and y.is_contiguous(memory_format=NHWC)
    grad = torch.randn_like(exact)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    found, expected = (torch.autograd.grad(result, leaves, grad) for result in (y, exact))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    conv2d(x.contiguous(), weight, bias, stride, padding)
    conv2d(x[:, :256], weight[:, :256], bias, stride, padding)  # channels of more than it has: not in one piece
    conv2d(x.repeat(30, 1, 1, 1), weight, bias, stride, padding)
    assert len(seen) == 1


def test_bfloat16_weights_take_a_float32_bias():
    """Autocast gives these."""
    x, weight, bias = inputs(32, 16, 3, 1)
    x, weight = x.bfloat16(), weight.bfloat16()
    y = conv2d(x, weight, bias, padding=1, relu=True)
    assert y.dtype == torch.bfloat16
    exact = F.conv2d(x.float(), weight.float(), bias, 1, 1).relu()
    torch.testing.assert_close(y.float(), exact, rtol=0.02, atol=0.02)


def test_compilers_get_the_parts():
    x, weight, bias = inputs(8, 8, 3, 1)
    names = []

    def backend(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(lambda x: conv2d(x, weight, bias, padding=1, relu=True), backend=backend, fullgraph=True)(x)
    assert any("conv2d" in name for name in names) and not any("mkldnn" in name for name in names)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_fused_call(shape, with_residual):
    channels, out, kernel, stride, groups = shape
    x, weight, bias = inputs(channels, out, kernel, groups, torch.float64, grad=True)
    y = by_parts(x, weight, bias, stride, groups, None, False)
    residual = torch.randn_like(y).requires_grad_() if with_residual else None
    leaves = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    grad, geometry = torch.randn_like(y), ([stride] * 2, [kernel // 2] * 2, [1, 1], groups)
    expected = torch.autograd.grad(by_parts(x, weight, bias, stride, groups, residual, True), leaves, grad)
    found = torch.autograd.grad(ConvReLU.apply(x, weight, bias, residual, *geometry), leaves, grad)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("with_residual", [True, False])
def test_cudnn_call_equals_its_parts(with_residual):
    conv = nn.Conv2d(64, 64, 3, padding=1).cuda().bfloat16().to(memory_format=NHWC)
    x = torch.randn(2, 64, 40, 56, device="cuda", dtype=torch.bfloat16).to(memory_format=NHWC).requires_grad_()
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    leaves = [tensor for tensor in (x, conv.weight, conv.bias, residual) if tensor is not None]
    y = conv2d(x, conv.weight, conv.bias, padding=1, residual=residual, relu=True, fused=True)
    z = by_parts(x, conv.weight, conv.bias, 1, 1, residual, True)
    torch.testing.assert_close(y, z, rtol=0.02, atol=0.02)
    for one, other in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(z.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.1)
