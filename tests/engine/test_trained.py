"""A trained model detects the same with its norms folded and as it was trained."""

import json

import pytest
import torch

from retinanet.config.load import dump_config, load_config, load_config_text
from retinanet.engine.checkpoint import write_checkpoint
from retinanet.engine.trained import build_classes, build_trained
from retinanet.errors import UserError
from retinanet.layers.norm import NORMS
from retinanet.modeling.build import build_model

SMALL = [
    *("MODEL.NUM_CLASSES", "2", "MODEL.BACKBONE.NAME", "R18", "MODEL.FPN.CHANNELS", "32", "MODEL.HEAD.NUM_CONVS", "1"),
    *("MODEL.ALLOW_MISSING_WEIGHTS", "True"),
]


def checkpoint(folder, norm: str):
    """A checkpoint of a small model with `norm` everywhere, whose statistics have seen one batch."""
    options = [f"MODEL.{part}.NORM={norm}" for part in ("BACKBONE", "FPN", "HEAD")]
    cfg = load_config("configs/quickstart.yaml", [*SMALL, *(word for pair in options for word in pair.split("="))])
    torch.manual_seed(0)
    model = build_model(cfg)
    model(torch.randn(2, 3, 64, 64))
    classes = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    state = {"model": model.state_dict(), "iteration": 1, "config": dump_config(cfg), "classes": classes}
    write_checkpoint(folder / "model.pth", state)
    return cfg, folder / "model.pth"


@pytest.mark.parametrize("norm", [*NORMS, "''"])
def test_test_fold_changes_the_parameters_and_not_the_outputs(tmp_path, norm):
    cfg, path = checkpoint(tmp_path, norm)
    outputs, names = [], []
    for fold in (True, False):
        cfg.defrost()
        cfg.TEST.FOLD = fold
        cfg.freeze()
        model = build_trained(cfg, path).model.eval()
        names.append({name for name in model.state_dict() if ".norm." in name})
        with torch.no_grad():
            outputs.append(model(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))))
    torch.testing.assert_close(outputs[0]["logits"], outputs[1]["logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0]["deltas"], outputs[1]["deltas"], rtol=1e-4, atol=1e-5)
    whole = norm in ("AffineChannel", "FrozenBN", "BN", "SyncBN", "MABN")
    assert (len(names[0]) < len(names[1])) == (whole or norm == "BCN")
    assert not (whole and names[0]), names[0]


def test_weights_of_another_batch_size_fit_where_the_norm_has_a_window(tmp_path):
    cfg, path = checkpoint(tmp_path, "MABN")
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.TEST.FOLD = False
    cfg.freeze()
    norm = build_trained(cfg, path).model.backbone.conv1.norm
    assert norm.buffer_x2.shape == (16, 64)


def test_weights_of_another_architecture_are_refused_by_name(tmp_path):
    cfg, path = checkpoint(tmp_path, "GN")
    cfg.defrost()
    cfg.MODEL.HEAD.NUM_CONVS = 2
    cfg.freeze()
    with pytest.raises(UserError, match="head.cls_convs.1.weight is missing"):
        build_trained(cfg, path)


@pytest.mark.parametrize(
    ("categories", "num_classes", "expected"),
    [
        ({7: "cat", 3: "person"}, 0, [(3, "person"), (7, "cat")]),
        ({7: "cat", 3: "person"}, 3, [(1, "__background__"), (2, "person"), (3, "cat")]),
        ({7: "cat", 3: "cow"}, 0, [(1, "__background__"), (2, "person"), (3, "cat")]),
    ],
)
def test_num_classes_0_takes_the_classes_of_the_data_when_the_weights_have_them(
    tmp_path, categories, num_classes, expected
):
    rows = [{"id": number, "name": name} for number, name in categories.items()]
    (tmp_path / "gt.json").write_text(json.dumps({"images": [], "annotations": [], "categories": rows}))
    (tmp_path / "catalog.yaml").write_text("small: {images: ., annotations: gt.json}\n")
    options = ["DATASETS.CATALOG", str(tmp_path / "catalog.yaml"), "DATASETS.TEST", "small"]
    options += ["MODEL.WEIGHTS_CLASSES", "__background__,person,cat", "MODEL.NUM_CLASSES", str(num_classes)]
    found = build_classes(load_config_text("", "test", options))
    assert [(entry["id"], entry["name"]) for entry in found] == expected
