"""How well the anchors of a configuration fit the boxes of a data set, and which setting fits better.

A box that no anchor overlaps enough is learned from one anchor at best. The best overlap of a box needs no list of
anchors: among the equal anchors of a level the nearest one overlaps most, along x and along y apart, so five levels
times A shapes decide about a box, exactly.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from retinanet.data.doctor.examine import Report
from retinanet.data.doctor.findings import Finding
from retinanet.data.transforms import resize_geometry
from retinanet.modeling.anchors import AnchorGenerator

THRESHOLDS = (0.5, 0.4)  # RetinaNet's bounds of positive and of background anchors
SIZES = ("all", "small", "medium", "large")
_SMALL, _LARGE = 32.0**2, 96.0**2  # square pixels of the original image: COCO's bounds, as in APs, APm and APl
NARROW = 8.0  # pixels: the stride of P3; anchors a stride apart rarely meet a narrower box
_CHUNK = 16384  # boxes at a time: the temporaries stay in the cache

_ENOUGH = 0.8  # share of boxes from which no warning is due; the published setting has 0.88 on COCO

_SAMPLE = 4000  # boxes that the search looks at: a share of 90 % is known to half a point
_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
_OCTAVES = (1, 2, 3, 4)
_FIXED_RATIOS = ((1.0,), (0.5, 1.0, 2.0), (0.67, 1.0, 1.5), (0.33, 1.0, 3.0), (0.33, 0.5, 1.0, 2.0, 3.0))
_QUANTILES = (1, 2, 3, 5)  # how many ratios are taken from the boxes themselves
_MOST_ANCHORS = 15  # per cell; the head's cost grows with them
_WORTH_ANCHORS = 0.01  # share of boxes that more anchors per cell have to win
_WORTH_CHANGE = 0.02  # share of boxes that a change of setting has to win: a trained head has to learn the new one


class AnchorSetting(NamedTuple):
    """`MODEL.ANCHORS`: SCALE, SCALES_PER_OCTAVE, ASPECT_RATIOS and CONVENTION."""

    scale: float
    scales_per_octave: int
    aspect_ratios: tuple[float, ...]
    convention: str = "detectron2"

    @property
    def num_anchors(self) -> int:
        """A, the anchors per cell."""
        return self.scales_per_octave * len(self.aspect_ratios)

    def as_opts(self) -> list[tuple[str, str]]:
        """Return the keys and values that set it in a configuration."""
        ratios = ", ".join(f"{ratio:g}" for ratio in self.aspect_ratios)
        return [
            ("MODEL.ANCHORS.SCALE", f"{self.scale:g}"),
            ("MODEL.ANCHORS.SCALES_PER_OCTAVE", str(self.scales_per_octave)),
            ("MODEL.ANCHORS.ASPECT_RATIOS", f"[{ratios}]"),
        ]


@dataclass(frozen=True)
class Resized:
    """Boxes as the anchors meet them, B of them.

    boxes: (B, 4) float32 xyxy pixels of the resized image. inputs: (B, 2) int64 (height, width) of the padded input.
    areas: (B,) float64 square pixels in the original image. plus_one: widths are x2 - x1 + 1 (Detectron).
    """

    boxes: np.ndarray
    inputs: np.ndarray
    areas: np.ndarray
    plus_one: bool = False

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows: np.ndarray) -> "Resized":
        """Return the boxes of these rows."""
        return Resized(self.boxes[rows], self.inputs[rows], self.areas[rows], self.plus_one)


class Coverage(NamedTuple):
    """boxes: how many. above: threshold -> share of them whose best IoU reaches it. mean: of their best IoU."""

    boxes: int
    above: dict[float, float]
    mean: float


def build_setting(cfg) -> AnchorSetting:
    """Return the anchor setting of a configuration."""
    anchors = cfg.MODEL.ANCHORS
    ratios = tuple(map(float, anchors.ASPECT_RATIOS))
    return AnchorSetting(anchors.SCALE, anchors.SCALES_PER_OCTAVE, ratios, anchors.CONVENTION)


def build_resized(cfg, xywh: np.ndarray, sizes: np.ndarray) -> Resized:
    """Return the boxes as the test input of the configuration has them (`INPUT.MIN_SIZE_TEST`, `MAX_SIZE_TEST`).

    xywh: (B, 4) float64 pixels of the original image. sizes: (B, 2) (height, width) of the image of each box.
    """
    plus_one = cfg.MODEL.BOX.CONVENTION == "detectron"
    one_number = sizes[:, 0].astype(np.int64) << 32 | sizes[:, 1]  # sorted ten times as fast as pairs
    distinct, which = np.unique(one_number, return_inverse=True)
    geometries = [
        resize_geometry(
            (size >> 32, size & 0xFFFFFFFF), cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.RESIZE
        )
        for size in distinct.tolist()
    ]
    scales = np.array([one.scales for one in geometries], dtype=np.float64).reshape(-1, 2)[which]  # (B, 2) x, y
    multiple = cfg.INPUT.SIZE_DIVISIBILITY
    inputs = -(-np.array([one.size for one in geometries], dtype=np.int64).reshape(-1, 2) // multiple) * multiple
    extent = np.maximum(xywh[:, 2:] - 1, 0) if plus_one else xywh[:, 2:]
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + extent], axis=1) * np.tile(scales, 2)
    return Resized(corners.astype(np.float32), inputs[which], xywh[:, 2] * xywh[:, 3], plus_one)


def best_iou(resized: Resized, setting: AnchorSetting) -> np.ndarray:
    """Return (B,) float32: the largest IoU of each box with any anchor of its input."""
    scale, octaves, ratios, convention = setting
    generator = AnchorGenerator(scale, octaves, ratios, convention)
    cells = [cell.numpy().astype(np.float32) for cell in generator.cells]
    best = np.zeros(len(resized), dtype=np.float32)
    for start in range(0, len(resized), _CHUNK):
        part = resized.take(np.arange(start, min(start + _CHUNK, len(resized))))
        for cell, stride in zip(cells, generator.strides, strict=True):
            found = _best_of_level(part, cell, stride, convention == "torchvision")
            np.maximum(best[start : start + _CHUNK], found, out=best[start : start + _CHUNK])
    return best


def _best_of_level(part: Resized, cell: np.ndarray, stride: int, adapt_stride: bool) -> np.ndarray:
    """Return (B,) the largest IoU with the anchors of one level; cell: (A, 4), those of the cell at the origin."""
    extra = np.float32(part.plus_one)
    counts = -(-part.inputs[:, ::-1] // stride)  # (B, 2) columns, rows
    steps = (part.inputs[:, ::-1] // counts if adapt_stride else np.full_like(counts, stride)).astype(np.float32)
    sides = part.boxes[:, 2:] - part.boxes[:, :2] + extra  # (B, 2) width, height
    centers = (part.boxes[:, :2] + part.boxes[:, 2:]) / 2
    area = sides[:, 0] * sides[:, 1]
    best, distance, origin = np.zeros(len(sides), dtype=np.float32), None, None
    for anchor in cell:
        middle = (anchor[:2] + anchor[2:]) / 2
        if origin is None or (middle != origin).any():  # shapes of a cell mostly share their centre
            origin = middle
            nearest = np.clip(np.rint((centers - middle) / steps), 0, counts - 1)
            distance = np.abs(centers - middle - nearest * steps)  # (B, 2)
        shape = anchor[2:] - anchor[:2] + extra
        overlap = np.minimum(np.minimum(sides, shape), (sides + shape) / 2 - distance)
        intersection = np.maximum(overlap[:, 0], 0) * np.maximum(overlap[:, 1], 0)
        np.maximum(best, intersection / (area + shape[0] * shape[1] - intersection), out=best)
    return best


def measure(resized: Resized, setting: AnchorSetting) -> dict[str, Coverage]:
    """Return the coverage of all boxes and of COCO's sizes; sizes without boxes are left out."""
    iou = best_iou(resized, setting)
    small, large = resized.areas < _SMALL, resized.areas >= _LARGE
    masks = dict(zip(SIZES, (np.ones(len(iou), dtype=bool), small, ~small & ~large, large), strict=True))
    return {
        name: Coverage(
            int(mask.sum()), {t: float((iou[mask] >= t).mean()) for t in THRESHOLDS}, float(iou[mask].mean())
        )
        for name, mask in masks.items()
        if mask.any()
    }


