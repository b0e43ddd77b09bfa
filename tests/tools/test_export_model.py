"""`tools/export_model.py` and the tools that take what it writes: files that detect what the model detects."""

import contextlib
import io
import json
from functools import partial

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from model_cases import randomize, small_cfg

import retinanet
from retinanet.config.load import dump_config
from retinanet.data.synthetic import render, write_dataset
from retinanet.deploy import export as export_module
from retinanet.deploy.exported import Exported
from retinanet.engine.checkpoint import write_checkpoint
from retinanet.engine.parity import Parity, match
from retinanet.errors import UserError
from retinanet.modeling.backbone import BACKBONES
from retinanet.modeling.backbone.resnet import ResNet
from retinanet.modeling.build import build_model

NAMES = ["triangle", "square", "circle", "star", "ring", "cross"]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import export_model
    import predict
    import test_net

    return {"export": export_model.main, "predict": predict.main, "test": test_net.main}


@pytest.fixture(scope="module", autouse=True)
def backbone():
    """A shallow one: the time of an export goes with the number of layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "R18", partial(ResNet, blocks=(1, 1, 1, 1), bottleneck=False))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a batch norm, a BCN and a GN, its data set, and its exported files."""
    folder = tmp_path_factory.mktemp("exported")
    annotations = write_dataset(folder / "data", "val", 3, (64, 96))
    categories = json.loads(annotations.read_text())["categories"]
    entry = {"val": {"images": str(folder / "data/val"), "annotations": str(annotations)}}
    (folder / "catalog.yaml").write_text(yaml.safe_dump(entry))
    opts = ["MODEL.NORM_OPTIONS.GN.GROUPS", 4, "MODEL.NORM_OPTIONS.BCN.GROUPS", 4, "TEST.PRE_NMS_TOPK", 50]
    opts += ["DATASETS.CATALOG", str(folder / "catalog.yaml"), "DATASETS.TEST", ("val",), "INPUT.MIN_SIZE_TEST", 64]
    opts += ["MODEL.NUM_CLASSES", len(categories), "INPUT.MAX_SIZE_TEST", 128, "TEST.IMS_PER_BATCH", 2]
    opts += ["DATALOADER.NUM_WORKERS", 0]
    cfg = small_cfg("NORMS", ("BN", "BCN", "GN"), *opts)
    torch.manual_seed(0)
    model = randomize(build_model(cfg)).eval()
    with torch.no_grad():
        model.head.cls_pred.weight.mul_(100)
    state = {"model": model.state_dict(), "iteration": 1, "config": dump_config(cfg), "classes": categories}
    write_checkpoint(folder / "model.pth", state | {"metrics": {"threshold": 0.125}})
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    """Two files of the folder's checkpoint, one of each format and one of each place of NMS, and what the tool said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        import export_model

        weights = ["--weights", str(folder / "model.pth"), "--evaluate"]
        export_model.main([*weights, "--formats", "onnx", "--nms", "inside"])
        export_model.main([*weights, "--formats", "pt2", "--nms", "outside"])
    return folder / "exported", said.getvalue()


def pictures():
    generator = np.random.default_rng(5)
    return [render(generator, size)[0] for size in ((64, 64), (96, 64), (70, 131))]


def test_every_file_is_compared_on_pictures_and_by_ap(exported):
    check_table(*exported, ["model.onnx", "model_raw.pt2"])


def check_table(files, said: str, names: list[str]) -> None:
    lines = [line.split() for line in said.splitlines() if line.startswith("model")]
    assert [line[0] for line in lines] == names
    for line in lines:
        assert (
            (files / line[0]).is_file()
            and int(line[2]) > 50
            and int(line[3]) < 0.01 * int(line[2])
            and line[6] == "equal;"
        ), line
        assert "AP on val" in " ".join(line)
    assert "BN whole" in said and "BCN part" in said and "GN nothing" in said


@pytest.mark.slow
def test_all_four_files_at_once(folder, tools, tmp_path, capsys):
    tools["export"](["--weights", str(folder / "model.pth"), "--evaluate", "--output", str(tmp_path)])
    names = ["model.pt2", "model_raw.pt2", "model.onnx", "model_raw.onnx"]
    check_table(tmp_path, capsys.readouterr().out, names)


def test_onnx_file_runs_without_this_package(exported):
    """Only onnxruntime and what the file says about itself."""
    import onnx
    import onnxruntime

    path = str(exported[0] / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["retinanet"])
    assert facts["opset"] == 18 == onnx.load(path).opset_import[0].version
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    assert facts["image_dtype"] == "uint8" and facts["size_multiple"] == 32 and facts["threshold"] == 0.125
    assert len(facts["classes"]) == 6 and facts["channel_order"] == "BGR" and facts["resize"]["short_side"] == 64
    for count, height, width in ((1, 32, 32), (3, 64, 160)):
        sizes = np.array([[height, width]] * count)
        feed = {"images": np.full((count, 3, height, width), 90, np.uint8), "image_sizes": sizes}
        feed |= {"original_sizes": sizes, "scales": np.ones((count, 2), np.float32)}
        boxes, scores, labels, counts = session.run(None, feed)
        assert boxes.shape == (count, 100, 4) and scores.shape == labels.shape == (count, 100) and counts.min() > 0
        assert boxes[..., 2].max() <= width and boxes[..., 3].max() <= height and labels.max() < 6


def test_pt2_file_runs_with_torch_alone(exported):
    program = torch.export.load(exported[0] / "model_raw.pt2").module()
    images = torch.full((1, 3, 96, 64), 90, dtype=torch.uint8)
    boxes, scores, labels = program(images, torch.tensor([[96, 64]]))
    assert boxes.shape == (1, 250, 4) and scores.max() > 0 and (scores.diff(dim=1) <= 0).all() and labels.max() < 6
    with pytest.raises((RuntimeError, AssertionError)):  # no multiple of 32
        program(images[:, :, :40], torch.tensor([[40, 64]]))


@pytest.mark.parametrize("name", ["model_raw.pt2", "model.onnx"])
def test_load_takes_an_exported_file_like_a_checkpoint(exported, folder, name):
    eager, other = retinanet.load(folder / "model.pth", device="cpu"), retinanet.load(exported[0] / name, device="cpu")
    assert (other.names, other.classes, other.threshold, other.batch_size) == (
        eager.names, eager.classes, 0.125, eager.batch_size,
    )  # fmt: skip
    parity = Parity()
    parity.add(eager(pictures()), other(pictures()))
    assert parity.expected > 50 and parity.equal and parity.box < 0.01 and parity.score < 1e-4


def test_predict_and_test_net_take_exported_files(exported, folder, tools, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a.png"), pictures()[0])
    rows, metrics, scored = {}, {}, {}
    views = ["TEST.AUG.FLIP", "True", "TEST.AUG.SCALES", "(1.0,1.5)"]  # an exported file sees each view
    for name in ("model.onnx", "model.pth"):
        path = exported[0] / name if name.endswith("onnx") else folder / name
        tools["predict"]([str(tmp_path / "a.png"), "--weights", str(path), "--output", str(tmp_path / name)])
        rows[name] = json.loads((tmp_path / name / "predictions.json").read_text())
        config = folder / "config.yaml"
        config.write_text(torch.load(folder / "model.pth", weights_only=True)["config"])
        tools["test"](["--config", str(config), "MODEL.WEIGHTS", str(path), "--output", str(tmp_path / name), *views])
        metrics[name] = json.loads((tmp_path / name / "metrics.json").read_text())
        scored[name] = json.loads((tmp_path / name / "predictions.json").read_text())
    assert len(rows["model.onnx"]) == len(rows["model.pth"]) > 5
    assert metrics["model.onnx"]["AP"] == pytest.approx(metrics["model.pth"]["AP"], abs=0.01)
    assert len(scored["model.onnx"]) == len(scored["model.pth"]) > 50
    with pytest.raises(UserError, match="TEST.NMS_IOU: is 0.7, but 0.5 is fixed inside"):
        tools["test"](
            ["--config", str(config), "MODEL.WEIGHTS", str(exported[0] / "model.onnx"), "TEST.NMS_IOU", "0.7"]
        )


def test_mistakes_are_named(exported, folder, tools, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--formats: 'onx' is not one of pt2, onnx"):
        tools["export"](["--weights", str(folder / "model.pth"), "--formats", "onx"])
    with pytest.raises(UserError, match="exported already"):
        tools["export"](["--weights", str(exported[0] / "model.onnx")])
    with pytest.raises(UserError, match="no picture and no folder"):
        tools["export"](["--weights", str(folder / "model.pth"), "--images", str(tmp_path)])
    for name, source in (("damaged.onnx", "model.onnx"), ("damaged.pt2", "model_raw.pt2")):
        (tmp_path / name).write_bytes((exported[0] / source).read_bytes()[:5000])
        with pytest.raises(UserError, match="damaged"):
            Exported(tmp_path / name)
    with pytest.raises(UserError, match="there is no such file"):
        retinanet.load(tmp_path / "none.onnx")
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(1),)), tmp_path / "other.pt2")
    with pytest.raises(UserError, match="not written by tools/export_model.py"):
        Exported(tmp_path / "other.pt2")
    monkeypatch.setitem(export_module.PACKAGES, "onnx", ("no_such_package",))
    with pytest.raises(UserError, match="no_such_package.*pip install -r requirements-export.txt"):
        tools["export"](["--weights", str(folder / "model.pth"), "--formats", "onnx"])


def test_a_file_that_differs_is_reported_and_ends_with_status_1(exported, folder, tools, tmp_path, monkeypatch, capsys):
    import export_model

    whole, content = Exported.forward, (exported[0] / "model_raw.pt2").read_bytes()

    def wrong(self, batch):
        return [found | {"boxes": found["boxes"] + 2} for found in whole(self, batch)]

    monkeypatch.setattr(Exported, "forward", wrong)
    monkeypatch.setattr(export_model, "export", lambda *_: (lambda file: file.write(content), ""))
    with pytest.raises(SystemExit) as end:
        arguments = ["--formats", "pt2", "--nms", "outside", "--output", str(tmp_path)]
        tools["export"](["--weights", str(folder / "model.pth"), *arguments])
    out = capsys.readouterr()
    assert end.value.code == 1 and "DIFFERENT" in out.out and "do not use" in out.err


def test_match_pairs_each_detection_once_and_not_across_classes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [50, 50, 60, 60]])
    one = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([0, 1, 0])}
    other = {"boxes": boxes + 0.005, "scores": torch.tensor([0.8, 0.9, 0.7]), "labels": torch.tensor([1, 0, 1])}
    assert match(one, other) == [(0, 1), (1, 0)]  # the third is of another class
    other["boxes"] = boxes + 0.1
    assert match(one, other) == []
