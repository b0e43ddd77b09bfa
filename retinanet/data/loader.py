"""Data sets -> batches: what the workers do, and the two loaders.

One item that a worker gets is a whole micro-batch, and one that it returns is a whole `Batch`. What a sample becomes
depends on (seed, optimizer step, place in the step) alone, never on the worker, the rank or the time.
"""

import logging

import numpy as np
import torch

from retinanet.data.augment import Augmenter, Plan, Settings
from retinanet.data.buckets import ShapeBuckets
from retinanet.data.catalog import Concatenated
from retinanet.data.coco import CocoDataset
from retinanet.data.collate import Collator
from retinanet.data.image import ImageError
from retinanet.data.sampler import (
    MicroBatch,
    TrainSampler,
    aspect_groups,
    eval_batches,
    repeat_factors,
    trainable_rows,
)
from retinanet.data.transforms import Augmentation, draw_augmentation
from retinanet.data.views import EvalBatches, ImageBatcher, View
from retinanet.data.workers import Batches, BatchLoader
from retinanet.errors import UserError
from retinanet.structures import Batch, Target

logger = logging.getLogger(__name__)
NO_AUGMENTATION = Settings()


class TrainBatches(Batches):
    """`MicroBatch` -> `Batch` of this rank's part: read, augment, resize.

    An unreadable image stops training, or is replaced by the next readable one of `rows` while not more than
    `max_bad_images` different ones were met. They are marked in shared memory: the count is of this rank with all its
    workers, and `bad_images()` of the training process sees it.
    """

    def __init__(
        self,
        dataset: CocoDataset | Concatenated,
        collator: Collator,
        rows: np.ndarray,
        seed: int,
        short_sides: tuple[int, ...],
        flip_prob: float,
        max_bad_images: int = 0,
        buckets: ShapeBuckets | None = None,
        augment: Settings = NO_AUGMENTATION,
    ):
        """rows: (J,) sorted rows of the data set that take part; the rest as in the config.

        buckets: gives the shapes of the batches; all images of a step are then resized to one drawn short side.
        augment: what is drawn beside size and flip.
        """
        self.dataset, self.collator, self.rows, self.seed = dataset, collator, rows, seed
        self.short_sides, self.flip_prob, self.max_bad_images = tuple(short_sides), flip_prob, max_bad_images
        self.buckets = buckets
        plus_one, mode = dataset.plus_one_boxes, collator.mode
        self.augmenter = Augmenter(augment, seed, rows, dataset.image_size, collator.geometry, mode, plus_one)
        self._bad = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def bad_images(self) -> list[int]:
        """Return the rows of the unreadable images that this rank has met so far."""
        return torch.nonzero(self._bad).flatten().tolist()

    def load(self, micro_batch: MicroBatch) -> Batch:
        """Return this rank's part; raises `UserError` for an image that cannot be read and not be replaced."""
        batch = None
        while batch is None:
            batch = self._try_to_load(micro_batch)
        return batch

    def _try_to_load(self, micro_batch: MicroBatch) -> Batch | None:
        """Return the batch, or None after marking an unreadable image, which the next try replaces."""
        try:
            return self._load(micro_batch)
        except _UnreadableError as unreadable:
            self._count(unreadable)
            return None

    def _load(self, micro_batch: MicroBatch) -> Batch:
        samples, mine = micro_batch.samples, slice(micro_batch.start, micro_batch.stop)
        rows = [sample.index for sample in samples]
        rows[mine] = [self._readable(row) for row in rows[mine]]
        drawn = [self._draw(sample.step, sample.position) for sample in samples]
        plans = [
            self.augmenter.plan(row, sample.step, sample.position, augmentation.short_side, self._readable)
            for row, sample, augmentation in zip(rows, samples, drawn, strict=True)
        ]
        geometries = [self.collator.geometry(plan.size, plan.short_side) for plan in plans]
        return self.collator(
            map(self._make, plans[mine]),
            drawn[mine],
            geometries[mine],
            (self.buckets or self.collator).canvas(geometries),  # of all ranks
            self.dataset.image_ids[rows[mine]].tolist(),
        )

    def _make(self, plan: Plan) -> tuple[np.ndarray, Target]:
        return self.augmenter.make(plan, self._read)

    def _draw(self, step: int, position: int) -> Augmentation:
        generator = np.random.default_rng([self.seed, step, position])
        short_sides = self.short_sides
        if self.buckets:
            short_sides = (short_sides[np.random.default_rng([self.seed, step]).integers(len(short_sides))],)
        return draw_augmentation(generator, short_sides, self.flip_prob)

    def _read(self, row: int) -> tuple[np.ndarray, Target]:
        self.reading(row)
        try:
            return self.dataset.read(row)
        except ImageError as error:
            raise _UnreadableError(row, error) from None

    def _readable(self, row: int) -> int:
        """Return `row`, or the next row that is not known to be unreadable."""
        if not self._bad[row]:
            return row
        start = int(np.searchsorted(self.rows, row))
        for candidate in np.roll(self.rows, -start).tolist():
            if not self._bad[candidate]:
                return candidate
        raise UserError(f"data set {self.dataset.name!r}: not one of its {len(self.rows)} images can be read")

    def _count(self, unreadable: "_UnreadableError") -> None:
        """Mark the image; raises its error when there are too many."""
        self._bad[unreadable.row] = 1
        count = len(self.bad_images())
        if count > self.max_bad_images:
            found = f" ({count} unreadable images so far)" if count > 1 else ""
            raise ImageError(f"{unreadable.error}; DATALOADER.MAX_BAD_IMAGES is {self.max_bad_images}{found}")
        logger.warning("replaced an unreadable image (%d of %d): %s", count, self.max_bad_images, unreadable.error)


