"""Group normalization (arXiv 1803.08494), one function for both memory formats and every precision.

On a CPU torch's kernels are the fastest, except for large images in channels_last with few channels in a group, where
sums and affine maps by image and channel are. On CUDA torch's kernels copy channels_last inputs to contiguous memory,
and autocast runs them in float32; there the norm is tensor math instead: statistics per image and channel, combined to
groups on tiny tensors, and one pass that applies them. That math, and torch's channels_last kernel, compute the
variance as E[x^2] - mean^2, which is 2 % off in float32 once the mean is 100 standard deviations; so their input is
centred first.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from retinanet.errors import UserError
from retinanet.layers.norm.reduce import image_affine, image_moments, image_sums, laid_out_as, narrow, wide

_LARGE_IMAGE = 2**20  # elements of an image in a map


class GN(nn.Module):
    """Every image is normalized over the positions and the channels of each group, then y = weight * z + bias.

    weight, bias: (C,) parameters, one and zero at first. groups: must divide the channels, else `UserError`.
    eps: inside the root. Group mean and variance (biased) are float32, under autocast too.
    """

    has_statistics = False
    folds_in_training = False
    conv_kind = "plain"

    def __init__(self, channels: int, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        check_groups("GN", channels, groups)
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight, self.bias, self.groups, self.eps)

    def folded(self) -> tuple[None, None, nn.Module]:
        return None, None, self

    def extra_repr(self) -> str:
        return f"{self.groups} groups of {len(self.weight) // self.groups}, eps={self.eps}"


def check_groups(norm: str, channels: int, groups: int) -> None:
    """Raise `UserError` unless the channels divide into the groups; `norm` is its name in the configuration."""
    if groups < 1 or channels % groups:
        fitting = ", ".join(str(count) for count in range(1, min(channels, 64) + 1) if channels % count == 0)
        raise UserError(
            f"{norm}: {channels} channels do not divide into {groups} groups; set MODEL.NORM_OPTIONS.{norm}.GROUPS to "
            f"one of {fitting}"
        )


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Return weight * (x - mean) / sqrt(var + eps) + bias in the dtype and memory format of x (N, C, H, W).

    mean and var (biased) are those of an image's group of C / groups channels, in float32 at least; weight and bias are
    (C,). Differentiable once; saves x and two (N, groups) vectors.
    """
    if torch.compiler.is_exporting():  # a graph for any size cannot ask for the layout; exporters know this operator
        return torch.group_norm(x, groups, weight, bias, eps)
    large = x.device.type == "cpu" and _layout(x) == torch.channels_last and x.numel() >= _LARGE_IMAGE * len(x) > 0
    # Forward and backward, AVX-512, one and two threads: (2, 64, 128, 128) 4.7 and 3.2 ms against 7.6 and 3.7 of
    # torch's kernels, (8, 64, 40, 40) 2.6 and 2.3 against 2.5 and 1.5
    if large and x.shape[1] < 8 * groups and not torch.compiler.is_compiling():
        return _GroupNormOfRows.apply(x, weight, bias, groups, eps)
    return _GroupNorm.apply(x, weight, bias, groups, eps)


