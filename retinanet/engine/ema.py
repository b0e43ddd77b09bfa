"""The exponential moving average of a model's state, which is evaluated and saved instead of the raw weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def model_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of `model` whose `update_parameters(model)` moves it: ema <- decay * ema + (1 - decay) * model.

    Floating-point parameters and buffers (running statistics) are averaged; integer buffers (step counters) are
    copied. The first update copies everything.
    """

    @torch.no_grad()
    def move(averages: list, values: list, _count) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    return AveragedModel(model, multi_avg_fn=move, use_buffers=True)
