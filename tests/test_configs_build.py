"""Every YAML of configs/ loads, passes the checks and builds; the families keep the conventions of their sources."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights

from retinanet.config import batch_recipe, check_config, load_config
from retinanet.config.check import BACKBONES, NORMS
from retinanet.layers.norm import NORMS as NORM_TABLE
from retinanet.modeling.backbone import BACKBONES as BACKBONE_TABLE
from retinanet.modeling.build import build_loss, build_model, build_postprocess

FOLDER = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
RUNS = [path for path in FILES if path.parent.name not in ("base", "pretrain")]
EVALUATION_ONLY = {"caffe2/retinanet_R50_gn.yaml"}  # for a checkpoint that its user brings


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER))


def load(path: str, *opts: str):
    return load_config(FOLDER / path, opts)


@pytest.mark.parametrize("path", RUNS, ids=name)
def test_file_passes_all_checks_without_a_warning(path):
    assert check_config(load_config(path), training=name(path) not in EVALUATION_ONLY) == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_model_loss_and_postprocess_build(path):
    cfg = load_config(path, [] if load_config(path).MODEL.NUM_CLASSES else ["MODEL.NUM_CLASSES", "80"])
    with torch.device("meta"):
        model = build_model(cfg)
    anchors = cfg.MODEL.ANCHORS.SCALES_PER_OCTAVE * len(cfg.MODEL.ANCHORS.ASPECT_RATIOS)
    assert model.head.cls_pred.weight.shape[:2] == (anchors * cfg.MODEL.NUM_CLASSES, cfg.MODEL.FPN.CHANNELS)
    build_loss(cfg)
    build_postprocess(cfg)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_file_says_what_it_is_and_how_to_run_it(path):
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(comment) >= 2
    if path in RUNS and path.stem != "finetune_custom":
        assert f"--config configs/{name(path)}" in comment[0]
        assert path.stem == "quickstart" or any(line.startswith("# AP on COCO val2017: ") for line in comment)


def test_runs_write_to_folders_of_their_own():
    folders = [load_config(path).OUTPUT_DIR for path in RUNS]
    assert len(set(folders)) == len(folders)


def test_names_in_the_checks_are_in_the_tables():
    assert set(NORMS) <= set(NORM_TABLE)
    assert set(BACKBONES) <= set(BACKBONE_TABLE)


def test_names_fixed_by_the_specification_are_there():
    norms = ("affine", "frozenbn", "bn", "syncbn", "gn", "mabn", "bcn")
    expected = {"quickstart.yaml", "retinanet_R50_gn.yaml", *(f"retinanet_R50_{norm}_fpn.yaml" for norm in norms)}
    assert expected <= {name(path) for path in RUNS}


@pytest.mark.parametrize(
    ("path", "backbone", "fpn", "head"),
    [
        ("retinanet_R50_affine_fpn.yaml", "AffineChannel", "", ""),
        ("retinanet_R50_frozenbn_fpn.yaml", "FrozenBN", "", ""),
        ("retinanet_R50_gn_fpn.yaml", "AffineChannel", "GN", ""),
        ("retinanet_R50_gn.yaml", "GN", "GN", "GN"),
        ("retinanet_R50_mabn_fpn.yaml", "MABN", "MABN", ""),
        ("caffe2/retinanet_R50_FPN_gn.yaml", "AffineChannel", "GN", ""),
        ("torchvision/retinanet_resnet50_fpn_v2.yaml", "BN", "", "GN"),
    ],
)
def test_norms_of_each_part(path, backbone, fpn, head):
    model = load(path).MODEL
    assert (model.BACKBONE.NORM, model.FPN.NORM, model.HEAD.NORM) == (backbone, fpn, head)


@pytest.mark.parametrize(
    ("suffix", "length", "steps"), [("", 90000, (60000, 80000)), ("_2x", 180000, (120000, 160000))]
)
@pytest.mark.parametrize("backbone", ["R50", "R101", "X101_64x4d", "X101_32x8d"])
def test_detectron_zoo_keeps_its_schedule(backbone, suffix, length, steps):
    for path in (f"caffe2/retinanet_{backbone}_FPN{suffix}.yaml", f"retinanet_{backbone}_affine_fpn{suffix}.yaml"):
        cfg = load(path)
        recipe = batch_recipe(cfg)
        assert (recipe.base_lr, recipe.max_iter, recipe.steps, recipe.warmup_iters) == (0.01, length, steps, 500)
        assert cfg.MODEL.BACKBONE.NAME == backbone
        assert cfg.MODEL.BACKBONE.STRIDE_IN_1X1 == backbone.startswith("R")  # X101 were trained with it in the 3x3


@pytest.mark.parametrize(
    ("path", "conventions", "pixels", "loss", "resize"),
    [
        ("caffe2/retinanet_R50_FPN.yaml", ("detectron", "detectron", "detectron"), ("BGR", 102.9801, 1.0),
         ("smooth_l1", 0.11, "batch"), ("cv2_float", 128)),
        ("detectron2/retinanet_R50_FPN_1x.yaml", ("detectron2", "detectron2", "detectron2"), ("BGR", 103.53, 1.0),
         ("smooth_l1", 0.0, "ema"), ("pil", 32)),
        ("torchvision/retinanet_resnet50_fpn.yaml", ("torchvision", "torchvision", "detectron2"),
         ("RGB", 123.675, 58.395), ("l1", 0.11, "image"), ("torchvision", 32)),
        ("torchvision/retinanet_resnet50_fpn_v2.yaml", ("torchvision", "torchvision", "detectron2"),
         ("RGB", 123.675, 58.395), ("giou", 0.11, "image"), ("torchvision", 32)),
    ],
)  # fmt: skip
def test_families_keep_the_conventions_of_their_checkpoints(path, conventions, pixels, loss, resize):
    cfg = load(path)
    model = cfg.MODEL
    assert (model.ANCHORS.CONVENTION, model.BOX.CONVENTION, model.MATCHER.LOW_QUALITY) == conventions
    assert (model.CHANNEL_ORDER, model.PIXEL_MEAN[0], model.PIXEL_STD[0]) == pixels
    assert (model.LOSS.BOX, model.LOSS.BETA, model.LOSS.NORMALIZER) == loss
    assert (cfg.INPUT.RESIZE, cfg.INPUT.SIZE_DIVISIBILITY) == resize


def test_torchvision_values_are_those_of_torchvision():
    for path, weights in (
        ("torchvision/retinanet_resnet50_fpn.yaml", RetinaNet_ResNet50_FPN_Weights.COCO_V1),
        ("torchvision/retinanet_resnet50_fpn_v2.yaml", RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1),
    ):
        model = load(path).MODEL
        assert model.WEIGHTS == weights.url
        assert list(model.WEIGHTS_CLASSES) == weights.meta["categories"]
        assert model.NUM_CLASSES == len(model.WEIGHTS_CLASSES)
        ap = weights.meta["_metrics"]["COCO-val2017"]["box_map"]
        assert f"{ap} published by torchvision" in (FOLDER / path).read_text()


def test_detectron_anchor_order_is_that_of_its_checkpoints():
    assert load("caffe2/retinanet_R50_FPN.yaml").MODEL.ANCHORS.ASPECT_RATIOS == [1.0, 2.0, 0.5]
    assert load("retinanet_R50_affine_fpn.yaml").MODEL.ANCHORS.ASPECT_RATIOS == [0.5, 1.0, 2.0]
