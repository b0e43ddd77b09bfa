"""Norms and inputs that the tests of `layers/norm` share."""

import torch
from torch import Tensor, nn

from retinanet.layers.norm import make_norm

CHANNELS = 64  # divides into the 32 groups of the defaults
LAYOUTS = ("contiguous", "channels_last", "sliced")


def new_norm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a norm with scales, shifts and statistics that no shortcut could get right by chance."""
    norm = make_norm(name, CHANNELS).to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in norm.state_dict(keep_vars=True).items():
            noise = torch.randn(tensor.shape, generator=generator).to(dtype)
            if key.endswith(("weight", "running_var")):
                tensor.copy_(noise.abs() + 0.5)
            elif key.endswith(("bias", "running_mean")):
                tensor.copy_(0.3 * noise)
    return norm


def new_input(
    layout: str = "contiguous", shape=(2, CHANNELS, 6, 5), dtype: torch.dtype = torch.float32, seed: int = 5
) -> Tensor:
    """Return x (N, C, H, W) with mean 0.5 and deviation 2; "sliced" is a view into a wider tensor."""
    n, c, h, w = shape
    noise = torch.randn(n, c, h, w + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (noise * 2 + 0.5).to(dtype)[..., 1:-1]
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return x.contiguous(memory_format=formats[layout]) if layout in formats else x


def output_gradient(shape, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64).to(dtype)


def run(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output and the gradients of x and of every parameter, for one fixed gradient of the output."""
    x = x.detach().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], output_gradient(y.shape, y.dtype))]


def one_step(layer: nn.Module, x: Tensor, w: Tensor) -> dict[str, Tensor]:
    """Return y, the gradients gx and g.NAME for the loss sum(y * w), and the buffers buf.NAME after the step."""
    x = x.requires_grad_()
    layer.zero_grad()
    y = layer(x)
    (y * w).sum().backward()
    gradients = {f"g.{name}": parameter.grad for name, parameter in layer.named_parameters()}
    buffers = {f"buf.{name}": buffer.clone() for name, buffer in layer.named_buffers()}
    return {"y": y.detach(), "gx": x.grad, **gradients, **buffers}


def randn(*shape, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
