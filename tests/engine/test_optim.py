"""Parameter groups and learning rate against Detectron's rules and torch's own schedulers."""

import pytest
import torch
from torch import nn

from retinanet.engine.optim import Schedule, parameter_groups, set_lr
from retinanet.layers.conv import Conv2d


def small_net() -> nn.Module:
    net = nn.Sequential(Conv2d(3, 4, 1, bias=True), nn.GroupNorm(2, 4), Conv2d(4, 4, 1, bias=False))
    net[2].weight.requires_grad_(False)
    return net


def test_groups_are_weights_norm_scales_and_biases():
    net = small_net()
    groups = {group["name"]: group for group in parameter_groups(net, 1e-4, 0.5, 0.25, 2.0)}
    assert [id(p) for p in groups["weights"]["params"]] == [id(net[0].weight)]
    assert [id(p) for p in groups["norm_scales"]["params"]] == [id(net[1].weight)]
    assert [id(p) for p in groups["biases"]["params"]] == [id(net[0].bias), id(net[1].bias)]
    assert (groups["weights"]["weight_decay"], groups["norm_scales"]["weight_decay"]) == (1e-4, 0.5)
    assert (groups["biases"]["weight_decay"], groups["biases"]["lr_factor"]) == (0.25, 2.0)


def test_weights_of_plain_convolutions_and_linear_layers_are_no_norm_scales():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.BatchNorm2d(4))
    groups = {group["name"]: group["params"] for group in parameter_groups(net, 1e-4, 0.5, 0.25, 2.0)}
    assert [id(p) for p in groups["weights"]] == [id(net[0].weight), id(net[1].weight)]
    assert [id(p) for p in groups["norm_scales"]] == [id(net[2].weight)]


def test_shared_parameters_are_listed_once():
    net = small_net()
    net[1].bias = net[0].bias
    (biases,) = [g for g in parameter_groups(net, 0, 0, 0, 1.0) if g["name"] == "biases"]
    assert len(biases["params"]) == 1


def test_biases_learn_at_their_own_rate():
    optimizer = torch.optim.SGD(parameter_groups(small_net(), 0, 0, 0, 2.0), lr=1.0)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 0.5]


def test_warmup_is_linear_from_a_third_and_steps_count_from_their_iteration():
    schedule = Schedule(0.9, 100, "multistep", (60, 80), 0.1, warmup_iters=10, warmup_factor=1 / 3)
    assert schedule.lr(0) == pytest.approx(0.3)
    assert schedule.lr(5) == pytest.approx(0.6)
    assert schedule.lr(10) == schedule.lr(59) == 0.9
    assert schedule.lr(60) == pytest.approx(0.09)
    assert schedule.lr(80) == schedule.lr(99) == pytest.approx(0.009)


@pytest.mark.parametrize("kind", ["multistep", "cosine"])
def test_schedule_equals_torch(kind):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.2)
    if kind == "multistep":
        oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 8], 0.1)
    else:
        oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    schedule = Schedule(0.2, 10, kind, (6, 8), 0.1)
    for iteration in range(10):
        assert schedule.lr(iteration) == pytest.approx(oracle.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        oracle.step()
