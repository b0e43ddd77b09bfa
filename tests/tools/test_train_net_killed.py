"""A run of tools/train_net.py that is killed again and again, and resumed, equals one that was left alone."""

from functools import partial

import pytest
from run_cases import write_data
from training_cases import assert_same_run, finish, lines, start

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


def test_a_deterministic_run_repeated_is_the_same_run(data, tmp_path):
    options = ["SOLVER.MAX_ITER", "4", "DETERMINISTIC", "True", *KEEPING]
    for name in ("first", "second"):
        assert finish(start(data, tmp_path / name, *options)) == [0]
    assert_same_run(tmp_path / "first", tmp_path / "second", 4)


def test_length_and_rate_may_change_on_resume_and_are_printed(data, tmp_path):
    options = [*("DATALOADER.NUM_WORKERS", "0", "SOLVER.LOG_PERIOD", "1", "SOLVER.SCHEDULE", "multistep")]
    options += [*("SOLVER.STEPS", "()", "--resume")]

    def run(length: int, rate: float) -> list[int]:
        given = [*options, "SOLVER.MAX_ITER", str(length), "SOLVER.BASE_LR", str(rate)]
        return finish(start(data, tmp_path / "run", *given))

    assert run(3, 0.02) == [0]
    assert run(5, 0.005) == [0]
    assert [row["lr"] for row in lines(tmp_path / "run") if "loss" in row][2:] == [0.02, 0.005, 0.005]
    log = (tmp_path / "run/log.txt").read_text()
    assert "resume: SOLVER.MAX_ITER changes from 3 to 5" in log
    assert "resume: SOLVER.BASE_LR changes from 0.02 to 0.005" in log
    finished = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert run(5, 0.005) == [0]  # a finished run is finished: no step, no evaluation
    assert run(4, 0.005) == [2]
    console = (tmp_path / "run/console0.txt").read_text()
    assert "error: SOLVER.MAX_ITER: this run ends at iteration 4" in console
    assert "checkpoint_0000005.pth is of iteration 5 already; set it to 5 or more" in console
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == finished


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_is_the_same(data, tmp_path):
    options = [*COMMON, *KEEPING, "DATALOADER.NUM_WORKERS", "0"]
    run_through(data, tmp_path / "whole", options)
    assert finish(start(data, tmp_path / "killed", *options, kill="step:8")) == [-9]
    newest = tmp_path / "killed/checkpoint_0000006.pth"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run_through(data, tmp_path / "killed", options)
    assert "passed over" in (tmp_path / "killed/log.txt").read_text()
    assert_same_run(tmp_path / "whole", tmp_path / "killed", LENGTH)
