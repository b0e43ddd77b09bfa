"""A disk that is full or cannot be written is one message, and what was there before stays."""

import errno
import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch

from retinanet.engine.checkpoint import Checkpointer
from retinanet.errors import UserError
from retinanet.utils.files import write_atomically
from retinanet.utils.log import MetricsWriter, get_logger, start_logging

needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
NO_SPACE = r"cannot be written \(No space left on device\); free some space"


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def state(iteration: int) -> dict:
    weights = {"w": torch.full((40_000,), float(iteration))}  # 160 KiB
    return {"model": weights, "iteration": iteration, "config": "A: 1\n", "classes": []}


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(small_disk):
    keeper = Checkpointer(small_disk)
    keeper.save(state(1))
    with pytest.raises(UserError, match=NO_SPACE):
        keeper.save(state(2))
    path, found = keeper.latest()
    assert (path.name, found["iteration"]) == ("checkpoint_0000001.pth", 1)
    assert sorted(os.listdir(small_disk)) == ["checkpoint_0000001.pth", "last_checkpoint"]


def test_metrics_and_events_on_a_full_disk_keep_their_whole_lines(small_disk):
    writer = MetricsWriter(small_disk)
    writer.write(1, {"loss": 1.0})
    (small_disk / "filler").write_bytes(b"x" * 200_000)
    with pytest.raises(UserError, match=NO_SPACE):
        for iteration in range(2, 5000):
            writer.write(iteration, {"loss": 1.0, "note": "y" * 100})
    (small_disk / "filler").unlink()
    again = MetricsWriter(small_disk, iteration=1, lines=1, tensorboard=False)
    again.write(2, {"loss": 2.0})
    again.close()
    assert (small_disk / "metrics.jsonl").read_text() == (
        '{"iteration": 1, "loss": 1.0}\n{"iteration": 2, "loss": 2.0}\n'
    )


@needs_full
def test_a_log_that_cannot_be_written_is_one_error(tmp_path, capsys):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    start_logging(tmp_path, console=False)
    try:
        with pytest.raises(UserError, match="log.txt: " + NO_SPACE):
            get_logger().info("a line")
        get_logger().info("another line")
        assert "Traceback" not in capsys.readouterr().err
    finally:
        for handler in list(get_logger().handlers):
            get_logger().removeHandler(handler)
        get_logger().propagate = True
        get_logger().setLevel(logging.NOTSET)


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    def read_only(*_args, **_kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", read_only)  # the tests may run as root, whom permissions do not stop
    with pytest.raises(UserError, match=r"Read-only file system\); check the folder and its permissions"):
        write_atomically(tmp_path / "a", lambda file: None)
    with pytest.raises(UserError, match="Read-only file system"):
        start_logging(tmp_path)


def test_an_error_of_torch_over_an_error_of_the_system_is_the_latter(tmp_path):
    """`torch.save` to a disk that fills up: its writer, ending, finds fewer bytes than it wrote."""

    def fill(_file):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            raise RuntimeError("unexpected pos 45696 vs 45616")

    with pytest.raises(UserError, match=NO_SPACE):
        write_atomically(tmp_path / "a", fill)
