"""tools/compare_norms.py as a user runs it: real runs, a table of them, and no run made twice."""

import csv
import json
import sys
from pathlib import Path

import pytest
from run_cases import run_tool, write_data

from retinanet.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("MODEL.FPN.CHANNELS", "16", "MODEL.HEAD.NUM_CONVS", "1", "MODEL.NORM_OPTIONS.GN.GROUPS", "4"),
    *("INPUT.MIN_SIZE_TRAIN", "64", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64", "DEVICE", "cpu"),
    *("SOLVER.REFERENCE_BATCH", "0", "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "1", "SOLVER.LOG_PERIOD", "1"),
    *("TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "0"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), train=6, val=3)


@pytest.fixture
def compare(data, capfd):
    """`compare(output, *arguments)`: the tool in this process; its runs are processes of their own."""

    def run(output, *more):
        line = ["--config", "configs/quickstart.yaml", "--output", str(output), "--latency-rounds", "0", *SMALL]
        return run_tool(
            "compare_norms", [*line, "DATASETS.CATALOG", str(data / "catalog.yaml"), *map(str, more)], capfd
        )

    return run


def test_study_trains_once_tabulates_and_draws(compare, tmp_path):
    asked = ["--norms", "GN,none", "--part", "FPN", "--batches", "2"]
    ended = compare(tmp_path, *asked)
    assert ended.status == 0, ended.stderr
    assert "GN_batch2_seed0: starts" in ended.stdout and "| none" in ended.stdout
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["norm"] for row in rows] == ["GN", ""] and {row["iterations"] for row in rows} == {"2"}
    folder = tmp_path / "runs" / "none_batch2_seed0"
    metrics = json.loads((folder / "inference/synthetic_val/metrics.json").read_text())
    assert float(rows[1]["AP"]) == metrics["AP"] and float(rows[1]["memory_mib"]) > 100
    assert load_config(folder / "config.yaml").MODEL.FPN.NORM == ""
    assert {"table.md", "quality.png", "cost.png"} <= {path.name for path in tmp_path.iterdir()}
    # a run that was killed goes on; one that is finished stays
    (folder / "run.json").unlink()
    again = compare(tmp_path, *asked)
    assert again.status == 0, again.stderr
    assert "GN_batch2_seed0: finished before" in again.stdout and "none_batch2_seed0: goes on" in again.stdout
    assert list(csv.DictReader((tmp_path / "results.csv").open()))[1]["AP"] == rows[1]["AP"]
    changed = compare(tmp_path, *asked, "SOLVER.BASE_LR", "0.5")
    assert changed.status == 2 and "finished run of another configuration" in changed.stderr


@pytest.mark.slow  # the library below it is tested in test_peer_training
def test_torchvision_is_trained_beside_ours(data, tmp_path, capfd):
    whole = [*SMALL, "MODEL.FPN.CHANNELS", "256", "MODEL.HEAD.NUM_CONVS", "4", "MODEL.NORM_OPTIONS.GN.GROUPS", "16"]
    line = ["--config", "configs/quickstart.yaml", "--output", str(tmp_path), *whole, "--batches", "2"]
    line += ["DATASETS.CATALOG", str(data / "catalog.yaml"), "--norms", "torchvision_bn", "--latency-rounds", "0"]
    ended = run_tool("compare_norms", line, capfd)
    assert ended.status == 0, ended.stderr
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert row["norm"] == "torchvision_bn" and row["iterations"] == "2" and float(row["images_per_s"]) > 0


def test_run_that_fails_is_named_and_the_others_are_kept(compare, tmp_path, monkeypatch):
    import compare_norms

    real = compare_norms.watch

    def watch(command, folder):
        if "BN_batch2" in folder.name and "GN" not in folder.name:
            return 2, {}
        (folder / "inference/synthetic_val").mkdir(parents=True)
        metrics = dict.fromkeys(("AP", "AP50", "precision", "recall", "f1", "threshold"), 1.0)
        (folder / "inference/synthetic_val/metrics.json").write_text(json.dumps(metrics))
        (folder / "metrics.jsonl").write_text('{"iteration": 2, "loss": 1.0, "images_per_s": 3.0}\n')
        return 0, {"seconds": 1.0, "resident_mib": 10.0}

    monkeypatch.setattr(compare_norms, "watch", watch)
    ended = compare(tmp_path, "--norms", "BN,GN", "--batches", "2")
    assert real is not watch and ended.status == 1
    assert "failed, and in no table: BN_batch2_seed0" in ended.stderr
    assert [row["norm"] for row in csv.DictReader((tmp_path / "results.csv").open())] == ["GN"]


def test_noise_of_two_batch_sizes_is_measured(data, tmp_path, capfd):
    sys.path.insert(0, str(ROOT / "tools"))
    from types import SimpleNamespace

    import _noise

    args = SimpleNamespace(
        config="configs/quickstart.yaml", output=tmp_path, noise_layer="res2.0.conv1", noise_batches=2
    )
    norms = [text for part in ("BACKBONE", "FPN", "HEAD") for text in (f"MODEL.{part}.NORM", "BN")]
    opts = [*SMALL, *norms, "DATASETS.CATALOG", str(data / "catalog.yaml"), "OUTPUT_DIR", str(tmp_path / "run")]
    _noise.measure(args, opts, [2, 4])
    rows = list(csv.DictReader((tmp_path / "noise.csv").open()))
    assert [(row["batch"], row["statistic"]) for row in rows[:4]] == [
        ("2", name) for name in ("mean", "variance", "g", "Psi")
    ]
    assert len(rows) == 8 and all(0 < float(row["noise"]) <= 1.5 for row in rows)
    assert (tmp_path / "noise.png").stat().st_size > 10000
    assert "random weights" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--norms", "GN,BM"], "--norms: 'BM' is not one of"),
        (["--norms", "GN", "--part", "NECK"], "--part: 'NECK' is not one of"),
        (["--norms", "GN", "--batches", "2,x"], "--batches: '2,x' is not a list of whole numbers"),
        (["--norms", "GN,GN"], "a value occurs twice"),
        (["--norms", "torchvision_bn"], "torchvision's RetinaNet has 256 channels"),
        (["--norms", "GN", "MODEL.NORM_OPTIONS.GN.GROUPS", "7"], "do not divide"),
        (["--norms", "AffineChannel"], "takes its scale and shift from pre-trained weights"),
        (["--norms", "GN", "DATASETS.TEST", "()"], "DATASETS.TEST: is empty"),
    ],
)
def test_mistakes_are_named_before_the_first_run(compare, tmp_path, more, message):
    ended = compare(tmp_path, *more)
    assert ended.status == 2 and message in ended.stderr and not (tmp_path / "runs").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the memory of a process")
def test_memory_and_time_of_a_run_are_its_own(tmp_path):
    import compare_norms

    ballast = bytearray(600 * 2**20)  # of this process, which must not count
    ballast[:: 2**12] = bytes(len(ballast[:: 2**12]))
    script = "import time; block = bytearray(100 * 2**20); block[::4096] = bytes(len(block[::4096])); time.sleep(1)"
    status, usage = compare_norms.watch([sys.executable, "-c", script], tmp_path)
    assert status == 0 and 100 < usage["resident_mib"] < 300 and usage["seconds"] > 1
    status, again = compare_norms.watch([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
    assert status == 3 and again["resident_mib"] == usage["resident_mib"] and again["seconds"] > usage["seconds"]
