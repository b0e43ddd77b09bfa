"""Weights that are kept packed for oneDNN: the same numbers at every size, and when each form is taken."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from retinanet.ops import conv as conv_module
from retinanet.ops.conv import conv2d
from retinanet.ops.packed import ConstantWeight

NHWC = torch.channels_last
SIZES = [(40, 40), (10, 10), (5, 7), (3, 3), (2, 2), (1, 4), (1, 2), (1, 1), (10, 10)]
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


def image(size, channels=32, dtype=torch.float32):
    return torch.randn(2, channels, *size).to(dtype, memory_format=NHWC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (1, 2, 1), (3, 1, 1), (3, 2, 1), (3, 1, 4)])
def test_packed_weights_give_the_same_bits_at_every_size(kernel, stride, groups, dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 32 // groups, kernel, kernel).to(dtype)
    bias, constant = torch.randn(64).to(dtype), ConstantWeight(weight)
    for size in SIZES:
        x = image(size, dtype=dtype)
        geometry = (stride, kernel // 2, 1, groups)
        y = F.conv2d(x, weight, bias, *geometry)
        found = conv2d(x, constant, bias, *geometry)
        if size == (1, 1):  # its layout is open, and PyTorch may take the other one
            torch.testing.assert_close(found, y, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(found, y)
        for relu, residual in ((True, None), (True, "some"), (False, "some")):
            residual = residual and torch.randn_like(y)
            found, expected = (conv2d(x, one, bias, *geometry, residual, relu) for one in (constant, weight))
            assert torch.equal(found, expected)


def test_only_calls_of_onednn_get_packed_weights(monkeypatch):
    seen, onednn = [], conv_module._onednn
    monkeypatch.setattr(conv_module, "_onednn", lambda x, w, *rest: seen.append(w.is_mkldnn) or onednn(x, w, *rest))
    weight = torch.randn(64, 32, 3, 3)
    constant, x = ConstantWeight(weight), image((8, 8))
    conv2d(x, constant, None)
    conv2d(x, constant, None, relu=True)
    assert seen == [True, True]
    inputs = x.clone().requires_grad_()
    grad = torch.autograd.grad(conv2d(inputs, constant, None, relu=True).sum(), inputs)[0]
    assert torch.equal(conv2d(x.contiguous(), constant, None), F.conv2d(x.contiguous(), weight))
    assert seen == [True, True] and grad.abs().sum() > 0


def test_what_suits_a_size_is_found_out_once(monkeypatch):
    """Sizes of 8 want the same blocks, that of 9 others, which would cost more than none."""
    asked = []

    class Ops:
        @staticmethod
        def _reorder_convolution_weight(weight, padding, stride, dilation, groups, size):
            asked.append(size)
            return torch.tensor(size)

    monkeypatch.setattr("retinanet.ops.packed._bytes", lambda packed: bytes([packed[2]]))
    monkeypatch.setattr(torch.ops, "mkldnn", Ops)
    plain, geometry = torch.randn(4, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1)
    constant = ConstantWeight(plain)
    first = constant.packed_for((1, 4, 8, 8), *geometry)
    assert first is not plain
    for _ in range(2):
        assert constant.packed_for((1, 4, 8, 8), *geometry) is first
        assert constant.packed_for((1, 4, 9, 9), *geometry) is plain
        assert constant.packed_for((2, 4, 8, 9), *geometry) is first
    assert asked == [[1, 4, 8, 8], [1, 4, 9, 9], [2, 4, 8, 9]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_packs_for_itself(copied):
    constant, x = ConstantWeight(torch.randn(64, 32, 3, 3)), image((8, 8))
    y = conv2d(x, constant, None)
    other = copied(constant)
    constant.plain.zero_()
    assert torch.equal(conv2d(x, other, None), y)
