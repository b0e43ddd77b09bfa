"""`retinanet.load`: a checkpoint or a configuration becomes a function of pictures."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

import retinanet
from retinanet.config.load import dump_config, load_config, load_config_text
from retinanet.data.coco import CocoDataset
from retinanet.data.image import ImageError
from retinanet.data.loader import build_test_loader
from retinanet.engine.checkpoint import read_checkpoint, write_checkpoint
from retinanet.engine.detector import as_picture
from retinanet.engine.evaluate import predict
from retinanet.engine.trained import build_trained, evaluated_weights
from retinanet.errors import UserError
from retinanet.modeling.build import build_model, build_postprocess

CLASSES = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
TINY = """
MODEL:
  NUM_CLASSES: 2
  BACKBONE: {NAME: R18, NORM: GN, FREEZE_AT: 0}
  FPN: {CHANNELS: 32}
  HEAD: {NUM_CONVS: 1, PRIOR_PROB: 0.3}
INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
TEST: {SCORE_THRESH: 0.0, MAX_DETS: 20, IMS_PER_BATCH: 2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with an untrained checkpoint, its configuration and two pictures of different shape."""
    folder = tmp_path_factory.mktemp("detector")
    cfg = load_config_text(TINY, "test")
    torch.manual_seed(0)
    model = build_model(cfg)
    metrics = {"metrics": {"AP": 1.0, "threshold": 0.25}}
    state = {"model": model.state_dict(), "iteration": 3, "config": dump_config(cfg), "classes": CLASSES}
    write_checkpoint(folder / "model.pth", state | metrics)
    (folder / "config.yaml").write_text(TINY)
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", (60, 90, 3)), ("tall.png", (120, 70, 3))):
        cv2.imwrite(str(folder / name), rng.integers(0, 256, shape, dtype=np.uint8))
    return folder


@pytest.fixture(scope="module")
def detector(folder):
    return retinanet.load(folder / "model.pth", device="cpu")


def assert_same(first, second):
    assert first["names"] == second["names"]
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


def test_checkpoint_alone_detects_in_a_file(detector, folder):
    found = detector(folder / "wide.png")
    count = len(found["scores"])
    assert 0 < count <= 20 and found["boxes"].shape == (count, 4) and found["labels"].dtype == torch.int64
    assert found["names"] == [["cat", "dog"][label] for label in found["labels"]]
    assert (found["scores"].diff() <= 0).all() and found["scores"].min() >= 0
    limits = torch.tensor([90, 60, 90, 60])
    assert (found["boxes"] >= 0).all() and (found["boxes"] <= limits).all()
    assert detector.threshold == 0.25


def test_name_path_and_array_give_the_same(detector, folder):
    path = folder / "wide.png"
    image = cv2.imread(str(path))
    expected = detector(path)
    assert_same(detector(str(path)), expected)
    assert_same(detector(image), expected)
    assert_same(detector(image[..., ::-1], channel_order="RGB"), expected)
    assert_same(detector(np.asfortranarray(image)), expected)
    assert len(detector(image[..., ::-1])["scores"]) and not torch.equal(
        detector(image[..., ::-1])["scores"], expected["scores"]
    )


def test_a_list_gives_a_list_in_its_order_whatever_the_batch_size(detector, folder, monkeypatch):
    pictures = [folder / "wide.png", cv2.imread(str(folder / "wide.png"))[::-1], str(folder / "wide.png")]
    monkeypatch.setattr(detector, "batch_size", 1)
    single = detector(pictures)
    assert_same(single[0], detector(pictures[0]))
    assert_same(single[2], single[0])
    monkeypatch.setattr(detector, "batch_size", 2)
    for one, other in zip(detector(tuple(pictures)), single, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)
    assert not torch.equal(single[0]["scores"], single[1]["scores"])
    assert detector([]) == []


def test_pictures_of_different_size_in_one_batch_keep_to_their_own(detector, folder):
    wide, tall = detector([folder / "wide.png", folder / "tall.png"])
    for found, (width, height) in ((wide, (90, 60)), (tall, (70, 120))):
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all() and len(found["boxes"])
    assert wide["boxes"][:, 2].max() > 70 and tall["boxes"][:, 3].max() > 60


def test_a_picture_is_seen_alike_alone_and_among_pictures_of_other_shapes(detector, folder):
    """In one batch the wide one would be padded to the height of the tall one, which group norm sees."""
    files = [folder / "wide.png", folder / "tall.png", folder / "wide.png"]
    for file, found in zip(files, detector(files), strict=True):
        alone = detector(file)
        torch.testing.assert_close(found["scores"], alone["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["boxes"], alone["boxes"], rtol=1e-3, atol=1e-2)


def test_an_array_of_pictures_is_a_batch_of_them(detector, folder):
    image = cv2.imread(str(folder / "wide.png"))
    both = detector(np.stack([image, image[::-1]]))
    assert len(both) == 2
    torch.testing.assert_close(both[0]["scores"], detector(image)["scores"], rtol=1e-4, atol=1e-5)


def test_score_leaves_out_what_is_below(detector, folder):
    everything = detector(folder / "wide.png")
    limit = float(everything["scores"][4])
    kept = detector(folder / "wide.png", score=limit)
    assert len(kept["scores"]) == len(kept["names"]) == int((everything["scores"] >= limit).sum()) < 20


def test_one_pixel_and_extreme_shapes_are_pictures(detector):
    for shape in ((1, 1, 3), (1, 300, 3), (200, 3, 3)):
        assert detector(np.zeros(shape, np.uint8))["boxes"].shape[1] == 4


def augmented(folder, **keys):
    """Return the detector of the checkpoint with `TEST.AUG` keys."""
    lines = "".join(f"    {key}: {value}\n" for key, value in keys.items())
    content = TINY.replace("TEST: {SCORE_THRESH: 0.0, MAX_DETS: 20, IMS_PER_BATCH: 2}", "TEST:\n  SCORE_THRESH: 0.0")
    (folder / "augmented.yaml").write_text(f"{content}  MAX_DETS: 20\n  IMS_PER_BATCH: 2\n  AUG:\n{lines}")
    return retinanet.load(folder / "augmented.yaml", weights=folder / "model.pth", device="cpu")


def test_augmentation_without_flip_and_scales_is_the_plain_result(detector, folder):
    assert_same(augmented(folder, FLIP=False, SCALES=[1.0])(folder / "wide.png"), detector(folder / "wide.png"))


def test_with_flip_a_mirrored_picture_has_mirrored_detections(detector, folder):
    """The two pictures have the same two views, so that nothing but rounding differs."""
    image = cv2.imread(str(folder / "wide.png"))
    both = augmented(folder, FLIP=True)
    straight, mirrored = both(image), both(np.ascontiguousarray(image[:, ::-1]))
    torch.testing.assert_close(mirrored["scores"], straight["scores"], rtol=0, atol=1e-6)
    expected = straight["boxes"].clone()
    expected[:, [0, 2]] = 90 - straight["boxes"][:, [2, 0]]
    torch.testing.assert_close(mirrored["boxes"], expected, rtol=0, atol=1e-4)
    plain, turned = detector(image), detector(np.ascontiguousarray(image[:, ::-1]))
    assert not torch.allclose(plain["scores"], turned["scores"], atol=1e-3)  # which alone they have not
    assert straight["scores"][0] >= max(plain["scores"][0], turned["scores"][0]) - 1e-6


def test_scales_see_each_size_and_keep_to_the_picture(detector, folder):
    pictures = [folder / "wide.png", folder / "tall.png"]
    for found, single, (width, height) in zip(
        augmented(folder, SCALES=[0.5, 1.0, 2.0])(pictures), detector(pictures), ((90, 60), (70, 120)), strict=True
    ):
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert len(found["scores"]) <= 20 and found["scores"][0] >= single["scores"][0] - 1e-6
        assert (found["scores"].diff() <= 0).all()


def test_evaluation_with_augmentation_gives_what_the_detector_gives(folder):
    both = augmented(folder, FLIP=True, SCALES=[1.0, 1.5])
    images = [{"id": 7, "file_name": "wide.png", "width": 90, "height": 60}]
    (folder / "x.json").write_text(json.dumps({"images": images, "annotations": [], "categories": CLASSES}))
    cfg = load_config(folder / "augmented.yaml", ["DATALOADER.NUM_WORKERS", "0"])
    loader = build_test_loader(cfg, CocoDataset(folder, folder / "x.json"))
    rows = predict(both.model, loader, build_postprocess(cfg), torch.device("cpu"), (3, 8))
    found = both(folder / "wide.png")
    assert [row["score"] for row in rows] == pytest.approx(found["scores"].tolist(), abs=1e-6)
    assert {row["image_id"] for row in rows} == {7}


def test_configuration_with_weights_equals_the_checkpoint(detector, folder):
    other = retinanet.load(str(folder / "config.yaml"), weights=folder / "model.pth", device="cpu")
    assert_same(other(folder / "tall.png"), detector(folder / "tall.png"))
    assert other.names == ["cat", "dog"]


def test_averaged_weights_are_used_where_a_checkpoint_has_them(folder):
    state = read_checkpoint(folder / "model.pth")
    averaged = {f"module.{name}": value + 1 for name, value in state["model"].items()} | {"n_averaged": torch.tensor(5)}
    chosen = evaluated_weights(state | {"ema": averaged})
    assert chosen.keys() == state["model"].keys()
    torch.testing.assert_close(chosen["fpn.p6.weight"], state["model"]["fpn.p6.weight"] + 1)
    assert evaluated_weights(state | {"ema": {}}) is state["model"]


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ("gone.jpg", "gone.jpg: the image file does not exist"),
        (3, "pictures: int is not a file name"),
        ([3], "picture: int is neither a file name nor a numpy array"),
        (np.zeros((5, 5), np.uint8), r"shape \(5, 5\) is not \(H, W, 3\); cv2.cvtColor"),
        (np.zeros((5, 5, 4), np.uint8), r"shape \(5, 5, 4\) is not"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\) is not"),
        (np.zeros((2, 0, 5, 3), np.uint8), r"shape \(0, 5, 3\) is not"),
        (np.full((5, 5, 3), 9.0), "picture: float64 values; give uint8, 0 to 255$"),
        (np.ones((5, 5, 3)), r"0 to 255; \(255 \* picture\).astype\(np.uint8\) is, for values up to 1"),
        (np.zeros((3, 5, 6), np.uint8), r"\(3, 5, 6\) is not \(H, W, 3\); picture.transpose\(1, 2, 0\) is"),
        (torch.zeros(5, 5, 3), r"pictures: Tensor is not .*; tensor.numpy\(\) makes an array"),
    ],
)
def test_what_is_no_picture_is_named(detector, picture, message):
    with pytest.raises(UserError, match=message):
        detector(picture)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "notes.jpg").write_text("not an image")
    with pytest.raises(ImageError, match="notes.jpg"):
        as_picture(tmp_path / "notes.jpg")


def test_unknown_channel_order_and_device_are_named(detector, folder):
    with pytest.raises(UserError, match="channel_order: 'bgr' is not one of BGR, RGB; did you mean 'BGR'"):
        detector(folder / "wide.png", channel_order="bgr")
    with pytest.raises(UserError, match="device: 'gpu' is not one of auto, cuda, cpu"):
        retinanet.load(folder / "model.pth", device="gpu")


def test_files_that_do_not_fit_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="gone.pth: there is no such checkpoint"):
        retinanet.load(tmp_path / "gone.pth")
    with pytest.raises(UserError, match="has to be a configuration"):
        retinanet.load(folder / "model.pth", weights=folder / "model.pth")
    with pytest.raises(UserError, match="MODEL.WEIGHTS: is empty"):
        retinanet.load(folder / "config.yaml")
    (tmp_path / "wide.yaml").write_text(TINY.replace("CHANNELS: 32", "CHANNELS: 64"))
    with pytest.raises(UserError, match=r"model.pth: does not fit the configuration .fpn.*32.*not.*64"):
        retinanet.load(tmp_path / "wide.yaml", weights=folder / "model.pth")
    (tmp_path / "three.yaml").write_text(TINY.replace("NUM_CLASSES: 2", "NUM_CLASSES: 3"))
    with pytest.raises(UserError, match="MODEL.NUM_CLASSES: is 3, but .*model.pth has 2 classes; set it to 0"):
        retinanet.load(tmp_path / "three.yaml", weights=folder / "model.pth")


def test_weights_of_a_backbone_alone_are_no_detector(folder, tmp_path):
    """An ImageNet model would give a random head, so it is refused however the configuration treats missing weights."""
    state = read_checkpoint(folder / "model.pth")["model"]
    torch.save({name: value for name, value in state.items() if name.startswith("backbone.")}, tmp_path / "r18.pth")
    cfg = load_config_text(TINY + "DATASETS: {TEST: []}", "test", ["MODEL.ALLOW_MISSING_WEIGHTS", "True"])
    with pytest.raises(UserError, match="no whole detector .* it lacks (fpn|head)"):
        build_trained(cfg, tmp_path / "r18.pth")


def test_bare_weights_take_names_from_the_configuration(folder, tmp_path):
    torch.save(read_checkpoint(folder / "model.pth")["model"], tmp_path / "bare.pth")
    cfg = load_config_text(TINY, "test", ["MODEL.WEIGHTS_CLASSES", "bird,fish", "DATASETS.TEST", "()"])
    trained = build_trained(cfg, tmp_path / "bare.pth")
    assert trained.classes == [{"id": 1, "name": "bird"}, {"id": 2, "name": "fish"}]
    assert not trained.carried and trained.threshold is None
    numbered = build_trained(load_config_text(TINY, "test", ["DATASETS.TEST", "()"]), tmp_path / "bare.pth")
    assert [entry["name"] for entry in numbered.classes] == ["class 1", "class 2"]


def test_importing_the_package_does_not_import_torch():
    code = "import sys, retinanet; assert callable(retinanet.load); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
