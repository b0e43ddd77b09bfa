"""The views of test-time augmentation: which sizes, what is mirrored, and that without them nothing changes."""

import cv2
import numpy as np
import pytest
import torch
from loader_cases import assert_same, config, write_nine_images

from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_image_batcher, build_test_loader


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_nine_images(folder)
    return CocoDataset(folder, folder / "x.json")


def test_each_view_is_the_image_on_disk_resized_and_mirrored(dataset):
    cfg = config(TEST__AUG__FLIP=True, TEST__AUG__SCALES=(1.0, 1.5))  # 32 and 48 pixels, capped at 60 and 90
    rows = {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}
    for batch in build_test_loader(cfg, dataset):
        views = [batch, *batch.views]
        assert [view.mirrored for view in views] == [False, False, True, True]
        for view, short_side, cap in zip(views, (32, 48, 32, 48), (60, 90, 60, 90), strict=True):
            assert view.image_ids == batch.image_ids and torch.equal(view.original_sizes, batch.original_sizes)
            for place, image_id in enumerate(view.image_ids):
                height, width = view.image_sizes[place].tolist()
                assert min(height, width) == short_side or max(height, width) == cap
                image = dataset.read(rows[image_id])[0]
                expected = cv2.resize(image[:, ::-1] if view.mirrored else image, (width, height))
                slot = view.images[place].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(slot[:height, :width], expected)


def test_views_come_through_workers_and_follow_their_batch(dataset):
    changes = {"TEST__AUG__FLIP": True, "TEST__AUG__SCALES": (0.5, 1.0)}
    alone = list(build_test_loader(config(**changes), dataset))
    workers = list(build_test_loader(config(**changes, DATALOADER__NUM_WORKERS=2), dataset))
    for views in zip(*([batch, *batch.views] for batch in alone), strict=True):
        assert len({(view.mirrored, len(view.views)) for view in views}) == 1
    assert_same([view for batch in alone for view in batch.views], [view for batch in workers for view in batch.views])
    moved = alone[0].to("meta")
    assert all(view.images.device.type == "meta" for view in [moved, *moved.views]) and len(moved.views) == 3


def test_prediction_sees_the_same_views(dataset):
    cfg = config(TEST__AUG__FLIP=True, TEST__IMS_PER_BATCH=1)
    batcher = build_image_batcher(cfg)
    for batch in build_test_loader(cfg, dataset):
        image, _ = dataset.read(dataset.image_ids.tolist().index(batch.image_ids[0]))
        (view,) = batcher([image]).views
        torch.testing.assert_close(view.images, batch.views[0].images, rtol=0, atol=0)


def test_without_augmentation_there_are_no_views(dataset):
    assert all(not batch.views and not batch.mirrored for batch in build_test_loader(config(), dataset))
