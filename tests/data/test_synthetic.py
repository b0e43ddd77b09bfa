"""The synthetic set: the same for the same seed, exact boxes, and all the cases that it promises."""

import json

import cv2
import numpy as np
import pytest

from retinanet.data.coco import CocoDataset
from retinanet.data.shapes import SHAPES, outline
from retinanet.data.synthetic import CATEGORY_IDS, render, write_dataset
from retinanet.errors import UserError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic")
    write_dataset(folder, "train", 150, (128, 160), seed=0)
    return folder, json.loads((folder / "annotations" / "train.json").read_text())


def test_same_seed_gives_the_same_files(tmp_path):
    for name in ("one", "two"):
        write_dataset(tmp_path / name, "val", 4, (64, 80), seed=7)
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    write_dataset(tmp_path / "more", "val", 6, (64, 80), seed=7)
    assert (tmp_path / "more/val/000003.jpg").read_bytes() == (tmp_path / "one/val/000003.jpg").read_bytes()


def test_splits_and_seeds_hold_different_images(tmp_path):
    files = set()
    for seed, split in ((0, "train"), (0, "val"), (1, "train")):
        write_dataset(tmp_path / str(seed), split, 1, (64, 80), seed)
        files.add((tmp_path / str(seed) / split / "000000.jpg").read_bytes())
    assert len(files) == 3


def test_set_is_a_data_set_with_every_class_crowds_and_empty_images(written):
    folder, content = written
    dataset = CocoDataset(folder / "train", folder / "annotations" / "train.json")
    assert len(dataset) == 150 and dataset.category_ids == CATEGORY_IDS and dataset.class_names == SHAPES
    assert (np.bincount(dataset.box_labels, minlength=len(SHAPES)) > 40).all()
    assert dataset.num_crowds >= 5 and dataset.num_clipped == 0
    assert (dataset.box_counts == 0).sum() >= 3 and dataset.box_counts.max() >= 5
    ids = [record["id"] for record in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    image, target = dataset.read(0)
    assert image.shape == (128, 160, 3) and len(target["labels"]) == dataset.box_counts[0]


def test_sizes_and_aspect_ratios_spread(written):
    _, content = written
    boxes = np.array([record["bbox"] for record in content["annotations"] if not record["iscrowd"]])
    sides = np.sqrt(boxes[:, 2] * boxes[:, 3])
    assert np.percentile(sides, 5) < 20 and np.percentile(sides, 95) > 50 and sides.max() < 110
    ratios = boxes[:, 2] / boxes[:, 3]
    assert np.percentile(ratios, 5) < 0.6 and np.percentile(ratios, 95) > 1.7


def test_boxes_lie_inside_the_image_and_around_their_pixels():
    image, things = render(np.random.default_rng([0, 1]), (128, 160))
    assert image.shape == (128, 160, 3) and image.dtype == np.uint8 and things
    for seed in range(40):
        _, things = render(np.random.default_rng([1, seed]), (128, 160))
        for thing in things:
            x, y, width, height = thing.bbox
            assert 0 <= x < x + width <= 160 and 0 <= y < y + height <= 128
            assert 0 < thing.area <= width * height
            assert thing.is_crowd or thing.area >= 20


def test_a_single_object_differs_from_its_surroundings_at_every_side_of_its_box():
    from retinanet.data import synthetic

    generator = np.random.default_rng(3)
    for _ in range(30):
        canvas = synthetic._Canvas(np.zeros((100, 120, 3), np.float32))
        synthetic._place_object(canvas, generator)
        (thing,) = canvas.things()
        changed = np.abs(canvas.pixels).max(axis=2) > 0
        ys, xs = np.nonzero(changed)
        x, y, width, height = thing.bbox
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        # smooth edges colour a little around what counts as the object, thin tips two pixels
        beyond = np.abs(drawn - [x, y, x + width, y + height])
        assert beyond.max() <= 3 and beyond.min() <= 1


def test_every_object_keeps_half_of_its_pixels_visible():
    from retinanet.data import synthetic

    for seed in range(30):
        generator = np.random.default_rng([2, seed])
        canvas = synthetic._Canvas(np.zeros((96, 96, 3), np.float32))
        for _ in range(7):
            synthetic._place_object(canvas, generator)
        for thing, full in zip(canvas.things(), canvas.full_areas, strict=True):
            assert thing.area >= 0.5 * full


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_size_and_turn(shape):
    part = outline(shape, 40, 20, 0.0)[0]
    assert np.abs(part).max(axis=0) == pytest.approx([20, 10], rel=0.2)
    quarter = outline(shape, 40, 20, np.pi / 2)[0]
    np.testing.assert_allclose(np.abs(quarter), np.abs(part[:, ::-1]), atol=1e-9)
    assert cv2.contourArea(part.astype(np.float32)) > 200


def test_foreign_json_is_not_replaced(tmp_path):
    (tmp_path / "annotations").mkdir()
    mine = tmp_path / "annotations" / "train.json"
    mine.write_text('{"images": []}')
    with pytest.raises(UserError, match=r"train\.json exists and is no synthetic data set"):
        write_dataset(tmp_path, "train", 1, (64, 64))
    assert mine.read_text() == '{"images": []}'
    write_dataset(tmp_path, "val", 1, (64, 64))
    write_dataset(tmp_path, "val", 2, (64, 64))  # our own is


def test_a_negative_seed_is_refused(tmp_path):
    with pytest.raises(UserError, match="seed -1: a seed is a whole number from 0 on"):
        write_dataset(tmp_path, "train", 1, (64, 64), seed=-1)


@pytest.mark.parametrize("count, size, expected", [(0, (64, 64), "0 images"), (1, (64, 40), "64 x 40 pixels")])
def test_senseless_requests_are_refused(tmp_path, count, size, expected):
    with pytest.raises(UserError, match=expected):
        write_dataset(tmp_path, "train", count, size)
    assert not list(tmp_path.iterdir())


def test_objects_keep_to_the_sides_asked_for(tmp_path):
    content = json.loads(write_dataset(tmp_path, "val", 12, (96, 96), sides=(6, 12)).read_text())
    sides = [max(r["bbox"][2:]) for r in content["annotations"] if not r["iscrowd"]]
    assert len(sides) > 20 and max(sides) <= 12 * 2 and min(sides) >= 3  # stretched by up to 2, half may be hidden
    for sides in ((1, 8), (12, 6), (8, 49)):
        with pytest.raises(UserError, match="pixels: give 4 to 48, smaller first"):
            write_dataset(tmp_path, "train", 1, (96, 96), sides=sides)
