"""What loaders do about mistakes and bad images: one clear message from any process, or a counted replacement."""

import json
import logging

import numpy as np
import pytest
from loader_cases import SIZES, assert_same, config, take

from retinanet.data.coco import CocoDataset
from retinanet.data.image import ImageError
from retinanet.data.loader import build_test_loader, build_train_loader
from retinanet.errors import UserError


def test_batch_that_processes_cannot_share_is_refused(dataset):
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH: 4 images cannot be shared equally by 3 processes"):
        build_train_loader(config(), dataset, world_size=3)


def test_data_set_without_any_box_is_refused(tmp_path, folder):
    content = json.loads((folder / "x.json").read_text()) | {"annotations": []}
    (tmp_path / "empty.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="none of its 9 images has a box"):
        build_train_loader(config(), CocoDataset(folder, tmp_path / "empty.json"))


@pytest.fixture
def damaged(tmp_path, folder):
    """The data set with image 2 cut off and image 5 missing."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "2.png").write_bytes(b"\x89PNG")
    (tmp_path / "5.png").unlink()
    return CocoDataset(tmp_path, tmp_path / "x.json")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_stops_with_its_path_and_no_traceback(damaged, workers):
    with pytest.raises(ImageError, match=r"(2|5)\.png: .*DATALOADER\.MAX_BAD_IMAGES is 0") as caught:
        take(build_train_loader(config(DATALOADER__NUM_WORKERS=workers), damaged), 20)
    assert "Traceback" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_wrong_size_in_a_worker_arrives_as_a_user_error(tmp_path, folder, workers):
    content = json.loads((folder / "x.json").read_text())
    content["images"][4]["width"] = 29
    (tmp_path / "x.json").write_text(json.dumps(content))
    dataset = CocoDataset(folder, tmp_path / "x.json")
    loaders = (build_train_loader, build_test_loader)
    for loader in (build(config(DATALOADER__NUM_WORKERS=workers), dataset) for build in loaders):
        with pytest.raises(UserError, match=r"4\.png: the file has 28 x 28 .* state 29 x 28") as caught:
            take(loader, 20)
        assert type(caught.value) is UserError and "\n" not in str(caught.value)


def test_admitted_bad_images_are_replaced_counted_and_logged(damaged, caplog):
    cfg = config(DATALOADER__MAX_BAD_IMAGES=2)
    loader = build_train_loader(cfg, damaged)
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 14)
    assert loader.dataset.bad_images() == [2, 5]
    assert len(caplog.records) == 2 and "2.png" in caplog.text and "5.png" in caplog.text
    ids = sum((batch.image_ids for batch in batches), [])
    assert 102 not in ids and 105 not in ids
    counts = np.bincount(np.array(ids) - 100, minlength=9)
    assert counts[3] >= 10 and counts[6] >= 10  # the next images stand in: twice their share of 56 / 9


@pytest.mark.parametrize("workers", [1, 3])
def test_replacement_does_not_depend_on_the_workers(damaged, workers):
    alone = take(build_train_loader(config(DATALOADER__MAX_BAD_IMAGES=2), damaged), 14)
    loader = build_train_loader(config(DATALOADER__MAX_BAD_IMAGES=2, DATALOADER__NUM_WORKERS=workers), damaged)
    assert_same(alone, take(loader, 14))
    assert loader.dataset.bad_images() == [2, 5]  # counted once, whichever workers met them


@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_image_too_many_stops(damaged, workers):
    cfg = config(DATALOADER__MAX_BAD_IMAGES=1, DATALOADER__NUM_WORKERS=workers)
    with pytest.raises(ImageError, match=r"MAX_BAD_IMAGES is 1 \(2 unreadable images so far\)"):
        take(build_train_loader(cfg, damaged), 20)


def test_nothing_but_bad_images_ends_with_a_message(tmp_path, folder):
    (tmp_path / "x.json").write_bytes((folder / "x.json").read_bytes())
    for i in range(len(SIZES)):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    dataset = CocoDataset(tmp_path, tmp_path / "x.json")
    with pytest.raises(UserError, match="not one of its 9 images can be read"):
        take(build_train_loader(config(DATALOADER__MAX_BAD_IMAGES=100), dataset), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_never_skips_a_bad_image(damaged, workers):
    cfg = config(DATALOADER__MAX_BAD_IMAGES=5, DATALOADER__NUM_WORKERS=workers)
    with pytest.raises(ImageError, match=r"(2|5)\.png"):
        list(build_test_loader(cfg, damaged))
