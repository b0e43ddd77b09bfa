"""Several data sets: what they share and should not, and what they should share and do not."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence

from retinanet.data.doctor.examine import Report
from retinanet.data.doctor.findings import SHOWN, Finding
from retinanet.data.doctor.table import Table
from retinanet.data.json_values import is_file_name

_SUSPECTS_STATED = 200_000  # pairs of equal names whose file sizes are compared


def compare(train: Sequence[Report], test: Sequence[Report]) -> list[Finding]:
    """Return images that are trained on and tested on, categories that differ, and files that no set names."""
    reports = [report for report in (*train, *test) if report.table.categories]
    findings = list(_compare_categories(reports))
    for learned in train:
        for scored in test:
            findings += _leakage(learned, scored)
    return findings + list(_unlisted([*train, *test]))


def _unlisted(reports: Sequence[Report]) -> Iterator[Finding]:
    """Files that none of the sets of a folder names: training and validation set often share one."""
    unlisted, listed = defaultdict(set), defaultdict(set)
    for report in reports:
        if report.presence is not None:
            folder = os.path.realpath(report.source.images_dir)
            unlisted[folder].update(report.presence.unlisted)
            names = report.table.column("images", "file_name")
            listed[folder].update(os.path.normpath(name) for name in names if is_file_name(name))
    for folder in unlisted:
        names = sorted(unlisted[folder] - listed[folder])
        if names:
            message = f"{len(names)} image files in {folder} are in no json and take no part"
            yield Finding("unlisted-file", message, len(names), examples=tuple(names[:SHOWN]))


def _compare_categories(reports: list[Report]) -> Iterator[Finding]:
    for report in reports[1:]:
        ours, theirs = _categories(reports[0].table), _categories(report.table)
        odd = sorted(ours ^ theirs, key=str)
        if odd:
            pair = f"{reports[0].source.name!r} and {report.source.name!r}"
            message = f"the categories (id, name) of {pair} differ; give both json files the same"
            yield Finding("different-categories", message, len(odd), examples=tuple(map(str, odd[:SHOWN])))


def _categories(table: Table) -> set[tuple]:
    pairs = zip(table.category_keys, table.categories, strict=True)
    return {(key, str(record.get("name", key))) for key, record in pairs if key is not None}


def _leakage(learned: Report, scored: Report) -> list[Finding]:
    """Two sets share an image when they share the file or its bytes; a name alone proves nothing."""
    names = f"{learned.source.name!r} and {scored.source.name!r}"
    ours, theirs = _paths(learned), _paths(scored)
    same = [row for path, row in theirs.items() if path in ours]
    digests = {one.digest for one in learned.opened.values() if one.digest}
    same += [row for row, one in scored.opened.items() if one.digest in digests]
    same = sorted(set(same))
    if same:
        message = f"{len(same)} images are in both {names}: the AP tells too little about new images"
        return [_shared("leakage", message, scored, same)]
    if digests:
        return []
    rows = _equal_names_and_bytes(ours, theirs)
    if not rows:
        return []
    message = f"{len(rows)} images of {names} have equal names and file sizes; --images compares their content"
    return [_shared("possible-leakage", message, scored, rows)]


def _shared(kind: str, message: str, scored: Report, rows: list[int]) -> Finding:
    ids = tuple(scored.table.id_of("images", row) for row in rows)
    examples = tuple(scored.table.name_of("images", row) for row in rows[:SHOWN])
    return Finding(kind, message, len(rows), ids, (), examples)


def _paths(report: Report) -> dict[str, int]:
    """Return path -> row of the images whose files are there; without a folder there are none."""
    if report.presence is None:
        return {}
    folder = os.path.realpath(report.source.images_dir)
    gone = {*report.presence.missing, *report.presence.renamed}
    names = report.table.column("images", "file_name")
    return {
        os.path.normpath(os.path.join(folder, name)): row
        for row, name in enumerate(names)
        if is_file_name(name) and row not in gone
    }


def _equal_names_and_bytes(ours: dict[str, int], theirs: dict[str, int]) -> list[int]:
    by_name = {os.path.basename(path): path for path in ours}
    pairs = [(by_name[name], path) for path in theirs if (name := os.path.basename(path)) in by_name]
    rows = []
    for mine, other in pairs[:_SUSPECTS_STATED]:
        try:
            if os.path.getsize(mine) == os.path.getsize(other):
                rows.append(theirs[other])
        except OSError:  # gone since it was listed
            continue
    return rows
