"""MABN's numbers: the authors' traces, the definition written as a slow loop, and values to check by hand."""

import copy

import norm_recipes as recipes
import numpy as np
import pytest
import torch
from norm_cases import one_step, randn
from norm_recipes import golden, relative_error, tensor
from torch import nn

from retinanet.layers.conv import CentralizedConv2d
from retinanet.layers.norm import MABN

TRACES = ["m1_short_warmup", "m2_buffer_rules", "m4_eps_momentum", "m7_buffer_one"]


class SlowMABN:
    """The layer in NumPy, one line per line of the definition, with its own backward."""

    def __init__(self, c: dict):
        self.c, rows = c, c["real_B"] // c["B"]
        self.weight, self.bias = (np.float64(vector) for vector in recipes.mabn_affine(c))
        self.running_var, self.iters = np.ones(c["C"]), 0
        self.buffer_x2, self.buffer_gz = np.zeros((rows, c["C"])), np.zeros((rows, c["C"]))
        if c["start"]:
            start = recipes.mabn_start(c)
            self.running_var, self.iters = np.float64(start["running_var"]).ravel(), c["start"]
            self.buffer_x2, self.buffer_gz = np.float64(start["buffer_x2"]), np.float64(start["buffer_gz"])

    def step(self, x: np.ndarray, grad_y: np.ndarray) -> dict[str, np.ndarray]:
        eps, rows, axes, count = self.c["eps"], len(self.buffer_x2), (0, 2, 3), x[:, 0].size
        self.iters += 1
        x2 = (x**2).sum(axes) / count
        self.buffer_x2[self.iters % rows] = x2
        window = self.iters > rows and self.iters >= self.c["warmup"]
        var = self.buffer_x2.mean(0) if window else x2
        r = np.ones_like(var)
        if self.iters > max(1000, self.c["warmup"]):
            r = np.clip(np.sqrt(var + eps) / np.sqrt(self.running_var + eps), 0.2, 5)
        deviation = np.sqrt(var + eps)[:, None, None]
        z, gain = x / deviation, (self.weight * r)[:, None, None]
        self.running_var = self.c["momentum"] * self.running_var + (1 - self.c["momentum"]) * var
        gz = (grad_y * gain * z).sum(axes) / count
        self.buffer_gz[self.iters % rows] = gz
        mean_gz = (self.buffer_gz.mean(0) if window else gz)[:, None, None]
        return {
            "y": gain * z + self.bias[:, None, None],
            "gx": (grad_y * gain - z * mean_gz) / deviation,
            "gw": (grad_y * r[:, None, None] * z).sum(axes),
            "gb": grad_y.sum(axes),
            "running_var": self.running_var,
            "buffer_x2": self.buffer_x2,
            "buffer_gz": self.buffer_gz,
        }


def layer_of(c: dict, dtype: torch.dtype) -> MABN:
    layer = MABN(c["C"], c["real_B"], c["momentum"], c["warmup"], c["eps"], images_per_batch=c["B"])
    state = dict(zip(("weight", "bias"), map(tensor, recipes.mabn_affine(c)), strict=True))
    if c["start"]:
        state |= {name: torch.as_tensor(value) for name, value in recipes.mabn_start(c).items()}
    layer.load_state_dict(layer.state_dict() | state)
    return layer.to(dtype)


