"""The description of a model: which norms it has, what they do, and what the parts cost."""

import pytest
import torch

from retinanet.config.defaults import get_cfg
from retinanet.deploy.describe import costs, norm_rows
from retinanet.modeling.build import build_model


def meta_model(norm: str, conv: str = "auto", freeze_at: int = 0):
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = 3, "R18", freeze_at
    cfg.MODEL.FPN.CHANNELS, cfg.MODEL.HEAD.NUM_CONVS = 32, 1
    for part in ("BACKBONE", "FPN", "HEAD"):
        cfg.MODEL[part].NORM, cfg.MODEL[part].CONV = norm, conv
    with torch.device("meta"):
        return build_model(cfg).train()


def test_every_norm_has_a_row_that_says_what_moves():
    rows = {row.name: row for row in norm_rows(meta_model("MABN", freeze_at=2))}
    assert len(rows) == 20 + 6 + 2  # convs of R18, laterals and outputs of the FPN, one conv in each tower
    stem, res3, tower = (rows[n] for n in ("backbone.conv1", "backbone.res3.0.conv1", "head.cls_convs.0"))
    assert (stem.statistics, stem.affine, stem.folds) == ("frozen", "frozen", "whole")
    assert (res3.statistics, res3.affine, res3.parameters) == ("moving", "trained", 2 * 128)
    assert res3.buffers == 128 + 1 + 2 * 2 * 128  # running_var, iters, two windows of 32 / 16 rows
    assert (tower.levels, tower.parameters, tower.buffers) == (5, 2 * 32, 5 * (32 + 1 + 2 * 2 * 32))


@pytest.mark.parametrize(
    "norm, statistics, affine, folds",
    [
        ("AffineChannel", "none", "frozen", "whole"),
        ("FrozenBN", "frozen", "frozen", "whole"),
        ("BN", "moving", "trained", "whole"),
        ("GN", "none", "trained", "nothing"),
        ("BCN", "moving", "trained", "part"),
    ],
)
def test_kinds_differ_in_what_moves_trains_and_folds(norm, statistics, affine, folds):
    for row in norm_rows(meta_model(norm)):
        assert (row.norm, row.statistics, row.affine, row.folds) == (norm, statistics, affine, folds)


def test_model_without_norms_has_no_rows():
    assert norm_rows(meta_model("")) == []


def test_flops_of_the_head_are_those_counted_by_hand():
    found = costs(meta_model(""), 2, 128, 256)
    cells = sum((128 // s) * (256 // s) for s in (8, 16, 32, 64, 128))
    outputs = 32 + 32 + 9 * 3 + 9 * 4  # both towers, then classes and deltas
    assert found["head"].forward == 2 * cells * 2 * (9 * 32) * outputs
    assert found["head"].backward == 2 * found["head"].forward
    assert found["head"].parameters == outputs * (9 * 32 + 1)


def test_frozen_stages_cost_no_backward_and_save_nothing():
    free, frozen = (costs(meta_model("BN", freeze_at=at), 2, 128, 256)["backbone"] for at in (0, 2))
    assert frozen.forward == free.forward and frozen.parameters == free.parameters
    assert frozen.backward < free.backward and frozen.saved < free.saved / 2 and frozen.trained < free.trained


@pytest.mark.parametrize("norm, conv", [("MABN", "centralized"), ("BCN", "standardized")])
def test_norms_with_windows_and_groups_save_what_batch_norm_saves(norm, conv):
    own, batch_norm = (costs(meta_model(kind, conv), 2, 256, 256) for kind in (norm, "BN"))
    for part in ("backbone", "fpn"):
        assert own[part].saved == pytest.approx(batch_norm[part].saved, rel=0.02)
