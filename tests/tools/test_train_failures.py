"""tools/train_net.py when a step fails: what the message says, what is saved, and what the printed command does."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_cases import ROOT, arguments, command, run_tool, write_data
from training_cases import finish, start

DIVERGES = ["SOLVER.MAX_ITER", "4", "SOLVER.BASE_LR", "1e9", "SOLVER.CLIP_GRAD_NORM", "0.0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def failed_batch(folder: Path) -> dict:
    (path,) = folder.glob("failed_batch_*.pth")
    return torch.load(path, weights_only=True)


def printed_command(stderr: str) -> list[str]:
    line = next(line for line in stderr.splitlines() if "--replay" in line)
    return [sys.executable, *shlex.split(line)[1:]]


def test_the_printed_command_repeats_the_failed_step(data, tmp_path, capfd):
    run = subprocess.run(
        command(data, tmp_path / "run", *DIVERGES, "SOLVER.CHECKPOINT_PERIOD", "1"), capture_output=True, text=True
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert "E error: iteration" in (tmp_path / "run/log.txt").read_text()
    saved = failed_batch(tmp_path / "run")
    assert {"images", "gt_boxes", "gt_labels", "image_ids"} <= set(saved["ranks"][0]["batches"][0])
    newest = max((tmp_path / "run").glob("checkpoint_*.pth"))
    assert newest.name == f"checkpoint_{saved['iteration'] - 1:07d}.pth"  # written before that step
    again = run_tool("train_net", printed_command(run.stderr)[2:], capfd)
    assert again.status == 1, again.stderr
    for image_id in saved["ranks"][0]["batches"][0]["image_ids"]:
        assert f"image {image_id} {data / 'train'}" in again.stdout
        assert f"{image_id}" in run.stderr
    assert "first not finite on the way forwards: the output of " in again.stdout
    assert "have run away" in again.stdout


def test_a_replay_with_a_mistake_ends_with_status_2(tmp_path, capfd):
    found = run_tool("train_net", ["--replay", str(tmp_path / "none.pth")], capfd)
    assert found.status == 2
    assert "none.pth: there is no such file" in found.stderr


def test_two_processes_save_one_batch_with_the_images_of_both(data, tmp_path):
    options = [*DIVERGES, "DATALOADER.NUM_WORKERS", "0", "MODEL.HEAD.NORM", "BN"]
    assert 2 in finish(start(data, tmp_path / "run", *options, processes=2))
    stderr = "".join((tmp_path / f"run/console{rank}.txt").read_text() for rank in (0, 1))
    saved = failed_batch(tmp_path / "run")
    ids = [i for part in saved["ranks"] for batch in part["batches"] for i in batch["image_ids"]]
    assert len(saved["ranks"]) == 2 and len(ids) == 4
    assert f"image ids of all 2 processes: {ids}" in stderr
    name = next(name for name in saved["ranks"][0]["buffers"] if name.endswith("running_mean"))
    assert not torch.equal(*(part["buffers"][name] for part in saved["ranks"]))


def workers_of(process: subprocess.Popen) -> list[int]:
    """The processes that load images for a run; empty while there are none."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for the workers in /proc")
def test_a_worker_that_is_killed_ends_the_run_with_one_message(data, tmp_path):
    options = ["SOLVER.MAX_ITER", "5000", "SOLVER.LOG_PERIOD", "1", "DATALOADER.NUM_WORKERS", "2"]
    pipe = subprocess.PIPE
    run = subprocess.Popen(command(data, tmp_path / "run", *options), stdout=subprocess.DEVNULL, stderr=pipe, text=True)
    while not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text():
        assert run.poll() is None
        time.sleep(0.05)
    killed = workers_of(run)[-1]
    os.kill(killed, signal.SIGKILL)
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 1, stderr
    message = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and "Traceback" not in stderr
    assert f"(pid {killed}) was ended by SIGKILL. The last image that it began to read is {data}" in message[0]


def test_an_unexpected_error_leaves_its_traceback_in_the_log(data, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("retinanet.engine.train.set_lr", lambda *_: [][0])
    with pytest.raises(IndexError):
        run_tool("train_net", arguments(data, tmp_path / "run", "SOLVER.MAX_ITER", "1"), capfd)
    log = (tmp_path / "run/log.txt").read_text()
    assert "E Traceback (most recent call last)" in log and "IndexError: list index out of range" in log


def test_ctrl_c_while_libraries_are_imported_is_one_word(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    tool = [sys.executable, str(ROOT / "tools/train_net.py"), "--help"]
    done = subprocess.run(tool, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.stdout, done.stderr) == ("", "interrupted\n")
    assert done.returncode in (130, -signal.SIGINT)  # Python ends by the signal itself, which a shell shows as 130


MISTAKES = [
    (["--dryrun"], "unrecognized arguments: --dryrun; did you mean '--dry-run'?; --help shows"),
    (["--config"], "argument --config: expected one argument; --help shows what"),
    ([], "--config FILE is missing"),
]


@pytest.mark.parametrize(("argv", "said"), MISTAKES, ids=[" ".join(argv) or "nothing" for argv, _ in MISTAKES])
def test_a_mistake_on_the_command_line_is_one_message(argv, said, capfd):
    ended = run_tool("train_net", argv, capfd)
    assert ended.status == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and said in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize(("split", "budget", "status"), [("train", 0, 2), ("train", 1, 0), ("val", 1, 2)])
def test_missing_images_are_found_before_training(data, tmp_path, capfd, split, budget, status):
    """Training may replace a few of its images; an evaluation is over all of them, and shall not fail hours later."""
    for folder in ("train", "val"):
        shutil.copytree(data / folder, tmp_path / folder)
    for name in ("annotations", "catalog.yaml"):
        copy = shutil.copytree if (data / name).is_dir() else shutil.copy
        copy(data / name, tmp_path / name)
    gone = sorted((tmp_path / split).iterdir())[2]
    gone.unlink()
    options = ["SOLVER.MAX_ITER", "1", "DATALOADER.MAX_BAD_IMAGES", str(budget), "DATALOADER.NUM_WORKERS", "0"]
    ended = run_tool("train_net", arguments(tmp_path, tmp_path / "run", *options), capfd)
    assert ended.status == status, ended.stderr
    assert gone.name in (ended.stderr if status else ended.stdout)
    assert gone.name in (tmp_path / "run/log.txt").read_text()
    assert (tmp_path / "run/metrics.jsonl").exists() == (status == 0)
