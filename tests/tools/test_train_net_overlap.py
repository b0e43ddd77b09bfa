"""Scores that come while training goes on change nothing: lines, best weights, detections, also killed and resumed."""

import sys

import pytest
from run_cases import arguments, run_tool, write_data
from training_cases import SMALLER, Thin, assert_same_run, finish, lines, start

from retinanet.engine import evaluate, pending, scoring, train
from retinanet.modeling.backbone import BACKBONES

LENGTH = 8
OPTIONS = [
    *("SOLVER.MAX_ITER", str(LENGTH), "SOLVER.CHECKPOINT_PERIOD", "4", "TEST.EVAL_PERIOD", "2"),
    *("SOLVER.LOG_PERIOD", "1", "DATALOADER.NUM_WORKERS", "0", "TEST.SCORE_THRESH", "0.005"),
]
OFF = ["TEST.OVERLAP_SCORING", "False"]
WAITING = "import os, time; [time.sleep(0.01) for _ in range(60_000) if not os.path.exists({!r})]; "
SCORING = "import retinanet.engine.scoring as scoring; scoring.main()"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run that waits for every score."""
    folder = tmp_path_factory.mktemp("plain")
    assert finish(start(data, folder, *OPTIONS, *OFF)) == [0]
    return folder


@pytest.fixture
def beside(data, tmp_path, monkeypatch, capfd):
    """`beside(code, *KEY VALUE)`: a run in this process whose scores come from a process that runs `code`."""

    def run(code: str, *extra: str):
        monkeypatch.setitem(BACKBONES, "Thin", Thin)
        monkeypatch.setattr(evaluate, "OVERLAP_FROM", 0)
        monkeypatch.setattr(scoring, "COMMAND", [sys.executable, "-c", code])
        return run_tool("train_net", arguments(data, tmp_path / "run", *SMALLER, *OPTIONS, *extra), capfd)

    return run


def test_steps_go_on_while_scores_are_pending_and_the_run_is_the_same(beside, plain, tmp_path, monkeypatch):
    """The process that scores waits for a file, which appears before the second step after the evaluation."""
    go, seen, set_lr = tmp_path / "go", [], train.set_lr

    def before_step(optimizer, lr):
        seen.append([row["iteration"] for row in lines(tmp_path / "run")])
        if len(seen) == 4:
            go.touch()
        set_lr(optimizer, lr)

    monkeypatch.setattr(train, "set_lr", before_step)
    done = beside(WAITING.format(str(go)) + SCORING)
    assert done.status == 0, done.stderr
    assert seen[:5] == [[], [1], [1, 2], [1, 2], [1, 2, 2, 3, 4]]  # step 3 is done, its line waits for the evaluation's
    assert_same_run(plain, tmp_path / "run", LENGTH)
    assert [row["iteration"] for row in lines(plain)] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]


def test_the_checkpoint_of_an_evaluated_iteration_repeats_the_evaluation(data, plain, tmp_path):
    """Stopped and killed while scores are pending, before and after a checkpoint: the same run in the end."""
    kills = ["scoring:1", "stop in scoring:1", "scoring:2", "stop in scoring:1", "line:2", ""]
    statuses = [finish(start(data, tmp_path, *OPTIONS, "--resume", kill=kill, overlap=True)) for kill in kills]
    assert statuses == [[-9], [143], [-9], [143], [-9], [0]], (tmp_path / "console0.txt").read_text()[-3000:]
    assert "Traceback" not in (tmp_path / "console0.txt").read_text()
    assert_same_run(plain, tmp_path, LENGTH)
    assert not list(tmp_path.rglob(".*.partial"))


def test_two_processes_go_on_together(data, tmp_path):
    more = ["MODEL.BACKBONE.NORM", "BN", "SOLVER.EMA_DECAY", "0.9"]
    assert finish(start(data, tmp_path / "plain", *OPTIONS, *more, *OFF, processes=2)) == [0, 0]
    begin = [data, tmp_path / "beside", *OPTIONS, *more, "--resume"]
    assert finish(start(*begin, kill="scoring:2", processes=2, overlap=True))[0] == -9
    assert finish(start(*begin, processes=2, overlap=True)) == [0, 0]
    assert_same_run(tmp_path / "plain", tmp_path / "beside", LENGTH)


def test_a_scoring_process_that_is_killed_ends_the_run_with_one_message(beside, tmp_path):
    done = beside("import os; os.kill(os.getpid(), 9)")
    assert done.status == 1
    assert "error: the process that scores an evaluation was ended by SIGKILL" in done.stderr
    assert "Traceback" not in done.stderr
    assert "was ended by SIGKILL" in (tmp_path / "run/log.txt").read_text()


def test_a_defect_in_scoring_ends_the_run_with_its_traceback(beside, tmp_path):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        beside("1 / 0")
    assert "ZeroDivisionError" in (tmp_path / "run/log.txt").read_text()


def test_a_run_that_fails_meanwhile_writes_the_evaluation_and_the_lines_since(beside, tmp_path, monkeypatch):
    go = tmp_path / "go"
    settle = pending.Pending.settle
    monkeypatch.setattr(pending.Pending, "settle", lambda self, wait=True: (wait and go.touch(), settle(self, wait)))
    fail_at(monkeypatch, 4, ArithmeticError("of the test"))
    with pytest.raises(ArithmeticError, match="of the test"):
        beside(WAITING.format(str(go)) + SCORING)
    assert [row["iteration"] for row in lines(tmp_path / "run")] == [1, 2, 2, 3]


def test_a_second_ctrl_c_does_not_wait_for_scores(beside, tmp_path, monkeypatch):
    begun, make = [], scoring.Scoring.__init__
    monkeypatch.setattr(scoring.Scoring, "__init__", lambda self, *given: (begun.append(self), make(self, *given))[1])
    fail_at(monkeypatch, 4, KeyboardInterrupt())
    assert beside("import time; time.sleep(600)").status == 130
    assert begun[0]._process.returncode == -9
    assert [row["iteration"] for row in lines(tmp_path / "run")] == [1, 2]


def fail_at(monkeypatch, iteration: int, error: BaseException) -> None:
    """Let the step of `iteration` raise `error`."""
    set_lr, count = train.set_lr, iter(range(1, LENGTH + 1))

    def before_step(optimizer, lr):
        if next(count) == iteration:
            raise error
        set_lr(optimizer, lr)

    monkeypatch.setattr(train, "set_lr", before_step)
