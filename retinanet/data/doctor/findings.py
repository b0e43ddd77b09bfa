"""What the doctor can find: one entry in `KINDS` for each kind, and `Finding`, one kind with all its culprits.

An error stops training, evaluation, or makes them wrong; a warning costs accuracy or may be a mistake; an info is for
the reader to know. docs/datasets.md explains every kind to users.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

SHOWN = 5  # examples that a finding carries
ERROR, WARNING, INFO = SEVERITIES = ("error", "warning", "info")


class Kind(NamedTuple):
    """severity: of findings of this kind. fix: what `repair` does about them; empty: they are left to the user."""

    severity: str
    fix: str = ""


KINDS: dict[str, Kind] = {
    # the file
    "json": Kind(ERROR),
    "structure": Kind(ERROR, "missing lists are added empty, entries that are no objects are dropped"),
    "nothing": Kind(ERROR),
    # ids and references
    "no-id": Kind(ERROR, "images and categories without an id are dropped: no annotation can mean them"),
    "id-type": Kind(ERROR, "ids and references become whole numbers"),
    "duplicate-image-id": Kind(ERROR, "equal copies become one; images that differ are dropped with their annotations"),
    "duplicate-category-id": Kind(ERROR, "the copies become one category; names that differ are joined by ' / '"),
    "duplicate-annotation-id": Kind(WARNING, "later copies get new ids"),
    "duplicate-category-name": Kind(WARNING),
    "unknown-image": Kind(ERROR, "the annotations are dropped"),
    "unknown-category": Kind(ERROR, "the annotations are dropped"),
    # images as the json states them
    "image-size": Kind(ERROR, "the size is written as whole numbers or taken from the file, else the image is dropped"),
    "file-name": Kind(ERROR, "the images are dropped with their annotations"),
    "duplicate-file-name": Kind(WARNING, "images of one file and size become one that has the boxes of all"),
    # boxes
    "bbox": Kind(ERROR, "numbers written as text become numbers, other annotations are dropped"),
    "box-format": Kind(ERROR, "all boxes become x, y, width, height in pixels"),
    "degenerate-box": Kind(ERROR, "the annotations are dropped"),
    "outside-box": Kind(ERROR, "the annotations are dropped"),
    "partly-outside-box": Kind(WARNING, "the boxes are clipped to the image"),
    "xyxy-suspect": Kind(WARNING),
    "tiny-box": Kind(WARNING),
    "duplicate-box": Kind(WARNING, "the later copies are dropped"),
    "iscrowd": Kind(ERROR, "0 and 1 written otherwise become numbers, other values become 0"),
    "area-value": Kind(ERROR, "the area becomes width x height"),
    "area-mismatch": Kind(INFO),
    # files
    "images-dir": Kind(ERROR),
    "missing-file": Kind(ERROR, "the images are dropped with their annotations"),
    "renamed-file": Kind(ERROR, "file_name becomes the name that the file has"),
    "unlisted-file": Kind(INFO),
    "empty-file": Kind(ERROR, "the images are dropped with their annotations"),
    "broken-image": Kind(ERROR, "the images are dropped with their annotations"),
    "size-mismatch": Kind(ERROR, "the images are dropped with their annotations"),
    "exif-turned": Kind(INFO),
    "exif-unclear": Kind(WARNING),
    "duplicate-image": Kind(WARNING),
    # the set as a whole
    "no-boxes": Kind(WARNING),
    "empty-image": Kind(INFO),
    "crowds": Kind(INFO),
    "unused-category": Kind(WARNING),
    "rare-category": Kind(INFO),
    # several sets, anchors
    "leakage": Kind(WARNING),
    "possible-leakage": Kind(INFO),
    "different-categories": Kind(ERROR),
    "anchor-coverage": Kind(WARNING),
}


@dataclass(frozen=True)
class Finding:
    """One kind of problem in one data set.

    message: what is wrong and what to do, in a sentence. count: how many culprits there are, of the thing that the
    message names. image_ids, annotation_ids: all that are concerned, as the json writes them, or `images[3]` for
    an entry without a usable id. examples: the first few culprits with their values. severity: that of the kind
    unless given.
    """

    kind: str
    message: str
    count: int = 1
    image_ids: tuple[int | str, ...] = ()
    annotation_ids: tuple[int | str, ...] = ()
    examples: tuple[str, ...] = ()
    severity: str = ""

    def __post_init__(self):
        object.__setattr__(self, "severity", self.severity or KINDS[self.kind].severity)
        assert self.severity in SEVERITIES, self.severity

    @property
    def fix(self) -> str:
        """What `repair` does about it; empty when it does nothing."""
        return KINDS[self.kind].fix

    def as_dict(self) -> dict:
        """Return the finding for a machine-readable report."""
        return {**asdict(self), "fix": self.fix}

    def __str__(self) -> str:
        more = self.count - len(self.examples)
        tail = f"; and {more} more" if self.examples and more > 0 else ""
        shown = f": {'; '.join(self.examples)}{tail}" if self.examples else ""
        return f"{self.severity} [{self.kind}] {self.message}{shown}"


def errors(findings: list[Finding]) -> list[Finding]:
    """Return the findings that are errors."""
    return [finding for finding in findings if finding.severity == ERROR]
