"""What training does to a MABN layer: precisions, loss scales, bad batches, resume, levels, compilation."""

import copy
import logging

import pytest
import torch
from norm_cases import one_step, randn
from torch import nn

from retinanet.errors import UserError
from retinanet.layers.norm import MABN, PerLevelNorm, set_loss_scale


def test_only_the_input_in_its_own_dtype_and_small_vectors_are_saved():
    saved = []
    layer, x = MABN(4), randn(2, 4, 32, 32).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    assert sum(t.numel() for t in saved) == x.numel() + 5 * 4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_float32_statistics(dtype, training):
    x = (300 * randn(2, 3, 8, 8)).to(dtype)  # squares above 65504, the end of float16
    half, full = MABN(3).train(training), MABN(3).train(training)
    y = half(x)
    assert y.dtype == dtype and half.running_var.dtype == torch.float32
    torch.testing.assert_close(y.float(), full(x.float()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half.running_var, full.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_memory_format_and_strides_do_not_change_the_result(training):
    x, w = randn(3, 4, 6, 5), randn(3, 4, 6, 5, seed=1)
    expected = one_step(MABN(4).train(training), x.clone(), w)
    for view in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        result = one_step(MABN(4).train(training), view.detach(), w)
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, rtol=1e-5, atol=1e-6)
    channels_last = MABN(4).train(training)(x.contiguous(memory_format=torch.channels_last))
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradient_of_a_sum_is_accepted():
    layer, x = MABN(2), randn(1, 2, 1, 1).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.ones(2))


def test_empty_batch_moves_nothing_and_gives_zero_gradients():
    layer, x = MABN(3), torch.zeros(0, 3, 4, 4, requires_grad=True)
    before = copy.deepcopy(layer.state_dict())
    layer(x).sum().backward()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(layer.weight.grad, torch.zeros(3))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_input_moves_nothing(bad):
    layer, x = MABN(3, simulated_batch=4, warmup_iters=1), randn(2, 3, 4, 4)
    for step in range(5):  # the window is in use
        one_step(layer, x * (step + 1), x)
    before = copy.deepcopy(layer.state_dict())
    x[0, 0, 0, 0] = bad
    one_step(layer, x, torch.ones_like(x))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def scaled_run(layer: MABN, scales: list[float]) -> torch.Tensor:
    """Train with a loss scale that changes, and return the last input gradient without its scale."""
    scale = torch.ones(())
    set_loss_scale(layer, scale)
    for step, factor in enumerate(scales):
        scale.fill_(factor)  # in place, as a gradient scaler does it
        result = one_step(layer, randn(2, 3, 4, 4, seed=step), factor * randn(2, 3, 4, 4, seed=100 + step))
    return result["gx"] / scales[-1]


def test_windows_do_not_depend_on_the_loss_scale():
    plain, scaled = MABN(3, simulated_batch=8, warmup_iters=2), MABN(3, simulated_batch=8, warmup_iters=2)
    expected, result = scaled_run(plain, [1.0] * 12), scaled_run(scaled, [1024.0] * 6 + [512.0] * 4 + [65536.0] * 2)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled.buffer_gz, plain.buffer_gz, rtol=1e-5, atol=1e-7)


def test_gradients_that_overflow_leave_the_window_as_it_was():
    layer = MABN(3, simulated_batch=8, warmup_iters=2)
    scaled_run(layer, [1.0] * 6)
    before = layer.buffer_gz.clone()
    w = torch.ones(2, 3, 4, 4)
    w[:, 1] = float("inf")
    one_step(layer, randn(2, 3, 4, 4), w)
    assert layer.buffer_gz.isfinite().all()
    torch.testing.assert_close(layer.buffer_gz[:, 1], before[:, 1], rtol=0, atol=0)
    assert one_step(layer, randn(2, 3, 4, 4), torch.ones(2, 3, 4, 4))["gx"].isfinite().all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_may_be_overwritten_in_place(memory_format):
    x = randn(2, 4, 5, 5).contiguous(memory_format=memory_format)
    result, inputs = [], [x.clone().requires_grad_() for _ in range(2)]
    for relu, x in zip((torch.relu, torch.relu_), inputs, strict=True):
        relu(MABN(4)(x)).square().sum().backward()
        result.append(x.grad)
    torch.testing.assert_close(result[0], result[1], rtol=0, atol=0)


def test_layer_used_twice_before_backward_fills_two_rows():
    inputs, weights = [randn(2, 3, 4, 4, seed=i) for i in range(4)], [randn(2, 3, 4, 4, seed=9 + i) for i in range(4)]
    separate, together = (MABN(3, simulated_batch=8, warmup_iters=10**9) for _ in range(2))
    for x, w in zip(inputs, weights, strict=True):
        one_step(separate, x.clone(), w)
    sum((together(x) * w).sum() for x, w in zip(inputs, weights, strict=True)).backward()
    torch.testing.assert_close(together.buffer_gz, separate.buffer_gz)
    assert int(together.iters) == 4


