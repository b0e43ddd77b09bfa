"""`train_net.py --dry-run` goes through a whole run and leaves nothing behind."""

import re

import pytest
from run_cases import arguments, run_tool, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=8, val=6)


def test_a_dry_run_tells_time_memory_and_the_largest_batch_and_writes_nothing(data, tmp_path, capfd):
    before = sorted(data.rglob("*"))
    options = ["--dry-run", "SOLVER.MAX_ITER", "1000", "DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "300"]
    ended = run_tool("train_net", arguments(data, tmp_path / "run", *options), capfd)
    assert ended.status == 0, ended.stderr
    assert "resumed from" in ended.stdout
    assert "data, training, saving, resuming and evaluating work" in ended.stdout
    assert re.search(r"s per iteration of 4 images; 1000 iterations and 4 evaluations of 6 images", ended.stdout)
    assert "the largest step has 4 images of 64 x 96 pixels with" in ended.stdout
    fitting = int(re.search(r"largest batch that fits is SOLVER.IMS_PER_BATCH (\d+)", ended.stdout)[1])
    assert fitting >= 4
    assert not (tmp_path / "run").exists() and sorted(data.rglob("*")) == before


@pytest.mark.parametrize(
    ("extra", "environment", "said"),
    [(["--resume"], {}, "does not go with --resume"), ([], {"WORLD_SIZE": "2"}, "start it without torchrun")],
)
def test_a_dry_run_is_one_process_and_one_run(data, tmp_path, capfd, monkeypatch, extra, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = run_tool("train_net", arguments(data, tmp_path / "run", "--dry-run", *extra), capfd)
    assert ended.status == 2 and said in ended.stderr


def test_a_mistake_ends_a_dry_run_as_it_would_the_run(data, tmp_path, capfd):
    ended = run_tool("train_net", arguments(data, tmp_path / "run", "--dry-run", "MODEL.NUM_CLASSES", "9"), capfd)
    assert ended.status == 2 and "MODEL.NUM_CLASSES: is 9" in ended.stderr
    assert not (tmp_path / "run").exists()
