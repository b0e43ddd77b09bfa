"""The detector up to its raw outputs; matching, loss and post-processing take it from there."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.structures import HeadOutputs


class RetinaNet(nn.Module):
    """RetinaNet (arXiv 1708.02002): backbone -> pyramid -> shared head, and the anchors that the outputs refer to.

    anchors: called as `anchors(image_size, device)`, returns (H*W*A, 4) for each of P3..P7.
    pixel_mean, pixel_std: per channel, 0..255, in the channel order of the images.
    channels_last: whether activations are NHWC in memory; weights are laid out likewise.
    """

    def __init__(
        self,
        backbone: nn.Module,
        fpn: nn.Module,
        head: nn.Module,
        anchors,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        channels_last: bool = False,
    ):
        super().__init__()
        self.backbone, self.fpn, self.head, self.anchors = backbone, fpn, head, anchors
        # Settings, not weights: a checkpoint of the same weights may come with other settings.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)
        self.set_memory_format(torch.channels_last if channels_last else torch.contiguous_format)

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Lay out weights and, from now on, activations in `memory_format`."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)

    def forward(self, images: Tensor) -> HeadOutputs:
        """Return the outputs for normalized images (N, 3, H, W), the same in training and in evaluation."""
        logits, deltas = self.head(self.fpn(self.backbone(images)))  # no name keeps a map longer than it is needed
        height, width = images.shape[-2:]
        return HeadOutputs(logits=logits, deltas=deltas, anchors=self.anchors((height, width), images.device))

    def normalize(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Return (images - mean) / std as float32, zero outside `image_sizes`, in the memory format of the model.

        A backbone that asks for more than three channels (`ResNet.pad_images`) gets zeros in the others.

        images: (N, 3, H, W) uint8, or floats in the same 0..255 (batches resized in floating point).
        image_sizes: (N, 2) (height, width) of each image in the batch; the rest of its plane is padding. The padding is
        zeroed after the mean is subtracted, as in every published RetinaNet: it then looks like an image's mean.
        """
        rows = torch.arange(images.shape[2], device=images.device) < image_sizes[:, :1]  # (N, H)
        columns = torch.arange(images.shape[3], device=images.device) < image_sizes[:, 1:]  # (N, W)
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        mean, std = self.pixel_mean, self.pixel_std
        if zeros := getattr(self.backbone, "in_channels", 3) - 3:  # before the conversion, in a quarter of the bytes
            end = (0, 0, 0, 0, 0, zeros)
            images, mean, std = F.pad(images, end), F.pad(mean, end), F.pad(std, end, value=1.0)
        images = images.to(torch.float32, memory_format=self.memory_format)  # loaders deliver NHWC
        return torch.where(inside, (images - mean) / std, 0.0)
