"""MABN, moving average batch normalization (arXiv 2001.06838), after the authors' detection layer.

Source: megvii-model/MABN, `MABN.py`, which its detection tree repeats. Only the second moment of a channel is
normalized; means are handled by the centralized convolution before the layer. Statistics of a batch of one or two
images are too noisy, in the backward pass above all, so both passes average theirs over the last batches.

Training step t = 1, 2, ... over M = N*H*W elements of a channel, with a window of n rows:

    x2     = sum(x^2) / M                        into row t % n of buffer_x2
    var    = mean of buffer_x2 if t > n and t >= warmup_iters, else x2
    r      = sqrt(var + eps) / sqrt(running_var + eps) clipped to [1/5, 5]; 1 while t <= max(1000, warmup_iters)
    y      = weight * r * x / sqrt(var + eps) + bias
    running_var <- keep_rate * running_var + (1 - keep_rate) * var         after r has used the old value

Backward, z = x / sqrt(var + eps), with no gradient through var, r and running_var:

    gz     = mean(grad_y * weight * r * z) = weight * grad_weight / M      into row t % n of buffer_gz
    grad_x = (grad_y * weight * r - z * (mean of buffer_gz, or gz as above)) / sqrt(var + eps)

Evaluation: y = weight * x / sqrt(running_var + eps) + bias. While r is not clipped, training computes the same.

Differences from the authors' layer, none of which moves a number where theirs is defined: forward reduces once and
backward twice, and only x is saved, in its own dtype; one instance may run several times before backward; an empty or
non-finite batch leaves no trace in the state; gradients are stored without the loss scale (`set_loss_scale`).
"""

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.layers.norm.reduce import channel_affine, channel_squares, channel_sums, laid_out_as, narrow, wide

_log = logging.getLogger(__name__)
FIXED_ITERS = 1000  # iterations with r = 1, while the running average settles (authors' code)
MAX_R = 5.0  # r is clipped to [1 / this, this] (authors' code)


