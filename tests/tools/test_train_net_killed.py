"""A run of tools/train_net.py that is killed again and again, and resumed, equals one that was left alone."""

from functools import partial

import pytest
from run_cases import write_data
from training_cases import assert_same_run, finish, start

LENGTH = 8
COMMON = ["SOLVER.MAX_ITER", str(LENGTH), "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "4"]
# every norm that keeps something: statistics, estimates and their step counts, windows
KEEPING = ["MODEL.BACKBONE.NORM", "MABN", "MODEL.FPN.NORM", "BCN", "MODEL.HEAD.NORM", "BN"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def run_through(data, folder, options, kills=(), processes: int = 1) -> list[list[int]]:
    """Run once for each of `kills` and then to the end; return the exit statuses of each of the runs."""
    begin = partial(start, data, folder, *options, "--resume", processes=processes)
    statuses = [finish(begin(kill=kill)) for kill in (*kills, "")]
    assert not any(statuses[-1]), (folder / "console0.txt").read_text()[-3000:]
    return statuses


def test_killed_at_every_kind_of_moment_it_equals_the_run_that_was_not(data, tmp_path):
    options = [*COMMON, *KEEPING, "SOLVER.EMA_DECAY", "0.9", "DATALOADER.NUM_WORKERS", "0"]
    run_through(data, tmp_path / "whole", options)
    kills = [
        *("step:2", "checkpoint:2", "rename:4", "line:2", "stop in step:1", "evaluation:2"),
        *("stop in evaluation:2", "checkpoint:2", "rename:4"),
    ]
    statuses = run_through(data, tmp_path / "killed", options, kills)
    assert [status for (status,) in statuses] == [143 if "stop" in kill else -9 for kill in kills] + [0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed", LENGTH)
    assert not list((tmp_path / "killed").glob(".*.partial"))


def test_two_processes_killed_and_stopped_equal_two_that_were_not(data, tmp_path):
    """Each process has its own statistics; saving at other iterations must not change them."""
    options = [*COMMON, *KEEPING, "SOLVER.EMA_DECAY", "0.9", "DATALOADER.NUM_WORKERS", "0", "SOLVER.MAX_ITER", "12"]
    run_through(data, tmp_path / "whole", options, processes=2)
    kills = ["checkpoint:2", "stop in evaluation:1", "stop in step:3"]
    statuses = run_through(data, tmp_path / "killed", options, kills, processes=2)
    assert [status[0] for status in statuses] == [-9, 143, 143, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 12)
