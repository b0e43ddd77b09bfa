"""A checkpoint says which command, which versions and which state of the source made it."""

import subprocess
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from retinanet.engine.provenance import command_line, describe_checkpoint, git_state, provenance, versions


def git(folder, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", "-C", str(folder), *author, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1\n")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path.resolve()


def test_a_clean_source_is_its_commit_and_a_changed_one_is_dirty(repository):
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "output").mkdir()  # not tracked, so it changes nothing
    (repository / "output/log.txt").write_text("x")
    assert git_state(repository) == {"commit": commit, "dirty": False}
    (repository / "a.py").write_text("2\n")
    assert git_state(repository) == {"commit": commit, "dirty": True}


def test_without_a_repository_or_git_nothing_is_said(repository, tmp_path_factory, monkeypatch):
    assert git_state(tmp_path_factory.mktemp("plain").resolve()) is None
    inside = repository / "copy"
    inside.mkdir()
    assert git_state(inside) is None, "the commit of another repository says nothing about a copy inside it"
    monkeypatch.setenv("PATH", "")
    assert git_state(repository) is None


def test_versions_are_those_of_what_is_imported():
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "retinanet", "torchvision", "cv2", "numpy"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_a_copy_of_the_folder_without_its_project_file_has_an_unknown_version(tmp_path, monkeypatch):
    monkeypatch.setattr("retinanet.engine.provenance._ROOT", tmp_path)
    monkeypatch.setattr("importlib.metadata.distribution", missing)
    assert versions()["retinanet"] == "unknown"


def missing(name):
    raise PackageNotFoundError(name)


def test_a_command_can_be_pasted_into_a_shell():
    found = provenance([*command_line(["--config", "my file.yaml", "OUTPUT_DIR", "a"])])
    assert found["command"].endswith("--config 'my file.yaml' OUTPUT_DIR a")


def test_it_survives_weights_only_loading(tmp_path):
    torch.save(provenance(["train_net.py"]), tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True)["command"] == "train_net.py"


def test_a_checkpoint_is_described_with_and_without_what_it_lacks():
    state = {
        "model": {"w": torch.zeros(3, 4)},
        "iteration": 70,
        "classes": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    text = describe_checkpoint(state)
    assert "70" in text and "2: cat, dog" in text and "12 numbers in 1 tensors" in text and "not stored" in text
    source = {"command": "python a.py", "git": {"commit": "abc", "dirty": True}, "versions": {"torch": "2.15"}}
    more = {"optimizer": {"state": 1}, "best": {"AP": 12.345, "iteration": 60}, "provenance": source}
    text = describe_checkpoint({**state, **more, "metrics": {"AP": 11.0, "AP50": None}})
    for part in ("python a.py", "abc, with changes", "torch 2.15", "AP 12.35 at iteration 60", "AP 11.00", "optimizer"):
        assert part in text, part
