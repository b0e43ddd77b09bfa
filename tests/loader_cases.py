"""What the tests of the loaders share: nine small images, a configuration for them, and how batches are compared."""

import json
from itertools import islice

import cv2
import numpy as np
import torch

from retinanet.config.defaults import get_cfg
from retinanet.structures import Batch

SIZES = [(30, 40), (40, 30), (33, 45), (50, 24), (28, 28), (37, 53), (44, 31), (25, 60), (61, 35)]


def write_nine_images(folder) -> None:
    """Write nine images of different sizes and `x.json`; the first, the fifth and the last have no box."""
    generator = np.random.default_rng(0)
    annotations = []
    for i, (height, width) in enumerate(SIZES):
        cv2.imwrite(str(folder / f"{i}.png"), generator.integers(0, 256, (height, width, 3)).astype(np.uint8))
        for _ in range(i % 4 if i < len(SIZES) - 1 else 0):
            x, y = generator.integers(0, 12, 2).tolist()
            annotations.append({"image_id": 100 + i, "category_id": i % 3, "bbox": [x, y, 9.5, 11.25]})
    images = [
        {"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height}
        for i, (height, width) in enumerate(SIZES)
    ]
    categories = [{"id": k, "name": str(k)} for k in range(3)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "x.json").write_text(json.dumps(content))


def config(**changes):
    cfg = get_cfg()
    cfg.DEVICE = "cpu"
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.TEST.IMS_PER_BATCH = 4
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (24, 32), 60
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 32, 60
    cfg.merge_from_list([item for pair in changes.items() for item in (pair[0].replace("__", "."), pair[1])])
    return cfg


def take(loader, count: int) -> list[Batch]:
    return list(islice(iter(loader), count))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, two in zip(first, second, strict=True):
        assert one.image_ids == two.image_ids
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, getattr(two, name), rtol=0, atol=0)
