"""Scoring in another process gives what scoring at once gives, and fails as loudly."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from simulated_detections import coco_json, detection

from retinanet.engine import scoring
from retinanet.engine.benchmark_scoring import write_case
from retinanet.engine.coco_json import read_json, write_json
from retinanet.engine.scoring import Scored, Scoring, count_results, score_results
from retinanet.errors import RunError, UserError

ENDLESS = [sys.executable, "-c", "import sys, time; sys.stdin.buffer.read(1); time.sleep(600)"]


@pytest.fixture
def truth(tmp_path) -> Path:
    write_json(tmp_path / "truth.json", coco_json({1: [(6, 1, 0, 10, 20)]}, {5: "cat", 6: "dog"}))
    return tmp_path / "truth.json"


def test_another_process_gives_the_same_numbers_and_files(tmp_path, monkeypatch):
    truth, found = write_case(tmp_path, 20, 30, 4)
    rows = read_json(found, "results")
    monkeypatch.chdir(tmp_path)
    begun = Scoring(Path(truth.name), rows, Path("beside"), "numpy", curves=True)
    metrics, counts = begun.result()
    assert begun.ready()
    assert metrics == score_results(truth, rows, tmp_path / "here", "numpy")
    assert metrics["AP"] > 1
    for name in ("metrics.json", "predictions.json"):
        assert (tmp_path / "beside" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    for one, other in zip(counts, count_results(truth, rows), strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_an_evaluator_that_prints_does_not_spoil_the_answer(truth, tmp_path, caplog, monkeypatch):
    replace_scores(monkeypatch, "os.write(2, b'a warning') and print('noise') or {'AP': 1.0}")
    assert Scoring(truth, [], tmp_path, "numpy", curves=False).result() == ({"AP": 1.0}, None)
    assert "a warning" in caplog.text


def test_a_mistake_in_the_data_is_raised_as_it_is_at_once(truth, tmp_path):
    rows = [detection(7, 6, [0, 0, 1, 1], 0.5)]
    with pytest.raises(UserError) as expected:
        score_results(truth, rows, tmp_path, "numpy")
    with pytest.raises(UserError) as raised:
        Scoring(truth, rows, tmp_path, "numpy", curves=False).result()
    assert str(raised.value) == str(expected.value)
    assert "image_id 7" in str(raised.value)


def test_a_defect_ends_with_its_traceback(truth, tmp_path, monkeypatch):
    replace_scores(monkeypatch, "[][1]")
    with pytest.raises(RuntimeError, match=r"(?s)failed:\nTraceback.*IndexError"):
        Scoring(truth, [], tmp_path, "numpy", curves=False).result()


def test_lack_of_memory_is_raised_as_such(truth, tmp_path, monkeypatch):
    replace_scores(monkeypatch, "(_ for _ in ()).throw(MemoryError('1 GiB'))")
    with pytest.raises(MemoryError, match="1 GiB"):
        Scoring(truth, [], tmp_path, "numpy", curves=False).result()


def test_a_killed_process_is_named_with_what_to_do(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "COMMAND", ENDLESS)
    begun = Scoring(truth, [detection(1, 6, [0, 0, 1, 1], 0.5)] * 20_000, tmp_path, "numpy", curves=False)
    assert not begun.ready()
    begun._process.kill()
    with pytest.raises(RunError, match="SIGKILL, as a rule because memory ran out; --resume .* TEST.OVERLAP_SCORING"):
        begun.result()


def test_a_machine_without_room_for_a_process_says_so(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "COMMAND", [str(tmp_path / "nothing")])
    with pytest.raises(RunError, match="no process can be started"):
        Scoring(truth, [], tmp_path, "numpy", curves=False)


def test_a_cancelled_process_is_gone(truth, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "COMMAND", ENDLESS)
    begun = Scoring(truth, [], tmp_path, "numpy", curves=False)
    begun.cancel()
    assert not is_running(begun._process.pid)
    Scored({}, None).cancel()


def test_it_is_out_of_reach_of_ctrl_c_and_ends_with_the_process_that_started_it(truth, tmp_path):
    slow = "import time, retinanet.engine.scoring as s; s.score_results = lambda *_: time.sleep(600); s.main()"
    parent = (
        f"import sys, os, time; from pathlib import Path; import retinanet.engine.scoring as s; "
        f"s.COMMAND = [sys.executable, '-c', {slow!r}]; "
        f"begun = s.Scoring(Path({str(truth)!r}), [], Path({str(tmp_path)!r}), 'numpy', False); "
        f"print(begun._process.pid, os.getpgid(begun._process.pid) == os.getpgrp(), flush=True); time.sleep(600)"
    )
    started = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    child, same_group = started.stdout.readline().split()
    assert same_group == "False"  # the terminal sends its signal to a group
    assert is_running(int(child))
    started.send_signal(signal.SIGKILL)
    started.wait()
    end = time.monotonic() + 60
    while is_running(int(child)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(int(child))


def replace_scores(monkeypatch, expression: str) -> None:
    """Let the process compute `expression` in place of the metrics."""
    code = f"import os, retinanet.engine.scoring as s; s.score_results = lambda *_: {expression}; s.main()"
    monkeypatch.setattr(scoring, "COMMAND", [sys.executable, "-c", code])


def is_running(pid: int) -> bool:
    """Whether there is such a process; one that has ended and that nobody waited for is not running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_training_waits_for_a_fraction_of_the_scoring_of_500_000_detections(tmp_path):
    """Prints what the process that trains spends on scoring: at once, and on handing over and taking the answer."""
    truth, found = write_case(tmp_path, 5000, 100, 80)
    rows, times = read_json(found, "results"), {}

    def lap(name: str, start: tuple[float, float]) -> None:
        times[name] = [now - before for now, before in zip(clocks(), start, strict=True)]

    start = clocks()
    metrics, counts = score_results(truth, rows, tmp_path / "here", "numpy"), count_results(truth, rows)
    lap("at once", start)
    start = clocks()
    begun = Scoring(truth, rows, tmp_path / "beside", "numpy", curves=True)
    lap("handing over", start)
    while not begun.ready():
        time.sleep(0.01)
    lap("until ready", start)
    start = clocks()
    answer = begun.result()
    lap("taking the answer", start)
    for name, (wall, cpu) in times.items():
        print(f"{name}: {wall:.2f} s, of this process's CPU {cpu:.2f} s")
    assert answer[0] == metrics and len(answer[1]) == len(counts) == 81
    assert times["handing over"][1] + times["taking the answer"][1] < times["at once"][1] / 4


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
