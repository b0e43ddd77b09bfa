"""Each process keeps its own statistics: averages are lent to evaluation and to the checkpoint, and given back."""

import copy
import logging

import pytest
import torch
from torch import nn

from retinanet.engine import process_state
from retinanet.engine.process_state import averaged_statistics, of_this_process, own_buffers, without_repeats
from retinanet.layers.norm import BN, MABN


@pytest.fixture
def beside(monkeypatch):
    """`beside(world_size, rank)`: this process belongs to a job whose other processes saw only zeros."""

    def pretend(world_size: int, rank: int = 0) -> None:
        monkeypatch.setattr(process_state.distributed, "world_size", lambda: world_size)
        monkeypatch.setattr(process_state.distributed, "rank", lambda: rank)
        monkeypatch.setattr(process_state.distributed, "all_reduce_mean", lambda moments: moments / world_size)

    return pretend


def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(BN(3), MABN(3, simulated_batch=4))
    model(torch.randn(2, 3, 5, 5) + 4).sum().backward()
    return model


def test_averages_are_lent_and_given_back_to_the_bit(beside):
    beside(2)
    models = [trained(), trained()]  # a model and its moving average
    before = copy.deepcopy([model.state_dict() for model in models])
    with averaged_statistics(models):
        for model, state in zip(models, before, strict=True):
            torch.testing.assert_close(model[0].running_mean, state["0.running_mean"] / 2)
            torch.testing.assert_close(model[1].running_var, state["1.running_var"] / 2)
    assert torch.equal(models[0][0].running_mean, before[0]["0.running_mean"])
    torch.testing.assert_close([model.state_dict() for model in models], before, rtol=0, atol=0)


def test_they_are_given_back_after_an_error_too(beside):
    beside(2)
    model = trained()
    before = model[0].running_var.clone()
    with pytest.raises(OSError), averaged_statistics([model]):
        raise OSError
    assert torch.equal(model[0].running_var, before)


def test_alone_nothing_is_averaged(beside):
    beside(1)
    model = trained()
    before = model[0].running_mean.clone()
    with averaged_statistics([model]):
        assert torch.equal(model[0].running_mean, before)


def test_only_buffers_that_differ_are_stored_and_each_process_gets_its_own(beside):
    first, second = trained(), trained()
    second(torch.randn(2, 3, 5, 5)).sum().backward()
    parts = [{"model": own_buffers(m), "ema": {}, "random": {"torch": torch.tensor([i])}} for i, m in
             enumerate((first, second))]  # fmt: skip
    assert "0.weight" not in parts[0]["model"]
    frozen = {f"2.{name}": torch.ones(2) for name in ("running_mean",)}
    for part in parts:
        part["model"].update(copy.deepcopy(frozen))
    state = {"model": {**first.state_dict(), **frozen}, "ema": {}, "random": parts[0]["random"]}
    state["processes"] = without_repeats(parts, state)
    assert all("2.running_mean" not in part["model"] for part in state["processes"])
    beside(2, rank=1)
    own = of_this_process(state)
    torch.testing.assert_close(own["model"], {**second.state_dict(), **frozen, **_parameters(first)}, rtol=0, atol=0)
    assert own["random"]["torch"] == 1


def _parameters(model: nn.Module) -> dict:
    return dict(model.named_parameters())


@pytest.mark.parametrize(("saved", "now"), [(2, 1), (2, 3), (0, 2)])
def test_another_number_of_processes_starts_from_the_averages_and_says_so(beside, caplog, monkeypatch, saved, now):
    beside(now)
    monkeypatch.setattr(logging.getLogger("retinanet"), "propagate", True)
    state = {"model": {}, "ema": {}, "processes": [{"model": {"a": 1}}] * saved}
    with caplog.at_level(logging.INFO):
        assert of_this_process(state) is state
    assert f"saved by {max(saved, 1)} process" in caplog.text and f"resumed by {now}" in caplog.text
