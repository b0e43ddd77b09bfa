"""BCN, batch-channel normalization (arXiv 1911.09738; micro-batches: 1903.10520), after the authors' code.

Source: joe-siyuan-qiao/Batch-Channel-Normalization, `BCNorm` in its README. Two normalizations, each with an affine of
its own: by batch statistics per channel, then over the channels of a group within each image.

    u = bn.weight * (x - mean) / sqrt(var + 1e-5) + bn.bias            mean, var (C,): EstBN's estimates, or the batch
    v = (u - mean_g) / sqrt(var_g + eps)                               mean_g, var_g (N, G) over group, H and W
    y = weight * v + bias                                              per group, (1, G, 1) each

u is an affine map of x within a channel, so the moments of x over each (image, channel) give every statistic of both
halves: one function reads x for them, reads it again for y = scale * x + shift, and saves nothing but x. Backward needs
sum(g) and sum(g * x) over each (image, channel), and one pass for the result. The published layer saves three
activations, this one saves one.
"""

import torch
from torch import Tensor, nn

from retinanet.layers.norm.est_bn import EPS, EstBN, over_batch
from retinanet.layers.norm.group_norm import check_groups, group_norm
from retinanet.layers.norm.reduce import (
    channel_affine,
    image_affine,
    image_moments,
    image_sums,
    laid_out_as,
    narrow,
    wide,
)

RATE = 0.1  # update rate of the running statistics when the batch half is BN (torch's default, as in the authors' code)


