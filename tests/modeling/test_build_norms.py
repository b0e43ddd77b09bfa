"""What the configuration's batch and norm keys make of the norms of a model."""

import pytest
import torch

from retinanet.config.defaults import get_cfg
from retinanet.layers.norm import BCN, MABN, PerLevelNorm
from retinanet.modeling.build import build_model
from retinanet.utils import distributed


def small_cfg(norm: str):
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = 3, "R18", 1
    cfg.MODEL.FPN.CHANNELS, cfg.MODEL.HEAD.NUM_CONVS = 32, 1
    for part in ("BACKBONE", "FPN", "HEAD"):
        cfg.MODEL[part].NORM = norm
    return cfg


@pytest.mark.parametrize("processes, window", [(1, 2), (8, 16)])
def test_window_counts_the_images_of_one_process(processes, window, monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: processes)
    cfg = small_cfg("MABN")
    cfg.SOLVER.IMS_PER_BATCH = 16
    norms = [module for module in build_model(cfg).modules() if isinstance(module, MABN)]
    assert {norm.window for norm in norms} == {window}


@pytest.mark.parametrize("norm, kind", [("MABN", MABN), ("BCN", BCN)])
def test_one_step_moves_every_norm_but_the_frozen_and_trains_every_parameter(norm, kind):
    torch.manual_seed(0)
    model = build_model(small_cfg(norm))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = model(torch.randn(2, 3, 64, 96))
    sum(x.square().mean() for x in outputs["logits"] + outputs["deltas"]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            assert torch.equal(value, before[name]) == name.startswith("backbone.conv1."), name
    per_level = [module for module in model.head.modules() if isinstance(module, PerLevelNorm)]
    assert len(per_level) == 2 and all(isinstance(level, kind) for norms in per_level for level in norms.levels)
