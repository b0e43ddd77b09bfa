"""BCN, EstBN and the channel half: the authors' and labml's traces, plain autograd, the rate schedule."""

import norm_recipes as recipes
import pytest
import torch
from norm_cases import one_step, randn
from norm_recipes import golden, relative_error, tensor
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.layers.norm import BCN, EstBN
from retinanet.layers.norm.bcn import ChannelNorm

LABML = {
    "batch_norm.": "bn.",
    "channel_norm.": "",
    "exp_mean": "running_mean",
    "exp_var": "running_var",
    "scale": "weight",
    "shift": "bias",
}


def channel_half() -> ChannelNorm:
    return ChannelNorm(nn.Parameter(torch.ones(1, 4, 1)), nn.Parameter(torch.zeros(1, 4, 1)))


# trace -> layer, seed of its inputs, rate before each step (None: the layer needs none)
TRACES = {
    "bcnorm_bn": (lambda: BCN(8, 4, estimate=False), 10000000, None),
    "bcnorm_bn_g2_eps": (lambda: BCN(8, 2, eps=1e-2, estimate=False), 10010000, None),
    "bcnorm_est": (lambda: BCN(8, 4, update_rate=None), 10020000, recipes.bcn_speed),
    "estbn": (lambda: EstBN(8, update_rate=None), 10030000, recipes.bcn_speed),
    "labml_est": (lambda: EstBN(8, update_rate=None, variance="batch"), 10030000, lambda step: 0.1),
    "labml_channelnorm": (channel_half, 10050000, None),
    "labml_bcn_bn": (lambda: BCN(8, 4, estimate=False, variance="batch"), 10000000, None),
    "labml_bcn_est": (lambda: BCN(8, 4, update_rate=None, variance="batch"), 10020000, lambda step: 0.1),
}
UNCOUNTED = "num_batches_tracked"  # labml has none, and without a schedule the layer does not count


def slow(layer: nn.Module, x: Tensor, speed: float) -> Tensor:
    """Return what `layer` computes for x, by plain autograd, and move its state. float64."""
    if isinstance(layer, ChannelNorm):
        return slow_channel_half(layer, x)
    bn, by_batch = getattr(layer, "bn", layer), not getattr(layer, "estimate", True)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    with torch.no_grad():
        second = (x - bn.running_mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
        if by_batch:
            rate, second = 0.1, var * (40 / 39) if layer.variance == "official" else var
        else:
            rate, second = speed, second if bn.variance == "official" else var
        bn.running_mean += rate * (mean - bn.running_mean)
        bn.running_var += rate * (second - bn.running_var)
    if not by_batch:
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
    z = (x - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + 1e-5).sqrt()
    u = z * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)
    return u if bn is layer else slow_channel_half(layer, u)


