"""ResNet (arXiv 1512.03385) and ResNeXt (arXiv 1611.05431) as feature extractors.

Names follow Detectron: res2..res5 are conv2_x..conv5_x of the papers, c2..c5 their outputs at strides 4, 8, 16, 32.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet(nn.Module):
    """images (N, 3, H, W) -> {"c2": (N, C2, H/4, W/4), ..., "c5": (N, C5, H/32, W/32)}, sizes rounded up.

    blocks: blocks of res2..res5. bottleneck: blocks of 1x1, 3x3, 1x1 convs (R50 and deeper), else of two 3x3.
    groups, width_per_group: of the 3x3 convs in res2; the width doubles with every stage (ResNeXt).
    conv: makes a convolution with its norm, as `conv(in_channels, out_channels, kernel_size, stride=, groups=)`.
    stride_in_1x1: a bottleneck strides in its first 1x1 conv (Detectron's and MSRA's R-50 to R-152 checkpoints);
        False: in the 3x3 (torchvision, ResNeXt).
    freeze_at: 0 trains all, 1 freezes the stem, 2 also res2, ... 5 everything. A frozen stage has no gradient, so
        autograd keeps nothing of it, and stays in evaluation mode through `.train()`, so statistics cannot move.
    """

    def __init__(
        self,
        conv: Callable[..., nn.Module],
        stride_in_1x1: bool,
        freeze_at: int,
        blocks: tuple[int, int, int, int],
        bottleneck: bool = True,
        groups: int = 1,
        width_per_group: int = 64,
    ):
        super().__init__()
        self.conv1 = conv(3, 64, 7, stride=2)
        self.out_channels: dict[str, int] = {}
        channels = 64
        for stage, num_blocks in enumerate(blocks):
            width, stride = groups * width_per_group * 2**stage, 1 if stage == 0 else 2
            out_channels = 64 * 2**stage * (4 if bottleneck else 1)
            layers = []
            for index in range(num_blocks):
                ends = (channels if index == 0 else out_channels, out_channels, stride if index == 0 else 1)
                layers.append(
                    Bottleneck(conv, *ends, width, groups, stride_in_1x1) if bottleneck else BasicBlock(conv, *ends)
                )
            self.add_module(f"res{stage + 2}", nn.Sequential(*layers))
            self.out_channels[f"c{stage + 2}"] = channels = out_channels
        self.freeze_at, self.pools = freeze_at, True
        for stage in self._frozen():
            stage.requires_grad_(False)
        self.train()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c2 = self.res2(self._stem(images))
        c3 = self.res3(c2)
        c4 = self.res4(c3)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": self.res5(c4)}

    def _stem(self, images: Tensor) -> Tensor:
        x = self.conv1(images, relu=True)
        return F.max_pool2d(x, 3, stride=2, padding=1) if self.pools else x

    @property
    def in_channels(self) -> int:
        """Channels that `forward` takes: 3, and those of `pad_images`."""
        return 3 + self.conv1.zero_inputs

    def pad_images(self, channels: int) -> None:
        """Take images with zeros behind their three colours, `channels` in all; weights and results stay the same.

        For NHWC in half precision on CUDA: cuDNN's kernels for tensor cores read channels in groups of 4 or more.
        """
        self.conv1.zero_inputs = channels - 3

    def use_small_stem(self) -> None:
        """Let the stem keep the size: its conv at stride 1, no pooling, so c2..c5 have strides 1, 2, 4, 8.

        For images of about 32 pixels. The weights keep their names and shapes, unlike those of the 3x3 stem of arXiv
        1512.03385, section 4.2, so what is learned on small images can start a detector.
        """
        self.conv1.stride, self.pools = 1, False

    def train(self, mode: bool = True) -> "ResNet":
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [self.conv1, self.res2, self.res3, self.res4, self.res5][: self.freeze_at]


class Bottleneck(nn.Module):
    """1x1 to `width`, grouped 3x3, 1x1 to `out_channels`; the input is added before the last ReLU."""

    def __init__(
        self,
        conv: Callable[..., nn.Module],
        in_channels: int,
        out_channels: int,
        stride: int,
        width: int,
        groups: int,
        stride_in_1x1: bool,
    ):
        super().__init__()
        stride1, stride3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv(in_channels, width, 1, stride=stride1)
        self.conv2 = conv(width, width, 3, stride=stride3, groups=groups)
        self.conv3 = conv(width, out_channels, 1)
        self.shortcut = _shortcut(conv, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(y, residual=x if self.shortcut is None else self.shortcut(x), relu=True)


class BasicBlock(nn.Module):
    """Two 3x3 convs; the input is added before the last ReLU."""

    def __init__(self, conv: Callable[..., nn.Module], in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride)
        self.conv2 = conv(out_channels, out_channels, 3)
        self.shortcut = _shortcut(conv, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x, relu=True)
        return self.conv2(y, residual=x if self.shortcut is None else self.shortcut(x), relu=True)


def _shortcut(conv: Callable[..., nn.Module], in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """Return the projection that a change of shape needs (option B of the paper), None where the input fits."""
    return None if in_channels == out_channels and stride == 1 else conv(in_channels, out_channels, 1, stride=stride)


RESNETS = {
    "R18": partial(ResNet, blocks=(2, 2, 2, 2), bottleneck=False),
    "R34": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=False),
    "R50": partial(ResNet, blocks=(3, 4, 6, 3)),
    "R101": partial(ResNet, blocks=(3, 4, 23, 3)),
    "R152": partial(ResNet, blocks=(3, 8, 36, 3)),
    "X101_32x8d": partial(ResNet, blocks=(3, 4, 23, 3), groups=32, width_per_group=8),
    "X101_64x4d": partial(ResNet, blocks=(3, 4, 23, 3), groups=64, width_per_group=4),
}
