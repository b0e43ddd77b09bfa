"""`tools/describe.py` from the command line."""

import subprocess
import sys
from pathlib import Path

import torch

from retinanet.engine.checkpoint import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def describe(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "describe.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_table_lists_norms_totals_and_costs(tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(
        "MODEL:\n  NUM_CLASSES: 3\n  BACKBONE: {NAME: R18, NORM: GN, FREEZE_AT: 0}\n  HEAD: {NORM: MABN}\n"
    )
    done = describe("--config", str(config), "--size", "64", "64", "MODEL.FPN.CHANNELS", "32")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["backbone.conv1", "GN", "Conv2d", "none", "trained", "128", "0", "nothing"] in lines
    assert lines[-1] != [] and ["28", "norms"] == lines[1 + 28][:2]
    assert "MABN x5 levels" in done.stdout and "GN folds nothing: it normalizes by its own input." in done.stdout
    assert "FLOPs of convolutions for one image of 64 x 64" in done.stdout


def test_impossible_size_is_one_message_and_exit_status_2():
    done = describe("--config", str(ROOT / "configs" / "quickstart.yaml"), "--size", "0", "64")
    assert done.returncode == 2 and "--size 0 64" in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_is_described_and_a_damaged_one_is_refused(tmp_path):
    state = {
        "model": {"w": torch.zeros(2)},
        "iteration": 3,
        "config": "SEED: 7\n",
        "classes": [{"id": 1, "name": "cat"}],
    }
    source = {"command": "python tools/train_net.py", "versions": {"torch": "2.15"}}
    write_checkpoint(tmp_path / "best.pth", {**state, "provenance": source})
    done = describe("--checkpoint", str(tmp_path / "best.pth"), "--show-config")
    assert done.returncode == 0, done.stderr
    for part in ("iteration", "1: cat", "python tools/train_net.py", "torch 2.15", "SEED: 7"):
        assert part in done.stdout
    (tmp_path / "best.pth").write_bytes(b"cut off")
    done = describe("--checkpoint", str(tmp_path / "best.pth"))
    assert done.returncode == 2 and "best.pth" in done.stderr and "Traceback" not in done.stderr