def run(layer: nn.Module, x: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the results of `one_step` under the names of the traces."""
    short = {"g.weight": "gw", "g.bias": "gb"}
    return {short.get(name, name.removeprefix("buf.")): value for name, value in one_step(layer, x, w).items()}


@pytest.mark.parametrize("name, dtype, tolerance", [
    *((name, torch.float64, 1e-9) for name in TRACES), ("m1_short_warmup", torch.float32, 1e-5),
])  # fmt: skip
def test_every_step_of_the_authors_traces_is_reproduced(name, dtype, tolerance):
    c, trace = recipes.MABN[name], golden(f"mabn_{name}" + ("_f32" if dtype == torch.float32 else ""))
    layer, compared = layer_of(c, dtype), 0
    for row in range(c["T"]):
        step = c["start"] + row + 1
        result = run(layer, tensor(recipes.mabn_x(step, c), dtype), tensor(recipes.mabn_w(step, c), dtype))
        for column, key in enumerate(("y", "gx", "gw", "gb")):
            total, size = trace["checksums"][row, column]
            assert abs(float(result[key].double().sum()) - total) <= tolerance * size, (step, key)
        for key in [key for key in result if f"it{step:04d}_{key}" in trace]:
            assert relative_error(result[key], trace[f"it{step:04d}_{key}"]) <= tolerance, (step, key)
            compared += 1
    assert compared >= 7 * 4  # the four results and three buffers, at several steps
    assert int(layer.iters) == trace["final_iters"].item()
    layer.eval()
    plain = c | {"shock": (0, 0)}
    result = run(layer, tensor(recipes.mabn_x(900001, plain), dtype), tensor(recipes.mabn_w(900001, plain), dtype))
    for key in ("y", "gx", "gw", "gb"):
        assert relative_error(result[key], trace[f"eval_{key}"]) <= tolerance, key


@pytest.mark.parametrize(
    "name, memory_format",
    [(name, torch.contiguous_format) for name in recipes.MABN]
    + [(name, torch.channels_last) for name in ("m2_buffer_rules", "m5_varying_shapes", "m6_resume")],
)
def test_every_step_equals_the_definition_written_as_a_slow_loop(name, memory_format):
    c = recipes.MABN[name]
    layer, slow = layer_of(c, torch.float64), SlowMABN(c)
    for step in range(c["start"] + 1, c["start"] + c["T"] + 1):
        x, w = recipes.mabn_x(step, c), recipes.mabn_w(step, c)
        expected = slow.step(np.float64(x), np.float64(w))
        result = run(layer, tensor(x).contiguous(memory_format=memory_format), tensor(w))
        for key, value in expected.items():
            assert relative_error(result[key], value) <= 1e-9, (step, key)


def test_first_step_divides_by_the_root_mean_square_and_leaves_the_mean_alone():
    layer = MABN(1, eps=0.0)
    x = torch.tensor([1.0, 7.0, 1.0, 7.0]).view(1, 1, 2, 2)  # mean square 25
    torch.testing.assert_close(layer(x), x / 5)
    torch.testing.assert_close(layer.running_var, torch.full((1, 1, 1, 1), 0.98 * 1 + 0.02 * 25))


def test_gradient_is_the_true_one_while_batch_statistics_are_used():
    layer = MABN(3, warmup_iters=10**9).double()
    x = randn(2, 3, 3, 2).double().requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


def test_training_and_evaluation_agree_while_r_is_free():
    layer = MABN(4, simulated_batch=4).double()
    layer.iters.fill_(2000)
    layer.running_var.fill_(1.1)
    x = randn(2, 4, 5, 5).double()
    evaluated = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), evaluated, rtol=1e-14, atol=1e-14)


def test_sixty_steps_of_the_authors_network_are_reproduced():
    trace, seed = golden("net_mabn"), 12000000

    def conv(i, o, k, s, p):
        return CentralizedConv2d(i, o, k, s, p, bias=False)

    def norm():
        return MABN(8, simulated_batch=8, warmup_iters=10)

    net = nn.Sequential(conv(3, 8, 3, 2, 1), norm(), nn.ReLU(), conv(8, 8, 3, 1, 1), norm(), nn.ReLU(),
                        conv(8, 8, 1, 1, 0)).double()  # fmt: skip
    for j, (name, parameter) in enumerate(sorted(net.named_parameters())):
        v = recipes.normals(seed - 100 - j, parameter.shape)
        value = 0.2 * v if v.ndim == 4 else 1 + 0.1 * v if name.endswith("weight") else 0.1 * v
        parameter.data.copy_(tensor(recipes.rounded(value)))
    target = tensor(recipes.rounded(recipes.normals(seed - 1, (2, 8, 6, 6))))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(1, 61):
        x = tensor(recipes.rounded(recipes.normals(seed + step, (2, 3, 12, 12))))
        loss = (net(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradients = sum(float(p.grad.abs().sum()) for p in net.parameters())
        assert abs(loss.item() / trace["loss"][step - 1] - 1) <= 1e-7, step
        assert abs(gradients / trace["grad_abs_sum"][step - 1] - 1) <= 1e-7, step
    for name, value in net.state_dict().items():
        assert relative_error(value, trace[f"final_{name}"]) <= 1e-7, name
    x = tensor(recipes.rounded(recipes.normals(seed + 5000, (2, 3, 12, 12))))
    assert relative_error(net.eval()(x), trace["eval_y"]) <= 1e-7
