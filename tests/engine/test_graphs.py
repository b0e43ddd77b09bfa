"""The step as a graph: the numbers of the eager step for every norm, on several shapes, and what has no graph."""

import copy
import logging

import pytest
import torch
from step_cases import GN, NORMS, new_batch, new_trainer, state
from tiny_backbone import TinyBackbone

from retinanet.config.load import load_config_text
from retinanet.engine.graphs import GraphedStep, changed_tensors
from retinanet.engine.optim import set_lr
from retinanet.engine.run import build_graphed_step
from retinanet.engine.train import train_step
from retinanet.layers import norm as layers
from retinanet.modeling.backbone import BACKBONES

CPU = torch.device("cpu")


class Repeat:
    """Stands for `CudaCapture` on a CPU: a "graph" runs the step again, on the tensors that it ran on first.

    A capture changes nothing, so what the recorded run changed is taken back.
    """

    def __init__(self, trainer):
        self.trainer, self.captures = trainer, 0

    def warm_up(self, run, times):
        for _ in range(times):
            run()

    def capture(self, run):
        self.captures += 1
        before = [(tensor, tensor.detach().clone()) for tensor in changed_tensors(self.trainer)]
        result = run()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        return lambda: result.copy_(run()), result


def both(norms, most=4):
    eager, graphed = (new_trainer("NORMS", norms) for _ in range(2))
    capture = Repeat(graphed)
    return eager, graphed, GraphedStep(graphed, most, capture), capture


def follow(eager, graphed, step, batches):
    """Train both; every value and at the end every tensor has to agree."""
    for index, batch in enumerate(batches):
        for trainer in (eager, graphed):
            set_lr(trainer.optimizer, 0.01 / (1 + index))
        expected, found = train_step(eager, [batch]), step([batch])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state(graphed), state(eager), rtol=1e-6, atol=1e-6)
    one, other = (trainer.optimizer.state_dict()["state"] for trainer in (eager, graphed))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_graphed_steps_equal_eager_ones_with_a_new_shape_in_between(norms):
    eager, graphed, step, capture = both(norms)
    follow(eager, graphed, step, [new_batch(2), new_batch(2, seed=1), new_batch(3, seed=2), new_batch(2, seed=3)])
    assert capture.captures == 2


@pytest.mark.slow
@pytest.mark.parametrize("norm", layers.NORMS)
def test_a_hundred_graphed_steps_equal_eager_ones(norm, monkeypatch):
    monkeypatch.setitem(BACKBONES, "R18", TinyBackbone)
    eager, graphed, step, capture = both((norm, norm, norm))
    follow(eager, graphed, step, [new_batch(2 + (index == 50), seed=index % 7) for index in range(100)])
    assert capture.captures == 2


def test_shapes_beyond_the_limit_run_eagerly_and_the_log_says_so_once(caplog):
    eager, graphed, step, capture = both(GN[1], most=1)
    with caplog.at_level(logging.INFO, logger="retinanet"):
        follow(eager, graphed, step, [new_batch(2), new_batch(1), new_batch(1, seed=1), new_batch(2, seed=2)])
    assert capture.captures == 1
    assert sum("another shape than the 1" in record.message for record in caplog.records) == 1
    assert any("capturing the step for 2x3x64x64" in record.message for record in caplog.records)


def test_values_of_a_step_outlive_the_next_one():
    _, _, step, _ = both(GN[1])
    first = step([new_batch(2)])
    kept = copy.deepcopy(first)
    step([new_batch(2, seed=1)])
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_a_failed_step_stops_graphed_steps_as_it_stops_eager_ones():
    eager, graphed, step, _ = both(GN[1])
    bad = new_batch(2)
    bad.images = bad.images.float()
    broken = copy.deepcopy(bad)
    broken.images[0, 0, 5, 5] = float("inf")
    for batch in (bad, broken, bad):
        train_step(eager, [batch])
        step([batch])
    assert eager.guard.failed and graphed.guard.failed
    torch.testing.assert_close(state(graphed), state(eager), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(graphed.guard.buffers(), eager.guard.buffers())


def test_a_run_that_cannot_have_graphs_says_why(caplog):
    trainer = new_trainer(*GN)
    with caplog.at_level(logging.WARNING, logger="retinanet"):
        assert build_graphed_step(load_config_text("SOLVER: {CUDA_GRAPHS: 4}", "test"), trainer, CPU) is None
    assert "steps run without, because the run is on a CPU" in caplog.text
