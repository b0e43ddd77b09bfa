"""tools/train_net.py in several processes: the numbers of one, whatever images each of them gets, and a way back."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_cases import command, write_data
from training_cases import SMALLER, assert_same_run, finish, lines, start, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PLAIN = ["DATALOADER.NUM_WORKERS", "0", "SOLVER.LOG_PERIOD", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def catalog(data: Path, folder: Path, content: dict) -> None:
    """Write a catalog to `folder` whose training json is `content`."""
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "catalog.yaml").write_text(
        f"synthetic_train: {{images: {data / 'train'}, annotations: train.json}}\n"
        f"synthetic_val: {{images: {data / 'val'}, annotations: {data / 'annotations/val.json'}}}\n"
    )


def one_and_two(data: Path, folder: Path, *options: str) -> tuple[Path, Path]:
    """The folders of the same run in one process and in two."""
    for processes, name in ((1, "one"), (2, "two")):
        ended = finish(start(data, folder / name, *PLAIN, *options, processes=processes))
        assert not any(ended), (folder / name / "console0.txt").read_text()[-3000:]
    return folder / "one", folder / "two"


def assert_equal_up_to_the_order_of_sums(one: Path, two: Path, iteration: int) -> None:
    first, second = (weights(folder, iteration)["model"] for folder in (one, two))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    for row, other in zip(lines(one), lines(two), strict=True):
        if "loss" in row:
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5, rel=1e-5)
            assert (row["num_fg"], row["lr"]) == (other["num_fg"], other["lr"])


# norms without batch statistics, and the one whose statistics are those of all processes
SLOWER = [pytest.param(norm, marks=pytest.mark.slow) for norm in ("AffineChannel", "FrozenBN", "")]


@pytest.mark.parametrize("norm", ["GN", "SyncBN", *SLOWER])
def test_two_processes_equal_one(data, tmp_path, norm):
    parts = [item for part in ("BACKBONE", "FPN", "HEAD") for item in (f"MODEL.{part}.NORM", norm)]
    one, two = one_and_two(data, tmp_path, *parts, "SOLVER.MAX_ITER", "4", "SOLVER.ACCUMULATE", "2")
    assert_equal_up_to_the_order_of_sums(one, two, 4)
    place = "inference/synthetic_val/predictions.json"
    found, shared_out = (json.loads((folder / place).read_text()) for folder in (one, two))
    assert [row["image_id"] for row in found] == [row["image_id"] for row in shared_out]  # none twice, none lost
    assert len({row["image_id"] for row in found}) == 6
    for row, other in zip(found, shared_out, strict=True):
        assert row["score"] == pytest.approx(other["score"], abs=1e-4)


def test_a_process_with_empty_images_alone_neither_hangs_nor_fails(data, tmp_path):
    """One image of twelve has boxes: in nearly every step one process, or both, have none."""
    content = json.loads((data / "annotations/train.json").read_text())
    only = content["annotations"][0]["image_id"]
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] == only]
    catalog(data, tmp_path, content)
    one, two = one_and_two(tmp_path, tmp_path, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "8")
    assert_equal_up_to_the_order_of_sums(one, two, 8)
    positives = [row["num_fg"] for row in lines(two) if "loss" in row]
    assert positives.count(0) >= 4 and max(positives) > 0


def test_statistics_of_two_processes_are_averaged_in_the_checkpoint(data, tmp_path):
    """After one step the second moment of the first layer, whose input is the image, is that of the whole batch."""
    norms = ["MODEL.BACKBONE.NORM", "MABN", "MODEL.FPN.NORM", "BCN", "MODEL.HEAD.NORM", "BN"]
    folders = one_and_two(data, tmp_path, "SOLVER.MAX_ITER", "1", *norms)
    one, two = (weights(folder, 1) for folder in folders)
    norm = "backbone.stem.0.norm"
    first, second = (state["model"][f"{norm}.running_var"] for state in (one, two))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    own = [part["model"][f"{norm}.running_var"] for part in two["processes"]]
    assert not torch.equal(*own)
    torch.testing.assert_close(torch.stack(own).mean(0), second, rtol=1e-6, atol=1e-7)
    assert [state["model"][f"{norm}.buffer_x2"].shape for state in (one, two)] == [(2, 8), (4, 8)]


def test_a_run_of_two_processes_goes_on_in_one_and_says_so(data, tmp_path):
    options = [*PLAIN, "MODEL.HEAD.NORM", "BN"]
    assert finish(start(data, tmp_path / "run", *options, "SOLVER.MAX_ITER", "2", processes=2)) == [0, 0]
    assert finish(start(data, tmp_path / "run", *options, "SOLVER.MAX_ITER", "4", "--resume")) == [0]
    assert [row["iteration"] for row in lines(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]
    log = (tmp_path / "run/log.txt").read_text()
    assert "saved by 2 processes, resumed by 1" in log
    assert "resume: SOLVER.MAX_ITER changes from 2 to 4" in log


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v[5:].decode() for v in variables if v.startswith(b"RANK=")), "")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process by /proc")
def test_torchrun_starts_again_after_a_process_died_and_equals_the_run_that_was_not_disturbed(data, tmp_path):
    options = [*PLAIN, "MODEL.HEAD.NORM", "BN", "SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "2", "--resume"]
    options += SMALLER[SMALLER.index("TEST.IMS_PER_BATCH") :]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    launch = [*TORCHRUN, "--log-dir", str(tmp_path / "torchrun"), "--max-restarts", "1"]
    launch += command(data, tmp_path / "disturbed", *options)[1:]
    with open(tmp_path / "console", "w") as console:
        job = subprocess.Popen(launch, env=environment, stdout=console, stderr=console)
    end = time.monotonic() + 240
    while not (tmp_path / "disturbed/checkpoint_0000002.pth").exists():
        assert job.poll() is None and time.monotonic() < end, (tmp_path / "console").read_text()[-3000:]
        time.sleep(0.01)
    (victim,) = [child for child in children(job.pid) if rank_of(child) == "1"]
    os.kill(victim, signal.SIGKILL)
    assert job.wait(240) == 0, (tmp_path / "console").read_text()[-3000:]
    log = (tmp_path / "disturbed/log.txt").read_text()
    assert log.count("resumed from") == 1
    given = [*options, "MODEL.BACKBONE.NAME", "R18"]
    assert finish(start(data, tmp_path / "whole", *given, processes=2)) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "disturbed", 8)


def test_a_process_that_fails_ends_the_job_and_its_reason_is_told(data, tmp_path):
    """The second image of a step goes to the second process, and cannot be read there."""
    content = json.loads((data / "annotations/train.json").read_text())
    content["images"] = content["images"][:2]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    (tmp_path / "damaged").write_bytes(b"no picture")
    content["images"][1]["file_name"] = str(tmp_path / "damaged")
    catalog(data, tmp_path, content)
    given = [*PLAIN, "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "50"]
    ended = finish(start(tmp_path, tmp_path / "run", *given, processes=2))
    first, second = ((tmp_path / f"run/console{rank}.txt").read_text() for rank in (0, 1))
    assert ended == [1, 2], first
    assert "error in process 1: " in second and "damaged" in second
    assert "error in process 0: another process has ended, it tells why" in first
    assert "Traceback" not in first + second


def test_bad_annotations_are_told_once_by_a_job_of_two_processes(data, tmp_path):
    content = json.loads((data / "annotations/train.json").read_text())
    content["images"][0]["file_name"] = "gone.jpg"
    catalog(data, tmp_path, content)
    ended = finish(start(tmp_path, tmp_path / "run", *PLAIN, processes=2))
    first, second = ((tmp_path / f"run/console{rank}.txt").read_text() for rank in (0, 1))
    assert ended == [2, 1], second
    assert first.startswith("error: synthetic_train: error [missing-file]") and first.count("\n") == 1
    assert second == "error in process 1: another process has ended, it tells why\n"
