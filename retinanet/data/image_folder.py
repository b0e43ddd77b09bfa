"""A folder of images with a sub-folder for each class (train/CLASS/*, val/CLASS/*, as ImageNet) -> labelled batches.

As in detection, what a sample becomes depends on (seed, optimizer step, place in the step) alone, never on the worker,
the rank or the time, so a resumed run sees what the uninterrupted one saw.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from retinanet.data.image import ImageError
from retinanet.data.loader import build_batch_loader
from retinanet.data.sampler import MicroBatch, TrainSampler
from retinanet.data.workers import Batches, BatchLoader
from retinanet.errors import UserError

TEST_CROP = 0.875  # side of the crop / short side of the resized image (224 / 256)


@dataclass
class LabelledImages:
    """images: (N, 3, S, S) uint8 in the channel order of the model. labels: (N,) int64 in [0, K). image_ids: rows."""

    images: Tensor
    labels: Tensor
    image_ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "LabelledImages":
        """Return the batch on `device`; copies from pinned memory do not wait for the device."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def pin_memory(self) -> "LabelledImages":
        """Return the batch in page-locked memory; `torch.utils.data.DataLoader` calls this."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


class FolderBatches(Batches):
    """`MicroBatch` or list of rows -> `LabelledImages`; an unreadable image is a `UserError` that names its path."""

    def __init__(self, folder: ImageFolder, transform: v2.Transform, seed: int, channel_order: str):
        self.folder, self.transform, self.seed, self.channel_order = folder, transform, seed, channel_order

    def load(self, asked: MicroBatch | list[int]) -> LabelledImages:
        """Return this rank's part, or the images of these rows; raises `UserError` for one that cannot be read."""
        if isinstance(asked, MicroBatch):
            samples = asked.samples[asked.start : asked.stop]
            return self._batch([s.index for s in samples], [(s.step, s.position) for s in samples])
        return self._batch(asked, [(0, 0)] * len(asked))

    def file(self, row: int) -> Path:
        """Return the path of image `row`."""
        return Path(self.folder.samples[row][0])

    def _batch(self, rows: list[int], places: list[tuple[int, int]]) -> LabelledImages:
        images = torch.stack([self._read(row, place) for row, place in zip(rows, places, strict=True)])
        images = images.flip(1) if self.channel_order == "BGR" else images
        labels = torch.tensor([self.folder.targets[row] for row in rows], dtype=torch.int64)
        return LabelledImages(images, labels, rows)

    def _read(self, row: int, place: tuple[int, int]) -> Tensor:
        """Return (3, S, S) uint8 RGB; torchvision draws from PyTorch's generator, which is as before afterwards."""
        path = self.folder.samples[row][0]
        self.reading(row)
        try:
            image = self.folder.loader(path)
        except (OSError, UnidentifiedImageError) as error:
            raise ImageError(f"{path}: the image cannot be read ({error}); restore the file or remove it") from None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, *place]).generate_state(1, np.uint64)[0]))
            return self.transform(image)


def open_folder(root: str | Path, split: str) -> ImageFolder:
    """Return `root`/`split` with its classes in the order of their names; `UserError` when it has no such layout."""
    folder = Path(root) / split
    try:
        return ImageFolder(str(folder))
    except (OSError, FileNotFoundError) as error:
        raise UserError(
            f"--data: {folder} is not a folder with a sub-folder of images for each class ({error}); expected are "
            f"{root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg, as tools/make_synthetic.py --classification writes"
        ) from None


def open_folders(root: str | Path) -> tuple[ImageFolder, ImageFolder]:
    """Return training and validation images; `UserError` when their classes differ."""
    train, val = (open_folder(root, split) for split in ("train", "val"))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(
            f"--data: {root}: train and val have different classes: {', '.join(odd[:8])} in only one of them"
        )
    return train, val


def train_transform(size: int, flip_prob: float, small: bool) -> v2.Transform:
    """Return crop and flip: of a random part resized to `size` (ImageNet), or `small`: shifted by up to an eighth."""
    crop = [v2.RandomResizedCrop(size, antialias=True)]
    if small:
        crop = [v2.Resize((size, size), antialias=True), v2.RandomCrop(size, padding=max(size // 8, 1))]
    return v2.Compose([*crop, v2.RandomHorizontalFlip(flip_prob), v2.PILToTensor()])


def eval_transform(size: int, small: bool) -> v2.Transform:
    """Return the resize and central crop of validation; `small`: no crop."""
    resize = [v2.Resize(round(size / TEST_CROP), InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*([v2.Resize((size, size), antialias=True)] if small else resize), v2.PILToTensor()])


def build_folder_train_loader(
    cfg, folder: ImageFolder, small: bool, start_iteration: int = 0, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Return the endless loader of this rank's micro-batches, the first being number `start_iteration`."""
    transform = train_transform(cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.FLIP_PROB, small)
    sampler = TrainSampler(
        np.arange(len(folder)),
        cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE,
        cfg.SEED,
        start_iteration=start_iteration,
        accumulate=cfg.SOLVER.ACCUMULATE,
        rank=rank,
        world_size=world_size,
    )
    batches = FolderBatches(folder, transform, cfg.SEED, cfg.MODEL.CHANNEL_ORDER)
    return build_batch_loader(cfg, batches, sampler)


def build_folder_test_loader(cfg, folder: ImageFolder, small: bool, rank: int = 0, world_size: int = 1) -> BatchLoader:
    """Return the loader of this rank's share of `folder`; over the ranks every image occurs exactly once."""
    rows = list(range(rank, len(folder), world_size))
    size = cfg.TEST.IMS_PER_BATCH
    batches = FolderBatches(folder, eval_transform(cfg.INPUT.MIN_SIZE_TEST, small), cfg.SEED, cfg.MODEL.CHANNEL_ORDER)
    return build_batch_loader(cfg, batches, [rows[start : start + size] for start in range(0, len(rows), size)])
