"""The compiled step: whole graphs without breaks, one for each shape, and the losses of the eager step."""

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


@pytest.mark.slow
@pytest.mark.parametrize("norms", [GN[1], ("BN", "", ""), ("MABN",) * 3], ids="-".join)
def test_compiled_steps_equal_eager_ones_on_two_shapes(norms):
    eager, compiled = (trainer_of("NORMS", norms, "SOLVER.COMPILE", compile) for compile in (False, True))
    for index, count in enumerate((2, 2, 3, 2)):
        batch = new_batch(count, seed=index)
        expected, found = train_step(eager, [batch]), train_step(compiled, [batch])
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
