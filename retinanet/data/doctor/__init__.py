"""The doctor: what is wrong with a data set, as a list of findings, and what of it can be repaired. Prints nothing.

Read in this order: `findings.py` (the kinds), `table.py` (any json -> arrays), the checks in `ids.py`, `layout.py`,
`boxes.py`, `overview.py` and `files.py`, `examine.py` (all of them), `across.py`,
`repair.py`.
"""

from retinanet.data.doctor.across import compare
from retinanet.data.doctor.draft import Change
from retinanet.data.doctor.examine import Report, Source, build_sources, examine, quick_check
from retinanet.data.doctor.findings import KINDS, SEVERITIES, Finding, errors
from retinanet.data.doctor.repair import repair, write_repaired

__all__ = [
    "KINDS",
    "SEVERITIES",
    "Change",
    "Finding",
    "Report",
    "Source",
    "build_sources",
    "compare",
    "errors",
    "examine",
    "quick_check",
    "repair",
    "write_repaired",
]
