"""One data set -> `Report`: all checks in order."""

from dataclasses import dataclass, field
from pathlib import Path

from retinanet.data.catalog import load_catalog
from retinanet.data.doctor.boxes import Boxes, check_boxes, judge
from retinanet.data.doctor.files import Opened, Presence, Progress, check_opened, check_presence, look, open_images
from retinanet.data.doctor.findings import INFO, Finding
from retinanet.data.doctor.ids import check_content, check_ids, check_images, check_structure
from retinanet.data.doctor.overview import Overview, check_overview, describe
from retinanet.data.doctor.table import Table, read_json, tabulate
from retinanet.errors import pick


@dataclass(frozen=True)
class Source:
    """Where a data set is. images_dir: None leaves the files unexamined. max_degenerate: as in the catalog."""

    name: str
    annotations: Path
    images_dir: Path | None = None
    max_degenerate: int = 0


@dataclass(frozen=True)
class Report:
    """What was found in one data set.

    content: the json as read; None when it cannot be. table, boxes: its arrays. presence: its files, None without a
    folder. opened: row of an image -> what reading its file told, empty when files were not opened.
    """

    source: Source
    findings: list[Finding]
    content: object
    table: Table
    boxes: Boxes
    overview: Overview
    presence: Presence | None = None
    opened: dict[int, Opened] = field(default_factory=dict)

    def as_dict(self) -> dict:
        """Return the report for a json file."""
        return {
            "name": self.source.name,
            "annotations": str(self.source.annotations),
            "images_dir": None if self.source.images_dir is None else str(self.source.images_dir),
            "overview": self.overview,
            "findings": [finding.as_dict() for finding in self.findings],
        }


def build_sources(cfg) -> tuple[list[Source], list[Source]]:
    """Return the sources of `DATASETS.TRAIN` and of `DATASETS.TEST`; `UserError` for a name not in the catalog."""
    catalog = load_catalog(cfg.DATASETS.CATALOG)

    def sources(split: str) -> list[Source]:
        entries = {name: pick(catalog, name, f"DATASETS.{split}") for name in cfg.DATASETS[split]}
        return [
            Source(name, entry["annotations"], entry["images"], entry["max_degenerate"])
            for name, entry in entries.items()
        ]

    return sources("TRAIN"), sources("TEST")


def examine(
    source: Source,
    open_files: bool = False,
    workers: int = 2,
    progress: Progress = lambda items, total: items,
) -> Report:
    """Return everything that the doctor finds in one data set; raises nothing for whatever the json may hold.

    open_files: read every image as training does, in `workers` threads; `progress` wraps the iteration over them.
    """
    content, findings = read_json(source.annotations)
    findings = findings or list(check_structure(content))
    table = tabulate(content)
    boxes = judge(table)
    presence, opened = None, {}
    if isinstance(content, dict):
        findings += check_table(table, boxes, source.max_degenerate)
        if source.images_dir is not None:
            presence, opened, found = _examine_files(table, source.images_dir, open_files, workers, progress)
            findings += found
    return Report(source, findings, content, table, boxes, describe(table, boxes), presence, opened)


def check_table(table: Table, boxes: Boxes, max_degenerate: int = 0) -> list[Finding]:
    """Return what the json alone tells."""
    checks = (check_content(table), check_ids(table), check_images(table), check_boxes(table, boxes, max_degenerate))
    return [finding for check in (*checks, check_overview(table, boxes)) for finding in check]


def _examine_files(table: Table, images_dir: Path, open_files: bool, workers: int, progress: Progress):
    """Return presence, opened files and findings."""
    if not images_dir.is_dir():
        return None, {}, [Finding("images-dir", f"the image folder {images_dir} does not exist")]
    presence = look(table, images_dir)
    opened = open_images(table, images_dir, presence, workers, progress) if open_files else {}
    return presence, opened, [*check_presence(table, images_dir, presence), *check_opened(table, opened)]


def quick_check(source: Source) -> list[Finding]:
    """Return the errors and warnings about one data set that need no image opened: the short form before training.

    Milliseconds for a set of some thousand boxes; for COCO's 118,000 images about as long as reading its json twice.
    """
    return [finding for finding in examine(source).findings if finding.severity != INFO]