class _GroupNormOfRows(torch.autograd.Function):
    """Group norm of a channels_last x on a CPU, by the sums over images and the affine maps of `reduce.py`.

    Without centring of x, but image by image in operations of their own, which only large images are worth.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        full, channels = wide(x), x.shape[1]
        image_mean, image_var = (moment.view(len(x), groups, -1) for moment in image_moments(full))
        mean = image_mean.mean(2)  # (N, groups)
        var = (image_var + (image_mean - mean.unsqueeze(2)).square()).mean(2)
        rstd = torch.rsqrt(var + eps)
        scale = _spread(rstd, channels).flatten(1) * weight.to(full.dtype)  # (N, C)
        shift = bias.to(full.dtype) - _spread(mean, channels).flatten(1) * scale
        ctx.save_for_backward(x, weight, mean, rstd)
        return narrow(image_affine(full, scale, shift), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        full, (n, channels) = wide(x), x.shape[:2]
        grad = laid_out_as(full, wide(grad))
        scale, size = weight.to(full.dtype), x[0].numel() // rstd.shape[1]
        channel_mean, channel_rstd = (_spread(vector, channels).flatten(1) for vector in (mean, rstd))
        sums, products = image_sums(grad, full, channel_mean)
        with_z = products * channel_rstd  # sum(grad * z) of each image and channel
        mean_g, mean_gz = ((part * scale).view(n, rstd.shape[1], -1).sum(2) / size for part in (sums, with_z))
        on_x = -rstd.square() * mean_gz  # as in `_backward`
        constant = -rstd * mean_g - mean * on_x
        grad_x = image_affine(grad, channel_rstd * scale, _spread(constant, channels).flatten(1))
        grad_x.addcmul_(full, _spread(on_x, channels))
        return grad_x.to(x.dtype), with_z.sum(0).to(weight.dtype), sums.sum(0).to(weight.dtype), None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        on_cuda, wide = x.device.type == "cuda", torch.promote_types(x.dtype, torch.float32)
        ctx.groups, ctx.layout = groups, _layout(x)
        x = x.contiguous(memory_format=ctx.layout)
        if on_cuda or ctx.layout == torch.channels_last:
            x = x - _estimated_mean(x, groups)  # saved in place of x: the norm is the same
        if on_cuda:
            mean, rstd = _group_statistics(x, groups, eps)
            y = _apply(x, weight.to(wide), bias.to(wide), mean, rstd)
        else:
            n, c, h, w = x.shape
            y, mean, rstd = torch.native_group_norm(x, weight.to(wide), bias.to(wide), n, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        (n, c, h, w), dtype, on_cuda = x.shape, x.dtype, x.device.type == "cuda"
        grad = grad.contiguous(memory_format=ctx.layout)  # torch's kernel takes equal layouts for granted
        slow = ctx.layout == torch.channels_last and not on_cuda
        if slow:  # torch's half kernel takes three times the float32 one
            grad, x = grad.to(mean.dtype), x.to(mean.dtype)
        if on_cuda or (slow and c < 8 * ctx.groups):  # (2, 64, 100, 168), 32 groups, torch 2.11: 5 ms against 33
            grads = _backward(grad, x, weight.to(mean.dtype), mean, rstd)
        else:
            grads = torch.ops.aten.native_group_norm_backward(
                grad, x, mean, rstd, weight.to(mean.dtype), n, c, h * w, ctx.groups, [True, True, True]
            )
        return grads[0].to(dtype), grads[1].to(weight.dtype), grads[2].to(weight.dtype), None, None


def _layout(x: Tensor) -> torch.memory_format:
    only_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if only_channels_last else torch.contiguous_format


def _estimated_mean(x: Tensor, groups: int) -> Tensor:
    """Return each group's mean over the middle row as (N, C, 1, 1), in the dtype of x; costs 1 / H of the mean."""
    row = x[:, :, x.shape[2] // 2].unflatten(1, (groups, -1))  # (N, groups, C / groups, W)
    mean = row.mean(dim=(2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    return _spread(mean.to(x.dtype), x.shape[1])


def _group_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(var + eps) of centred x as (N, groups), float32 at least, by two reads of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean(dim=(2, 3), dtype=wide)
    root_mean_square = torch.linalg.vector_norm(x, dim=(2, 3), dtype=wide) / (x.shape[2] * x.shape[3]) ** 0.5
    mean, square = (moment.view(len(x), groups, -1).mean(dim=2) for moment in (mean, root_mean_square.square()))
    return mean, torch.rsqrt((square - mean.square()).clamp(min=0) + eps)


def _apply(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return (x - mean) * rstd * weight + bias in one pass, computed in the vectors' dtype and stored in that of x."""
    channels = x.shape[1]
    scale = _spread(rstd, channels) * weight.view(1, -1, 1, 1)
    shift = bias.view(1, -1, 1, 1) - _spread(mean, channels) * scale
    return _multiply_add(shift, x, scale)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias, the last two in the dtype of the statistics.

    With z = (x - mean) * rstd, g = grad * weight and means over the group:
    grad_x = rstd * (g - mean(g) - z * mean(g * z)) = rstd * weight * grad + on_x * x + constant.
    """
    (n, channels), groups, size = x.shape[:2], rstd.shape[1], x[0].numel() // rstd.shape[1]
    # The zero has the dtype of the statistics: two halves are multiplied and their product stored in float32 at once.
    product = torch.addcmul(mean.new_zeros(1, 1, 1, 1), grad, x)
    sum_grad = grad.sum(dim=(2, 3), dtype=mean.dtype)  # (N, C)
    channel_mean, channel_rstd = (_spread(vector, channels).flatten(1) for vector in (mean, rstd))
    sum_grad_z = (product.sum(dim=(2, 3)) - channel_mean * sum_grad) * channel_rstd
    mean_g, mean_gz = ((sums * weight).view(n, groups, -1).sum(dim=2) / size for sums in (sum_grad, sum_grad_z))
    on_x = -rstd.square() * mean_gz  # (N, groups)
    constant = -rstd * mean_g - mean * on_x
    rest = torch.addcmul(_spread(constant, channels), x, _spread(on_x, channels))
    on_grad = (channel_rstd * weight)[:, :, None, None]
    return _multiply_add(rest, grad, on_grad), sum_grad_z.sum(dim=0), sum_grad.sum(dim=0)


def _multiply_add(addend: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Return addend + x * scale in the dtype of x, computed in that of the others."""
    if x.dtype == addend.dtype or torch.compiler.is_compiling():  # torch 2.11 compiles no `out=` in channels_last
        return narrow(torch.addcmul(addend, x, scale), x.dtype)
    return torch.addcmul(addend, x, scale, out=torch.empty_like(x))  # eager CUDA: one kernel, no float32 copy


def _spread(vector: Tensor, channels: int) -> Tensor:
    """Return (N, groups) as (N, C, 1, 1), the value of each group at its channels."""
    return vector.repeat_interleave(channels // vector.shape[1], dim=1)[:, :, None, None]
