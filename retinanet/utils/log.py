"""Where numbers of a run go: the console and log.txt, metrics.jsonl, TensorBoard events."""

import contextlib
import errno
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from retinanet.errors import UserError
from retinanet.utils.files import not_written, write_atomically, writing

_log = logging.getLogger(__name__)
# the charts of TensorBoard's "custom scalars": what belongs together in one picture
_CHARTS = {
    "training": {
        "losses": ["Multiline", ["^loss$", "^loss_cls$", "^loss_box$"]],
        "share of the time spent on waiting for data": ["Multiline", ["^data_wait$"]],
        "images per second": ["Multiline", ["^images_per_s$"]],
    },
    "evaluation": {"AP": ["Multiline", ["^AP$", "^AP50$", "^AP75$"]]},
}
_FORMAT = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")


class _Console(logging.Handler):
    """Writes above a progress bar that may be at the bottom of the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()  # a log that is piped into a file or another program shows up at once


class _LogFile(logging.FileHandler):
    """Appends to a file; a line that the disk does not take is an error, not a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is logging's
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger("retinanet").removeHandler(self)  # so that the message itself can be logged elsewhere
        raise not_written(Path(self.baseFilename), error) from error


def get_logger() -> logging.Logger:
    """Return the project's log, for the tools; modules of the package use their own name below it."""
    return logging.getLogger("retinanet")


def record_failure(message: str) -> None:
    """Append what ended a run to its log.txt alone, for it is on the console already; no run, or no room: nothing."""
    record = logging.LogRecord("retinanet", logging.ERROR, "", 0, message, None, None)
    for handler in list(get_logger().handlers):
        if isinstance(handler, _LogFile):
            with contextlib.suppress(UserError):  # the disk is full: perhaps that is what the message says
                handler.handle(record)


def start_logging(folder: Path | None = None, console: bool = True) -> None:
    """Send the project's log to the console and, appended, to `folder`/log.txt; calling again replaces both.

    The file also gets what is too long for the console, at the level DEBUG, such as the whole configuration. Processes
    other than the first of a job pass `console=False` and no folder: only their warnings are shown.
    """
    logger = get_logger()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    screen = _Console()
    screen.setLevel(logging.INFO if console else logging.WARNING)
    handlers = [screen]
    if folder is not None:
        with writing(folder / "log.txt"):
            folder.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(folder / "log.txt"))
    for handler in handlers:
        handler.setFormatter(_FORMAT)
        logger.addHandler(handler)


class MetricsWriter:
    """Appends one JSON object per logged iteration to `folder`/metrics.jsonl and the same numbers to TensorBoard.

    Opening it with `iteration` > 0 (a resumed run) drops what is after that iteration, and what is after the first
    `lines` lines where that is given: those steps and evaluations run again. `lines` then counts the lines of the file.
    Everything raises `UserError` where the disk is full or the folder cannot be written.
    """

    def __init__(self, folder: Path, iteration: int = 0, lines: int | None = None, tensorboard: bool = True):
        self.path = Path(folder) / "metrics.jsonl"
        found = [(json.loads(line)["iteration"], line) for line in self._whole_lines()] if iteration else []
        kept = [line for at, line in found if at <= iteration][:lines]
        write_atomically(self.path, lambda file: file.write("".join(kept).encode()))
        self.lines = len(kept)
        self._events = self._end = None
        with writing(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # an evaluation of this very iteration that runs again; what else there is of it is written again
            again = sum(at <= iteration for at, _ in found) > len(kept)
            with self._to_events():
                self._events = SummaryWriter(str(folder), purge_step=iteration + (not again))
                for line in (json.loads(line) for line in kept if again):
                    if line.pop("iteration") == iteration:
                        self._add_scalars(iteration, line)
                self._events.add_custom_scalars(_CHARTS)

    def _whole_lines(self) -> list[str]:
        """Return the complete lines; a killed process or a full disk may have left half a line at the end."""
        if not self.path.exists():
            return []
        whole = []
        for number, line in enumerate(self.path.read_text(errors="replace").splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break
            try:
                whole.append((json.loads(line)["iteration"], line)[1])
            except (ValueError, KeyError, TypeError):
                _log.warning("%s: line %d is damaged; it and what follows is left out", self.path, number)
                break
        return whole

    def write(self, iteration: int, values: dict) -> None:
        """Append `values` (numbers, or nested dicts of them, by name) for `iteration`."""
        line = (json.dumps({"iteration": iteration, **values}) + "\n").encode()
        with writing(self.path):
            if self._file.write(line) < len(line):  # the disk had room for a part of it
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.lines += 1
        if self._events is not None:
            with self._to_events():
                self._add_scalars(iteration, values)

    def _to_events(self):
        return writing(self.path.with_name("events.out.tfevents"))

    def _add_scalars(self, iteration: int, values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._events.add_scalar(name, value, iteration)

    def hyperparameters(self, values: dict[str, str | int | float], metrics: list[str]) -> None:
        """Tell TensorBoard what the run was made of, and which scalars its table of runs shows beside that."""
        if self._events is None:
            return
        from torch.utils.tensorboard.summary import hparams

        experiment, start, self._end = hparams(values, dict.fromkeys(metrics, 0.0))
        with self._to_events():
            for summary in (experiment, start):  # the end is told by close(): until then the run goes on
                self._events.file_writer.add_summary(summary)

    def precision_recall(self, iteration: int, name: str, counts: dict) -> None:
        """Add a precision-recall curve to TensorBoard: `true`, `false` and `missed`, each (T,), at T thresholds evenly
        from 0 to 1."""
        if self._events is None:
            return
        true, false, missed = (counts[key].astype(float) for key in ("true", "false", "missed"))
        precision = np.divide(true, true + false, out=np.ones_like(true), where=true + false > 0)
        recall = np.divide(true, true + missed, out=np.zeros_like(true), where=true + missed > 0)
        with self._to_events():
            self._events.add_pr_curve_raw(
                name, true, false, np.zeros_like(true), missed, precision, recall, iteration, len(true)
            )

    def image(self, iteration: int, name: str, picture) -> None:
        """Add `picture (H, W, 3) uint8 RGB` to TensorBoard."""
        if self._events is not None:
            with self._to_events():
                self._events.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            with self._to_events():
                if self._end is not None:
                    self._events.file_writer.add_summary(self._end)
                self._events.close()
