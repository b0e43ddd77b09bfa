"""`Conv2d` against torch's own convolution, and what folding its norm costs: counted, not timed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from retinanet.layers.conv import CONVS, CentralizedConv2d, Conv2d, StandardizedConv2d, kept_by_frozen
from retinanet.layers.norm import BN, GN, AffineChannel, FrozenBN, PerLevelNorm

FOLDING = {
    "frozen affine": lambda channels: AffineChannel(channels),
    "learnable affine": lambda channels: AffineChannel(channels, learnable=True),
    "frozen bn": lambda channels: FrozenBN(channels),
}


class Recorder(TorchDispatchMode):
    """Records (name, numbers of elements of the tensor outputs) of every operation."""

    def __init__(self):
        super().__init__()
        self.ops: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [out.numel() for out in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(out)]
        self.ops.append((func.overloadpacket.__name__, max(sizes, default=0)))
        return result

    def at_least(self, elements: int) -> list[str]:
        """Return the operations with an output of at least this size; `detach` makes a view and costs nothing."""
        return [name for name, largest in self.ops if largest >= elements and name != "detach"]


def randomize(norm: nn.Module) -> nn.Module:
    """Give the norm scales, shifts and statistics that no shortcut could get right by chance."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in norm.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                positive = name.endswith(("weight", "running_var"))
                tensor.copy_(noise.abs() + 0.5 if positive else 0.3 * noise)
    return norm


@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"groups": 4}, {"dilation": 2, "padding": 2}])
def test_conv_without_norm_equals_torch(settings):
    conv = Conv2d(8, 12, 3, **settings)
    oracle = nn.Conv2d(8, 12, 3, **settings)
    conv.load_state_dict(oracle.state_dict())  # the same names and shapes, too
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(conv(x), oracle(x), rtol=0, atol=0)


def test_bias_exists_exactly_without_norm_unless_asked_for():
    assert Conv2d(2, 3, 1).bias is not None
    assert Conv2d(2, 3, 1, norm=GN(3, groups=3)).bias is None
    assert Conv2d(2, 3, 1, bias=False).bias is None
    assert Conv2d(2, 3, 1, bias=True, norm=AffineChannel(3)).bias is not None


def test_initial_weight_is_he_normal_over_the_fan_out():
    torch.manual_seed(0)
    weight = Conv2d(64, 128, 3).weight
    expected = (2 / (128 * 9)) ** 0.5
    assert abs(weight.std().item() / expected - 1) < 0.01 and abs(weight.mean().item()) < 0.01 * expected


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FOLDING)
def test_folding_in_training_equals_conv_then_norm(name, bias):
    torch.manual_seed(1)
    norm = randomize(FOLDING[name](6))
    conv = Conv2d(4, 6, 3, stride=2, padding=1, bias=bias, norm=norm).double().train()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    inputs = [x, *conv.parameters()]

    oracle = norm(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1))
    expected = torch.autograd.grad(oracle, inputs, grad)

    torch.testing.assert_close(conv(x), oracle, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(conv(x), inputs, grad), expected, rtol=1e-12, atol=1e-12)
    assert len(inputs) == 2 + bias + 2 * (name == "learnable affine")


@pytest.mark.parametrize("name", FOLDING)
def test_frozen_norm_costs_no_pass_over_activations(name):
    conv = Conv2d(3, 5, 3, padding=1, norm=randomize(FOLDING[name](5))).train()
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    saved: list[int] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with Recorder() as forward, keep:
        y = conv(x)
    grad = torch.ones_like(y)
    with Recorder() as backward:
        y.backward(grad)
    activations = 2 * 3 * 32 * 32  # the smaller of input and output; weights have 135 elements
    assert forward.at_least(activations) == ["convolution"]
    assert backward.at_least(activations) == ["convolution_backward"]
    assert [count for count in saved if count >= activations] == [x.numel()]  # the conv's input, as without a norm


def test_norm_with_statistics_does_cost_a_pass():
    """The counter above sees a pass where there is one."""
    conv = Conv2d(3, 5, 3, padding=1, norm=BN(5)).train()
    with Recorder() as forward:
        conv(torch.randn(2, 3, 32, 32))
    assert len(forward.at_least(2 * 3 * 32 * 32)) > 1


