"""Stochastic gradient descent with Detectron's parameter groups, and its learning rate as a function of the iteration.

Detectron (`modeling/optimizer.py`): biases and norm shifts learn `BIAS_LR_FACTOR` times faster and decay by
`WEIGHT_DECAY_BIAS` (0 there), norm scales decay by `WEIGHT_DECAY_NORM`, conv weights by `WEIGHT_DECAY`. Caffe2 folds
the rate into the momentum (V = m V + lr g) and rescales V when the rate changes by more than 10 %; here the rate
multiplies V when it is applied, which is the same for a constant rate and needs no rescaling.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD

from retinanet.config.recipe import batch_recipe
from retinanet.layers.conv import Conv2d

_WEIGHTED = (Conv2d, nn.Conv2d, nn.Linear)  # their `weight` is no scale of a norm


@dataclass(frozen=True)
class Schedule:
    """Learning rate in iterations (optimizer steps): linear warm-up, then multistep or cosine.

    `base_lr` is the rate after the warm-up. `kind` is "multistep" (times `gamma` at each of `steps`) or "cosine"
    (to zero at `max_iter`).
    """

    base_lr: float
    max_iter: int
    kind: str = "multistep"
    steps: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_iters: int = 0
    warmup_factor: float = 1.0 / 3

    def lr(self, iteration: int) -> float:
        """Return the rate of the step that leads from `iteration` to `iteration + 1`.

        Warm-up multiplies the rate by f + (1 - f) * iteration / warmup_iters, f = `warmup_factor` (Detectron
        `utils/lr_policy.py`); a step at `iteration` counts from that iteration on.
        """
        rate = self.base_lr
        if self.kind == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * min(iteration / self.max_iter, 1.0)))
        else:
            rate *= self.gamma ** bisect_right(self.steps, iteration)
        if iteration < self.warmup_iters:
            share = iteration / self.warmup_iters
            rate *= self.warmup_factor * (1 - share) + share
        return rate


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_bias: float,
    bias_lr_factor: float,
) -> list[dict]:
    """Return three groups for an optimizer: conv weights, norm scales, biases and norm shifts.

    Each group says its `name`, `weight_decay` and `lr_factor`. Only parameters that require a gradient are listed,
    each once; empty groups are left out. What decides is the module that owns the parameter, not its name's spelling.
    """
    groups = {
        "weights": {"params": [], "weight_decay": weight_decay, "lr_factor": 1.0},
        "norm_scales": {"params": [], "weight_decay": weight_decay_norm, "lr_factor": 1.0},
        "biases": {"params": [], "weight_decay": weight_decay_bias, "lr_factor": bias_lr_factor},
    }
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = "biases" if name == "bias" else "weights" if isinstance(module, _WEIGHTED) else "norm_scales"
            groups[kind]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def set_lr(optimizer: SGD, lr: float) -> None:
    """Set the rate of every group to `lr` times the group's `lr_factor`."""
    for group in optimizer.param_groups:
        rate = lr * group["lr_factor"]
        if isinstance(group["lr"], Tensor):  # a CUDA graph reads it (`graphs.py`)
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def build_optimizer(cfg, model: nn.Module) -> SGD:
    """Return SGD over the trainable parameters of `model`, at the rate of iteration 0."""
    solver = cfg.SOLVER
    groups = parameter_groups(
        model, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS, solver.BIAS_LR_FACTOR
    )
    optimizer = SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, fused=True)
    if solver.MOMENTUM:
        # PyTorch makes them in the first step, without values, and a first step that is skipped leaves them so
        for group in groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    set_lr(optimizer, build_schedule(cfg).lr(0))
    return optimizer


def build_schedule(cfg) -> Schedule:
    """Return the schedule of `cfg` after the batch recipe (`config/recipe.py`) has rescaled it."""
    recipe = batch_recipe(cfg)
    return Schedule(
        base_lr=recipe.base_lr,
        max_iter=recipe.max_iter,
        kind=cfg.SOLVER.SCHEDULE,
        steps=tuple(recipe.steps),
        gamma=cfg.SOLVER.GAMMA,
        warmup_iters=recipe.warmup_iters,
        warmup_factor=cfg.SOLVER.WARMUP_FACTOR,
    )


def clip_gradients(optimizer: SGD, limit: float) -> Tensor:
    """Scale all gradients so that their total norm is at most `limit`, 0: not at all; return the norm before, 0-d.

    Does not wait for the device. Without a limit the gradients are read, but not written.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(grads, foreach=True)
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm


def settle_loaded(optimizer: SGD) -> None:
    """Lay the momentum of a loaded state out in memory as its parameters are.

    A checkpoint may come from a run in another memory format (`SOLVER.CHANNELS_LAST`), and fused SGD takes equal
    layouts for granted: it would give the momentum of one weight to another.

    Raises `ValueError` when the state has a group without a rate, or the momentum of some parameters alone. PyTorch
    checks neither, nor the shapes. No momentum at all is that of a run without (`SOLVER.MOMENTUM` 0).
    """
    for group in optimizer.param_groups:
        rate = group.get("lr")
        scalar = isinstance(rate, Tensor) and rate.shape == () and rate.is_floating_point()  # of `graphs.py`
        if not scalar and (isinstance(rate, bool) or not isinstance(rate, int | float)):
            raise ValueError("the learning rate of a group of parameters is missing or no number")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = [optimizer.state.get(parameter, {}).get("momentum_buffer") for parameter in parameters]
    if all(one is None for one in found):
        return
    for parameter, one in zip(parameters, found, strict=True):
        if not isinstance(one, Tensor) or one.shape != parameter.shape or one.dtype != parameter.dtype:
            raise ValueError(f"the momentum of a parameter of shape {tuple(parameter.shape)} is missing or another's")
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(one)
