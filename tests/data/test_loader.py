"""Batches: slow reference for pixels and boxes, and the same batches for any workers, ranks and starting point."""

import cv2
import numpy as np
import pytest
import torch
from loader_cases import assert_same, config, take

from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_image_batcher, build_test_loader, build_train_loader
from retinanet.data.transforms import draw_augmentation
from retinanet.structures import PAD_LABEL


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_batch_holds_resized_flipped_padded_images_and_their_boxes(dataset, order):
    """Slow reference: each sample by itself, from the (seed, step, position) of its place."""
    cfg = config(SEED=3, MODEL__CHANNEL_ORDER=order, INPUT__SIZE_DIVISIBILITY=16)
    rows = {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}
    flips = set()
    for step, batch in enumerate(take(build_train_loader(cfg, dataset), 5)):
        assert batch.images.dtype == torch.uint8 and batch.images.shape[0] == len(batch) == 4
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.images.shape[2] == -(-batch.image_sizes[:, 0].max() // 16) * 16
        assert batch.images.shape[3] == -(-batch.image_sizes[:, 1].max() // 16) * 16
        for place, image_id in enumerate(batch.image_ids):
            image, target = dataset.read(rows[image_id])
            drawn = draw_augmentation(np.random.default_rng([3, step, place]), (24, 32), 0.5)
            flips.add(drawn.flip)
            height, width = image.shape[:2]
            scale = min(drawn.short_side / min(height, width), 60 / max(height, width))
            size = (round(height * scale), round(width * scale))
            pixels = cv2.resize(image[:, ::-1] if drawn.flip else image, size[::-1], interpolation=cv2.INTER_LINEAR)
            pixels = pixels[..., ::-1] if order == "RGB" else pixels
            slot = batch.images[place].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(slot[: size[0], : size[1]], pixels)
            assert not slot[size[0] :].any() and not slot[:, size[1] :].any()
            boxes = []
            for x1, y1, x2, y2 in target["boxes"].tolist():
                x1, x2 = (width - x2, width - x1) if drawn.flip else (x1, x2)
                boxes.append([x1 * size[1] / width, y1 * size[0] / height, x2 * size[1] / width, y2 * size[0] / height])
            count = len(boxes)
            expected = torch.tensor(boxes).reshape(-1, 4)
            torch.testing.assert_close(batch.gt_boxes[place, :count], expected, rtol=0, atol=1e-4)
            assert batch.gt_labels[place, :count].tolist() == target["labels"].tolist()
            assert (batch.gt_labels[place, count:] == PAD_LABEL).all() and not batch.gt_boxes[place, count:].any()
            assert batch.image_sizes[place].tolist() == list(size)
            assert batch.original_sizes[place].tolist() == [height, width]
            expected = torch.tensor([size[1] / width, size[0] / height])
            torch.testing.assert_close(batch.scales[place], expected)
    assert flips == {True, False}


@pytest.mark.parametrize("mode", ["cv2", "cv2_float", "pil", "torchvision"])
def test_every_resize_mode_makes_batches(dataset, mode):
    (batch,) = take(build_train_loader(config(INPUT__RESIZE=mode), dataset), 1)
    assert batch.images.dtype == (torch.float32 if mode in ("cv2_float", "torchvision") else torch.uint8)
    assert 100 < batch.images[0, :, :20, :20].float().mean() < 155  # the noise of the test images
    one_scale = (batch.scales[:, 0] == batch.scales[:, 1]).all()
    assert one_scale if mode == "cv2_float" else not one_scale


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(dataset, workers):
    alone = take(build_train_loader(config(), dataset), 9)
    assert_same(alone, take(build_train_loader(config(DATALOADER__NUM_WORKERS=workers), dataset), 9))


def test_spawned_workers_change_nothing(dataset):
    loader = build_train_loader(config(DATALOADER__NUM_WORKERS=1), dataset)
    loader.multiprocessing_context = "spawn"
    assert_same(take(build_train_loader(config(), dataset), 3), take(loader, 3))


@pytest.mark.parametrize("start, accumulate", [(1, 1), (5, 1), (3, 2), (4, 2)])
def test_starting_later_equals_skipping(dataset, start, accumulate):
    cfg = config(SOLVER__ACCUMULATE=accumulate)
    whole = take(build_train_loader(cfg, dataset), start + 4)
    assert_same(whole[start:], take(build_train_loader(cfg, dataset, start_iteration=start), 4))


def test_ranks_load_the_parts_of_one_batch(dataset):
    cfg = config(DATALOADER__ASPECT_GROUPING=False)  # so that the ranks differ in their own sizes
    alone = take(build_train_loader(cfg, dataset), 6)
    ranks = [take(build_train_loader(cfg, dataset, rank=rank, world_size=2), 6) for rank in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert sum((part.image_ids for part in parts), []) == whole.image_ids
        for name in ("images", "image_sizes", "scales"):
            together = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(together, getattr(whole, name), rtol=0, atol=0)


def test_micro_batches_are_the_big_batch_in_parts(dataset):
    big = take(build_train_loader(config(), dataset), 4)
    parts = take(build_train_loader(config(SOLVER__IMS_PER_BATCH=2, SOLVER__ACCUMULATE=2), dataset), 8)
    for i, batch in enumerate(big):
        pair = parts[2 * i : 2 * i + 2]
        assert pair[0].image_ids + pair[1].image_ids == batch.image_ids
        torch.testing.assert_close(torch.cat([part.scales for part in pair]), batch.scales, rtol=0, atol=0)
        count = min(part.gt_boxes.shape[1] for part in pair)
        boxes = torch.cat([part.gt_boxes[:, :count] for part in pair])
        torch.testing.assert_close(boxes, batch.gt_boxes[:, :count], rtol=0, atol=0)  # the same flips


def test_other_seed_is_another_order(dataset):
    ids = [[batch.image_ids for batch in take(build_train_loader(config(SEED=seed), dataset), 5)] for seed in (0, 1)]
    assert ids[0] != ids[1]


def test_making_a_loader_leaves_the_global_generators_alone(dataset):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(build_train_loader(config(DATALOADER__NUM_WORKERS=1), dataset), 2)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_aspect_grouping_separates_tall_from_wide(dataset):
    batches = take(build_train_loader(config(), dataset), 12)
    for batch in batches:
        assert len({bool(height > width) for height, width in batch.original_sizes.tolist()}) == 1
    mixed = take(build_train_loader(config(DATALOADER__ASPECT_GROUPING=False), dataset), 12)
    assert any(len({bool(h > w) for h, w in batch.original_sizes.tolist()}) == 2 for batch in mixed)


def test_empty_images_train_unless_skipped(dataset):
    empty = {100, 104, 108}
    seen = {image_id for batch in take(build_train_loader(config(), dataset), 14) for image_id in batch.image_ids}
    assert empty < seen
    cfg = config(DATALOADER__SKIP_EMPTY=True)
    seen = {image_id for batch in take(build_train_loader(cfg, dataset), 14) for image_id in batch.image_ids}
    assert seen == {101, 102, 103, 105, 106, 107}


def test_repeat_threshold_shows_rare_classes_more_often(dataset):
    def counts(threshold):
        cfg = config(DATALOADER__REPEAT_THRESHOLD=threshold, DATALOADER__ASPECT_GROUPING=False)
        ids = sum((batch.image_ids for batch in take(build_train_loader(cfg, dataset), 40)), [])
        return np.bincount(np.array(ids) - 100, minlength=9)

    plain, repeated = counts(0.0), counts(2.0)
    assert plain.max() - plain.min() <= 1
    assert repeated[[0, 4, 8]].max() < repeated[[1, 2, 3, 5, 6, 7]].min()  # 0, 4, 8 have no box


def test_evaluation_sees_every_image_once_and_unchanged(dataset):
    for world_size in (1, 2, 4):
        batches = [
            b
            for rank in range(world_size)
            for b in build_test_loader(config(), dataset, rank=rank, world_size=world_size)
        ]
        assert sorted(sum((batch.image_ids for batch in batches), [])) == dataset.image_ids.tolist()
    rows = {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}
    for batch in batches:
        for place, image_id in enumerate(batch.image_ids):
            image, target = dataset.read(rows[image_id])
            height, width = batch.image_sizes[place].tolist()
            assert min(height, width) == 32 or max(height, width) == 60
            expected = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
            slot = batch.images[place].permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(slot[:height, :width], expected)
            assert (batch.gt_labels[place] != PAD_LABEL).sum() == len(target["labels"])


def test_loader_of_evaluation_can_be_used_again(dataset):
    loader = build_test_loader(config(DATALOADER__NUM_WORKERS=1), dataset)
    assert len(loader) == 3
    assert_same(list(loader), list(loader))


def test_prediction_resizes_as_evaluation_does(dataset):
    batcher = build_image_batcher(config())
    for batch in build_test_loader(config(TEST__IMS_PER_BATCH=1), dataset):
        image, _ = dataset.read(dataset.image_ids.tolist().index(batch.image_ids[0]))
        single = batcher([image])
        torch.testing.assert_close(single.images, batch.images, rtol=0, atol=0)
        torch.testing.assert_close(single.scales, batch.scales, rtol=0, atol=0)
        assert single.image_ids == [0] and (single.gt_labels == PAD_LABEL).all()


def test_detectron_boxes_flip_as_pixel_indices(folder):
    dataset = CocoDataset(folder, folder / "x.json", plus_one_boxes=True)
    cfg = config(INPUT__FLIP_PROB=1.0, INPUT__RESIZE="cv2_float")
    (batch,) = take(build_train_loader(cfg, dataset), 1)
    for place, image_id in enumerate(batch.image_ids):
        boxes, scale = dataset.target(image_id - 100)["boxes"], batch.scales[place, 0]
        x1 = (batch.original_sizes[place, 1] - boxes[:, 2] - 1) * scale
        torch.testing.assert_close(batch.gt_boxes[place, : len(boxes), 0], x1, rtol=0, atol=1e-4)


def test_workers_start_after_opencv_has_used_its_threads_here(dataset):
    threads = cv2.getNumThreads()
    cv2.setNumThreads(4)  # a pool of threads that a forked process does not have, but would wait for
    try:
        cv2.resize(np.zeros((2000, 2000, 3), np.uint8), (1500, 1500))
        assert len(take(build_train_loader(config(DATALOADER__NUM_WORKERS=1), dataset), 2)) == 2
        assert cv2.getNumThreads() == 4
    finally:
        cv2.setNumThreads(threads)


def test_real_coco_images_make_batches(shared):
    folder = shared("data/coco_mini")
    dataset = CocoDataset(folder / "val2017", folder / "annotations" / "instances_val2017.json")
    cfg = config(INPUT__MIN_SIZE_TRAIN=(160,), INPUT__MAX_SIZE_TRAIN=267)
    for batch in take(build_train_loader(cfg, dataset), 4):
        real = batch.gt_labels != PAD_LABEL
        limit = batch.image_sizes.flip(1).repeat(1, 2)[:, None].float()  # (N, 1, 4)
        assert ((batch.gt_boxes >= 0) & (batch.gt_boxes <= limit + 1e-3))[real].all()
        assert (batch.gt_boxes[..., 2:] > batch.gt_boxes[..., :2])[real].all()
        assert batch.gt_labels[real].max() < 80
