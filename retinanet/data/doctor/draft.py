"""What repairs work on: a json's content, and the table of it, made again only after a change."""

from typing import NamedTuple

import numpy as np

from retinanet.data.doctor.table import Table, tabulate


class Change(NamedTuple):
    """One kind of repair: the kind of finding that it removes, what was done, to how many."""

    kind: str
    message: str
    count: int

    def __str__(self) -> str:
        return f"[{self.kind}] {self.count} {self.message}"


class Draft:
    """A json's content on its way to be repaired, in place, and the changes so far.

    Whoever writes into a record calls `log`, which forgets the table when something was changed.
    """

    def __init__(self, content: dict):
        self.content = content
        self.changes: list[Change] = []
        self._table: Table | None = None

    @property
    def table(self) -> Table:
        """The table of the content as it is now."""
        if self._table is None:
            self._table = tabulate(self.content)
        return self._table

    def log(self, kind: str, message: str, number: int) -> None:
        """Note a change of `number` things; 0 is none."""
        if number:
            self.changes.append(Change(kind, message, int(number)))
            self._table = None

    def drop(self, section: str, mask, kind: str, message: str) -> None:
        """Take the records of a section in `mask` (rows of the table,) out of the content."""
        mask = np.asarray(mask, dtype=bool)
        if mask.any():
            records = self.content[section]
            self.content[section] = [record for record, gone in zip(records, mask.tolist(), strict=True) if not gone]
            self.log(kind, message, mask.sum())

    def drop_images(self, mask, kind: str) -> None:
        """Take the images in `mask` (I,) out of the content, with the annotations that mean them."""
        mask = np.asarray(mask, dtype=bool)
        theirs = np.append(mask, False)[self.table.rows]  # row -1, no image, is the last
        self.drop("images", mask, kind, "images dropped")
        self.drop("annotations", theirs, kind, "annotations of dropped images dropped")
