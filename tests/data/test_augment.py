"""Crop, scale jitter and mosaic: solid rectangles are found again in the pixels, exactly where their boxes are."""

import json

import cv2
import numpy as np
import pytest
import torch
from loader_cases import assert_same, config, take, write_nine_images

from retinanet.data.augment import Augmenter, Settings, cut_boxes
from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_train_loader
from retinanet.data.transforms import resize_geometry
from retinanet.errors import UserError
from retinanet.structures import PAD_LABEL

SIZES = [(60, 90), (80, 64), (70, 70), (50, 120), (96, 72)]
EVERYTHING = {
    "INPUT__AUGMENT__CROP": 0.6,
    "INPUT__AUGMENT__LSJ": (0.5, 2.0),
    "INPUT__AUGMENT__MOSAIC": 0.4,
    "INPUT__AUGMENT__PHOTOMETRIC": 0.4,
}


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory):
    """Five black images, each with up to three solid rectangles, one in each channel, which is its class."""
    folder = tmp_path_factory.mktemp("rectangles")
    generator = np.random.default_rng(5)
    images, annotations = [], []
    for row, (height, width) in enumerate(SIZES):
        image = np.zeros((height, width, 3), np.uint8)
        for label in range(3 if row else 1):
            x, y = generator.integers(0, (width - 30, height - 30)).tolist()
            w, h = generator.integers(12, 30, 2).tolist()
            image[y : y + h, x : x + w, label] = 255
            annotations.append({"image_id": row, "category_id": label, "bbox": [x, y, w, h]})
        cv2.imwrite(str(folder / f"{row}.png"), image)
        images.append({"id": row, "file_name": f"{row}.png", "width": width, "height": height})
    categories = [{"id": label, "name": name} for label, name in enumerate(("blue", "green", "red"))]
    (folder / "x.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return CocoDataset(folder, folder / "x.json")


def augmenter(dataset, settings: Settings, mode: str = "cv2", max_size: int = 400) -> Augmenter:
    def geometry(size, short_side):
        return resize_geometry(size, short_side, max_size, mode)

    return Augmenter(settings, 7, np.arange(len(dataset)), dataset.image_size, geometry, mode)


def extent(mask: np.ndarray) -> list[int] | None:
    """Return (x1, y1, x2, y2) of what is True, None where nothing is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return None if len(rows) == 0 else [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("settings", [Settings(crop=0.3), Settings(jitter=(1.0, 3.0)), Settings(0.5, (1.5, 2.0))])
def test_cut_boxes_are_where_their_pixels_are_and_go_when_too_little_is_left(rectangles, settings):
    """To the pixel: before the resize, a cut image holds the rectangles themselves."""
    settings = settings._replace(min_visible=0.4)
    made = augmenter(rectangles, settings)
    kept = dropped = 0
    for step in range(60):
        row = step % len(SIZES)
        image, target = made.make(made.plan(row, step, 0, 64, int), rectangles.read)
        original, whole = rectangles.read(row)
        boxes = dict(zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True))
        for label in whole["labels"].tolist():
            share = (image[..., label] > 0).sum() / (original[..., label] > 0).sum()
            assert (label in boxes) == (share >= 0.4)
            if label in boxes:
                assert boxes[label] == extent(image[..., label] > 0)
            kept, dropped = kept + (label in boxes), dropped + (label not in boxes)
    assert kept > 30 and dropped > 10


@pytest.mark.parametrize("mode", ["cv2", "cv2_float", "pil", "torchvision"])
def test_boxes_of_a_mosaic_are_where_their_pixels_are(rectangles, mode):
    """Within the blur of the resize: an edge at half of its height is less than a pixel off, in each quarter."""
    made = augmenter(rectangles, Settings(mosaic=1.0), mode)
    found = 0
    for step in range(20):
        plan = made.plan(step % len(SIZES), step, 1, 200, int)
        image, target = made.make(plan, rectangles.read)
        assert image.shape[:2] == plan.size == made.geometry(SIZES[step % len(SIZES)], 200).size
        assert image.dtype == (np.float32 if mode in ("cv2_float", "torchvision") else np.uint8)
        covered = np.zeros(plan.size, int)
        for piece in plan.pieces:
            x1, y1, x2, y2 = piece.place
            covered[y1:y2, x1:x2] += 1
            inside = (target["boxes"] >= torch.tensor([x1, y1, x1, y1])).all(1)
            inside &= (target["boxes"] <= torch.tensor([x2, y2, x2, y2])).all(1)
            for box, label in zip(target["boxes"][inside].tolist(), target["labels"][inside].tolist(), strict=True):
                if min(box[2] - box[0], box[3] - box[1]) < 4:  # thinner than what a resize leaves of an edge
                    continue
                pixels = extent(image[y1:y2, x1:x2, label] > 127)
                np.testing.assert_allclose(np.array(pixels) + [x1, y1, x1, y1], box, atol=1.01)
                found += 1
        assert (covered == 1).all() and {piece.row for piece in plan.pieces} >= {step % len(SIZES)}
    assert found > 60


def test_rectangles_and_boxes_agree_in_batches_of_the_training_loader(rectangles):
    """All kinds at once with flips and resizes: every box has its rectangle, and each large rectangle has a box."""
    cfg = config(**{**EVERYTHING, "INPUT__AUGMENT__PHOTOMETRIC": 0.0, "INPUT__AUGMENT__MIN_VISIBLE": 0.0})
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (160, 200), 400
    boxes = 0
    for batch in take(build_train_loader(cfg, rectangles), 8):
        for image, size, gt_boxes, labels in zip(
            batch.images, batch.image_sizes.tolist(), batch.gt_boxes, batch.gt_labels, strict=True
        ):
            for label in range(3):
                mask = (image[label, : size[0], : size[1]].numpy() > 127).astype(np.uint8)
                parts = cv2.connectedComponentsWithStats(mask)[2][1:, :4].astype(float)
                parts[:, 2:] += parts[:, :2]
                own = gt_boxes[labels == label].numpy()
                large = parts[(parts[:, 2:] - parts[:, :2]).min(1) > 4]
                assert len(own) >= len(large)
                for box in large:  # two quarters may show one image, whose rectangles then touch
                    assert np.abs(own - box).max(1).min() < 1.5 or len(own) > len(parts)
                boxes += len(own)
    assert boxes > 30


def test_boxes_are_cut_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 5, 30, 15], [8, 0, 12, 10], [2, 2, 3, 3]])
    cut, kept = cut_boxes(boxes, (5, 0, 20, 8), min_visible=0.5)
    # the first keeps 5 x 8 of 100 pixels, the second begins where the window ends, the third keeps 4 x 8 of 40
    assert kept.tolist() == [False, False, True, False] and cut.tolist() == [[3.0, 0.0, 7.0, 8.0]]
    cut, kept = cut_boxes(boxes, (5, 0, 20, 8), min_visible=0.4)
    assert kept.tolist() == [True, False, True, False] and cut[0].tolist() == [0.0, 0.0, 5.0, 8.0]
    cut, kept = cut_boxes(boxes[:1] - torch.tensor([0, 0, 1, 1]), (5, 0, 20, 8), min_visible=0.4, plus_one=True)
    assert kept.tolist() == [True] and cut.tolist() == [[0.0, 0.0, 4.0, 7.0]]  # 5 x 8 of 10 x 10 again
    cut, kept = cut_boxes(torch.zeros(0, 4), (5, 0, 20, 8), min_visible=0.4)
    assert cut.shape == (0, 4) and kept.shape == (0,)


def test_jitter_scales_within_its_range_and_never_beyond_the_usual_size(rectangles):
    made = augmenter(rectangles, Settings(jitter=(0.25, 2.0)), max_size=100)
    factors = []
    for step in range(200):
        size = SIZES[step % len(SIZES)]
        plan = made.plan(step % len(SIZES), step, 0, 64, int)
        usual = np.array(made.geometry(size, 64).size)
        new = np.array(made.geometry(plan.size, plan.short_side).size)
        assert (new <= usual + 2).all() and (new >= 0.25 * usual - 1).all()
        factors.append(np.sqrt(np.prod(size) / np.prod(plan.size)) * np.sqrt(new.prod() / usual.prod()))
    assert min(factors) < 0.35 and max(factors) > 1.9  # the size of an object, with a usual object as 1
    assert np.mean(factors) == pytest.approx(1.125, abs=0.1)  # uniform


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nine")
    write_nine_images(folder)
    return CocoDataset(folder, folder / "x.json")


def test_each_kind_leaves_order_flips_and_the_other_kinds_alone(nine):
    plain = take(build_train_loader(config(), nine), 6)
    coloured = take(build_train_loader(config(INPUT__AUGMENT__PHOTOMETRIC=0.5), nine), 6)
    for one, other in zip(plain, coloured, strict=True):
        assert one.image_ids == other.image_ids and not torch.equal(one.images, other.images)
        for name in ("image_sizes", "scales", "gt_boxes", "gt_labels"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)
    mosaics = take(build_train_loader(config(INPUT__AUGMENT__MOSAIC=1.0), nine), 6)
    for one, other in zip(plain, mosaics, strict=True):
        assert one.image_ids == other.image_ids and one.images.shape == other.images.shape
        torch.testing.assert_close(one.image_sizes, other.image_sizes, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["cv2", "cv2_float", "pil", "torchvision"])
def test_augmented_batches_are_the_same_for_workers_ranks_and_a_later_start(nine, mode):
    cfg = config(**EVERYTHING, INPUT__RESIZE=mode, DATALOADER__ASPECT_GROUPING=False)
    alone = take(build_train_loader(cfg, nine), 8)
    assert_same(alone[5:], take(build_train_loader(cfg, nine, start_iteration=5), 3))
    if mode == "cv2":
        workers = config(**EVERYTHING, DATALOADER__NUM_WORKERS=2, DATALOADER__ASPECT_GROUPING=False)
        assert_same(alone, take(build_train_loader(workers, nine), 8))
    ranks = [take(build_train_loader(cfg, nine, rank=rank, world_size=2), 8) for rank in (0, 1)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        torch.testing.assert_close(torch.cat([part.images for part in parts]), whole.images, rtol=0, atol=0)


def test_detectron_boxes_stay_inside_their_augmented_image(nine):
    dataset = CocoDataset(nine.images_dir, nine.annotations_file, plus_one_boxes=True)
    cfg = config(**EVERYTHING, INPUT__RESIZE="cv2_float")
    for batch in take(build_train_loader(cfg, dataset), 8):
        real = batch.gt_labels != PAD_LABEL
        limit = batch.image_sizes.flip(1).repeat(1, 2)[:, None].float()
        assert ((batch.gt_boxes >= 0) & (batch.gt_boxes <= limit))[real].all()
        assert (batch.gt_boxes[..., 2:] >= batch.gt_boxes[..., :2])[real].all()


def test_an_unreadable_image_inside_a_mosaic_is_replaced_and_counted(tmp_path):
    write_nine_images(tmp_path)
    (tmp_path / "4.png").write_bytes(b"broken")
    dataset = CocoDataset(tmp_path, tmp_path / "x.json")
    loader = build_train_loader(config(INPUT__AUGMENT__MOSAIC=1.0, DATALOADER__MAX_BAD_IMAGES=1), dataset)
    take(loader, 6)
    assert loader.dataset.bad_images() == [4]
    with pytest.raises(UserError, match="4.png"):
        take(build_train_loader(config(INPUT__AUGMENT__MOSAIC=1.0), dataset), 6)


@pytest.mark.parametrize("mode", ["cv2", "cv2_float", "pil", "torchvision"])
def test_images_of_a_pixel_survive_everything(tmp_path, mode):
    sizes = [(1, 1), (1, 50), (50, 1), (2, 2)]
    images, annotations = [], []
    for row, (height, width) in enumerate(sizes):
        cv2.imwrite(str(tmp_path / f"{row}.png"), np.zeros((height, width, 3), np.uint8))
        images.append({"id": row, "file_name": f"{row}.png", "width": width, "height": height})
        annotations.append({"image_id": row, "category_id": 1, "bbox": [0, 0, width, height]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    cfg = config(**EVERYTHING, INPUT__RESIZE=mode)
    cfg.INPUT.MIN_SIZE_TRAIN = (1, 24)
    for batch in take(build_train_loader(cfg, CocoDataset(tmp_path, tmp_path / "x.json")), 12):
        boxes = batch.gt_boxes[batch.gt_labels != PAD_LABEL]
        assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()
