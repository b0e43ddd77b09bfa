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
