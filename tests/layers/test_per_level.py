"""Norms of the shared head: one per level, with one scale and shift for all."""

import copy

import pytest
import torch
from norm_cases import CHANNELS, new_input

from retinanet.layers.norm import BN, NORMS, PerLevelNorm, make_norm


def test_levels_share_scale_and_shift_and_keep_their_statistics():
    norm = PerLevelNorm(lambda: BN(3), num_levels=2).train()
    assert [name for name, _ in norm.named_parameters()] == ["weight", "bias"]
    x = torch.randn(2, 3, 4, 4) + 5
    norm(x, 1)
    torch.testing.assert_close(norm.levels[0].running_mean, torch.zeros(3), rtol=0, atol=0)
    torch.testing.assert_close(norm.levels[1].running_mean, 0.1 * x.mean((0, 2, 3)))
    with torch.no_grad():
        norm.weight.fill_(2)
    assert all(level.weight is norm.weight for level in norm.levels)


def test_state_of_levels_holds_shared_parameters_once_and_loads():
    one, other = (PerLevelNorm(lambda: BN(3), num_levels=2) for _ in range(2))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert list(one.state_dict()) == ["weight", "bias", *(f"levels.{i}.{name}" for i in range(2) for name in buffers)]
    state = {key: torch.rand(value.shape) for key, value in one.state_dict().items() if "tracked" not in key}
    missing, unexpected = other.load_state_dict({**one.state_dict(), **state})
    assert not missing and not unexpected
    torch.testing.assert_close(other.levels[1].weight, state["weight"], rtol=0, atol=0)
    torch.testing.assert_close(other.levels[1].running_var, state["levels.1.running_var"], rtol=0, atol=0)
    missing, unexpected = other.load_state_dict({"bias": state["bias"], "extra": state["bias"]}, strict=False)
    assert "weight" in missing and "levels.0.weight" not in missing and unexpected == ["extra"]


def test_levels_stay_tied_through_copies_moves_and_assignment():
    norm = PerLevelNorm(lambda: BN(3), num_levels=2)
    moved = copy.deepcopy(norm).double()
    assert moved.levels[1].bias is moved.bias
    with torch.device("meta"):
        assigned = PerLevelNorm(lambda: BN(3), num_levels=2)
    assigned.load_state_dict(norm.state_dict(), assign=True)
    assert assigned.levels[1].weight is assigned.weight and assigned.weight.device.type == "cpu"


@pytest.mark.parametrize("name", [name for name in NORMS if NORMS[name].has_statistics])
def test_every_norm_with_statistics_works_per_level(name):
    norm = PerLevelNorm(lambda: make_norm(name, CHANNELS), num_levels=3).train()
    inputs = [new_input(shape=(2, CHANNELS, size, size), seed=size) for size in (8, 4, 2)]
    sum(norm(x, level).square().sum() for level, x in enumerate(inputs)).backward()
    assert all(parameter.grad is not None for parameter in norm.parameters())
    alone = make_norm(name, CHANNELS).train()
    alone(inputs[1])
    for key, value in alone.named_buffers():
        if not key.endswith("buffer_gz"):  # moves in backward
            torch.testing.assert_close(norm.get_buffer(f"levels.1.{key}"), value)
