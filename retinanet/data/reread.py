"""A batch of training once more: the order is a function of the seed, so any step can be read again."""

import copy
from itertools import islice

from retinanet.data.workers import BatchLoader
from retinanet.errors import UserError
from retinanet.structures import Batch


def read_step(loader: BatchLoader, step: int) -> list[list[Batch]]:
    """Return the micro-batches of optimizer step `step`, counted from 0, read in this process: by rank, in order.

    loader: of `build_train_loader`, of any rank. The batches equal those that its workers delivered.
    """
    ranks = []
    for rank in range(loader.sampler.world_size):
        order = copy.copy(loader.sampler)
        order.rank, order.start_iteration = rank, step * order.accumulate
        ranks.append([loader.dataset[item] for item in islice(order, order.accumulate)])
    for item in (item for items in ranks for item in items):
        if isinstance(item, UserError):
            raise item
    return ranks


def files_of(loader: BatchLoader, image_ids: list[int]) -> list[str]:
    """Return the path of each image, or "" for an id that several of the joined data sets have."""
    dataset = loader.dataset.dataset
    rows = {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}
    repeated = len(rows) < len(dataset)
    return ["" if repeated else str(dataset.file(rows[image_id])) for image_id in image_ids]
