"""A backbone under a linear classifier, for pre-training on folders of images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """images (N, 3, H, W) in 0..255 -> logits (N, K): the backbone's c5, its mean over the map, one linear layer.

    Names: `backbone.*`, as in the detector, so that a checkpoint loads as its starting weights, and `fc.*`.
    pixel_mean, pixel_std: per channel, 0..255, in the channel order of the images.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, pixel_mean: Sequence[float], pixel_std: Sequence[float]):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.out_channels["c5"], num_classes)
        nn.init.normal_(self.fc.weight, std=0.01)  # Goyal et al., arXiv 1706.02677, section 5.1
        nn.init.zeros_(self.fc.bias)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)
        self.memory_format = torch.contiguous_format

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Lay out weights and, from now on, activations in `memory_format`."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.to(torch.float32, memory_format=self.memory_format)
        features = self.backbone((pixels - self.pixel_mean) / self.pixel_std)["c5"]
        return self.fc(features.mean(dim=(2, 3)))
