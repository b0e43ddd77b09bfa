"""What is between an evaluation and its line in metrics.jsonl when its scores come while training goes on.

Lines of later iterations wait in memory until the evaluation's line is written, so that the file is the one of a run
that waits for every score. Who saves a checkpoint, or evaluates again, settles the evaluation first: a checkpoint never
lies between an evaluation and its line.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from retinanet.engine.out_of_memory import explained_evaluation
from retinanet.engine.progress import Progress
from retinanet.engine.scoring import PendingEvaluation

Record = Callable[[int, dict, dict[str, Tensor]], None]


class Pending:
    """At most one evaluation whose scores are not there yet. In a `with`: an error settles it, Ctrl-C cancels it.

    record: called with the iteration of the evaluation, its metrics and the weights that were evaluated.
    """

    def __init__(self, progress: Progress, record: Record):
        self._progress, self._record = progress, record
        self._waiting: tuple[int, PendingEvaluation, dict[str, Tensor]] | None = None

    def __bool__(self) -> bool:
        return self._waiting is not None

    def start(self, iteration: int, evaluation: PendingEvaluation, weights: dict[str, Tensor]) -> None:
        """Hold back the lines of later iterations until `evaluation` of the copied `weights` is recorded."""
        assert not self, iteration
        self._progress.hold()
        self._waiting = iteration, evaluation, weights

    def settle(self, wait: bool = True) -> None:
        """Record the evaluation, then the lines since; without `wait` only where its scores are there."""
        if self._waiting is None or not (wait or self._waiting[1].ready()):
            return
        (iteration, evaluation, weights), self._waiting = self._waiting, None
        with explained_evaluation(torch.device("cpu")):
            metrics = evaluation.finish()
        self._record(iteration, metrics, weights)
        self._progress.release()

    def __enter__(self) -> "Pending":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None or issubclass(kind, Exception):
            self.settle()
        elif self._waiting:
            self._waiting[1].cancel()
