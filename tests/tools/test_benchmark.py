"""`tools/benchmark.py`: what it plans, prints and writes, and the mistakes of its users."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from retinanet.engine import benchmark
from retinanet.engine.benchmark_report import short
from retinanet.engine.benchmark_worker import Worker
from retinanet.errors import UserError

TINY = """
MODEL:
  NUM_CLASSES: 0
  BACKBONE: {NAME: R18, NORM: BN, FREEZE_AT: 0}
  FPN: {CHANNELS: 32}
  HEAD: {NUM_CONVS: 1}
DEVICE: cpu
"""
FEW = ("--rounds", 2, "--steps", 2, "--warm-up", 0, "--batch", 1)
ROW = {
    "task", "variant", "ms", "ms_low", "ms_high", "spread", "images_per_s", "ratio", "ratio_low", "ratio_high",
    "cpu_ms", "cpu_ratio", "memory_mib", "memory_ratio", "rounds_ms", "host",
}  # fmt: skip
COST = {"gflop", "floor_ms", "operations", "host_waits", "mfu", "roofline", "tflops", "gb_per_s"}


class Here:
    """Stands for `Remote`: the worker without a process of its own, which costs seconds."""

    def __init__(self, job):
        self.job, self.worker = job, Worker(job)

    def call(self, method, *arguments):
        return getattr(self.worker, method)(*arguments)

    def stop(self):
        self.worker = None


@pytest.fixture
def tool(monkeypatch):
    """The module of the tool, which works in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(benchmark, "Remote", Here)
    sys.modules.pop("benchmark", None)
    import benchmark as tool

    return tool


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.yaml").write_text(TINY)
    return tmp_path / "config.yaml"


def run(tool, *arguments):
    tool.main(list(map(str, arguments)))


def test_training_report_has_times_ratios_memory_and_the_machine(tool, config, tmp_path, capsys):
    out = tmp_path / "new/out.json"
    run(tool, "--config", config, "--norms", "BN,MABN", "--part", "FPN", "--size", 64, 64, *FEW, "--json", out)
    written = json.loads(out.read_text())
    assert set(written) == {"command", "machine", "settings", "results"}
    assert written["command"].startswith("python tools/benchmark.py --config")
    wanted = {"date", "cpu", "cores", "load", "load_after", "system", "python", "torch", "torchvision", "environment"}
    assert set(written["machine"]) == wanted | {"device", "threads", "capability", "tuned"}
    settings = written["settings"]
    assert settings["size"] == [64, 64] and settings["batch"] == 1 and settings["num_classes"] == 80
    first, second = written["results"]
    assert set(first) == set(second) == ROW | COST | {"first_loss", "last_loss"}
    assert [row["variant"] for row in written["results"]] == ["BN", "MABN"]
    assert first["ratio"] == 1 and first["images_per_s"] == pytest.approx(1000 / first["ms"])
    assert [len(turn) for turn in second["rounds_ms"]] == [2, 2]
    assert 0 < first["floor_ms"] < first["ms"] and first["roofline"] == pytest.approx(first["floor_ms"] / first["ms"])
    assert first["host_waits"] == 0 < first["operations"]
    assert first["last_loss"] > 0 and second["last_loss"] != first["last_loss"]
    printed = capsys.readouterr()
    assert f"| MABN  | {short(second['ms'])}" in printed.out
    assert f"{written['machine']['threads']} threads" in printed.out and written["machine"]["date"] in printed.out
    assert "train: round 2 of 2: BN" in printed.err


def test_norms_are_set_in_the_named_parts_alone(tool, config):
    args = parsed(tool, "--config", config, "--norms", "GN,config,torchvision", "--part", "FPN,HEAD", "--batch", 4)
    jobs = tool.plan(args, "train")[0][0]
    found = [tool.load_config_text(job.config, "") for job in jobs]
    assert [[cfg.MODEL[part].NORM for part in ("BACKBONE", "FPN", "HEAD")] for cfg in found] == [
        ["BN", "GN", "GN"],
        ["BN", "", ""],
        ["BN", "", ""],
        ["BN", "", ""],
    ]
    assert {cfg.SOLVER.IMS_PER_BATCH for cfg in found} == {4}  # MABN's window follows from it


def parsed(tool, *arguments):
    """Return what `main` gives to `plan` for a command line."""
    seen, real = [], tool.plan
    try:
        tool.plan = lambda args, task: seen.append(args) or ([], None)
        with pytest.raises(IndexError):  # nothing was measured
            run(tool, *arguments)
    finally:
        tool.plan = real
    return seen[0]


def test_detection_is_timed_plain_and_folded_and_the_peer_with_both_allocators(tool, config):
    args = parsed(tool, "--config", config, "--norms", "BN,torchvision", "--detect")
    assert [job.name for job in tool.plan(args, "detect")[0][0]] == [
        "BN",
        "BN folded",
        "torchvision",
        "torchvision + allocator",
    ]


def test_detection_report_counts_detections(tool, config, tmp_path):
    out = tmp_path / "out.json"
    run(tool, "--config", config, "--detect", "--size", 64, 64, "--scores", 50, *FEW, "--json", out)
    plain, folded = json.loads(out.read_text())["results"]
    assert (plain["variant"], folded["variant"]) == ("config", "config folded")
    assert 0 < plain["detections_per_image"] <= 50
    assert folded["detections_per_image"] == pytest.approx(plain["detections_per_image"], abs=2)


