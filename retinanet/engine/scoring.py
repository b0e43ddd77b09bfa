"""Scoring of detections in a process of its own, so that training goes on meanwhile.

The process imports NumPy and the metrics alone (a quarter of a second), shares neither CUDA nor the interpreter's lock
with training, and gives the numbers that scoring at once gives. It is out of reach of the terminal's Ctrl-C, and ends
when the process that started it does, however that ended.
"""

import contextlib
import gc
import logging
import marshal
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from retinanet.engine.coco_json import ground_truth, write_json
from retinanet.engine.coco_json import results as as_arrays
from retinanet.engine.coco_metrics import coco_metrics
from retinanet.engine.operating_point import counts_by_threshold
from retinanet.errors import RunError, UserError

COMMAND = [sys.executable, "-m", "retinanet.engine.scoring"]
Counts = list[dict[str, np.ndarray]]  # of all classes together, then of each: `counts_by_threshold`
_ROOT = Path(__file__).resolve().parents[2]
_REMEDY = "--resume goes on from the last checkpoint; TEST.OVERLAP_SCORING False scores in the training process"
_log = logging.getLogger(__name__)


def score_results(annotations: Path | str, rows: list[dict], folder: Path | str, evaluator: str) -> dict:
    """Return `coco_metrics` of `rows`; write them and the rows to `folder`, each file whole or not at all."""
    write_json(Path(folder) / "predictions.json", rows)
    metrics = coco_metrics(annotations, rows, evaluator)
    write_json(Path(folder) / "metrics.json", metrics)
    return metrics


def count_results(annotations: Path | str, rows: list[dict]) -> Counts:
    """Return `counts_by_threshold` of `rows`, for precision-recall curves."""
    truth = ground_truth(annotations)
    return counts_by_threshold(truth, as_arrays(rows, truth))


class Scored:
    """Scores that are there: `metrics` and, where curves were asked for, `counts`."""

    def __init__(self, metrics: dict, counts: Counts | None):
        self._scores = metrics, counts

    def ready(self) -> bool:
        return True

    def result(self) -> tuple[dict, Counts | None]:
        return self._scores

    def cancel(self) -> None:
        pass


class Scoring:
    """`score_results` in a process that starts at once and, with `curves`, `count_results`."""

    def __init__(self, annotations: Path, rows: list[dict], folder: Path, evaluator: str, curves: bool):
        # marshal: 0.2 s for 500,000 rows, ten times as fast as pickle; both ends are the same interpreter
        task = marshal.dumps((str(Path(annotations).absolute()), rows, str(folder.absolute()), evaluator, curves))
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by _close()
        try:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                cwd=_ROOT,  # where `-m` finds the package
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"no process can be started for scoring ({error.strerror}); {_REMEDY}") from error
        self._answer = b""
        self._thread = threading.Thread(target=self._talk, args=(task,), daemon=True)
        self._thread.start()

    def _talk(self, task: bytes) -> None:
        """Hand over the task and wait for the answer; the pipe stays open, for its end would end the process."""
        with contextlib.suppress(OSError):  # it has died, and its status tells why
            self._process.stdin.write(task)
            self._process.stdin.flush()
        self._answer = self._process.stdout.read()

    def ready(self) -> bool:
        """Return whether `result` would not wait."""
        return not self._thread.is_alive()

    def result(self) -> tuple[dict, Counts | None]:
        """Return metrics and counts, waiting for them; raise what scoring raised, `RunError` when it was killed."""
        self._thread.join()
        status = self._process.wait()
        told = self._close()
        if status < 0:
            name = signal.Signals(-status).name
            cause = ", as a rule because memory ran out" if name == "SIGKILL" else ""
            raise RunError(f"the process that scores an evaluation was ended by {name}{cause}; {_REMEDY}")
        if status:
            raise RuntimeError(f"the process that scores an evaluation failed:\n{told}")
        if told:
            _log.warning("scoring: %s", told)
        done, value = pickle.loads(self._answer)
        if not done:
            raise value
        return value

    def cancel(self) -> None:
        """End the process."""
        self._process.kill()
        self._thread.join()
        self._process.wait()
        self._close()

    def _close(self) -> str:
        """Close the pipes and return what the process wrote to its standard error."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        with self._errors:
            self._errors.seek(0)
            return self._errors.read().decode(errors="replace").strip()


class PendingEvaluation:
    """An evaluation that waits for scores. `finish` returns its metrics, and tells them, once they are there."""

    def __init__(self, scorings: list[Scored | Scoring], finish: Callable[[], dict]):
        self._scorings, self.finish = scorings, finish

    def ready(self) -> bool:
        """Return whether `finish` would not wait."""
        return all(scoring.ready() for scoring in self._scorings)

    def cancel(self) -> None:
        """End the processes; there will be no metrics."""
        for scoring in self._scorings:
            scoring.cancel()


def main() -> None:
    """The body of the process: a task from standard input, its scores or its error to standard output."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # evaluators print
    gc.disable()  # looking for cycles among the rows costs more than everything else
    annotations, rows, folder, evaluator, curves = marshal.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        metrics = score_results(annotations, rows, folder, evaluator)
        reply = True, (metrics, count_results(annotations, rows) if curves else None)
    except (UserError, MemoryError) as error:
        reply = False, error
    with answer:
        pickle.dump(reply, answer)


def _end_with_parent() -> None:
    """End this process when the other end of its standard input is closed: the training has ended."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
