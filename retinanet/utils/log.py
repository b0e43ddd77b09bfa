"""Where numbers of a run go: the console and log.txt, metrics.jsonl, TensorBoard events."""

import json
import logging
import sys
from pathlib import Path

from tqdm import tqdm

_FORMAT = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")


class _Console(logging.Handler):
    """Writes above a progress bar that may be at the bottom of the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()  # a log that is piped into a file or another program shows up at once


def get_logger() -> logging.Logger:
    """Return the project's log, for the tools; modules of the package use their own name below it."""
    return logging.getLogger("retinanet")


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
        folder.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / "log.txt"))
    for handler in handlers:
        handler.setFormatter(_FORMAT)
        logger.addHandler(handler)


class MetricsWriter:
    """Appends one JSON object per logged iteration to `folder`/metrics.jsonl and the same numbers to TensorBoard.

    Opening it with `iteration` > 0 (a resumed run) drops the lines after that iteration: those steps run again.
    """

    def __init__(self, folder: Path, iteration: int = 0, tensorboard: bool = True):
        self.path = Path(folder) / "metrics.jsonl"
        kept = [line for line in self._lines() if json.loads(line)["iteration"] <= iteration] if iteration else []
        rewritten = self.path.with_suffix(".partial")
        rewritten.write_text("".join(kept))
        rewritten.replace(self.path)  # a kill in between leaves the old lines, not half of them
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  closed by close()
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else None)

    def _lines(self) -> list[str]:
        """Return the complete lines; a killed process may have left half a line at the end."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def write(self, iteration: int, values: dict) -> None:
        """Append `values` (numbers, or nested dicts of them, by name) for `iteration`."""
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, iteration)

    def image(self, iteration: int, name: str, picture) -> None:
        """Add `picture (H, W, 3) uint8 RGB` to TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