class MABN(nn.Module):
    """y = weight * r * x / sqrt(var + eps) + bias, as the module docstring defines it, and its state.

    weight, bias: (C,) parameters. Buffers, with the names and shapes of the authors' checkpoints: running_var
    (1, C, 1, 1), a second moment; iters (1,) int64; buffer_x2, buffer_gz (window, C).
    simulated_batch: images that the window stands for. images_per_batch: images of one micro-batch of one process;
    only their ratio matters, which is the length of the window, at least 1. Batches may differ in size.
    keep_rate: weight of the OLD running_var, so 0.98 is 0.02 in torch's `momentum`. eps: inside the roots.

    Training moves all buffers, in forward but for buffer_gz, which moves in backward. Each micro-batch is a row of the
    window, also when gradients are accumulated. Do not put the layer into activation checkpointing, which runs forward
    twice and would count every batch twice.
    """

    has_statistics = True
    folds_in_training = False
    conv_kind = "centralized"
    takes_images_per_batch = True

    def __init__(
        self,
        channels: int,
        simulated_batch: int = 32,
        keep_rate: float = 0.98,
        warmup_iters: int = 100,
        eps: float = 1e-5,
        images_per_batch: int = 2,
    ):
        super().__init__()
        _check_options(simulated_batch, keep_rate, images_per_batch)
        self.keep_rate, self.warmup_iters, self.eps = keep_rate, warmup_iters, eps
        self.window = max(1, simulated_batch // images_per_batch)
        self.loss_scale: Tensor | None = None  # see `set_loss_scale`; not state, it belongs to the gradient scaler
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(1, channels, 1, 1))
        self.register_buffer("iters", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("buffer_x2", torch.zeros(self.window, channels))
        self.register_buffer("buffer_gz", torch.zeros(self.window, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x (N, C, H, W) in its dtype and memory format; in training mode it moves the state."""
        if self.training and x.numel() > 0:
            step = self._step(channel_squares(x.detach()) / (x.numel() // x.shape[1]))
            return _Normalize.apply(x, self.weight, self.bias, step, self.buffer_gz, self.loss_scale)
        mean = torch.zeros_like(self.weight)
        return F.batch_norm(x, mean, self.running_var.flatten(), self.weight, self.bias, training=False, eps=self.eps)

    def folded(self) -> tuple[Tensor | None, Tensor | None, nn.Module | None]:
        if self.training:
            return None, None, self
        return self.weight * torch.rsqrt(self.running_var.flatten() + self.eps), self.bias, None

    @torch.no_grad()
    def _step(self, x2: Tensor) -> Tensor:
        """Move the forward state by the second moments x2 (C,); return the step's constants, as `_Normalize` says."""
        running = self.running_var.flatten()
        finite = x2.amax() < torch.inf  # False for NaN too
        x2 = torch.where(finite, x2, running)
        self.iters.add_(finite)
        here = torch.where(finite, self.iters % self.window, -1)  # the row of this step, -1: none
        self.buffer_x2.copy_(_with_row(self.buffer_x2, here, x2))
        active = (self.iters > self.window) & (self.iters >= self.warmup_iters)
        var = torch.where(active, self.buffer_x2.mean(0), x2)
        r = torch.sqrt((var + self.eps) / (running + self.eps)).clamp(1 / MAX_R, MAX_R)
        r = torch.where(self.iters <= max(FIXED_ITERS, self.warmup_iters), 1.0, r)
        # Stacked, which torch.compile does not recompute: in backward it would read the buffers as they are by then.
        step = torch.stack([torch.rsqrt(var + self.eps), r, *(flag.to(r).expand_as(r) for flag in (active, here))])
        moved = self.keep_rate * running + (1 - self.keep_rate) * var
        self.running_var.copy_(torch.where(finite, moved, running).view_as(self.running_var))
        return step

    def _load_from_state_dict(self, state, prefix, *args) -> None:
        _refuse_batch_norm(state, prefix)
        running = state.get(prefix + "running_var")
        if running is not None and running.numel() == self.running_var.numel():
            state[prefix + "running_var"] = running.reshape(self.running_var.shape)
        for name in ("buffer_x2", "buffer_gz"):
            saved = state.get(prefix + name)
            if saved is not None and len(saved) != self.window:
                state[prefix + name] = self._refilled(saved, state.get(prefix + "iters"))
        super()._load_from_state_dict(state, prefix, *args)

    def _refilled(self, saved: Tensor, iters: Tensor | None) -> Tensor:
        """Return a window of this layer's length whose rows are the mean of the rows in use of `saved`."""
        in_use = len(saved) if iters is None else min(len(saved), int(iters))
        _log_refill(len(saved), self.window)
        return (saved.sum(0) / max(1, in_use)).expand(self.window, -1).clone()

    def extra_repr(self) -> str:
        return (
            f"{len(self.weight)}, window={self.window}, keep_rate={self.keep_rate}, warmup_iters={self.warmup_iters}, "
            f"eps={self.eps}"
        )


class _Normalize(torch.autograd.Function):
    """The training pass over the activations. Saves x, weight (C,) and the constants of the step.

    step: (4, C): 1 / sqrt(var + eps), r, whether the window is in use (0 or 1), the row of the window or -1.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, step, buffer_gz, loss_scale):
        ctx.save_for_backward(x, weight, step)
        ctx.buffer_gz, ctx.loss_scale = buffer_gz, loss_scale
        inverse, r = step[0], step[1]
        return narrow(channel_affine(wide(x), weight * r * inverse, bias.to(step)), x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, step = ctx.saved_tensors
        inverse, r, active, here = step.unbind()
        wide_x = wide(x)
        grad_y = laid_out_as(wide_x, wide(grad_y))
        grad_bias, products = channel_sums(grad_y, wide_x)
        grad_weight = products * inverse * r
        gz = weight * grad_weight / (x.numel() // x.shape[1])
        mean_gz = _update_window(ctx.buffer_gz, here, active, gz, ctx.loss_scale)
        grad_x = grad_y * (weight * r * inverse).view(1, -1, 1, 1)
        grad_x.addcmul_(wide_x, (inverse * inverse * -mean_gz).view(1, -1, 1, 1))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None


def _update_window(window: Tensor, here: Tensor, active: Tensor, gz: Tensor, loss_scale: Tensor | None) -> Tensor:
    """Write gz (C,) into its row of `window` (n, C), without the loss scale; return what backward subtracts (C,).

    Channels that are not finite, from a loss scale that was too large, keep their old value in the window.
    """
    unscaled = gz if loss_scale is None else gz / loss_scale
    row = torch.where(unscaled.isfinite(), here, -1)
    window.copy_(_with_row(window, row, unscaled))
    mean = window.mean(0) if loss_scale is None else window.mean(0) * loss_scale
    return torch.where(active > 0, mean, gz)


def _with_row(window: Tensor, row: Tensor, values: Tensor) -> Tensor:
    """Return `window` (n, C) with `values` (C,) in place of row `row`, a tensor that does not reach the host."""
    rows = torch.arange(len(window), device=window.device)
    return torch.where(rows[:, None] == row, values.to(window.dtype), window)


@functools.cache  # a model has two windows for each of its layers, and one line says it all
def _log_refill(saved: int, own: int) -> None:
    _log.info("MABN: the file has windows of %d rows, the model of %d; each row becomes the mean of theirs", saved, own)


def _check_options(simulated_batch: int, keep_rate: float, images_per_batch: int) -> None:
    if simulated_batch < 1 or images_per_batch < 1:
        raise UserError(
            f"MABN: SIMULATED_BATCH is {simulated_batch} and a process sees {images_per_batch} images per batch; "
            "both must be at least 1"
        )
    if not 0 <= keep_rate < 1:
        raise UserError(
            f"MABN: KEEP_RATE is {keep_rate}; it is the weight of the old value and must lie in [0, 1), e.g. 0.98"
        )


def _refuse_batch_norm(state: dict, prefix: str) -> None:
    """Batch norm has a running mean, MABN has none; the running_var of the one is not that of the other."""
    if prefix + "running_mean" in state:
        raise UserError(
            f"{prefix}running_mean: these are batch norm statistics, and MABN cannot use them: its running_var is a "
            "second moment (variance + mean^2), and the shift by the mean would be lost. Start from weights that were "
            "trained with MABN, or choose BN, FrozenBN or AffineChannel for this part of the model"
        )
