"""GN against Caffe2 and torch in float64, in every memory format and precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from norm_cases import CHANNELS, LAYOUTS, new_input, new_norm, output_gradient, run
from torch import nn

from retinanet.errors import UserError
from retinanet.layers.norm import GN, make_norm
from retinanet.layers.norm import group_norm as group_norm_file


class Oracle(nn.Module):
    """torch's own group norm with the parameters of `norm` in float64."""

    def __init__(self, norm: GN):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(value.double()) for value in (norm.weight, norm.bias))
        self.groups = norm.groups

    def forward(self, x):
        return F.group_norm(x, self.groups, self.weight, self.bias, 1e-5)


@pytest.mark.parametrize("prefix, channels", [("gn", 64), ("gn256", 256)])
def test_gn_equals_caffe2(shared, prefix, channels):
    ops = {key: torch.from_numpy(value) for key, value in np.load(shared("goldens/caffe2") / "ops.npz").items()}
    norm = GN(channels)
    norm.load_state_dict({"weight": ops[f"{prefix}_s"], "bias": ops[f"{prefix}_b"]})
    x = ops[f"{prefix}_x"].clone().requires_grad_()
    y = norm(x)
    torch.testing.assert_close(y, ops[f"{prefix}_y"], rtol=1e-5, atol=1e-5)
    y.backward(ops[f"{prefix}_dy"])
    torch.testing.assert_close(x.grad, ops[f"{prefix}_dx"], rtol=1e-5, atol=1e-3 if prefix == "gn256" else 1e-5)
    torch.testing.assert_close(norm.weight.grad, ops[f"{prefix}_ds"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.bias.grad, ops[f"{prefix}_db"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 8, 32, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("counts_as_large", [False, True])
def test_gn_equals_float64_group_norm_even_far_from_zero(monkeypatch, groups, layout, offset, counts_as_large):
    """E[x^2] - mean^2 alone would be 1 % off at 100 deviations, which torch's channels_last kernel is."""
    if counts_as_large:
        monkeypatch.setattr(group_norm_file, "_LARGE_IMAGE", 1)
    norm = make_norm("GN", CHANNELS, groups=groups)
    norm.load_state_dict(new_norm("GN").state_dict())
    x = new_input(layout, (2, CHANNELS, 33, 21)) + offset
    results = run(norm, x)
    expected = run(Oracle(norm), x.double())
    for result, exact in zip(results, expected, strict=True):
        assert (result.double() - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.002)])
def test_gn_math_for_cuda_equals_float64_group_norm(layout, dtype, tolerance):
    """The tensor math that CUDA devices run, here on the CPU, which runs it only for some channels_last inputs."""
    norm = new_norm("GN")
    x = (new_input(layout, (2, CHANNELS, 9, 8)) + 10).to(dtype)
    expected = run(Oracle(norm), x.double())
    centred = x - group_norm_file._estimated_mean(x, 32)
    mean, rstd = group_norm_file._group_statistics(centred, 32, 1e-5)
    y = group_norm_file._apply(centred, norm.weight.detach(), norm.bias.detach(), mean, rstd)
    grad = output_gradient(y.shape, dtype)
    results = [y, *group_norm_file._backward(grad, centred, norm.weight.detach(), mean, rstd)]
    assert mean.dtype == torch.float32 and y.dtype == dtype and y.stride() == torch.empty_like(x).stride()
    for result, exact in zip(results, expected, strict=True):
        assert (result.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("counts_as_large", [False, True])
def test_gn_gradient_is_that_of_the_formula(monkeypatch, counts_as_large):
    if counts_as_large:
        monkeypatch.setattr(group_norm_file, "_LARGE_IMAGE", 1)
    x = new_input("channels_last", (2, 8, 3, 2), torch.float64).requires_grad_()
    weight, bias = (torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *args: group_norm_file.group_norm(*args, 4, 1e-5), (x, weight, bias))


def test_gn_needs_channels_that_divide_into_groups():
    with pytest.raises(
        UserError, match=r"GN: 48 channels .* 32 groups; set .*GN.GROUPS to one of 1, 2, 3, 4, 6, 8, 12"
    ):
        GN(48)
