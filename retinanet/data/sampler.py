"""Which image goes where: one endless sampler, the same for any number of processes and workers.

The order is a function of the seed alone, so nothing has to be saved: a resumed run asks for micro-batch i and gets
what the uninterrupted run got. Images are drawn for whole optimizer steps; a step is cut into micro-batches, and those
into one part per rank, so that 1 x 16, 2 x 8 and 16 x 1 images see the same data in the same step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from retinanet.errors import UserError


class Sample(NamedTuple):
    """One image of a step: row in the data set, number of the optimizer step, place in the step."""

    index: int
    step: int
    position: int


class MicroBatch(NamedTuple):
    """One micro-batch of all ranks, and the slice `samples[start:stop]` that this rank loads.

    All ranks know all samples: they pad to one common size, so that N processes compute what one would.
    """

    samples: list[Sample]
    start: int
    stop: int


class TrainSampler:
    """Endless micro-batches of one rank, from `start_iteration` on.

    Each epoch is a permutation drawn from (seed, epoch). With `groups`, a step holds images of one group only: the
    images of the epoch queue up by group, a full queue is a step, and what is left at the end stays in the queue for
    the next epoch, so that no image is ever lost. A group that does not fill one step joins the largest.
    """

    def __init__(
        self,
        indices: np.ndarray,
        images_per_step: int,
        seed: int,
        groups: np.ndarray | None = None,
        factors: np.ndarray | None = None,
        start_iteration: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Describe the order; nothing is drawn yet.

        indices: (J,) rows of the data set that take part. groups, factors: (J,) group number and repeat factor >= 1
        of each (see `repeat_factors`). start_iteration: number of the first micro-batch. images_per_step is of all
        ranks and `accumulate` micro-batches together.
        """
        assert images_per_step % (accumulate * world_size) == 0, (images_per_step, accumulate, world_size)
        self.indices = np.asarray(indices, dtype=np.int64)
        self.images_per_step, self.seed = images_per_step, seed
        self.groups = np.zeros(len(self.indices), np.int64) if groups is None else _join_small(groups, images_per_step)
        self.factors = factors
        self.start_iteration, self.accumulate = start_iteration, accumulate
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[MicroBatch]:
        start_step, skipped = divmod(self.start_iteration, self.accumulate)
        per_rank = self.images_per_step // (self.accumulate * self.world_size)
        for step, rows in self._steps(start_step):
            samples = [Sample(index, step, position) for position, index in enumerate(rows.tolist())]
            micro_batches = np.split(np.arange(len(samples)), self.accumulate)
            for places in micro_batches[skipped:]:
                chosen = samples[places[0] : places[-1] + 1]
                yield MicroBatch(chosen, self.rank * per_rank, (self.rank + 1) * per_rank)
            skipped = 0

    def _steps(self, start_step: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (step number, (images_per_step,) rows of the data set) from `start_step` on."""
        step, epoch = 0, 0
        queues = {int(group): np.empty(0, np.int64) for group in np.unique(self.groups)}
        while True:
            for rows in self._fill(queues, self._epoch(epoch)):
                if step >= start_step:
                    yield step, self.indices[rows]
                step += 1
            epoch += 1

    def _epoch(self, epoch: int) -> np.ndarray:
        """Return the places in `indices` in the order of this epoch, repeated by their factors."""
        generator = np.random.default_rng([self.seed, epoch])
        places = np.arange(len(self.indices))
        if self.factors is not None:  # a factor of 1.3 means twice in 30 % of the epochs
            whole = np.floor(self.factors)
            extra = generator.random(len(places)) < self.factors - whole
            places = np.repeat(places, (whole + extra).astype(np.int64))
        return generator.permutation(places)

    def _fill(self, queues: dict[int, np.ndarray], places: np.ndarray) -> list[np.ndarray]:
        """Send `places` through the queues (changed in place) and return the full steps in the order they fill."""
        full: list[tuple[int, np.ndarray]] = []
        for group, waiting in queues.items():
            arrivals = np.flatnonzero(self.groups[places] == group)
            queue = np.concatenate([waiting, places[arrivals]])
            num_full = len(queue) // self.images_per_step
            ends = np.arange(1, num_full + 1) * self.images_per_step
            times = arrivals[ends - len(waiting) - 1]  # when the last image of each step came
            full += zip(times.tolist(), np.split(queue[: num_full * self.images_per_step], num_full or 1), strict=False)
            queues[group] = queue[num_full * self.images_per_step :]
        return [rows for _, rows in sorted(full, key=lambda item: item[0])]


def _join_small(groups: np.ndarray, images_per_step: int) -> np.ndarray:
    """Return the groups with those too small for one step moved to the largest.

    Alone, three tall images and a step of 16 would make a step out of copies of the same three.
    """
    groups = np.asarray(groups, dtype=np.int64)
    names, counts = np.unique(groups, return_counts=True)
    return np.where(np.isin(groups, names[counts < images_per_step]), names[counts.argmax()], groups)


def aspect_groups(sizes: np.ndarray) -> np.ndarray:
    """Return (J,) int64: 1 for images taller than wide, else 0; sizes: (J, 2) (height, width)."""
    return (sizes[:, 0] > sizes[:, 1]).astype(np.int64)


def repeat_factors(box_counts: np.ndarray, box_labels: np.ndarray, threshold: float) -> np.ndarray:
    """Return (I,) float64 >= 1: how often each image is shown per epoch, on average.

    A class in the share f of the images has the factor max(1, sqrt(threshold / f)), and an image that of its rarest
    class; images without boxes have 1. box_counts: (I,) boxes of each image, box_labels: (B,) sorted by image.
    Source: LVIS (arXiv 1908.03195), appendix B.3.
    """
    num_images = len(box_counts)
    image_of_box = np.repeat(np.arange(num_images), box_counts)  # (B,)
    factors = np.ones(num_images)
    if len(box_labels) == 0:
        return factors
    pairs = np.unique(np.stack([image_of_box, box_labels.astype(np.int64)], axis=1), axis=0)  # image, class in it
    share = np.bincount(pairs[:, 1]) / num_images
    with np.errstate(divide="ignore"):  # classes in no image
        of_class = np.maximum(1.0, np.sqrt(threshold / share))
    np.maximum.at(factors, pairs[:, 0], of_class[pairs[:, 1]])
    return factors


def trainable_rows(box_counts: np.ndarray, skip_empty: bool, name: str) -> np.ndarray:
    """Return the rows that take part in training; raises `UserError` when the data set has no box at all."""
    if not box_counts.any():
        raise UserError(
            f"data set {name!r}: none of its {len(box_counts)} images has a box (crowds do not count), there is "
            "nothing to learn; is it the json of a test split?"
        )
    return np.flatnonzero(box_counts > 0) if skip_empty else np.arange(len(box_counts))


def eval_batches(sizes: np.ndarray, images_per_batch: int, rank: int, world_size: int) -> list[list[int]]:
    """Return this rank's batches of rows; over the ranks every row occurs exactly once.

    Images are sorted by aspect ratio, so that a batch needs little padding. sizes: (I, 2) (height, width).
    """
    order = np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable").tolist()
    batches = [order[start : start + images_per_batch] for start in range(0, len(order), images_per_batch)]
    return batches[rank::world_size]
