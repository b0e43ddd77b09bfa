"""`tools/convert_weights.py`: foreign weights in, a checkpoint out that loads on its own; and back out again."""

import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import ROOT
from goldens.recipes import caffe2_blobs, caffe2_shapes
from weights.cases import make_cfg, make_model

from retinanet.config import dump_config
from retinanet.engine.checkpoint import read_checkpoint
from retinanet.engine.detector import load
from retinanet.errors import UserError

SMALL = ["MODEL.BACKBONE.NAME", "R18", "MODEL.BACKBONE.NORM", "BN", "MODEL.BACKBONE.STRIDE_IN_1X1", "False"]


@pytest.fixture
def main(monkeypatch):
    """The tool's `main(argv)` in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import convert_weights

    return lambda *arguments: convert_weights.main(list(map(str, arguments)))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(make_cfg(*SMALL[:4], "MODEL.BACKBONE.STRIDE_IN_1X1", False)))
    return path


def test_a_caffe2_retinanet_becomes_a_detector_of_its_own(main, tmp_path, capsys):
    blobs = caffe2_blobs(caffe2_shapes())
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"blobs": blobs}, 4))
    out = tmp_path / "r50.pth"
    main("--config", ROOT / "configs/caffe2/retinanet_R50_FPN.yaml", "--output", out,
         "MODEL.WEIGHTS", tmp_path / "model_final.pkl")  # fmt: skip
    printed = capsys.readouterr().out
    assert "Caffe2 Detectron RetinaNet): 195 matched" in printed
    state = read_checkpoint(out)
    torch.testing.assert_close(state["model"]["fpn.p6.bias"], torch.from_numpy(blobs["fpn_6_b"]), rtol=0, atol=0)
    assert len(state["classes"]) == 80
    assert load(out, device="cpu").model.backbone.conv1.weight.shape == (64, 3, 7, 7)


def test_an_imagenet_file_becomes_a_backbone(main, config, tmp_path, capsys):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    out = tmp_path / "backbone.pth"
    main("--config", config, "--output", out, "--names", "MODEL.WEIGHTS", tmp_path / "resnet18.pth")
    printed = capsys.readouterr().out
    assert "first convolution: turned from RGB to BGR" in printed
    assert "warning: MODEL.PIXEL_STD" in printed
    assert "  backbone.res5.1.conv2.norm.running_var" in printed
    assert all(name.startswith("backbone.") for name in read_checkpoint(out)["model"])
    model = make_model(*SMALL[:4])
    from retinanet.weights.load import load_weights

    report = load_weights(model, str(out))
    assert report.missing == []
    assert all(not name.startswith("backbone.") for name in report.initialised)


def test_our_checkpoint_goes_out_to_detectron2(main, config, tmp_path, capsys):
    model = make_model(*SMALL[:4])
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    out = tmp_path / "d2.pth"
    main("--config", config, "--to", "detectron2", "--output", out, "MODEL.WEIGHTS", tmp_path / "ours.pth")
    assert "INPUT.FORMAT BGR" in capsys.readouterr().out
    written = torch.load(out, weights_only=True)["model"]
    expected = model.backbone.res2[0].conv1.weight
    torch.testing.assert_close(written["backbone.bottom_up.res2.0.conv1.weight"], expected, rtol=0, atol=0)


def test_a_backbone_alone_does_not_go_out(main, config, tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(UserError, match="no whole detector"):
        main("--config", config, "--to", "detectron2", "--output", tmp_path / "d2.pth",
             "MODEL.WEIGHTS", tmp_path / "resnet18.pth")  # fmt: skip
    assert not (tmp_path / "d2.pth").exists()


def test_nothing_is_overwritten(main, config, tmp_path):
    with pytest.raises(UserError, match=r"--output: .* exists"):
        main("--config", config, "--output", config, "MODEL.WEIGHTS", "x.pth")


def test_weights_must_be_named(main, config, tmp_path):
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS: is empty"):
        main("--config", config, "--output", tmp_path / "out.pth", "MODEL.WEIGHTS", "")


def test_a_mistake_of_the_user_is_one_message_and_status_2(config, tmp_path):
    (tmp_path / "hostile.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    command = [sys.executable, str(ROOT / "tools/convert_weights.py"), "--config", str(config), "--output",
               str(tmp_path / "o.pth"), "MODEL.WEIGHTS", str(tmp_path / "hostile.pkl")]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "it holds the name os.system" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ran").exists()


def test_help_shows_examples():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/convert_weights.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--to torchvision" in done.stdout
