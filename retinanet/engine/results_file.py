"""A COCO results file that grows while a video or a camera runs, and is whole whenever the run ends."""

import json
import os
from pathlib import Path

from retinanet.errors import UserError


class ResultsFile:
    """Writes a json list row by row; use it in a `with`. `path` appears when the list is closed, whole.

    An exception that passes through, such as Ctrl-C, closes the list after the rows that were written.
    """

    def __init__(self, path: Path):
        self.path, self.count = path, 0
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> "ResultsFile":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._partial, "w", encoding="utf-8")  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise self._failure(error) from error
        return self

    def write(self, rows: list[dict]) -> None:
        """Append `rows`; `UserError` when that fails, as on a full disk."""
        try:
            for row in rows:
                self._file.write(("[" if self.count == 0 else ", ") + json.dumps(row, allow_nan=False))
                self.count += 1
        except OSError as error:
            raise self._failure(error) from error

    def __exit__(self, *_exception) -> None:
        try:
            with self._file:
                self._file.write("]" if self.count else "[]")
            os.replace(self._partial, self.path)
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot be written ({error.strerror}); choose another folder")