def test_layers_are_timed_in_both_memory_formats_beside_torch(tool, tmp_path, capsys):
    out, traces = tmp_path / "out.json", tmp_path / "traces"
    run(tool, "--layer", "--norms", "MABN", "--size", 8, 8, *FEW, "--json", out, "--profile", traces)
    rows = json.loads(out.read_text())["results"]
    assert [(row["task"], row["variant"]) for row in rows] == [
        (f"layer_{memory}", name) for memory in ("contiguous", "channels_last") for name in ("BatchNorm2d", "MABN")
    ]
    assert all(row["saved_mib"] > 0 and row["memory_mib"] is None for row in rows)
    assert len(list(traces.glob("*.json"))) == 4
    printed = capsys.readouterr().out
    assert "| layer_contiguous" in printed and "| layer_channels_last" in printed and "Self CPU" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--norms", "BN,MABM"], "--norms: 'MABM' is not one of .*; did you mean 'MABN'?"),
        (["--norms", "torchvison"], "did you mean 'torchvision'?"),
        (["--norms", "GN", "--part", "FNP"], "--part: 'FNP' is not one of BACKBONE, FPN, HEAD; did you mean 'FPN'?"),
        (["--layer", "--norms", "torchvision"], "--norms: 'torchvision' is not one of AffineChannel"),
        (["--rounds", 0], "--rounds: 0 has to be at least 1"),
        (["--size", 64, 0], r"--size: \[64, 0\] has to be at least 1"),
        (["--boxes", -1], "--boxes: -1 has to be at least 0"),
        (["--json", "."], "--json: . is a folder"),
        (["MODEL.FPN.NROM", "BN"], "did you mean 'MODEL.FPN.NORM'?"),
        (["SOLVER.AMP", "fp8"], "SOLVER.AMP: 'fp8' is not one of"),
        (["--norms", "torchvision"], "torchvision's RetinaNet has 256 channels in the FPN"),
    ],
)
def test_mistakes_are_named(tool, config, arguments, message):
    with pytest.raises(UserError, match=message.replace("?", "[?]")):
        run(tool, "--config", config, *arguments)


def test_configuration_is_asked_for(tool):
    with pytest.raises(UserError, match="--config FILE is missing"):
        run(tool, "--norms", "BN")


def test_from_a_shell_without_packages_for_evaluation(config, tmp_path):
    """Processes of their own, a folder that is not the project's, and neither pycocotools nor faster-coco-eval."""
    for name in ("pycocotools", "faster_coco_eval"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed')\n")
    tool = [sys.executable, str(ROOT / "tools/benchmark.py"), "--config", "config.yaml", "--size", "64", "64"]
    done = subprocess.run(
        [*tool, "--rounds", "1", "--steps", "1", "--warm-up", "0", "--json", "out.json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out.json").read_text())["results"][0]
    assert row["memory_mib"] > 100  # weights, gradients and momentum of R18 alone
    assert "Traceback" not in done.stderr


def test_training_on_image_files_is_reported_beside_its_steps(tool, config, tmp_path, capsys):
    """With generated images, where those of the catalog are not there; classes are then the data's."""
    (tmp_path / "catalog.yaml").write_text("mine: {images: none, annotations: none.json}")
    keys = ["DATASETS.CATALOG", tmp_path / "catalog.yaml", "DATASETS.TRAIN", "['mine']", "DATALOADER.NUM_WORKERS", 0]
    size = ["INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MAX_SIZE_TRAIN", 96]
    common = ("--config", config, "--end-to-end", "--rounds", 1, "--steps", 2, "--warm-up", 0, "--batch", 1)
    out = tmp_path / "out.json"
    run(tool, *common, "--synthetic", 2, "--json", out, *keys, *size)
    written = json.loads(out.read_text())
    (row,) = written["results"]
    assert set(row) == ROW | {"data_wait", "steps_images_per_s", "of_steps"}
    assert 0 < row["data_wait"] < 1 and 0 < row["of_steps"] < 2
    assert row["steps_images_per_s"] * row["of_steps"] == pytest.approx(row["images_per_s"])  # of the one round
    settings = written["settings"]
    assert settings["data"] == "2_generated_images" and settings["workers"] == 0 and settings["short_sides"] == [64]
    assert "| data wait |" in capsys.readouterr().out
    with pytest.raises(UserError, match="the image folder .*none.* not found"):
        run(tool, *common, *keys, *size)
    with pytest.raises(UserError, match="--end-to-end: has no torchvision"):
        run(tool, *common, "--norms", "config,torchvision", *keys)
    with pytest.raises(UserError, match="--synthetic: goes with --end-to-end"):
        run(tool, "--config", config, "--synthetic", 2)


def test_every_case_of_the_suites_can_be_planned(tool, monkeypatch):
    monkeypatch.setattr(tool, "write_synthetic", lambda folder, count: [])
    for suite, cases in tool.SUITES.items():
        for case in cases:
            args = parsed(tool, *case.arguments, *(["DEVICE", "cpu", "SOLVER.AMP", "off"] if suite == "gpu" else []))
            jobs = tool.plan(args, "end_to_end" if args.end_to_end else "detect" if args.detect else "train")[0][0]
            assert len(jobs) >= (1 if args.end_to_end else 3)


def test_suite_measures_its_cases_one_by_one(tool, config, tmp_path, monkeypatch, capsys):
    cases = [tool.SUITES["cpu"][0].__class__(f"case {n}", ("--config", str(config), "--boxes", n), 1.5) for n in "12"]
    monkeypatch.setattr(tool, "SUITES", {"cpu": cases})
    monkeypatch.setattr(tool, "verdict", lambda case, rows: f"{case.title}: {len(rows)} variants")
    out = tmp_path / "out.json"
    run(tool, "--suite", "cpu", *FEW, "--size", 64, 64, "--json", out)
    written = json.loads(out.read_text())
    assert [(case["title"], case["settings"]["boxes"]) for case in written["cases"]] == [("case 1", 1), ("case 2", 2)]
    assert "case 2: 1 variants" in capsys.readouterr().out