class BCN(nn.Module):
    """Batch half `bn`, then channel half, as the module docstring defines them; state as in the authors' checkpoints.

    weight, bias: (1, G, 1) parameters of the channel half. bn.weight, bn.bias: (C,) parameters; bn.running_mean,
    bn.running_var, bn.num_batches_tracked and, with EstBN, bn.estbn_moving_speed: buffers, moved in training mode.
    groups: G, must divide the channels, else `UserError`. eps: inside the root of the channel half; that of the batch
    half is 1e-5. estimate: True normalizes the batch half by EstBN's estimates (batches of one or two images), False
    by the batch, as `torch.nn.BatchNorm2d` does, the gradient of its statistics included.
    update_rate, decay_iters, variance: as in `EstBN`. Without `estimate`, the rate is 0.1 and only variance is used:
    "official" keeps an unbiased running_var, as torch does, "batch" a biased one (labml).
    """

    has_statistics = True
    folds_in_training = False
    conv_kind = "standardized"

    def __init__(
        self,
        channels: int,
        groups: int = 32,
        eps: float = 1e-5,
        estimate: bool = True,
        update_rate: float | None = 0.01,
        decay_iters: int = 0,
        variance: str = "official",
    ):
        super().__init__()
        check_groups("BCN", channels, groups)
        self.groups, self.eps, self.estimate, self.variance = groups, eps, estimate, variance
        self.weight = nn.Parameter(torch.ones(1, groups, 1))
        self.bias = nn.Parameter(torch.zeros(1, groups, 1))
        self.bn = EstBN(channels, update_rate, decay_iters, variance) if estimate else nn.BatchNorm2d(channels, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized x (N, C, H, W) in its dtype and memory format; in training mode it moves the state."""
        if x.numel() == 0:  # through all parameters, so that each has a gradient: zero
            scale = self.bn.weight * _per_channel(self.weight, x.shape[1])
            shift = self.bn.bias + _per_channel(self.bias, x.shape[1])
            return channel_affine(x, scale.to(x.dtype), shift.to(x.dtype))
        moments = torch.stack(image_moments(wide(x.detach())))  # (2, N, C)
        bn, by_batch = self.bn, self.training and not self.estimate
        used = self._statistics(*moments, x.numel() // x.shape[1])
        return _Normalize.apply(x, bn.weight, bn.bias, self.weight, self.bias, moments, used, self.eps, by_batch)

    def folded(self) -> tuple[Tensor | None, Tensor | None, nn.Module]:
        if self.training:
            return None, None, self
        scale = self.bn.weight * torch.rsqrt(self.bn.running_var + EPS)
        return scale, self.bn.bias - self.bn.running_mean * scale, ChannelNorm(self.weight, self.bias, self.eps)

    def _statistics(self, mean: Tensor, var: Tensor, num_values: int) -> Tensor:
        """Return mean and variance of the batch half (2, C) for images with these moments (N, C); moves the state.

        num_values: N*H*W, the values of a channel that the moments stand for.
        """
        if not self.training:
            return torch.stack([self.bn.running_mean, self.bn.running_var])
        batch = over_batch(mean, var)
        if self.estimate:
            return self.bn.update(*batch)
        _track(self.bn, *batch, num_values if self.variance == "official" else None)
        return torch.stack(batch)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}, estimate={self.estimate}"


class ChannelNorm(nn.Module):
    """The channel half alone: y = weight * v + bias with v normalized over group, H and W of each image (N, C, H, W).

    weight, bias: (1, G, 1), per group. It is what is left of a BCN whose batch half is folded into the convolution.
    """

    has_statistics = False
    folds_in_training = False
    conv_kind = "standardized"

    def __init__(self, weight: Tensor, bias: Tensor, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalized in float32, in its own dtype."""
        weight, bias = _per_channel(self.weight, x.shape[1]), _per_channel(self.bias, x.shape[1])
        return group_norm(x, weight, bias, self.weight.shape[1], self.eps)

    def folded(self) -> tuple[None, None, nn.Module]:
        return None, None, self


class _Normalize(torch.autograd.Function):
    """Both halves at once. Saves x, weight, and vectors over (image, channel), which are written (N, G, K) here.

    moments: (2, N, C) mean and biased variance of x over H and W. used: (2, C) mean and variance of the batch half,
    constants for the gradient unless `by_batch`.
    """

    @staticmethod
    def forward(ctx, x, bn_weight, bn_bias, weight, bias, moments, used, eps, by_batch):
        grouped = (weight.shape[1], -1)
        mean, var = moments.view(2, len(x), *grouped).unbind()
        off_batch = mean - used[0].view(grouped)
        root = torch.rsqrt(used[1].view(grouped) + EPS)
        slope = bn_weight.view(grouped) * root
        u = torch.addcmul(bn_bias.view(grouped), slope, off_batch)  # the mean of u over one image and channel
        off_group = u - u.mean(2, keepdim=True)
        inverse = torch.rsqrt((slope.square() * var + off_group.square()).mean(2, keepdim=True) + eps)  # (N, G, 1)
        centre, steep = inverse * off_group, inverse * slope  # v = steep * (x - mean) + centre
        scale, at_mean = weight * steep, weight * centre + bias
        ctx.save_for_backward(x, weight, mean, var, off_batch, root, slope, inverse, centre)
        ctx.by_batch = by_batch
        y = image_affine(wide(x), scale.flatten(1), (at_mean - scale * mean).flatten(1))
        return narrow(y, x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, mean, var, off_batch, root, slope, inverse, centre = ctx.saved_tensors
        wide_x, size, steep = wide(x), x.shape[2] * x.shape[3], inverse * slope
        grad_y = laid_out_as(wide_x, wide(grad_y))
        sums, products = (s.view_as(mean) for s in image_sums(grad_y, wide_x, mean.flatten(1)))
        with_v = steep * products + centre * sums  # sum(grad_y * v) of each image and channel
        # grad_u = inverse * (weight * grad_y - mean_g - mean_gv * v), the means over group, H and W
        mean_g, mean_gv = (weight * s.mean(2, keepdim=True) / size for s in (sums, with_v))
        at_centre = mean_g + mean_gv * centre
        sum_u = inverse * (weight * sums - size * at_centre)  # sum(grad_u)
        sum_ux = inverse * (weight * products - size * mean_gv * steep * var)  # sum(grad_u * (x - mean))
        grad_bn_weight, grad_bn_bias = root * (sum_ux + off_batch * sum_u).sum(0), sum_u.sum(0)
        by_x, constant = -mean_gv * steep.square(), -steep * at_centre
        if ctx.by_batch:  # batch norm's own: minus mean(grad_u) and minus mean(grad_u * z) * z, z = root * (x - mean)
            by_z = slope * root * grad_bn_weight / (len(x) * size)
            by_x = by_x - by_z
            constant = constant - slope * grad_bn_bias / (len(x) * size) - by_z * off_batch
        grad_x = image_affine(grad_y, (weight * steep).flatten(1), (constant - by_x * mean).flatten(1))
        grad_x.addcmul_(wide_x, by_x.flatten(1)[:, :, None, None])
        grads = (grad_bn_weight.flatten(), grad_bn_bias.flatten())
        grads += tuple(s.sum((0, 2)).view_as(weight) for s in (with_v, sums))
        return grad_x.to(x.dtype), *(grad.to(weight.dtype) for grad in grads), None, None, None, None


def _per_channel(values: Tensor, channels: int) -> Tensor:
    """Return (C,) from `values` per group (1, G, 1)."""
    groups = values.shape[1]
    return values.view(groups, 1).expand(groups, channels // groups).reshape(channels)


@torch.no_grad()
def _track(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, num_values: int | None) -> None:
    """Move the running statistics of `bn` towards a batch (C,); num_values unbiases the variance, None does not."""
    if num_values is not None:
        var = var * (num_values / max(1, num_values - 1))
    finite = mean.isfinite().all() & var.isfinite().all()
    bn.num_batches_tracked.add_(finite)
    for running, batch in ((bn.running_mean, mean), (bn.running_var, var)):
        running.lerp_(torch.where(finite, batch, running).to(running), RATE)