def propose(resized: Resized, current: AnchorSetting, seed: int = 0) -> AnchorSetting:
    """Return the setting that covers most boxes, or `current` when nothing covers two points more of them.

    Searched on at most 4000 boxes: scales, sizes per octave, and ratios both usual and taken from the boxes. Of
    settings within a point of the best the one with the fewest anchors per cell is taken, then the one with the higher
    mean IoU.
    """
    if not len(resized):
        return current
    rows = np.random.default_rng(seed).permutation(len(resized))[:_SAMPLE]
    sample = resized.take(np.sort(rows))
    scored = [(setting, *_score(sample, setting)) for setting in (current, *_candidates(sample, current))]
    most = max(share for _, share, _ in scored)
    good = [one for one in scored if one[1] >= most - _WORTH_ANCHORS]
    chosen, share, _ = min(good, key=lambda one: (one[0].num_anchors, -one[1] - one[2]))
    return chosen if share - scored[0][1] >= _WORTH_CHANGE else current


def _score(resized: Resized, setting: AnchorSetting) -> tuple[float, float]:
    """Return the share of boxes with a positive anchor by overlap, and the mean of the best overlaps."""
    iou = best_iou(resized, setting)
    return float((iou >= THRESHOLDS[0]).mean()), float(iou.mean())


