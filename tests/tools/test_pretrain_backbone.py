"""tools/pretrain_backbone.py as a user runs it: it resumes to the bit, and a detector starts from the result."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import _cli  # noqa: E402
import make_synthetic  # noqa: E402
import pretrain_backbone  # noqa: E402

from retinanet.config.load import load_config  # noqa: E402
from retinanet.engine.checkpoint import read_checkpoint  # noqa: E402
from retinanet.modeling.build import build_model  # noqa: E402
from retinanet.weights.load import build_weights  # noqa: E402

TINY = [
    *("SOLVER.IMS_PER_BATCH", "8", "SOLVER.REFERENCE_BATCH", "0", "SOLVER.WARMUP_ITERS", "2", "SOLVER.LOG_PERIOD", "1"),
    *("SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.CHECKPOINT_KEEP", "0"),
    *("DATALOADER.NUM_WORKERS", "0", "DEVICE", "cpu", "SOLVER.BASE_LR", "0.02"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    sys.argv = ["make_synthetic.py", "--classification", "--output", str(folder), "--size", "32", "32"]
    sys.argv += ["--train", "30", "--val", "12"]
    make_synthetic.main()
    return folder


@pytest.fixture
def run(data, capfd):
    """`run(output, *arguments)`: the tool in this process, from its command line to its exit status and messages."""

    def run_tool(output, *more, folder=None) -> tuple[int, str]:
        line = ["--config", "configs/pretrain/small_R18.yaml", "--data", str(folder or data), *TINY]
        status = 0
        try:
            _cli.run(lambda: pretrain_backbone.main([*line, "OUTPUT_DIR", str(output), *map(str, more)]))
        except SystemExit as end:
            status = end.code
        return status, capfd.readouterr().err

    return run_tool


def same_state(first: Path, second: Path) -> None:
    one, two = read_checkpoint(first), read_checkpoint(second)
    assert one["iteration"] == two["iteration"]
    torch.testing.assert_close(one["model"], two["model"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer"]["state"], two["optimizer"]["state"], rtol=0, atol=0)


def lines(folder: Path) -> list[dict]:
    timed = ("images_per_s", "data_wait", "memory")
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in timed} for line in found]


def test_resumed_equals_uninterrupted_whatever_the_workers(run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole)[0] == 0
    assert run(parts)[0] == 0
    for late in [*parts.glob("checkpoint_0000004.pth"), parts / "best.pth"]:
        late.unlink()
    assert run(parts, "--resume", "DATALOADER.NUM_WORKERS", 2)[0] == 0
    same_state(whole / "checkpoint_0000004.pth", parts / "checkpoint_0000004.pth")
    assert lines(whole) == lines(parts)
    evaluated = [line for line in lines(whole) if "top5" in line]
    assert [line["iteration"] for line in evaluated] == [2, 4]
    assert all(line["images"] == 12 and 0 <= line["top1"] <= line["top5"] <= 100 for line in evaluated)


def test_a_detector_starts_from_every_weight_of_the_backbone(run, tmp_path):
    assert run(tmp_path / "out", "--stem", "small", "MODEL.BACKBONE.NORM", "MABN")[0] == 0
    best = tmp_path / "out" / "best.pth"
    opts = ["MODEL.WEIGHTS", str(best), "MODEL.NUM_CLASSES", "3", "MODEL.BACKBONE.NORM", "MABN"]
    cfg = load_config("configs/quickstart.yaml", opts)
    model = build_model(cfg)
    report = build_weights(cfg, model)
    wanted = {f"backbone.{name}" for name in model.backbone.state_dict()}
    assert not report.missing and not report.unexpected and not report.refused and set(report.unused) <= {
        "fc.weight", "fc.bias",
    }  # fmt: skip
    stored = read_checkpoint(best)["model"]
    assert wanted == {name for name in stored if name.startswith("backbone.")}
    for name, value in model.state_dict().items():
        if name in wanted:
            torch.testing.assert_close(value, stored[name], rtol=0, atol=0)


def test_micro_batches_are_the_big_batch(run, tmp_path):
    assert run(tmp_path / "big", "SOLVER.MAX_ITER", 2)[0] == 0
    more = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2]
    assert run(tmp_path / "micro", *more)[0] == 0
    one, two = (read_checkpoint(tmp_path / name / "checkpoint_0000002.pth")["model"] for name in ("big", "micro"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)  # GN: the batch does not matter


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["MODEL.BACKBONE.NORM", "FrozenBN"], "FrozenBN normalizes nothing"),
        (["MODEL.BACKBONE.FREEZE_AT", 1], "FREEZE_AT: frozen stages would stay random"),
        (["MODEL.WEIGHTS", "x.pth"], "MODEL.WEIGHTS: 'x.pth' has no effect here"),
        (["MODEL.BACKBONE.NAME", "R19"], "did you mean 'R18'"),
    ],
)
def test_mistakes_of_the_configuration_are_named(run, tmp_path, more, message):
    status, error = run(tmp_path / "out", *more)
    assert status == 2 and message in error and "Traceback" not in error


def test_folders_of_another_layout_are_named(run, data, tmp_path):
    status, error = run(tmp_path / "out", folder=tmp_path)
    assert status == 2 and "train is not a folder with a sub-folder of images for each class" in error
    for split, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            (tmp_path / "odd" / split / name).mkdir(parents=True)
            source = next((data / "train" / "disk").iterdir())
            (tmp_path / "odd" / split / name / "x.jpg").write_bytes(source.read_bytes())
    status, error = run(tmp_path / "out", folder=tmp_path / "odd")
    assert status == 2 and "different classes: b, c in only one of them" in error
    (tmp_path / "odd/val/b").mkdir()
    (tmp_path / "odd/val/c").rename(tmp_path / "odd/val/b/deeper")
    (tmp_path / "odd/train/a/y.jpg").write_bytes(b"no image")
    status, error = run(tmp_path / "out", folder=tmp_path / "odd")
    assert status == 2 and "y.jpg: the image cannot be read" in error and "Traceback" not in error


def test_another_stem_than_before_is_refused(run, tmp_path):
    assert run(tmp_path / "out", "SOLVER.MAX_ITER", 3)[0] == 0
    assert run(tmp_path / "out", "SOLVER.MAX_ITER", 3)[0] == 2  # holds a run already
    status, error = run(tmp_path / "out", "--resume", "--stem", "small")
    assert status == 2 and "--stem: the run was started with full" in error
