"""Group normalization (arXiv 1803.08494)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.errors import UserError


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
        if groups < 1 or channels % groups:
            fitting = [count for count in range(1, channels + 1) if channels % count == 0 and count <= 64]
            raise UserError(
                f"GN: {channels} channels do not divide into {groups} groups; set MODEL.NORM_OPTIONS.GN.GROUPS to one "
                f"of {', '.join(map(str, fitting))}"
            )
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps).to(x.dtype)

    def folded(self) -> tuple[None, None, nn.Module]:
        return None, None, self

    def extra_repr(self) -> str:
        return f"{self.groups} groups of {len(self.weight) // self.groups}, eps={self.eps}"
