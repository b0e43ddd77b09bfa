"""What a training loop does to the norms of a model, whichever they are: average over processes, announce the scale.

Both functions go by the buffers and attributes that norms have, not by their names, and do nothing to a model without.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def sync_statistics(model: nn.Module, all_reduce_mean: Callable[[Tensor], Tensor]) -> None:
    """Replace the running statistics of `model` by their average over processes, for evaluation and saving.

    Every process sees other images and keeps its own statistics (run DDP with `broadcast_buffers=False`). Averaged are
    the moments E[x] and E[x^2] = running_var + running_mean^2, since the mean of variances would leave out how far the
    means lie apart; MABN's running_var is a second moment already. Windows and counters stay as they are.

    all_reduce_mean: maps a (B,) float64 vector to its mean over the processes; called once, on all of them alike. In
    float64 the way there and back leaves statistics that agree on all processes (frozen stages) as they were.
    """
    norms = [module for module in model.modules() if _has_running_statistics(module)]
    if not norms:
        return
    moments = [moment for norm in norms for moment in _moments(norm)]
    averages = iter(all_reduce_mean(torch.cat(moments)).split([len(moment) for moment in moments]))
    for norm in norms:
        if _mean_of(norm) is not None:
            mean = next(averages)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_((next(averages) - mean.square()).clamp(min=0))
        else:
            norm.running_var.copy_(next(averages).view_as(norm.running_var))


def set_loss_scale(model: nn.Module, scale: Tensor | None) -> None:
    """Tell the norms that store gradients by which factor the loss is multiplied before backward; None: by none.

    scale: () float32 on the device of the model, for example the tensor that `torch.amp.GradScaler` updates in place;
    it is referred to and not copied, so one call holds for a whole run. Without it a window of MABN would mix gradients
    of different scales whenever the scale changes.
    """
    for module in model.modules():
        if hasattr(module, "loss_scale"):
            module.loss_scale = scale


def _has_running_statistics(module: nn.Module) -> bool:
    return module._buffers.get("running_var") is not None and getattr(module, "has_statistics", True)


def _mean_of(norm: nn.Module) -> Tensor | None:
    return norm._buffers.get("running_mean")


def _moments(norm: nn.Module) -> list[Tensor]:
    second, mean = norm.running_var.double().flatten(), _mean_of(norm)
    return [second] if mean is None else [mean.double(), second + mean.double().square()]
