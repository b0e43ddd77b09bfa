"""A checkpoint is whole or absent; damage is found and passed over."""

import os

import pytest
import torch

from retinanet.engine import checkpoint
from retinanet.engine.checkpoint import Checkpointer, read_checkpoint, write_checkpoint
from retinanet.errors import UserError
from retinanet.utils import files


def state(iteration: int) -> dict:
    weights = {"w": torch.full((1000,), float(iteration))}
    return {"model": weights, "iteration": iteration, "config": "A: 1\n", "classes": []}


def test_what_is_written_is_read_back_with_weights_only(tmp_path):
    write_checkpoint(tmp_path / "a.pth", state(3))
    plain = torch.load(tmp_path / "a.pth", weights_only=True)
    assert (plain["format"], plain["version"], plain["iteration"]) == ("retinanet", 1, 3)
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pth")["model"]["w"], torch.full((1000,), 3.0))


def test_pointer_names_the_newest_and_old_ones_go(tmp_path):
    keeper = Checkpointer(tmp_path, keep=2)
    for iteration in (10, 20, 30):
        keeper.save(state(iteration))
    keeper.save_best(state(10))
    assert (tmp_path / "last_checkpoint").read_text() == "checkpoint_0000030.pth\n"
    assert [path.name for path in keeper.existing()] == ["checkpoint_0000030.pth", "checkpoint_0000020.pth"]
    assert (tmp_path / "best.pth").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_newest_is_passed_over(tmp_path, damage):
    keeper = Checkpointer(tmp_path)
    keeper.save(state(10))
    newest = keeper.save(state(20))
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        at = content.index(torch.full((1000,), 20.0).numpy().tobytes()[:64])
        content[at + 100] ^= 1
    newest.write_bytes({"cut": content[: len(content) // 2], "flip": content, "empty": b""}[damage])
    path, found = keeper.latest()
    assert (path.name, found["iteration"]) == ("checkpoint_0000010.pth", 10)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_checkpoint_does_not_count_among_those_kept(tmp_path, keep):
    keeper = Checkpointer(tmp_path, keep)
    keeper.save(state(10))
    (tmp_path / "checkpoint_0000020.pth").write_bytes(b"cut off")
    keeper.save(state(12))
    keeper.save(state(14))
    path, found = keeper.latest()
    assert (path.name, found["iteration"]) == ("checkpoint_0000014.pth", 14)
    assert len(keeper.existing()) == keep + 1


def test_only_damaged_checkpoints_are_an_error_and_none_is_none(tmp_path):
    keeper = Checkpointer(tmp_path)
    assert keeper.latest() is None
    keeper.save(state(1)).write_bytes(b"x")
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):
        keeper.latest()


def test_failed_write_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    write_checkpoint(path, state(1))

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(UserError, match="free some space"):
        write_checkpoint(path, state(2))
    assert read_checkpoint(path)["iteration"] == 1
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_programming_error_is_not_called_a_full_disk(tmp_path):
    def fail(_file):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        files.write_atomically(tmp_path / "a", fail)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "not a checkpoint of this project"),
        ([1], "not a checkpoint"),
        ({"format": "retinanet", "version": 1, "model": {}, "iteration": 0}, "incomplete .* it lacks config, classes"),
        ({"format": "retinanet", **dict.fromkeys(checkpoint._ALWAYS, "9")}, "incomplete .* lacks a version number"),
    ],
)
def test_foreign_files_are_refused_with_a_reason(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "a.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "nothing.pth")


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_checkpoint(tmp_path / "run" / "a.pth", state(1))
