"""Trials of a training step before a run: the largest shape that the data can have, the memory of a step, what fits."""

import math
import time
from collections.abc import Callable

import numpy as np
import torch

from retinanet.data.augment import Settings
from retinanet.data.workers import BatchLoader
from retinanet.engine.train import Trainer, train_step
from retinanet.structures import Batch, pad_targets
from retinanet.utils import memory

HEADROOM = 0.9  # share of the free memory to plan with: fragmentation, and what evaluation and other programs take


def largest_canvas(loader: BatchLoader) -> tuple[int, int]:
    """Return the (height, width) that holds every batch that the loader of training can deliver.

    Height and width are each the largest of a group of images that may share a batch. Where images are cropped or put
    together, the square of the cap of the long side.
    """
    batches = loader.dataset
    if batches.buckets:
        return max(batches.buckets.shapes, key=lambda shape: shape[0] * shape[1])
    collator = batches.collator
    if batches.augmenter.settings._replace(colour=0.0, min_visible=0.0) != Settings():
        side = -(-collator.max_size // collator.divisibility) * collator.divisibility
        return side, side
    sizes, groups = batches.dataset.sizes[loader.sampler.indices], loader.sampler.groups
    canvases = []
    for group in np.unique(groups):
        distinct = np.unique(sizes[groups == group], axis=0).tolist()
        geometries = [collator.geometry(tuple(size), side) for size in distinct for side in batches.short_sides]
        canvases.append(collator.canvas(geometries))
    return max(canvases, key=lambda shape: shape[0] * shape[1])


def crowded_batch(images: int, canvas: tuple[int, int], boxes: int, num_classes: int) -> Batch:
    """Return a batch of noise of that shape, each image with that many boxes of 32 pixels."""
    generator = torch.Generator().manual_seed(0)
    height, width = canvas
    size = torch.tensor([float(width), float(height)])
    corners = torch.rand(boxes, 2, generator=generator) * (size - 33).clamp(min=0)
    ends = torch.minimum(corners + 32, size)
    target = {"boxes": torch.cat([corners, ends], 1), "labels": torch.arange(boxes) % num_classes}
    sizes = torch.tensor([canvas] * images)
    pixels = torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8, generator=generator)
    padded = pad_targets([target] * images)
    return Batch(pixels.permute(0, 3, 1, 2), sizes, sizes, torch.ones(images, 2), *padded, list(range(images)))


def measure_step(trainer: Trainer, batch: Batch, accumulate: int, device: torch.device) -> tuple[float, int]:
    """Return the seconds and the most memory in bytes of one step of `accumulate` such batches; weights change.

    Raises what the allocator raises when the step does not fit.
    """
    trainer.model.train()
    memory.restart_peak(device)
    start = time.perf_counter()
    float(train_step(trainer, [batch.to(device) for _ in range(accumulate)])["loss"])  # waits for the device
    return time.perf_counter() - start, memory.peak(device)


def largest_that_fits(fits: Callable[[int], bool], most: int = 1024) -> int:
    """Return the largest number of images up to `most` for which `fits` holds, 0 when one image does not fit."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_in_memory(peaks: dict[int, float], budget: int) -> int:
    """Return how many images fit into `budget` bytes, from the measured peaks of two numbers of images.

    Memory is a fixed part and a part for each image.
    """
    (few, less), (many, more) = sorted(peaks.items())
    if more == math.inf:  # it did not survive
        return few if less <= budget else 0
    each = max(more - less, 1) / (many - few)
    return max(0, int(few + (budget - less) / each))


def fits_on_gpu(trainer: Trainer, make: Callable[[int], Batch], accumulate: int, device: torch.device):
    """Return the function images -> whether a step with that many fits on the GPU, by trying."""

    def fits(images: int) -> bool:
        try:
            measure_step(trainer, make(images), accumulate, device)
        except RuntimeError as error:
            if not memory.is_out_of_memory(error):
                raise
            return False
        finally:
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    return fits