def _candidates(sample: Resized, current: AnchorSetting) -> Iterator[AnchorSetting]:
    ratios = {current.aspect_ratios, *_FIXED_RATIOS, *_ratios_of(sample)}
    for scale, octaves, chosen in product(_SCALES, _OCTAVES, sorted(ratios)):
        setting = AnchorSetting(scale, octaves, chosen, current.convention)
        if setting.num_anchors <= max(_MOST_ANCHORS, current.num_anchors):
            yield setting


def _ratios_of(sample: Resized) -> Iterator[tuple[float, ...]]:
    """Yield sets of aspect ratios (height / width) that split the boxes into equal parts."""
    sides = np.maximum(sample.boxes[:, 2:] - sample.boxes[:, :2], 1e-3)
    logs = np.log(sides[:, 1] / sides[:, 0])
    for number in _QUANTILES:
        middles = (np.arange(number) + 0.5) / number
        values = np.clip(np.exp(np.quantile(logs, middles)), 0.1, 10)
        yield tuple(sorted({_round(value) for value in values.tolist()}))


def _round(ratio: float) -> float:
    return float(f"{ratio:.2g}")


def check_coverage(measured: dict[str, Coverage], better: dict[str, Coverage]) -> list[Finding]:
    """Return a finding when the anchors leave out many boxes that `better`, the coverage of a proposal, has."""
    share, possible = measured["all"].above[THRESHOLDS[0]], better["all"].above[THRESHOLDS[0]]
    if share >= _ENOUGH or possible - share < _WORTH_CHANGE:
        return []
    number = round((1 - share) * measured["all"].boxes)
    message = (
        f"{100 * (1 - share):.1f} % of the boxes have no anchor of IoU >= {THRESHOLDS[0]} in this configuration; "
        f"{100 * (1 - possible):.1f} % with the setting that tools/check_dataset.py proposes"
    )
    return [Finding("anchor-coverage", message, number)]


def share_below(resized: Resized, pixels: float) -> float:
    """Return the share of boxes with a side below `pixels` in the resized image, 0 when there are no boxes."""
    if not len(resized):
        return 0.0
    sides = resized.boxes[:, 2:] - resized.boxes[:, :2] + resized.plus_one
    return float((sides.min(axis=1) < pixels).mean())


@dataclass(frozen=True)
class AnchorReport:
    """A configuration's anchors on a data set, and the proposal, which is the same setting when none is better.

    narrow: the share of boxes with a side below the stride of P3 in the resized image.
    """

    current: AnchorSetting
    measured: dict[str, Coverage]
    proposal: AnchorSetting
    better: dict[str, Coverage]
    narrow: float

    @property
    def findings(self) -> list[Finding]:
        """A warning when the anchors leave out many boxes that the proposal has."""
        return check_coverage(self.measured, self.better)

    def as_dict(self) -> dict:
        """Return the report for a json file."""
        return {
            "current": dict(self.current.as_opts()),
            "coverage": _as_json(self.measured),
            "proposed": dict(self.proposal.as_opts()),
            "proposed_coverage": _as_json(self.better),
            "findings": [finding.as_dict() for finding in self.findings],
        }


def build_anchor_report(cfg, reports: Sequence[Report]) -> AnchorReport | None:
    """Return how the anchors of the configuration fit the boxes of data sets; None when they have no boxes."""
    usable = [report.boxes.usable & (report.table.labels >= 0) for report in reports]
    boxes = [report.boxes.clipped[mask] for report, mask in zip(reports, usable, strict=True)]
    sizes = [report.table.box_sizes[mask] for report, mask in zip(reports, usable, strict=True)]
    if not sum(map(len, boxes)):
        return None
    resized, current = build_resized(cfg, np.concatenate(boxes), np.concatenate(sizes)), build_setting(cfg)
    proposal = propose(resized, current)
    measured = measure(resized, current)
    better = measured if proposal == current else measure(resized, proposal)
    return AnchorReport(current, measured, proposal, better, share_below(resized, NARROW))


def _as_json(measured: dict[str, Coverage]) -> dict:
    return {
        size: {"boxes": one.boxes, "mean_iou": one.mean, **{f"share_{t}": one.above[t] for t in THRESHOLDS}}
        for size, one in measured.items()
    }
