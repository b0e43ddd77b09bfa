"""Masks over a table -> findings that name every culprit."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from retinanet.data.doctor.findings import SHOWN, Finding
from retinanet.data.doctor.table import Table

Show = Callable[[int], str]  # row -> what is wrong with that record, to follow its name


def on_annotations(
    table: Table, kind: str, mask: Sequence[bool] | np.ndarray, message: str, show: Show, severity: str = ""
) -> Iterator[Finding]:
    """Yield one finding about the annotations in `mask` (B,) bool, none when it is empty; `message` follows a count."""
    rows = np.flatnonzero(mask)
    if len(rows):
        images = np.unique(table.rows[rows])
        yield Finding(
            kind,
            f"{len(rows)} {message}",
            len(rows),
            tuple(table.id_of("images", row) for row in images[images >= 0].tolist()),
            tuple(table.id_of("annotations", row) for row in rows.tolist()),
            _examples(table, "annotations", rows, show),
            severity,
        )


def on_images(
    table: Table, kind: str, mask: Sequence[bool] | np.ndarray, message: str, show: Show, severity: str = ""
) -> Iterator[Finding]:
    """Yield one finding about the images in `mask` (I,) bool, none when it is empty; `message` follows a count."""
    rows = np.flatnonzero(mask)
    if len(rows):
        ids = tuple(table.id_of("images", row) for row in rows.tolist())
        examples = _examples(table, "images", rows, show)
        yield Finding(kind, f"{len(rows)} {message}", len(rows), ids, (), examples, severity)


def on_categories(
    table: Table, kind: str, mask: Sequence[bool] | np.ndarray, message: str, show: Show
) -> Iterator[Finding]:
    """Yield one finding about the categories in `mask` (K,) bool, none when it is empty; `message` follows a count."""
    rows = np.flatnonzero(mask)
    if len(rows):
        yield Finding(kind, f"{len(rows)} {message}", len(rows), examples=_examples(table, "categories", rows, show))


def _examples(table: Table, section: str, rows: np.ndarray, show: Show) -> tuple[str, ...]:
    return tuple(f"{table.name_of(section, row)} {show(row)}".rstrip() for row in rows[:SHOWN].tolist())
