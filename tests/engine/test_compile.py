"""The compiled step: whole graphs without breaks, one for each shape, and the losses of the eager step."""

from functools import partial

import pytest
import torch
from model_cases import small_cfg
from step_cases import GN, new_batch
from tiny_backbone import TinyBackbone

from retinanet.engine.run import build_trainer
from retinanet.engine.train import train_step
from retinanet.layers import norm as layers
from retinanet.modeling.backbone import BACKBONES

SETTINGS = ("MODEL.PIXEL_STD", [58.0, 58.0, 58.0], "MODEL.NORM_OPTIONS.BCN.GROUPS", 8)


def trainer_of(*opts):
    torch.manual_seed(0)
    cfg = small_cfg(*SETTINGS, "SOLVER.BASE_LR", 0.01, *opts)
    cfg.SOLVER.CHANNELS_LAST = "True"  # as inductor has it in any case
    trainer = build_trainer(cfg, torch.device("cpu"), [])
    trainer.model.train()
    return trainer


def follow(norms, batches, rtol=2e-4):
    """Train eagerly and compiled; every value of every step has to agree, and no trace may break."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (trainer_of("NORMS", norms, "SOLVER.COMPILE", compile) for compile in (False, True))
    for batch in batches:
        expected, found = train_step(eager, [batch]), train_step(compiled, [batch])
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-5)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert not breaks, breaks
    torch.testing.assert_close(compiled.model.state_dict(), eager.model.state_dict(), rtol=rtol, atol=1e-5)


@pytest.fixture
def traced_only(monkeypatch):
    """What inductor would get, run as it is: no code is generated, which takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.slow
def test_step_is_traced_without_breaks_for_each_shape(traced_only):
    follow(GN[1], [new_batch(count, seed=seed) for seed, count in enumerate((2, 2, 3))])


@pytest.mark.slow
@pytest.mark.parametrize("norm", layers.NORMS)
def test_a_hundred_traced_steps_equal_eager_ones(norm, traced_only, monkeypatch):
    monkeypatch.setitem(BACKBONES, "R18", TinyBackbone)
    follow((norm, norm, norm), [new_batch(2 + (index == 50), seed=index % 7) for index in range(100)], rtol=1e-3)


@pytest.mark.slow
def test_steps_compiled_by_inductor_equal_eager_ones(monkeypatch):
    """On a busy machine inductor finds no vector instructions: it asks processes that may take 60 s, and then goes on
    without. So they are taken for granted here."""
    inductor = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(inductor.cpp, "vec_isa_ok", True)
    monkeypatch.setitem(BACKBONES, "R18", TinyBackbone)
    follow(GN[1], [new_batch(2, seed=seed) for seed in range(3)])
