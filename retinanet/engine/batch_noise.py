"""How noisy the statistics of a batch norm are: the same network and weights, batches of several sizes.

Batch normalization computes four means over a batch: mean and variance of its input forward, and backward those of the
gradient of its normalized output, g = mean(dL/dy), and of that times the output, Psi = mean(y dL/dy) (MABN, arXiv
2001.06838, section 3 and figure 2). The fewer images, the farther each is from what the whole data set would give; MABN
replaces the small batch's statistics by moving averages, the backward ones included.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from retinanet.engine.train import Trainer
from retinanet.structures import Batch

STATISTICS = ("mean", "variance", "g", "Psi")


def batch_statistics(trainer: Trainer, norm: nn.Module, batches: Iterator[Batch], count: int) -> dict[str, Tensor]:
    """Return each of `STATISTICS` of `norm` as (count, C) float64 on the CPU, a row for each of `count` batches.

    norm: a batch norm of `trainer.model` with `weight`, `bias` and `eps`, that sees one map a forward. Nothing learns:
    weights and running statistics are as before afterwards, gradients are gone. The loss is a mean over the batch, so
    its gradients shrink with the batch; g and Psi are given as sums over batch and map, which compare over sizes.
    """
    model = trainer.model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    rows: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept["x"] = inputs[0].detach().clone()
        output.register_hook(lambda gradient: kept.__setitem__("gradient", gradient.detach().clone()))

    handle = norm.register_forward_hook(keep)
    try:
        for _ in range(count):
            batch = next(batches).to(next(model.parameters()).device)
            losses = _losses(trainer, batch)
            sum(losses.values()).backward()
            for name, value in zip(STATISTICS, _statistics(norm, len(batch), **kept), strict=True):
                rows[name].append(value.double().cpu())
            model.zero_grad(set_to_none=True)
    finally:
        handle.remove()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in before:
                    buffer.copy_(before[name])
    return {name: torch.stack(values) for name, values in rows.items()}


def _losses(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    model, loss = trainer.model, trainer.loss
    anchors = model.anchors(tuple(batch.images.shape[-2:]), batch.images.device)
    assigned = loss.assign(anchors, batch.gt_boxes, batch.gt_labels)
    divisor = loss.divisor(loss.count(assigned.num_fg))
    outputs = model(model.normalize(batch.images, batch.image_sizes))
    return loss(outputs, batch.gt_boxes, batch.gt_labels, assigned, divisor)


def _statistics(norm: nn.Module, images: int, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four statistics (C,) of one batch from the input and the gradient of the output, each (N, C, H, W)."""
    x, gradient = x.double(), gradient.double() * norm.weight.detach().double().view(-1, 1, 1)
    mean = x.mean(dim=(0, 2, 3))
    variance = x.var(dim=(0, 2, 3), unbiased=False)
    y = (x - mean.view(-1, 1, 1)) / torch.sqrt(variance + norm.eps).view(-1, 1, 1)
    scale = float(images * x.shape[2] * x.shape[3])  # gradients of a mean shrink with what the mean is over
    return mean, variance, gradient.mean(dim=(0, 2, 3)) * scale, (gradient * y).mean(dim=(0, 2, 3)) * scale


def noise(values: Tensor, of_all_sizes: Tensor) -> float:
    """Return how far a statistic of one batch is from its mean, relative to its size: the median over channels.

    values: (batches, C) of one batch size; their standard deviation over the batches is divided by the root mean square
    of `of_all_sizes` (all batches, C), which batch sizes that are compared share: backward statistics are near zero on
    average, so their own mean would say nothing. 0 is no noise, 1 as large as the statistic itself.
    """
    deviation, size = values.std(dim=0), of_all_sizes.square().mean(dim=0).sqrt()
    alive = size > 0
    return float((deviation[alive] / size[alive]).median()) if alive.any() else 0.0
