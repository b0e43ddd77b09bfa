"""What training does to a BCN layer: large means, precisions, bad batches, resume, levels, compilation."""

import copy

import pytest
import torch
from norm_cases import one_step, randn
from torch import nn

from retinanet.layers.conv import StandardizedConv2d
from retinanet.layers.norm import BCN, PerLevelNorm


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [100.0, 1000.0])
def test_variance_survives_a_large_mean_in_float32(mean, memory_format):
    x = (0.1 * randn(2, 32, 16, 16) + mean).contiguous(memory_format=memory_format)
    single, double = BCN(32, 4), BCN(32, 4).double()
    for _ in range(3):
        y, expected = single(x), double(x.double())
    torch.testing.assert_close(single.bn.running_var.double(), double.bn.running_var, rtol=1e-3, atol=0)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-2)


def test_only_the_input_in_its_own_dtype_and_small_vectors_are_saved():
    saved = []
    layer, x = BCN(32, 4), randn(2, 32, 32, 32).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in saved if t.numel() >= x.numel()] == [x.data_ptr()]
    assert sum(t.numel() for t in saved) < 1.01 * x.numel()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("estimate", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_float32_statistics(dtype, estimate, training):
    x = (300 * randn(2, 8, 8, 8)).to(dtype)
    half, full = BCN(8, 4, estimate=estimate).train(training), BCN(8, 4, estimate=estimate).train(training)
    y = half(x)
    assert y.dtype == dtype and half.bn.running_var.dtype == torch.float32
    torch.testing.assert_close(y.float(), full(x.float()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half.bn.running_var, full.bn.running_var)


@pytest.mark.parametrize("estimate", [True, False])
def test_memory_format_and_strides_do_not_change_the_result(estimate):
    x, w = randn(3, 4, 6, 5), randn(3, 4, 6, 5, seed=1)
    expected = one_step(BCN(4, 2, estimate=estimate), x.clone(), w)
    for view in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        result = one_step(BCN(4, 2, estimate=estimate), view.detach(), w)
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-4, atol=1e-5)
    y = BCN(4, 2, estimate=estimate)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("estimate", [True, False])
def test_empty_and_non_finite_batches_move_nothing(estimate):
    layer = BCN(4, 2, estimate=estimate)
    one_step(layer, randn(2, 4, 4, 4), randn(2, 4, 4, 4))
    before = copy.deepcopy(layer.state_dict())
    broken = randn(2, 4, 4, 4)
    broken[1, 2, 0, 0] = float("inf")
    for x in (torch.zeros(0, 4, 4, 4), broken):
        result = one_step(layer, x, torch.ones_like(x))
        assert all(parameter.grad is not None for parameter in layer.parameters()) and result["y"].shape == x.shape
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("estimate", [True, False])
def test_resume_equals_no_interruption_bit_for_bit(estimate):
    straight = BCN(4, 2, estimate=estimate, update_rate=0.2)
    resumed = copy.deepcopy(straight)
    for step in range(10):
        x, w = randn(2, 4, 4, 4, seed=step), randn(2, 4, 4, 4, seed=50 + step)
        expected = one_step(straight, x.clone(), w)
        if step == 4:
            state, resumed = resumed.state_dict(), BCN(4, 2, estimate=estimate, update_rate=0.2)
            resumed.load_state_dict(state)
        result = one_step(resumed, x.clone(), w)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_may_be_overwritten_in_place(memory_format):
    x = randn(2, 4, 5, 5).contiguous(memory_format=memory_format)
    result, inputs = [], [x.clone().requires_grad_() for _ in range(2)]
    for relu, x in zip((torch.relu, torch.relu_), inputs, strict=True):
        relu(BCN(4, 2)(x)).square().sum().backward()
        result.append(x.grad)
    torch.testing.assert_close(result[0], result[1], rtol=0, atol=0)


def test_layer_used_twice_before_backward_keeps_what_each_use_saw():
    twice, once = BCN(4, 2), BCN(4, 2)
    first, second = randn(2, 4, 4, 4).requires_grad_(), randn(2, 4, 4, 4, seed=1)
    y = twice(first)
    twice(second)
    y.square().sum().backward()
    x = first.detach().clone()
    result = one_step(once, x, 2 * y.detach())
    torch.testing.assert_close(first.grad, result["gx"])


def test_levels_share_both_affines_and_keep_their_estimates_apart():
    norm = PerLevelNorm(lambda: BCN(4, 2), num_levels=5)
    sum(norm(randn(2, 4, 4, 4) + level, level).square().sum() for level in range(5)).backward()
    assert sorted(name for name, _ in norm.named_parameters()) == ["bias", "bn_bias", "bn_weight", "weight"]
    assert all(parameter.grad.isfinite().all() for parameter in norm.parameters())
    means = torch.stack([level.bn.running_mean for level in norm.levels])
    torch.testing.assert_close(means[1:] - means[:-1], torch.ones(4, 4))
    other = PerLevelNorm(lambda: BCN(4, 2), num_levels=5)
    other.load_state_dict(norm.state_dict())
    torch.testing.assert_close(other.state_dict(), norm.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("estimate", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_layer_is_one_graph_and_equals_eager(estimate, training):
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        norms = [BCN(4, 2, estimate=estimate, update_rate=0.3) for _ in range(2)]
        convs = [StandardizedConv2d(3, 4, 3, norm=norms[0]), StandardizedConv2d(4, 4, 3, norm=norms[1])]
        return nn.Sequential(convs[0], nn.ReLU(), convs[1]).train(training)

    eager, model = build(), build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(6):
        x = (1 + step % 3) * randn(2, 3, 8, 8, seed=step)
        for net in (eager, compiled):
            net.zero_grad()
            net(x).pow(3).sum().backward()
        torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)
        for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
