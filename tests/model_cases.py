"""Small parts of models that the tests of `modeling` share."""

from collections.abc import Callable

import torch
from torch import nn

from retinanet.config.defaults import get_cfg
from retinanet.modeling.build import build_conv


def conv_with(norm: str = "", part: str = "BACKBONE") -> Callable[..., nn.Module]:
    """Return the conv factory that the configuration gives to a part with this norm and its default conv kind."""
    cfg = get_cfg()
    cfg.MODEL[part].NORM = norm
    return build_conv(cfg, part)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm scales, shifts and statistics of its own, so that none is the identity by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.dim() == 1 and tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(0.5 + 0.1 * noise.abs() if name.endswith(("weight", "running_var")) else 0.1 * noise)
    return model


def small_cfg(*opts):
    """Return the configuration of a model that runs in milliseconds: R18, 32 channels, one conv per tower, 3 classes.

    "NORMS" among the options, with three names, stands for `MODEL.{BACKBONE,FPN,HEAD}.NORM`.
    """
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "R18", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.NUM_CLASSES", 3])
    cfg.merge_from_list(["MODEL.FPN.CHANNELS", 32, "MODEL.HEAD.NUM_CONVS", 1, "SOLVER.IMS_PER_BATCH", 2])
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        parts = zip(("BACKBONE", "FPN", "HEAD"), value, strict=True) if key == "NORMS" else ()
        cfg.merge_from_list([item for part, norm in parts for item in (f"MODEL.{part}.NORM", norm)] or [key, value])
    return cfg
