"""A convolution with what follows it, relu(conv(x, W) + bias + residual), in as few passes as the device offers.

- On a CPU without gradients and in channels_last: one oneDNN call (`mkldnn::_convolution_pointwise`, which inductor's
  frozen graphs call as well).
- On a CPU in channels_last, for 3 x 3 kernels on large maps, half of the multiplications (`ops/winograd.py`).
- On a CPU in channels_last, where the weight is large beside the map, a product of two matrices: with its backward 1.2
  to 2.5 times as fast there as oneDNN's convolution, which reorders the weight and its gradient.
- On CUDA in half precision, where `fused` asks for it: one cuDNN call (`torch.cudnn_convolution_relu` and
  `torch.cudnn_convolution_add_relu`), with its backward written here, because torch has none.
- Everywhere else, and for compilers, which fuse by themselves: convolution, addition and ReLU one after the other, the
  last two in place.

All give the same numbers up to the rounding of the sums inside the convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from retinanet.ops import winograd
from retinanet.ops.packed import ConstantWeight

_HALF = (torch.float16, torch.bfloat16)
_WEIGHTS_PER_POSITION = 4096  # of the output, from which on a product of matrices is the faster way
_MAX_FUSED_KERNEL = 3  # cuDNN's fused call was 17 times slower for a 7x7 kernel in channels_last (pytorch #68506)


def conv2d(
    x: Tensor,
    weight: Tensor | ConstantWeight,
    bias: Tensor | None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
    fused: bool = False,
) -> Tensor:
    """Return relu(conv(x, weight) + bias + residual), (N, out, H', W'), without the parts that are not asked for.

    x: (N, in, H, W). weight: (out, in / groups, k, k), or one that is kept packed for oneDNN. bias: (out,) or None.
    residual: (N, out, H', W') or None.
    fused: on CUDA, one cuDNN call for the whole where there is one (half precision, k <= 3, with ReLU).
    """
    geometry = ([stride, stride], [padding, padding], [dilation, dilation], groups)
    constant, weight = (weight, weight.plain) if isinstance(weight, ConstantWeight) else (None, weight)
    eager = type(x) is Tensor and not torch.compiler.is_compiling()
    followed = relu or residual is not None
    if eager and winograd.suits(x, constant or weight, stride, padding, dilation, groups):
        y = winograd.conv2d(x, constant or weight, bias)
        y = y if residual is None else y.add_(residual)
        return F.relu_(y) if relu else y
    if eager and (followed or constant) and _one_onednn_call(x, weight, bias, residual, groups):
        weight = constant.packed_for(tuple(x.shape), *geometry) if constant else weight
        return _onednn(x, weight, bias, *geometry, residual, relu)
    if eager and fused and relu and _one_cudnn_call(x, weight):
        bias = weight.new_zeros(len(weight)) if bias is None else bias.to(x.dtype)
        return ConvReLU.apply(x, weight, bias, residual, *geometry)
    if eager and _one_product(x, weight, stride, padding, dilation, groups):
        y = _product(x, weight, bias, stride, padding)
    else:
        y = F.conv2d(x, weight, bias, *geometry)
    if residual is not None:
        y = y.add_(residual)
    return F.relu_(y) if relu else y


def _one_onednn_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, groups: int
) -> bool:
    tensors = [tensor for tensor in (x, weight, bias, residual) if tensor is not None]
    # With groups PyTorch adds by itself, and not in bfloat16; torch 2.11 cannot add to a single position.
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype == x.dtype
        and x.numel() > 0
        and (residual is None or (groups == 1 and residual.shape[2:].numel() > 1))
        and x.is_contiguous(memory_format=torch.channels_last)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def _onednn(x, weight, bias, stride, padding, dilation, groups, residual, relu) -> Tensor:
    geometry = (weight, None if bias is None else bias.to(x.dtype), padding, stride, dilation, groups)
    call = torch.ops.mkldnn._convolution_pointwise
    if residual is None:
        return call(x, *geometry, "relu" if relu else "none", [], "")
    residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return call.binary(x, residual, *geometry, "add", 1.0, "relu" if relu else None, [], "")


def _one_product(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int) -> bool:
    kernel, num_images = weight.shape[-1], len(x)
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in x.shape[2:])
    return (
        x.device.type == "cpu"
        and dilation == groups == 1
        and num_images * height * width * _WEIGHTS_PER_POSITION <= weight.numel()
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Return the convolution as (N * H' * W', k * k * in) x (k * k * in, out), in channels_last."""
    kernel, x = weight.shape[-1], x.permute(0, 2, 3, 1)
    if padding:
        x = F.pad(x, (0, 0, padding, padding, padding, padding))
    height, width = ((side - kernel) // stride * stride + 1 for side in x.shape[1:3])
    taps = [x[:, i : i + height : stride, j : j + width : stride] for i in range(kernel) for j in range(kernel)]
    return F.linear(torch.cat(taps, dim=3), weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def _one_cudnn_call(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cuda"
        and x.dtype in _HALF
        and weight.dtype == x.dtype
        and weight.shape[-1] <= _MAX_FUSED_KERNEL
        and x.numel() > 0
    )


class ConvReLU(torch.autograd.Function):
    """relu(conv(x, weight) + bias + residual) in one cuDNN call; on a CPU, for tests, by its parts.

    Saves x, weight and y, whose positive elements are where the gradient passes. stride, padding, dilation: [2].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, residual, stride, padding, dilation, groups):
        ctx.geometry, ctx.has_residual = (stride, padding, dilation, groups), residual is not None
        if x.device.type != "cuda":
            y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
            y = torch.relu(y if residual is None else y + residual)
        elif residual is None:
            y = torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        else:
            residual = residual.to(x.dtype).contiguous(memory_format=torch.channels_last)
            y = torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)], stride, padding, dilation, False, [0, 0], groups,
            list(ctx.needs_input_grad[:3]),
        )  # fmt: skip
        grad_residual = grad if ctx.has_residual and ctx.needs_input_grad[3] else None
        return grad_x, grad_weight, grad_bias, grad_residual, None, None, None, None
