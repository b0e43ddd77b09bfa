"""Repair what can be repaired without guessing what an annotator meant; `KINDS` says what is done about each kind."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np

from retinanet.data.doctor.boxes import Boxes, judge, not_numbers, wrong_areas, wrong_crowds
from retinanet.data.doctor.draft import Change, Draft
from retinanet.data.doctor.examine import Report
from retinanet.data.doctor.layout import Layout
from retinanet.data.doctor.repair_entries import (
    repair_categories,
    repair_files,
    repair_images,
    repair_references,
    repair_structure,
)
from retinanet.data.doctor.table import Table, crowd_of
from retinanet.errors import UserError

_MOST_ROUNDS = 5  # one repair can uncover the next: joined images have boxes twice, clipped boxes become equal
_DIGITS = 6  # decimals of rewritten coordinates: a millionth of a pixel
_AREA_SLACK = 0.01  # share by which an area that was w * h may differ from it by rounding


def repair(report: Report) -> list[Change]:
    """Repair `report.content` in place and return what was changed, nothing for a clean set.

    Images are dropped together with their annotations, never relabelled. Raises `UserError` when the json holds no
    object, or when no image or category would be left.
    """
    path, content = report.source.annotations, report.content
    if not isinstance(content, dict):
        raise UserError(f"{path}: cannot be repaired: {report.findings[0].message}")
    draft = Draft(content)
    if any(finding.fix for finding in report.findings):  # else spare a large clean set the time
        _repair_until_nothing_changes(draft, report)
    for section in ("images", "categories"):
        if not content[section]:
            done = "; ".join(map(str, draft.changes)) or "there is nothing in the original"
            raise UserError(f"{path}: cannot be repaired, nothing would be left in {section!r}: {done}")
    return draft.changes


def _repair_until_nothing_changes(draft: Draft, report: Report) -> None:
    opened, images = report.opened.items(), report.table.images
    problems = {images[row]["file_name"]: one.problem for row, one in opened if one.problem}
    for _ in range(_MOST_ROUNDS):
        before = len(draft.changes)
        _one_round(draft, report.source.images_dir, problems)
        if len(draft.changes) == before:
            return


def write_repaired(report: Report, path: Path) -> None:
    """Write `report.content` to `path`, whole or not at all; raises `UserError` when that is the file it came from."""
    source = report.source.annotations
    if path.exists() and source.exists() and path.samefile(source):
        raise UserError(f"{path}: is the file that was examined, and that one is never overwritten; name another file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(report.content), encoding="utf-8")
        os.replace(partial, path)
    except (OSError, RecursionError) as error:
        with contextlib.suppress(OSError):  # not there, or its folder is none
            partial.unlink()
        reason = error.strerror if isinstance(error, OSError) else "the json is nested too deeply"
        raise UserError(f"{path}: cannot be written ({reason})") from error


def _one_round(draft: Draft, images_dir: Path | None, problems: dict[str, str]) -> None:
    repair_structure(draft)
    repair_categories(draft)
    repair_images(draft)
    repair_references(draft)
    repair_files(draft, images_dir, problems)
    _repair_values(draft)
    _repair_boxes(draft)


def _repair_values(draft: Draft) -> None:
    """Correct `iscrowd`, and boxes that are texts; drop annotations without a box."""
    table = draft.table
    crowds = np.flatnonzero(wrong_crowds(table.column("annotations", "iscrowd")))
    for row in crowds.tolist():
        table.annotations[row]["iscrowd"] = crowd_of(table.annotations[row]["iscrowd"]) or 0
    draft.log("iscrowd", "values of iscrowd corrected", len(crowds))
    lost = np.isnan(draft.table.boxes).any(axis=1)
    draft.drop("annotations", lost, "bbox", "annotations without a box dropped")
    table = draft.table
    texts = np.flatnonzero(not_numbers(table))
    for row in texts.tolist():
        table.annotations[row]["bbox"] = table.boxes[row].tolist()
    draft.log("bbox", "boxes written as text made numbers", len(texts))
    table = draft.table
    areas = np.flatnonzero(wrong_areas(table.column("annotations", "area")))
    for row in areas.tolist():
        table.annotations[row]["area"] = float(table.boxes[row, 2] * table.boxes[row, 3])
    draft.log("area-value", "areas computed from their box", len(areas))


def _repair_boxes(draft: Draft) -> None:
    """Rewrite boxes as COCO has them and inside their image; drop those without area, outside, or repeated."""
    table = draft.table
    boxes = judge(table)
    foreign = np.full(len(table.boxes), boxes.layout != Layout())
    _rewrite(table, boxes, foreign | boxes.partly)
    draft.log("box-format", f"boxes changed from {boxes.layout}", foreign.sum())
    draft.log("partly-outside-box", "boxes clipped to their image", boxes.partly.sum())
    left = np.ones(len(table.boxes), dtype=bool)
    for kind, mask, message in (
        ("degenerate-box", boxes.degenerate, "annotations without area dropped"),
        ("outside-box", boxes.outside, "annotations outside their image dropped"),
        ("duplicate-box", boxes.copies, "repeated annotations dropped"),
    ):
        draft.drop("annotations", mask[left], kind, message)
        left &= ~mask


def _rewrite(table: Table, boxes: Boxes, mask: np.ndarray) -> None:
    """Write the boxes in `mask` into their annotations as read and clipped; an area that was w * h stays so."""
    for row in np.flatnonzero(mask).tolist():
        record, old = table.annotations[row], table.boxes[row]
        new = (boxes.clipped if boxes.known[row] else boxes.xywh)[row]
        new = [round(number, _DIGITS) for number in new.tolist()]
        area = record.get("area")
        if type(area) in (int, float) and abs(area - old[2] * old[3]) <= _AREA_SLACK * abs(old[2] * old[3]):
            record["area"] = new[2] * new[3]
        record["bbox"] = new
