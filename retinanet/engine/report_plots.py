"""The plots of an evaluation report."""

import numpy as np

from retinanet.utils.page import Plot
from retinanet.utils.plot import COLOURS, plain, svg

NAMED_CLASSES = 8  # curves that a reader can tell apart
SHOWN_IOUS = {0: "0.50", 2: "0.60", 4: "0.70", 6: "0.80", 8: "0.90"}  # place among COCO's ten -> label
CELL_TEXT = 12  # classes up to which the confusion matrix shows its counts
PERCENT = (0, 101)
CURVE_POINTS = 1000  # of a curve with a point for each score: a page for COCO would have millions


def precision_recall(precision: np.ndarray, curves: list[dict], names: list[str], num_boxes: list[int]) -> Plot:
    """precision: (10, 101, K, 4, 3), see `coco_metrics.accumulate`. curves: all classes together, then each."""

    def draw(figure):
        left, right = figure.subplots(1, 2)
        for place, label in SHOWN_IOUS.items():
            cells = precision[place, :, :, 0, 2]
            cells = cells[:, (cells > -1).all(0)]
            if cells.shape[1]:
                left.plot(np.linspace(0, 100, 101), 100 * cells.mean(1), label=f"IoU {label}")
        left.set(xlabel="recall, %", ylabel="precision, %", title="mean over classes, as in AP")
        frequent = np.argsort(-np.array(num_boxes), kind="stable")
        for place in frequent[NAMED_CLASSES:]:
            right.plot(*_thinned(curves[place + 1], "recall", "precision"), color="#8888", lw=0.5)
        for place in frequent[:NAMED_CLASSES]:
            curve = _thinned(curves[place + 1], "recall", "precision")
            right.plot(*curve, lw=1.2, label=plain(names[place]))
        right.plot(*_thinned(curves[0], "recall", "precision"), color=_ink(), lw=2.2, label="all together")
        right.set(xlabel="recall, %", title="classes, IoU 0.5")
        for axis in (left, right):
            axis.set(xlim=PERCENT, ylim=PERCENT)
            _legend(axis)

    more = f" Thin grey lines: the other {len(names) - NAMED_CLASSES} classes." if len(names) > NAMED_CLASSES else ""
    caption = (
        f"Precision over recall. Left: as COCO averages it, for five of its ten IoUs. Right: single classes.{more}"
    )
    return Plot("precision-recall", svg("precision-recall", (11, 4.4), draw), caption)


def rates_over_score(curve: dict, metrics: dict) -> Plot:
    """Precision, recall and F1 of all classes together over the score threshold, with the highest F1."""

    def draw(figure):
        axis = figure.subplots()
        for rate, label in {"precision": "precision", "recall": "recall", "f1": "F1"}.items():
            axis.plot(*_thinned(curve, "threshold", rate), label=label)
        if metrics["threshold"] is not None:
            axis.axvline(metrics["threshold"], color=_ink(), ls=":", label=f"score {metrics['threshold']:.3f}")
            axis.plot(metrics["threshold"], metrics["f1"], "o", color=COLOURS[2])
        axis.set(xlabel="score from which detections are kept", ylabel="%", xlim=(0, 1), ylim=PERCENT)
        _legend(axis)

    caption = "Precision, recall and F1 of all classes together, at IoU 0.5, over the score threshold."
    return Plot("rates-over-score", svg("rates-over-score", (8, 3.8), draw), caption)


def by_size(metrics: dict) -> Plot:
    """AP and AR for small, medium and large boxes."""

    def draw(figure):
        axis = figure.subplots()
        for shift, kind in ((-0.2, "AP"), (0.2, "AR")):
            values = [metrics[kind + size] for size in "sml"]
            places = np.arange(3) + shift
            bars = axis.bar(places, [value or 0 for value in values], 0.38, label=kind)
            axis.bar_label(bars, ["-" if value is None else f"{value:.1f}" for value in values], fontsize=9)
        axis.set_xticks(range(3), ["small", "medium", "large"])
        axis.set(ylabel="%", ylim=(0, 105))
        axis.legend(loc="upper left", ncols=2)

    caption = "AP and AR (100 detections) by annotated area: small below 32 x 32 pixels, large from 96 x 96."
    return Plot("by-size", svg("by-size", (6, 3.2), draw), caption)


def error_gains(costs: dict[str, dict], kinds: list[str]) -> Plot:
    """Points of AP50 that correcting each kind of error would add."""

    def draw(figure):
        axis = figure.subplots()
        gains = [costs[kind]["gain"] or 0 for kind in kinds]
        bars = axis.barh(kinds, gains, color=COLOURS[: len(kinds)])
        axis.bar_label(bars, [f"{gain:.1f}" for gain in gains], padding=3, fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set(xlabel="points of AP50 gained if these errors alone were corrected")
        axis.set_xlim(min(0, *gains), max(1.0, *gains) * 1.1)

    return Plot("errors", svg("errors", (8, 3.2), draw), "What each kind of error costs.")


def confusion(matrix: np.ndarray, names: list[str]) -> Plot:
    """matrix: (K + 1, K + 1) counts, see `confusion_matrix`; colours are shares of the row."""
    size = len(names) + 1
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)

    def draw(figure):
        axis = figure.subplots()
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        labels = [plain(name) for name in (*names, "nothing")]
        font = 9 if size <= 30 else 6
        axis.set_xticks(range(size), labels, rotation=90 if size > 5 else 0, fontsize=font)
        axis.set_yticks(range(size), labels, fontsize=font)
        axis.grid(False)
        axis.set(xlabel="found as", ylabel="annotated as")
        if size <= CELL_TEXT + 1:
            for (row, column), count in np.ndenumerate(matrix):
                colour = "#fff" if share[row, column] > 0.5 else "#111"
                axis.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)

    side = min(max(4.5, 1.5 + 0.5 * size if size <= 30 else 2 + 0.14 * size), 15)
    caption = (
        "Rows: what the boxes are; columns: what was found there. Row 'nothing': detections where there is no box; "
        "column 'nothing': boxes not found. Darker is a larger share of the row."
    )
    return Plot("confusion", svg("confusion", (side, side), draw), caption)


def _thinned(curve: dict, across: str, up: str) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.unique(np.linspace(0, len(curve[up]) - 1, CURVE_POINTS).astype(int)) if len(curve[up]) else slice(0)
    return curve[across][chosen], curve[up][chosen]


def _legend(axis) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend()


def _ink() -> str:
    """Return the colour of text in the drawing at hand: the page's."""
    import matplotlib

    return matplotlib.rcParams["text.color"]