def test_resume_equals_no_interruption_bit_for_bit():
    straight, steps = MABN(3, simulated_batch=8, warmup_iters=2), 14
    straight.iters.fill_(992)  # so that r becomes free on the way
    resumed = copy.deepcopy(straight)
    for step in range(steps):
        x, w = randn(2, 3, 4, 4, seed=step), randn(2, 3, 4, 4, seed=50 + step)
        expected = one_step(straight, x.clone(), w)
        if step == steps // 2:
            state, resumed = resumed.state_dict(), MABN(3, simulated_batch=8, warmup_iters=2)
            resumed.load_state_dict(state)
        result = one_step(resumed, x.clone(), w)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_other_window_length_is_refilled_with_the_mean_row(caplog):
    old, new = MABN(2, simulated_batch=8, images_per_batch=2), MABN(2, simulated_batch=46, images_per_batch=2)
    for step in range(3):  # one of four rows stays unused
        one_step(old, randn(2, 2, 4, 4, seed=step), randn(2, 2, 4, 4, seed=50 + step))
    with caplog.at_level(logging.INFO):
        new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new.buffer_gz, (old.buffer_gz.sum(0) / 3).expand(23, 2))
    torch.testing.assert_close(new.running_var, old.running_var)
    assert int(new.iters) == 3 and caplog.text.count("windows of 4 rows, the model of 23") == 1


def test_running_var_is_accepted_as_a_vector():
    layer = MABN(3)
    layer.load_state_dict(layer.state_dict() | {"running_var": torch.tensor([1.0, 2.0, 3.0])})
    assert layer.running_var.flatten().tolist() == [1.0, 2.0, 3.0] and layer.running_var.shape == (1, 3, 1, 1)


def test_batch_norm_statistics_are_refused_with_the_reason():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), MABN(3))
    state = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).state_dict()
    with pytest.raises(UserError, match="1.running_mean: these are batch norm statistics.*second moment"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("options", [{"simulated_batch": 0}, {"images_per_batch": 0}, {"keep_rate": 1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError):
        MABN(3, **options)


def test_window_is_the_simulated_batch_in_micro_batches():
    assert MABN(3, simulated_batch=32, images_per_batch=2).buffer_x2.shape == (16, 3)
    assert MABN(3, simulated_batch=2, images_per_batch=4).buffer_x2.shape == (1, 3)


def test_levels_share_the_affine_and_keep_their_windows_apart():
    norm = PerLevelNorm(lambda: MABN(3, simulated_batch=4, warmup_iters=1), num_levels=5)
    for step in range(4):
        norm.zero_grad()
        sum((norm(10.0**level * randn(2, 3, 4, 4, seed=step), level)).square().sum() for level in range(5)).backward()
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]
    assert all(int(level.iters) == 4 for level in norm.levels)
    ratio = norm.levels[3].buffer_x2 / norm.levels[2].buffer_x2
    torch.testing.assert_close(ratio, torch.full_like(ratio, 100.0))
    assert all((level.buffer_gz != 0).all() for level in norm.levels) and norm.weight.grad.isfinite().all()


def test_compiled_training_is_one_graph_and_equals_eager():
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        norms = [MABN(4, simulated_batch=4, warmup_iters=2) for _ in range(2)]
        for norm in norms:
            norm.iters.fill_(998)  # window in use, and r free from the third step
        return nn.Sequential(nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 3), norms[1])

    eager, model = build(), build()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(7):
        x = (1 + step % 3) * randn(2, 3, 8, 8, seed=step)
        for net in (eager, compiled):
            net.zero_grad()
            net(x).square().sum().backward()
        torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-6)
        for (name, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_gradient_scaler_that_overflows_leaves_no_trace_in_later_steps():
    """fp16 with a scale that is far too large: the first steps are infinite, the scaler halves, training goes on."""
    torch.manual_seed(0)
    half = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), MABN(4, simulated_batch=8, warmup_iters=2))
    full = copy.deepcopy(half)
    scaler, infinite = torch.amp.GradScaler("cpu", init_scale=2.0**17), 0
    optimizer = torch.optim.SGD(half.parameters(), lr=0.0)
    for step in range(16):
        x, w = randn(2, 3, 8, 8, seed=step), randn(2, 4, 6, 6, seed=50 + step)
        set_loss_scale(half, scaler.scale(torch.ones(())))
        with torch.autocast("cpu", torch.float16):
            y = half(x)
        scaler.scale((y * w).sum()).backward()
        infinite += not half[0].weight.grad.isfinite().all()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        (full(x) * w).sum().backward()
        result, expected = half[0].weight.grad.clone(), full[0].weight.grad.clone()
        half.zero_grad()
        full.zero_grad()
    assert 4 <= infinite <= 11  # then at least one whole window of finite steps followed
    torch.testing.assert_close(half[1].buffer_gz, full[1].buffer_gz, rtol=0.02, atol=1e-3)
    torch.testing.assert_close(result, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