class _UnreadableError(Exception):
    """Says which row `error` is about."""

    def __init__(self, row: int, error: ImageError):
        super().__init__(row, error)
        self.row, self.error = row, error


def build_train_loader(
    cfg, dataset: CocoDataset | Concatenated, start_iteration: int = 0, rank: int = 0, world_size: int = 1
) -> BatchLoader:
    """Return the endless loader of this rank's micro-batches, the first being number `start_iteration`.

    Micro-batches count through: `SOLVER.ACCUMULATE` of them are one optimizer step. `loader.dataset.bad_images()` are
    the rows of images that had to be replaced. Iterate over it once: a second iterator starts over.
    """
    if cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH: {cfg.SOLVER.IMS_PER_BATCH} images cannot be shared equally by {world_size} "
            f"processes; take a multiple of {world_size}"
        )
    rows = trainable_rows(dataset.box_counts, cfg.DATALOADER.SKIP_EMPTY, dataset.name)
    threshold = cfg.DATALOADER.REPEAT_THRESHOLD
    factors = repeat_factors(dataset.box_counts, dataset.box_labels, threshold)[rows] if threshold > 0 else None
    images_per_step = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE
    collator = build_collator(cfg, cfg.INPUT.MAX_SIZE_TRAIN, dataset.plus_one_boxes)
    buckets = build_buckets(cfg, dataset.sizes[rows], images_per_step, collator)
    aspects = aspect_groups(dataset.sizes[rows]) if cfg.DATALOADER.ASPECT_GROUPING else None
    sampler = TrainSampler(
        rows,
        images_per_step,
        cfg.SEED,
        groups=buckets.groups if buckets else aspects,
        factors=factors,
        start_iteration=start_iteration,
        accumulate=cfg.SOLVER.ACCUMULATE,
        rank=rank,
        world_size=world_size,
    )
    batches = TrainBatches(
        dataset,
        collator,
        rows,
        cfg.SEED,
        cfg.INPUT.MIN_SIZE_TRAIN,
        cfg.INPUT.FLIP_PROB,
        cfg.DATALOADER.MAX_BAD_IMAGES,
        buckets,
        build_augmentation(cfg),
    )
    return build_batch_loader(cfg, batches, sampler)


def build_augmentation(cfg) -> Settings:
    """Return what the config wants to be drawn for each training sample beside its size and flip."""
    wanted = cfg.INPUT.AUGMENT
    return Settings(wanted.CROP, tuple(wanted.LSJ), wanted.MOSAIC, wanted.PHOTOMETRIC, wanted.MIN_VISIBLE)


def build_buckets(cfg, sizes: np.ndarray, images_per_step: int, collator: Collator) -> ShapeBuckets | None:
    """Return the fixed shapes for training images of `sizes` (J, 2), and log them; None where the config wants none."""
    if not cfg.DATALOADER.SHAPE_BUCKETS:
        return None
    short_sides, max_size = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN
    step = cfg.INPUT.SIZE_DIVISIBILITY
    buckets = ShapeBuckets(sizes, short_sides, max_size, step, images_per_step, collator.geometry)
    logger.info("%s", buckets.describe())
    return buckets


def build_test_loader(cfg, dataset: CocoDataset, rank: int = 0, world_size: int = 1) -> BatchLoader:
    """Return the loader of this rank's share of `dataset`; over the ranks every image occurs exactly once.

    The order is by aspect ratio, and ranks may differ by one batch: go by `Batch.image_ids`.
    """
    batches = EvalBatches(dataset, build_views(cfg))
    return build_batch_loader(cfg, batches, eval_batches(dataset.sizes, cfg.TEST.IMS_PER_BATCH, rank, world_size))


def build_image_batcher(cfg) -> ImageBatcher:
    """Return the function images (H, W, 3) uint8 BGR -> `Batch`, resized as in evaluation; for prediction."""
    return ImageBatcher(build_views(cfg))


def build_views(cfg) -> list[View]:
    """Return the views of each image in evaluation: all of `TEST.AUG.SCALES`, then all of them mirrored if wanted."""
    views = []
    for mirrored in (False, True) if cfg.TEST.AUG.FLIP else (False,):
        for scale in cfg.TEST.AUG.SCALES:
            collator = build_collator(cfg, max(1, round(scale * cfg.INPUT.MAX_SIZE_TEST)))
            views.append(View(collator, max(1, round(scale * cfg.INPUT.MIN_SIZE_TEST)), mirrored))
    return views


def build_collator(cfg, max_size: int, plus_one_boxes: bool = False) -> Collator:
    """Return the `Collator` that the config describes, with the long side capped at `max_size` pixels."""
    return Collator(cfg.INPUT.RESIZE, max_size, cfg.INPUT.SIZE_DIVISIBILITY, cfg.MODEL.CHANNEL_ORDER, plus_one_boxes)


def build_batch_loader(cfg, batches: Batches, order) -> BatchLoader:
    """Return the loader that asks `batches` for the items of `order`, with the workers that the config wants."""
    pin_memory = cfg.DEVICE != "cpu" and torch.cuda.is_available()
    return BatchLoader(batches, order, cfg.DATALOADER.NUM_WORKERS, pin_memory)
