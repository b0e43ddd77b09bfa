"""Images and targets -> `Batch`: the images are resized straight into their slots of one array.

The array is (N, H, W, 3), so the batch's images (N, 3, H, W) are channels_last in memory. Inside a loader worker it
lies in shared memory from the start, which spares the copy that sending it to the training process would cost.
"""

from collections.abc import Iterable

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from retinanet.data.transforms import (
    FLOAT_MODES,
    Augmentation,
    Geometry,
    flip_boxes,
    flip_image,
    resize_geometry,
    resize_into,
)
from retinanet.structures import Batch, Target, pad_targets


class Collator:
    """How images become a batch: resize mode and cap, padding, channel order and box convention.

    mode: a value of `INPUT.RESIZE`. max_size: cap of the long side in pixels. divisibility: batches are padded to a
    multiple of it. channel_order: BGR or RGB. plus_one: boxes flip as pixel indices (Detectron).
    """

    def __init__(self, mode: str, max_size: int, divisibility: int, channel_order: str, plus_one: bool = False):
        self.mode, self.max_size, self.divisibility = mode, max_size, divisibility
        self.channel_order, self.plus_one = channel_order, plus_one

    def geometry(self, size: tuple[int, int], short_side: int) -> Geometry:
        """Return how an image of `size` (height, width) is resized."""
        return resize_geometry(size, short_side, self.max_size, self.mode)

    def canvas(self, geometries: list[Geometry]) -> tuple[int, int]:
        """Return the (height, width) that holds all of these, rounded up to the divisibility."""
        step = self.divisibility
        height, width = (max(geometry.size[axis] for geometry in geometries) for axis in (0, 1))
        return -(-height // step) * step, -(-width // step) * step

    def __call__(
        self,
        samples: Iterable[tuple[np.ndarray, Target]],
        augmentations: list[Augmentation],
        geometries: list[Geometry],
        canvas: tuple[int, int],
        image_ids: list[int],
    ) -> Batch:
        """Return the batch of N samples, each (image (H, W, 3) uint8 BGR, target in original pixels).

        `samples` is consumed one at a time, so a generator keeps one decoded image in memory.
        """
        pixels = _allocate(len(geometries), canvas, torch.float32 if self.mode in FLOAT_MODES else torch.uint8)
        targets, original_sizes = [], []
        for slot, (image, target), augmentation, geometry in zip(
            pixels.numpy(), samples, augmentations, geometries, strict=True
        ):
            self._place(image, slot, augmentation, geometry)
            targets.append(self._flipped(target, image.shape[1]) if augmentation.flip else target)
            original_sizes.append(image.shape[:2])
        gt_boxes, gt_labels = pad_targets(targets)
        scales = torch.tensor([geometry.scales for geometry in geometries], dtype=torch.float32)  # (N, 2)
        return Batch(
            images=pixels.permute(0, 3, 1, 2),
            image_sizes=torch.tensor([geometry.size for geometry in geometries], dtype=torch.int64),
            original_sizes=torch.tensor(original_sizes, dtype=torch.int64),
            scales=scales,
            gt_boxes=gt_boxes * scales.repeat(1, 2)[:, None],  # at once: the padding is zeros
            gt_labels=gt_labels,
            image_ids=image_ids,
        )

    def _place(self, image: np.ndarray, slot: np.ndarray, augmentation: Augmentation, geometry: Geometry) -> None:
        """Write the augmented image into `slot` (H, W, 3), zeros at the bottom and right."""
        height, width = geometry.size
        if self.channel_order == "RGB":
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        if augmentation.flip:
            image = flip_image(image)
        resize_into(image, slot[:height, :width], geometry.scales, self.mode)
        slot[height:] = 0
        slot[:height, width:] = 0

    def _flipped(self, target: Target, width: int) -> Target:
        return Target(boxes=flip_boxes(target["boxes"], width, self.plus_one), labels=target["labels"])


def _allocate(num_images: int, canvas: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised (N, H, W, 3) tensor, in shared memory inside a worker."""
    shape = (num_images, *canvas, 3)
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    flat = torch.empty(0, dtype=dtype)
    storage = flat.untyped_storage()._new_shared(int(np.prod(shape)) * flat.element_size())
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)