def slow_channel_half(layer: nn.Module, u: Tensor) -> Tensor:
    grouped = u.reshape(len(u), layer.weight.shape[1], -1)
    var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    return ((grouped - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias).view_as(u)


def start(name: str, dtype: torch.dtype) -> nn.Module:
    """Return the layer of a trace with the trace's parameters."""
    layer = TRACES[name][0]()
    seed, names = TRACES[name][1], sorted(name for name, _ in layer.named_parameters())
    for j, parameter in enumerate(names):
        target = layer.get_parameter(parameter)
        v = recipes.normals(seed - 50 - j, target.shape)
        target.data = tensor(recipes.rounded(1 + 0.2 * v if parameter.endswith("weight") else 0.1 * v))
    return layer.to(dtype)


def ours(name: str) -> str:
    for theirs, own in LABML.items():
        name = name.replace(theirs, own)
    return name


def set_speed(layer: nn.Module, speed: float) -> None:
    getattr(layer, "bn", layer).estbn_moving_speed.fill_(speed)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", [name for name in TRACES if name not in ("bcnorm_bn_g2_eps", "labml_bcn_est")])
def test_every_step_of_the_published_traces_is_reproduced(name, dtype, tolerance, memory_format):
    trace, (_, seed, speed) = golden(name), TRACES[name]
    layer, w = start(name, dtype), tensor(recipes.bcn_w(seed), dtype)
    for key in [key for key in trace if key.startswith("param_")]:
        parameter = layer.get_parameter(ours(key.removeprefix("param_")))
        parameter.data.copy_(tensor(trace[key]).view_as(parameter))
    for step in range(1, 21):
        if speed:
            set_speed(layer, speed(step))
        x = tensor(recipes.bcn_x(step, seed), dtype).contiguous(memory_format=memory_format)
        result = one_step(layer, x, w)
        for key, (total, size) in zip(trace["checksum_columns"], trace["checksums"][step - 1], strict=True):
            key = key if key in result else ours(key)
            assert abs(result[key].double().sum().item() - total) <= tolerance * size, (step, key)
        for key in [key for key in trace if key.startswith(f"it{step:02d}_") and UNCOUNTED not in key]:
            assert relative_error(result[ours(key.split("_", 1)[1])], trace[key]) <= tolerance, (step, key)
    x = tensor(recipes.bcn_x(99, seed), dtype).contiguous(memory_format=memory_format)
    result = one_step(layer.eval(), x, w)
    assert relative_error(result["y"], trace["eval_y"]) <= tolerance
    assert relative_error(result["gx"], trace.get("eval_gx", result["gx"])) <= tolerance


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", TRACES)
def test_every_step_equals_the_definition_by_plain_autograd(name, memory_format):
    (_, seed, speed), w = TRACES[name], tensor(recipes.bcn_w(TRACES[name][1]))
    layer, reference = start(name, torch.float64), start(name, torch.float64)
    for step in range(1, 21):
        rate = speed(step) if speed else 0.0
        if speed:
            set_speed(layer, rate)
            set_speed(reference, rate)
        x = tensor(recipes.bcn_x(step, seed))
        result = one_step(layer, x.contiguous(memory_format=memory_format), w)
        reference.zero_grad()
        (slow(reference, x.requires_grad_(), rate) * w).sum().backward()
        assert relative_error(result["gx"], x.grad) <= 1e-9, step
        for key, parameter in reference.named_parameters():
            assert relative_error(result[f"g.{key}"], parameter.grad) <= 1e-9, (step, key)
        for key, buffer in reference.named_buffers():
            if UNCOUNTED not in key:
                assert relative_error(result[f"buf.{key}"], buffer) <= 1e-9, (step, key)


@pytest.mark.parametrize("estimate", [True, False])
def test_gradients_are_those_of_the_function(estimate):
    layer = BCN(4, 2, estimate=estimate, update_rate=None).double()  # a rate of 0: repeated calls agree
    x = randn(2, 4, 3, 2).double().requires_grad_()
    parameters = [parameter for _, parameter in layer.named_parameters()]
    torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


def test_estimates_move_before_they_normalize():
    layer = EstBN(1, update_rate=0.5)
    layer.num_batches_tracked.fill_(10)  # past the average of the first batches
    x = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)  # mean 2; (1 + 9) / 2 = 5 about the old mean 0
    y = layer(x)
    assert layer.running_mean.item() == 1.0 and layer.running_var.item() == 3.0  # half of 0 and 2, of 1 and 5
    torch.testing.assert_close(y, (x - 1.0) / (3.0 + 1e-5) ** 0.5)


def test_default_rate_averages_all_batches_until_it_reaches_the_update_rate():
    layer, means = EstBN(1, update_rate=0.05), []
    for step in range(1, 41):
        x = randn(2, 1, 4, 4, seed=step) + step
        layer(x)
        means.append(x.mean())
        assert layer.estbn_moving_speed.item() == pytest.approx(max(1 / step, 0.05))
        if step <= 20:
            torch.testing.assert_close(layer.running_mean[0], torch.stack(means).mean())
    assert int(layer.num_batches_tracked) == 40


def test_rate_decays_in_proportion_to_the_steps_when_asked():
    layer = EstBN(1, update_rate=0.1, decay_iters=50)
    rates = [layer._rate(torch.tensor([step])).item() for step in (5, 10, 50, 100, 500)]
    assert rates == pytest.approx([0.2, 0.1, 0.1, 0.05, 0.01])


def test_estimates_without_a_step_count_are_not_averaged_away():
    authors = EstBN(2, update_rate=None).state_dict() | {"running_mean": torch.tensor([3.0, -1.0])}
    layer = EstBN(2, update_rate=0.01)
    layer.load_state_dict(authors)
    layer(torch.zeros(1, 2, 4, 4))
    torch.testing.assert_close(layer.running_mean, torch.tensor([3.0, -1.0]) * 0.99)


@pytest.mark.parametrize(
    "options", [{"update_rate": 0.0}, {"update_rate": 2.0}, {"decay_iters": -1}, {"variance": "x"}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError):
        BCN(32, **options)


def test_groups_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(UserError, match="BCN: 48 channels do not divide into 32 groups.*16, 24, 48"):
        BCN(48)


def test_state_has_the_names_and_shapes_of_the_authors_layer():
    shapes = {name: tuple(value.shape) for name, value in BCN(8, 4).state_dict().items()}
    assert shapes == {
        "weight": (1, 4, 1),
        "bias": (1, 4, 1),
        "bn.weight": (8,),
        "bn.bias": (8,),
        "bn.running_mean": (8,),
        "bn.running_var": (8,),
        "bn.num_batches_tracked": (),
        "bn.estbn_moving_speed": (1,),
    }
    without = {name for name in shapes if "estbn" not in name}
    assert set(BCN(8, 4, estimate=False).state_dict()) == without


def test_folded_halves_together_equal_the_layer():
    layer = start("bcnorm_est", torch.float64).eval()
    layer.bn.running_mean.copy_(randn(8))
    x = randn(2, 8, 5, 4).double()
    scale, shift, rest = layer.folded()
    folded = rest(x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
    torch.testing.assert_close(folded, layer(x), rtol=1e-12, atol=1e-12)
    assert layer.train().folded() == (None, None, layer)
