"""Averaging statistics over processes, and announcing the loss scale, for any norm."""

import copy

import pytest
import torch
from torch import nn

from retinanet.layers.norm import BCN, BN, GN, MABN, FrozenBN, set_loss_scale, sync_statistics

NORMS = {
    "BN": lambda: BN(4, update_rate=1.0),
    "EstBN in BCN": lambda: BCN(4, 2, update_rate=1.0),
    "BN in BCN": lambda: BCN(4, 2, estimate=False),
}


def mean_of(models: list[nn.Module]):
    """Return an all-reduce for models that are synchronized one after the other, from what each would contribute."""
    contributions = []
    for model in models:
        sync_statistics(copy.deepcopy(model), lambda vector: contributions.append(vector) or vector)
    return lambda vector: torch.stack(contributions).mean(0)


@pytest.mark.parametrize("name", NORMS)
def test_statistics_of_two_processes_become_those_of_all_their_data(name):
    a, b = NORMS[name](), NORMS[name]()
    owners = [getattr(norm, "bn", norm) for norm in (a, b)]
    data = [torch.randn(400, generator=torch.Generator().manual_seed(i)) * (i + 1) + 5 * i for i in range(2)]
    for owner, values in zip(owners, data, strict=True):
        owner.running_mean.fill_(values.mean())
        owner.running_var.fill_(values.var(correction=0))
    average = mean_of([a, b])
    for norm in (a, b):
        sync_statistics(norm, average)
    together = torch.cat(data)
    for owner in owners:
        torch.testing.assert_close(owner.running_mean, together.mean().expand(4))
        torch.testing.assert_close(owner.running_var, together.var(correction=0).expand(4), rtol=1e-5, atol=0)


def test_second_moments_are_averaged_plainly_and_windows_stay():
    models = [MABN(2, simulated_batch=4) for _ in range(2)]
    for i, model in enumerate(models):
        model.running_var.fill_(1.0 + 2 * i)
        model.buffer_x2.fill_(float(i))
        model.iters.fill_(7)
    average = mean_of(models)
    for i, model in enumerate(models):
        sync_statistics(model, average)
        assert model.running_var.flatten().tolist() == [2.0, 2.0]
        assert model.buffer_x2.unique().tolist() == [float(i)] and int(model.iters) == 7


def test_statistics_that_agree_keep_every_bit():
    torch.manual_seed(0)
    model = nn.Sequential(BN(64), MABN(64))
    for norm in model:
        norm.running_var.copy_(torch.rand_like(norm.running_var) + 1e-3)
    model[0].running_mean.normal_(0, 10)
    before = copy.deepcopy(model.state_dict())
    sync_statistics(model, lambda vector: torch.stack([vector] * 3).mean(0))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_model_without_running_statistics_asks_nothing_of_other_processes():
    def fail(vector):
        raise AssertionError("no process may wait here")

    sync_statistics(nn.Sequential(nn.Conv2d(3, 4, 1), GN(4, 2), FrozenBN(4)), fail)


def test_loss_scale_reaches_every_layer_that_stores_gradients():
    model, scale = nn.Sequential(MABN(2), nn.Sequential(MABN(2)), GN(2, 1)), torch.tensor(4.0)
    set_loss_scale(model, scale)
    assert model[0].loss_scale is scale and model[1][0].loss_scale is scale and not hasattr(model[2], "loss_scale")
    set_loss_scale(model, None)
    assert model[0].loss_scale is None
