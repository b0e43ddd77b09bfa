"""AffineChannel: a scale and a shift per channel, no statistics (Detectron `AffineChannelOp`).

The same as BatchNorm in evaluation mode with mean 0 and variance 1, which is how Detectron's ImageNet models store
their frozen batch norms: the statistics are already inside the scale and the shift.
"""

import torch
from torch import Tensor, nn


class AffineChannel(nn.Module):
    """y = weight * x + bias per channel; weight and bias are (C,) float32, one and zero at first.

    learnable: False keeps both as buffers, which no optimizer sees (Detectron); True makes them parameters.
    """

    has_statistics = False
    folds_in_training = True
    conv_kind = "plain"

    def __init__(self, channels: int, learnable: bool = False):
        super().__init__()
        for name, value in (("weight", torch.ones(channels)), ("bias", torch.zeros(channels))):
            if learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return scale_and_shift(x, self.weight, self.bias)

    def folded(self) -> tuple[Tensor, Tensor, None]:
        return self.weight, self.bias, None

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, learnable={self.weight.requires_grad}"


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * x + shift in the dtype and memory format of x (N, C, H, W), one pass; scale, shift: (C,)."""
    scale, shift = (vector.to(x.dtype).view(1, -1, 1, 1) for vector in (scale, shift))
    return torch.addcmul(shift, x, scale)
