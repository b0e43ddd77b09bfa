"""Feature pyramid (arXiv 1612.03144) with RetinaNet's two coarse levels (arXiv 1708.02002, section 4)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.layers.conv import Conv2d


class FPN(nn.Module):
    """c3, c4, c5 -> [p3, p4, p5, p6, p7], each (N, channels, H / 2^level, W / 2^level), sizes rounded up.

    in_channels: {"c3": ..., "c4": ..., "c5": ...}. p6_from: "C5" or "P5", the input of the strided conv of P6.
    conv: makes a convolution with its norm, as in `backbone/resnet.py`. As in Detectron it makes the lateral and the
        output convs; P6 and P7 stay plain with a bias. The head gets P6 before the ReLU that P7 starts from.
    """

    def __init__(self, in_channels: dict[str, int], channels: int, p6_from: str, conv: Callable[..., nn.Module]):
        super().__init__()
        for level in (3, 4, 5):
            self.add_module(f"lateral{level}", conv(in_channels[f"c{level}"], channels, 1))
            self.add_module(f"output{level}", conv(channels, channels, 3))
        self.p6_from = p6_from
        self.p6 = Conv2d({"C5": in_channels["c5"], "P5": channels}[p6_from], channels, 3, stride=2, padding=1)
        self.p7 = Conv2d(channels, channels, 3, stride=2, padding=1)
        for child in self.children():  # Caffe2's XavierFill: uniform within sqrt(3 / fan_in)
            nn.init.kaiming_uniform_(child.weight, a=1)

    def forward(self, features: dict[str, Tensor]) -> list[Tensor]:
        top = self.lateral5(features["c5"])
        middle = _add_upsampled(self.lateral4(features["c4"]), top)
        bottom = _add_upsampled(self.lateral3(features["c3"]), middle)
        p3, p4, p5 = self.output3(bottom), self.output4(middle), self.output5(top)
        p6 = self.p6(features["c5"] if self.p6_from == "C5" else p5)
        return [p3, p4, p5, p6, self.p7(F.relu(p6))]


def _add_upsampled(lateral: Tensor, coarser: Tensor) -> Tensor:
    """Return lateral (N, C, H, W) + coarser (N, C, ~H/2, ~W/2), repeated to the size of lateral (odd ones too)."""
    return lateral.add_(F.interpolate(coarser, size=lateral.shape[-2:], mode="nearest"))
