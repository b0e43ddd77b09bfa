"""What a dry run measures: shapes by hand, batches found by trying and from memory, and peaks that are real."""

import numpy as np
import pytest
import torch
from loader_cases import SIZES, config, take, write_nine_images
from step_cases import GN, new_trainer

from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_train_loader
from retinanet.engine.trials import (
    crowded_batch,
    largest_canvas,
    largest_in_memory,
    largest_that_fits,
    measure_step,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_nine_images(folder)
    return CocoDataset(folder, folder / "x.json")


@pytest.mark.parametrize("changes", [{}, {"DATALOADER__ASPECT_GROUPING": False}, {"INPUT__AUGMENT__MOSAIC": 0.5}])
def test_no_batch_is_larger_than_the_largest_canvas(dataset, changes):
    loader = build_train_loader(config(INPUT__MIN_SIZE_TRAIN=(24, 40), INPUT__MAX_SIZE_TRAIN=100, **changes), dataset)
    height, width = largest_canvas(loader)
    seen = np.array([batch.images.shape[2:] for batch in take(loader, 30)])
    assert (seen[:, 0] * seen[:, 1]).max() <= height * width
    assert height % 32 == width % 32 == 0


def test_the_largest_canvas_by_hand(dataset):
    """At 40 pixels, the most slender wide image (25, 60) becomes 40 x 96, and tall (50, 24) becomes 83 x 40."""
    assert max(width / height for height, width in SIZES) == 60 / 25
    loader = build_train_loader(config(INPUT__MIN_SIZE_TRAIN=(24, 40), INPUT__MAX_SIZE_TRAIN=100), dataset)
    assert largest_canvas(loader) == (64, 96)


@pytest.mark.parametrize("most", range(20))
def test_the_largest_batch_is_found_by_trying(most):
    tried = []
    assert largest_that_fits(lambda images: not tried.append(images) and images <= most) == most
    assert len(tried) <= 10 and len(set(tried)) == len(tried)


def test_the_largest_batch_has_a_limit():
    assert largest_that_fits(lambda images: True, most=10) == 10


def test_the_largest_batch_follows_from_two_peaks():
    """100 fixed and 50 for each image: 8 fit into 500, and 8 into 549."""
    peaks = {1: 150.0, 4: 300.0}
    assert [largest_in_memory(peaks, budget) for budget in (99, 149, 150, 500, 549, 550)] == [0, 0, 1, 8, 8, 9]
    assert largest_in_memory({1: 150.0, 4: float("inf")}, 200) == 1


def test_a_crowded_batch_trains_with_all_its_boxes():
    trainer = new_trainer(*GN)
    batch = crowded_batch(2, (64, 96), 50, 3)
    assert batch.images.shape == (2, 3, 64, 96) and (batch.gt_labels >= 0).sum(1).tolist() == [50, 50]
    assert (batch.gt_boxes[..., 2] <= 96).all() and (batch.gt_boxes[..., 3] <= 64).all()
    seconds, peak = measure_step(trainer, batch, 2, torch.device("cpu"))
    assert seconds > 0 and peak > 50 * 2**20


def test_boxes_of_an_image_smaller_than_them_are_cut():
    batch = crowded_batch(1, (32, 32), 3, 3)
    assert batch.gt_boxes[0, :3].min() >= 0 and batch.gt_boxes.max() <= 32