def test_batch_norm_folds_in_evaluation_and_not_in_training():
    norm = randomize(BN(6))
    conv = Conv2d(4, 6, 3, padding=1, norm=norm).double()
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    before = norm.running_mean.clone()
    with Recorder() as evaluation:
        y = conv.eval()(x)
    torch.testing.assert_close(y, norm(F.conv2d(x, conv.weight, padding=1)), rtol=1e-12, atol=1e-12)
    assert evaluation.at_least(x.numel()) == ["convolution"]
    torch.testing.assert_close(norm.running_mean, before, rtol=0, atol=0)

    torch.testing.assert_close(
        conv.train()(x),
        F.batch_norm(F.conv2d(x, conv.weight, padding=1), None, None, norm.weight, norm.bias, training=True),
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    assert not torch.equal(norm.running_mean, before)


def test_scale_times_weight_is_computed_in_float32_and_cast_once():
    norm = randomize(FrozenBN(16))
    conv = Conv2d(8, 16, 3, padding=1, norm=norm)
    levels = [torch.randn(2, 8, size, size) for size in (8, 4, 2)]
    scale, shift, _ = norm.folded()
    with torch.autocast("cpu", torch.bfloat16):
        with Recorder() as recorder:
            prepared = conv.prepare()
            outputs = [conv(x, prepared=prepared) for x in levels]
        weight = (scale.view(-1, 1, 1, 1) * conv.weight).bfloat16()
        expected = [F.conv2d(x, weight, shift, padding=1) for x in levels]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert outputs[0].dtype == torch.bfloat16
    casts = [largest for name, largest in recorder.ops if name == "_to_copy" and largest == conv.weight.numel()]
    assert len(casts) == 1


@pytest.mark.parametrize("name", FOLDING)
def test_autocast_trains_every_parameter_in_float32(name):
    conv = Conv2d(4, 6, 3, padding=1, norm=randomize(FOLDING[name](6)))
    with torch.autocast("cpu", torch.bfloat16):
        conv(torch.randn(2, 4, 5, 5)).float().sum().backward()
    for parameter in conv.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0


def test_centralized_weight_has_filters_of_mean_zero():
    conv = CentralizedConv2d(1, 2, 2)
    conv.weight.data = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]], [[[5.0, 5.0], [5.0, 5.0]]]])
    expected = torch.tensor([[[[-2.0, -1.0], [0.0, 3.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    torch.testing.assert_close(conv.effective_weight(), expected, rtol=0, atol=0)


def test_standardized_weight_has_filters_of_mean_zero_and_variance_one():
    conv = StandardizedConv2d(1, 1, 2)
    conv.weight.data = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]])  # mean 3, unbiased variance 14 / 3
    expected = torch.tensor([[[[-2.0, -1.0], [0.0, 3.0]]]]) / (14 / 3 + 1e-5) ** 0.5
    torch.testing.assert_close(conv.effective_weight(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", CONVS)
def test_every_conv_kind_convolves_with_its_effective_weight(kind):
    conv = CONVS[kind](4, 6, 3, padding=1, groups=2).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    expected = F.conv2d(x, conv.effective_weight(), conv.bias, padding=1, groups=2)
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda weight: _effective(conv, weight), conv.weight)


def _effective(conv: Conv2d, weight: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(_Effective(conv), {"conv.weight": weight}, ())


class _Effective(nn.Module):
    def __init__(self, conv: Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self) -> torch.Tensor:
        return self.conv.effective_weight()


def test_level_reaches_the_norm_of_that_level():
    conv = Conv2d(3, 4, 1, norm=PerLevelNorm(lambda: BN(4), num_levels=3)).train()
    conv(torch.randn(2, 3, 5, 5), level=1)
    moved = [int(norm.num_batches_tracked) for norm in conv.norm.levels]
    assert moved == [0, 1, 0]


@pytest.mark.parametrize("norm", [None, *FOLDING])
def test_channels_last_goes_through(norm):
    conv = Conv2d(8, 16, 3, padding=1, norm=None if norm is None else FOLDING[norm](16))
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = conv(x)
    y.backward(torch.randn(2, 16, 6, 5).contiguous(memory_format=torch.channels_last))
    assert conv.prepare()[0].is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch_and_one_pixel():
    conv = Conv2d(3, 4, 3, stride=2, padding=1, norm=FrozenBN(4))
    assert conv(torch.zeros(0, 3, 8, 6)).shape == (0, 4, 4, 3)
    assert conv(torch.zeros(1, 3, 1, 1)).shape == (1, 4, 1, 1)


def test_meta_tensors_pass_for_counting_flops():
    with torch.device("meta"):
        conv = Conv2d(3, 4, 3, stride=2, padding=1, norm=FrozenBN(4))
        assert conv(torch.empty(2, 3, 8, 6)).shape == (2, 4, 4, 3)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_breaks(autocast):
    conv = Conv2d(3, 4, 3, padding=1, norm=randomize(FrozenBN(4)))
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(compiled(x), conv(x), rtol=1e-6, atol=1e-6)


def test_frozen_conv_folds_once_and_again_when_its_tensors_change():
    conv = Conv2d(4, 8, 3, padding=1, norm=FrozenBN(8)).eval().requires_grad_(False)
    x = torch.randn(1, 4, 6, 6)
    first = conv.prepare()
    assert conv.prepare()[0] is first[0]
    conv.norm.running_var.fill_(4.0)
    expected = conv.norm(F.conv2d(x, conv.weight, padding=1))
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.prepare()[0].plain.dtype == torch.bfloat16
    conv.load_state_dict({name: value + 0.5 for name, value in conv.state_dict().items()})
    torch.testing.assert_close(conv(x), conv.norm(F.conv2d(x, conv.weight, padding=1)), rtol=1e-5, atol=1e-5)
    conv.double()
    assert conv.prepare()[0].plain.dtype == torch.float64


def test_frozen_conv_without_a_norm_is_cast_once_and_again_when_it_changes():
    conv = Conv2d(4, 8, 3).eval().requires_grad_(False)
    assert conv.prepare()[0].plain is conv.weight
    with torch.autocast("cpu", torch.bfloat16):
        first = conv.prepare()[0]
        assert first.plain.dtype == torch.bfloat16 and conv.prepare()[0] is first
        conv.weight.mul_(2)
        assert torch.equal(conv.prepare()[0].plain, 2 * first.plain)
    assert kept_by_frozen(conv)[0][1][0].plain.dtype == torch.bfloat16


def test_conv_that_trains_is_folded_anew_every_time():
    conv = Conv2d(4, 8, 3, padding=1, norm=FrozenBN(8)).eval()
    assert conv.prepare()[0] is not conv.prepare()[0]
