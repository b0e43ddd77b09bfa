"""Sums over images and positions, and the channel-wise affine maps that go with them, for norms with own statistics.

Both memory formats of x (N, C, H, W) keep their format. Everything here computes in the dtype of its inputs, which
the norms choose with `wide`: float32, or float64 for float64.

In eager mode on a CPU kernels of torch's own norms do the work. With mean 0 and deviation 1, the backward of batch norm
is one pass that returns sum(g) and sum(g * x), and its evaluation forward one pass of scale * x + shift; group norm
with one channel per group returns moments. For float32 of 2x64x128x128 on one thread (Xeon, AVX-512) a sum takes 0.5
ms, moments and the affine map 0.6, where `var_mean` takes 12, `linalg.vector_norm` in channels_last 12 and `addcmul`
1.1. Elsewhere the same is written as plain tensor arithmetic, which `torch.compile` fuses.
"""

import torch
from torch import Tensor

# Positions in one call of a channels_last kernel: these add row after row in float32, and would lose 7e-5 of the sum
# over a map of 400 x 672; in blocks, 3e-6.
BLOCK = 16384


def wide(x: Tensor) -> Tensor:
    """Return x as float32 or, when it is, float64: the dtype of its statistics; contiguous in one of the formats."""
    x = x if x.dtype == torch.float64 else x.float()
    return x if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def narrow(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return y in `dtype`, without an operation when it has it already.

    torch 2.11 compiles a Function whose result is a conversion to the dtype that it has into gradients of zero.
    """
    return y if y.dtype == dtype else y.to(dtype)


def channel_squares(x: Tensor) -> Tensor:
    """Return sum(x^2) over N, H and W, (C,), of x (N, C, H, W) of any dtype; squared in the dtype that `wide` gives."""
    if not _has_kernels(x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.linalg.vector_norm(x, dim=(0, 2, 3), dtype=dtype).square()
    return channel_sums(wide(x), wide(x))[1]


def channel_sums(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(g) and sum(g * x) over N, H and W, (C,) each, of two (N, C, H, W) tensors."""
    if not _has_kernels(x):
        return g.sum((0, 2, 3)), (g * x).sum((0, 2, 3))
    zero = x.new_zeros(x.shape[:2])
    if x.is_contiguous():
        sums, products = image_sums(g, x, zero)
        return sums.sum(0), products.sum(0)
    return _row_sums(_rows(laid_out_as(x, g)), _rows(x), zero[0])


def image_sums(g: Tensor, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(g) and sum(g * (x - shift)) over H and W, (N, C) each; g, x: (N, C, H, W), shift: (N, C)."""
    if not _has_kernels(x):
        return g.sum((2, 3)), (g * (x - shift[:, :, None, None])).sum((2, 3))
    g = laid_out_as(x, g)
    if x.is_contiguous():  # images and channels are one axis
        sums, products = _batch_norm_sums(_as_one_image(g), _as_one_image(x), shift.flatten())
        return sums.view_as(shift), products.view_as(shift)
    images = [_row_sums(_rows(g[i : i + 1]), _rows(x[i : i + 1]), shift[i]) for i in range(len(x))]
    return torch.stack([sums for sums, _ in images]), torch.stack([products for _, products in images])


def image_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over H and W, (N, C) each, of x (N, C, H, W).

    The variance is that of x - mean and not E[x^2] - E[x]^2, which cancels when the mean is large: x around 1000 with
    variance 0.01 has E[x^2] = 1000000.01, and float32 keeps seven digits.
    """
    n, c, h, w = x.shape
    if not _has_kernels(x):
        var, mean = torch.var_mean(x, (2, 3), correction=0)
        return mean, var
    if x.is_contiguous():
        _, mean, rstd = torch.native_group_norm(x, None, None, n, c, h * w, c, 1e-30)  # eps, so that 1 / var is finite
        return mean, rstd.pow(-2)
    # In channels_last group norm takes E[x^2] - E[x]^2.
    images = [_row_moments(_rows(x[i : i + 1])) for i in range(n)]
    return torch.stack([mean for mean, _ in images]), torch.stack([var for _, var in images])


def channel_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * x + shift, (N, C, H, W); scale, shift: (C,)."""
    if not _has_kernels(x):
        return torch.addcmul(shift.view(1, -1, 1, 1), x, scale.view(1, -1, 1, 1))
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    # Not `F.batch_norm`, which refuses an eps of 0 in torch 2.11 although its kernel does not.
    return torch.batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0, False)


def image_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * x + shift, (N, C, H, W); scale, shift: (N, C)."""
    if _has_kernels(x) and x.is_contiguous():
        y = channel_affine(_as_one_image(x), scale.flatten(), shift.flatten())
        return y.resize_(x.shape)  # not a view, so that a ReLU may overwrite what an autograd function returns
    return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


def laid_out_as(x: Tensor, g: Tensor) -> Tensor:
    """Return g with the memory format of x: the kernels want both alike, and autograd may give an expanded scalar."""
    return g.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)


def _has_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() > 0 and not torch.compiler.is_compiling()


def _as_one_image(x: Tensor) -> Tensor:
    return x.view(1, -1, *x.shape[2:])


def _rows(x: Tensor) -> Tensor:
    """Return a channels_last x as the rows (N*H*W, C) that its memory holds."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_image(rows: Tensor) -> Tensor:
    return rows.view(1, len(rows), 1, -1).permute(0, 3, 1, 2)  # (1, C, rows, 1), channels_last


def _row_sums(g: Tensor, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(g) and sum(g * (x - shift)) over the rows of g and x (rows, C); shift: (C,)."""
    blocks = [
        _batch_norm_sums(_as_image(gs), _as_image(xs), shift)
        for gs, xs in zip(g.split(BLOCK), x.split(BLOCK), strict=True)
    ]
    return sum(sums for sums, _ in blocks), sum(products for _, products in blocks)


def _row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of the columns of x (rows, C)."""
    unused = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    blocks = x.split(BLOCK)
    moments = torch.stack([torch.stack(torch.batch_norm_update_stats(_as_image(xs), *unused, 0.0)) for xs in blocks])
    share = torch.tensor([len(xs) / len(x) for xs in blocks], dtype=x.dtype)[:, None]
    mean = (share * moments[:, 0]).sum(0)
    return mean, (share * (moments[:, 1] + (moments[:, 0] - mean).square())).sum(0)


def _batch_norm_sums(g: Tensor, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.ones_like(shift)
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        g, x, one, None, None, shift, one, True, 0.0, [False, True, True]
    )
    return sums, products
