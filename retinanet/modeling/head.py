"""The class and the box tower that all pyramid levels share (arXiv 1708.02002, section 4)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from retinanet.layers.conv import Conv2d


class Head(nn.Module):
    """[p3, ..., p7] -> logits and deltas of every level.

    num_convs: 3x3 convs with ReLU in each tower before its prediction. conv: makes one with its norm, as in
        `backbone/resnet.py`; a norm with running statistics comes as a `PerLevelNorm`. The predictions stay plain.
    prior_prob: score of every anchor and class at the start, so that the many easy negatives do not swamp the first
        steps (section 4.1). Weights start from N(0, 0.01).
    """

    def __init__(
        self,
        channels: int,
        num_anchors: int,
        num_classes: int,
        num_convs: int,
        prior_prob: float,
        conv: Callable[..., nn.Module],
    ):
        super().__init__()
        self.num_classes = num_classes
        self.cls_convs = nn.ModuleList(conv(channels, channels, 3) for _ in range(num_convs))
        self.box_convs = nn.ModuleList(conv(channels, channels, 3) for _ in range(num_convs))
        self.cls_pred = Conv2d(channels, num_anchors * num_classes, 3, padding=1)
        self.box_pred = Conv2d(channels, num_anchors * 4, 3, padding=1)
        for layer in [*self.cls_convs, *self.box_convs, self.cls_pred, self.box_pred]:
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(self.cls_pred.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits (N, H*W*A, K) and deltas (N, H*W*A, 4), lists over the levels, in row, column, anchor order."""
        logits = _run([*self.cls_convs, self.cls_pred], features)
        deltas = _run([*self.box_convs, self.box_pred], features)
        return [_flatten(x, self.num_classes) for x in logits], [_flatten(x, 4) for x in deltas]


def _run(convs: list[Conv2d], features: list[Tensor]) -> list[Tensor]:
    """Return the output (N, A*K, H, W) of the last conv for every level; each weight is prepared once for all."""
    prepared = [conv.prepare() for conv in convs]
    outputs = []
    for level, x in enumerate(features):
        for conv, ready in zip(convs[:-1], prepared[:-1], strict=True):
            x = conv(x, level if conv.takes_level else None, ready, relu=True)
        outputs.append(convs[-1](x, None, prepared[-1]))
    return outputs


def _flatten(x: Tensor, values: int) -> Tensor:
    """Return (N, A * values, H, W) as (N, H*W*A, values): a view when x is channels_last, a copy otherwise."""
    x = x.permute(0, 2, 3, 1)
    if torch.compiler.is_exporting():  # whether a view is possible depends on sizes, and the graph would fix them
        x = x.clone(memory_format=torch.contiguous_format)
    return x.unflatten(3, (-1, values)).flatten(1, 3)
