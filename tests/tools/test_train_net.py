"""tools/train_net.py as a user runs it: it trains, evaluates, stops and goes on, and explains mistakes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_cases import ROOT, arguments, command, run_tool, write_data

from retinanet.data.synthetic import write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A catalog with a synthetic training set of 12 and an evaluation set of 6 images."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run(capfd):
    """`run(data, output, *KEY VALUE)`: the tool in this process, from its command line to its exit status."""
    return lambda *given: run_tool("train_net", arguments(*given), capfd)


def weights(folder: Path, iteration: int) -> dict:
    return torch.load(folder / f"checkpoint_{iteration:07d}.pth", weights_only=True)


def lines(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "data_wait")} for row in rows]


def test_a_run_leaves_all_that_the_readme_names(data, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)  # tools work from any directory
    done = run(data, tmp_path / "run", "SOLVER.MAX_ITER", "6")
    assert done.status == 0, done.stderr
    out = tmp_path / "run"
    for name in ("config.yaml", "log.txt", "metrics.jsonl", "checkpoint_0000006.pth", "best.pth"):
        assert (out / name).stat().st_size > 0, name
    assert (out / "last_checkpoint").read_text().strip() == "checkpoint_0000006.pth"
    assert list(out.glob("events.out.tfevents.*"))
    metrics = json.loads((out / "inference/synthetic_val/metrics.json").read_text())
    assert {"AP", "AP50", "AR100", "precision", "recall", "per_class"} <= set(metrics)
    assert isinstance(json.loads((out / "inference/synthetic_val/predictions.json").read_text()), list)
    rows = [row for row in lines(out) if "loss" in row]
    assert [row["iteration"] for row in rows] == [3, 6]
    assert {"lr", "loss", "loss_cls", "loss_box", "grad_norm"} <= set(rows[0])


def test_a_signal_saves_and_stops_and_the_run_goes_on(data, tmp_path, run):
    options = ["SOLVER.MAX_ITER", "200", "SOLVER.LOG_PERIOD", "1"]
    process = subprocess.Popen(command(data, tmp_path / "run", *options), stdout=subprocess.DEVNULL)
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    saved = sorted((tmp_path / "run").glob("checkpoint_*.pth"))
    assert len(saved) == 1
    iteration = int(saved[0].stem.split("_")[1])
    more = [*options[2:], "SOLVER.MAX_ITER", str(iteration + 2), "--resume"]
    more = run(data, tmp_path / "run", *more)
    assert more.status == 0, more.stderr
    assert [row["iteration"] for row in lines(tmp_path / "run") if "loss" in row] == list(range(1, iteration + 3))


def test_accumulation_equals_the_big_batch(data, tmp_path, run):
    for name, batch, accumulate in (("big", "4", "1"), ("small", "2", "2")):
        split = ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.ACCUMULATE", accumulate]
        done = run(data, tmp_path / name, "SOLVER.MAX_ITER", "3", *split)
        assert done.status == 0, done.stderr
    big, small = weights(tmp_path / "big", 3)["model"], weights(tmp_path / "small", 3)["model"]
    torch.testing.assert_close(big, small, rtol=1e-4, atol=1e-5)


def test_a_new_run_does_not_overwrite_an_old_one(data, tmp_path, run):
    assert run(data, tmp_path / "run", "SOLVER.MAX_ITER", "2").status == 0
    again = run(data, tmp_path / "run", "SOLVER.MAX_ITER", "2")
    assert again.status == 2
    assert "--resume" in again.stderr


def test_resuming_another_model_is_refused_by_its_key(data, tmp_path, run):
    assert run(data, tmp_path / "run", "SOLVER.MAX_ITER", "2").status == 0
    other = run(data, tmp_path / "run", "SOLVER.MAX_ITER", "4", "MODEL.FPN.CHANNELS", "32", "--resume")
    assert other.status == 2, other.stderr
    assert "MODEL.FPN.CHANNELS 16" in other.stderr


MISTAKES = [
    (["SOLVER.BASE_LRR", "0.1"], "SOLVER.BASE_LR"),
    (["SOLVER.BASE_LR", "fast"], "'fast'"),
    (["DATASETS.TRAIN", "synthetic_tain"], "synthetic_train"),
    (["MODEL.NUM_CLASSES", "3"], "MODEL.NUM_CLASSES: is 3"),
    (["MODEL.WEIGHTS", "nowhere.pth"], "nowhere.pth"),
    (["MODEL.BACKBONE.NORM", "GroupNrom"], "GN"),
    (["DEVICE", "cuda"], "DEVICE cpu"),
    (["OUTPUT_DIR", "/proc/nothing"], "/proc/nothing"),
    (["SOLVER.BASE_LR", "1e9", "SOLVER.CLIP_GRAD_NORM", "0.0"], "a loss or the gradient is not finite"),
]


@pytest.mark.parametrize(("extra", "named"), MISTAKES, ids=[" ".join(pair[0]) for pair in MISTAKES])
def test_a_mistake_ends_with_status_2_and_one_message(data, tmp_path, run, extra, named):
    if extra == ["DEVICE", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = run(data, tmp_path / "run", "SOLVER.MAX_ITER", "2", *extra)
    assert done.status == 2
    assert "Traceback" not in done.stderr
    message = [line for line in done.stderr.splitlines() if line.startswith("error: ")]  # on its own line
    assert len(message) == 1 and named in message[0]


def broken(data: Path, folder: Path, change) -> Path:
    """A catalog whose training json went through `change`."""
    content = json.loads((data / "annotations/train.json").read_text())
    change(content)
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "catalog.yaml").write_text(
        f"synthetic_train: {{images: {data / 'train'}, annotations: train.json}}\n"
        f"synthetic_val: {{images: {data / 'val'}, annotations: {data / 'annotations/val.json'}}}\n"
    )
    return folder


def no_images(content):
    content["images"], content["annotations"] = [], []


def missing_image(content):
    content["images"][0]["file_name"] = "gone.jpg"


@pytest.mark.parametrize(("change", "named"), [(no_images, "train.json"), (missing_image, "gone.jpg")])
def test_bad_data_ends_with_status_2_and_its_name(data, tmp_path, run, change, named):
    done = run(broken(data, tmp_path, change), tmp_path / "run", "SOLVER.MAX_ITER", "4")
    assert done.status == 2
    assert "Traceback" not in done.stderr
    assert named in done.stderr


def repeated_ids(content):
    for annotation in content["annotations"]:
        annotation["id"] = 7


def test_doubtful_data_is_named_before_training(data, tmp_path, run):
    done = run(broken(data, tmp_path, repeated_ids), tmp_path / "run", "SOLVER.MAX_ITER", "1")
    assert done.status == 0, done.stderr
    assert "[duplicate-annotation-id]" in (tmp_path / "run/log.txt").read_text()


def test_missing_coco_says_what_is_missing_and_what_to_do(tmp_path):
    (tmp_path / "catalog.yaml").write_text(
        "coco_2017_train: {images: coco/train2017, annotations: coco/annotations/instances_train2017.json}\n"
        "coco_2017_val: {images: coco/val2017, annotations: coco/annotations/instances_val2017.json}\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools/train_net.py"), "--config", "configs/retinanet_R50_gn_fpn.yaml"),
            *("DATASETS.CATALOG", str(tmp_path / "catalog.yaml"), "OUTPUT_DIR", str(tmp_path / "run")),
        ],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 2, done.stderr
    assert "train2017" in done.stderr
    assert "make demo" in done.stderr


def test_four_images_are_learned_by_heart(tmp_path, run):
    """AP above 90 on its own training images: boxes, matching, loss, decoding and evaluation agree with one another."""
    write_dataset(tmp_path, "train", 4, size=(96, 96))
    (tmp_path / "catalog.yaml").write_text("synthetic_train: {images: train, annotations: annotations/train.json}\n")
    done = run(
        *(tmp_path, tmp_path / "run", "DATASETS.TEST", "synthetic_train", "MODEL.FPN.CHANNELS", "32"),
        *("INPUT.MIN_SIZE_TRAIN", "96", "INPUT.MIN_SIZE_TEST", "96", "INPUT.FLIP_PROB", "0"),
        *("SOLVER.MAX_ITER", "80", "SOLVER.WARMUP_ITERS", "20", "SOLVER.BASE_LR", "0.03"),
    )
    assert done.status == 0, done.stderr
    metrics = json.loads((tmp_path / "run/inference/synthetic_train/metrics.json").read_text())
    assert metrics["AP"] > 90, metrics


def test_the_coco_configuration_trains_evaluates_and_resumes_on_coco_images(tmp_path, shared, capfd):
    coco = shared("data/coco_mini")
    val = json.loads((coco / "annotations/instances_val2017.json").read_text())
    val["images"] = val["images"][:16]  # of 158: each of the two evaluations goes over all
    kept = {image["id"] for image in val["images"]}
    val["annotations"] = [row for row in val["annotations"] if row["image_id"] in kept]
    (tmp_path / "val.json").write_text(json.dumps(val))
    (tmp_path / "catalog.yaml").write_text(
        f"coco_2017_train: {{images: {coco}/train2017, annotations: {coco}/annotations/instances_train2017.json}}\n"
        f"coco_2017_val: {{images: {coco}/val2017, annotations: {tmp_path}/val.json}}\n"
    )
    options = [
        *("--config", "configs/retinanet_R50_gn_fpn.yaml", "MODEL.WEIGHTS", "", "MODEL.ALLOW_MISSING_WEIGHTS", "True"),
        *("DATASETS.CATALOG", str(tmp_path / "catalog.yaml"), "OUTPUT_DIR", str(tmp_path / "run")),
        *("INPUT.MIN_SIZE_TRAIN", "96", "INPUT.MAX_SIZE_TRAIN", "160", "INPUT.MIN_SIZE_TEST", "64"),
        *("INPUT.MAX_SIZE_TEST", "96", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_BATCH", "0"),
    ]
    assert run_tool("train_net", [*options, "SOLVER.MAX_ITER", "2"], capfd).status == 0
    resumed = run_tool("train_net", [*options, "SOLVER.MAX_ITER", "3", "--resume"], capfd)
    assert weights(tmp_path / "run", 3)["iteration"] == 3
    assert len(weights(tmp_path / "run", 3)["classes"]) == 80
    metrics = json.loads((tmp_path / "run/inference/coco_2017_val/metrics.json").read_text())
    assert metrics["AP"] is not None
    assert "resumed from" in resumed.stdout
