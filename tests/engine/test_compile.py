"""The compiled step: whole graphs without breaks, one for each shape, and the losses of the eager step."""

from functools import partial

import pytest
import torch
from model_cases import small_cfg
from step_cases import GN, new_batch

from retinanet.engine.run import build_trainer
from retinanet.engine.train import train_step

SETTINGS = ("MODEL.PIXEL_STD", [58.0, 58.0, 58.0], "MODEL.NORM_OPTIONS.BCN.GROUPS", 8)


def trainer_of(*opts):
    torch.manual_seed(0)
    cfg = small_cfg(*SETTINGS, "SOLVER.BASE_LR", 0.01, *opts)
    cfg.SOLVER.CHANNELS_LAST = "True"  # as inductor has it in any case
    trainer = build_trainer(cfg, torch.device("cpu"), [])
    trainer.model.train()
    return trainer


def follow(norms, counts):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (trainer_of("NORMS", norms, "SOLVER.COMPILE", compile) for compile in (False, True))
    for index, count in enumerate(counts):
        batch = new_batch(count, seed=index)
        expected, found = train_step(eager, [batch]), train_step(compiled, [batch])
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert not breaks, breaks


@pytest.mark.slow
def test_step_is_traced_without_breaks_for_each_shape(monkeypatch):
    """What inductor would get, run as it is: no code is generated, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    follow(GN[1], (2, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("norms", [GN[1], ("BN", "", ""), ("MABN",) * 3], ids="-".join)
def test_compiled_steps_equal_eager_ones_on_two_shapes(norms):
    follow(norms, (2, 2, 3, 2))
