"""What an evaluation found, as a page for people: numbers, curves, mistakes by kind, the best and worst images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retinanet.engine import report_plots
from retinanet.engine.coco_json import GroundTruth, Results, ground_truth, results
from retinanet.engine.coco_metrics import METRICS, accumulate, unique_names
from retinanet.engine.confusion import confusion_matrix, keep
from retinanet.engine.error_types import KINDS, MEANINGS, NO_ERROR, Errors, classify, error_costs
from retinanet.engine.matching import TRUE, ignored_boxes, match
from retinanet.engine.operating_point import curves
from retinanet.engine.report_images import LEGEND, image_reader, worst_and_best
from retinanet.errors import UserError
from retinanet.utils.page import Block, Page, Section, Table, to_html, write_markdown

CONFUSIONS = 15  # pairs of classes in the table
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # square pixels
CLASS_COLUMNS = {
    "boxes": "num_boxes",
    "found": "num_detections",
    **{name: name for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")},
    "precision": "precision",
    "recall": "recall",
    "F1": "f1",
    "best F1": "best_f1",
    "at score": "best_threshold",
}


@dataclass
class Scored:
    """Detections beside ground truth; `kept` are those from the threshold on, `names` the class names."""

    truth: GroundTruth
    found: Results
    kept: Results
    names: list[str]
    metrics: dict
    errors: Errors
    evaluator: str


def report_page(
    name: str,
    annotations: Path | str | dict,
    detections: Path | str | list,
    metrics: dict,
    images: Path | None = None,
    evaluator: str = "numpy",
    facts: dict[str, str] | None = None,
) -> Page:
    """Return the page about `detections` of the data set `name`, whose `coco_metrics` are `metrics`.

    images: the folder with the images, None when it is not known. facts: more lines for the head of the page.
    """
    truth = ground_truth(annotations)
    found = results(detections, truth)
    kept = keep(found, metrics["threshold"])
    names = unique_names(truth)
    scored = Scored(truth, found, kept, names, metrics, classify(truth, found), evaluator)
    sections = [
        Section("Result", _summary(scored, facts or {})),
        Section("Precision and recall", _precision_and_recall(scored)),
        Section("Classes", _classes(scored)),
        Section("Sizes", _sizes(scored)),
        Section("Mistakes", _mistakes(scored)),
        Section("Confusion", _confusion(scored)),
        *_images(scored, annotations, images),
    ]
    return Page(f"Evaluation of {name}", sections)


def write_report(page: Page, folder: Path, name: str = "report") -> tuple[Path, Path]:
    """Write `page` as NAME.html and NAME.md to `folder` and return both paths; `UserError` when that fails."""
    web, markdown = folder / f"{name}.html", folder / f"{name}.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        web.write_text(to_html(page), encoding="utf-8")
        write_markdown(page, markdown)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror}); choose another --output") from error
    return web, markdown


def show(value: float | None, digits: int = 1) -> str:
    """Return a number as a cell of a table, "-" where there is none; whole numbers get thousands separators."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _summary(scored: Scored, facts: dict[str, str]) -> list[Block]:
    truth, metrics = scored.truth, scored.metrics
    crowds = int(truth.crowd.sum())
    rows = {
        **facts,
        "annotations": truth.source,
        "images": show(len(truth.image_ids)),
        "boxes": show(len(truth.boxes) - crowds) + (f", and {show(crowds)} crowds" if crowds else ""),
        "classes": show(len(scored.names)),
        "detections": show(len(scored.found.scores)),
    }
    return [
        Table(["", ""], [[key, value] for key, value in rows.items()], text=(0, 1)),
        Table(list(METRICS), [[show(metrics[name], 2) for name in METRICS]], text=()),
        _operating_point(scored),
    ]


def _operating_point(scored: Scored) -> str:
    metrics = scored.metrics
    if metrics["threshold"] is None:
        return "No detection matches a box at IoU 0.5, so there is no threshold to choose."
    return (
        f"Kept from score {metrics['threshold']:.3f} on, where F1 is highest: {show(len(scored.kept.scores))} "
        f"detections, precision {show(metrics['precision'])} %, recall {show(metrics['recall'])} %, "
        f"F1 {show(metrics['f1'])} % at IoU 0.5. This threshold serves all that follows, where one is needed."
    )


def _precision_and_recall(scored: Scored) -> list[Block]:
    precision = accumulate(scored.truth, scored.found, scored.evaluator)["precision"]
    together, *classes = curves(scored.truth, scored.found)
    num_boxes = [row["num_boxes"] for row in scored.metrics["per_class"].values()]
    return [
        report_plots.precision_recall(precision, [together, *classes], scored.names, num_boxes),
        report_plots.rates_over_score(together, scored.metrics),
    ]


def _classes(scored: Scored) -> list[Block]:
    rows = []
    for name, row in scored.metrics["per_class"].items():
        rows.append([name, *(show(row[key], 3 if key == "best_threshold" else 1) for key in CLASS_COLUMNS.values())])
    text = (
        "Precision, recall and F1 at the threshold above; best F1, and the score where it lies, for each class alone. "
        "'-' where there is nothing to measure."
    )
    return [Table(["class", *CLASS_COLUMNS], rows), text]


def _sizes(scored: Scored) -> list[Block]:
    truth, metrics = scored.truth, scored.metrics
    outcome, box = match(truth, scored.kept)
    counted = ~ignored_boxes(truth)
    found = np.zeros(len(counted), dtype=bool)
    found[box[outcome == TRUE]] = True
    rows = []
    for size, (low, high) in SIZES.items():
        among = counted & (truth.area >= low) & (truth.area < high)
        total = int(among.sum())
        recall = 100 * float(found[among].mean()) if total else None
        rows.append([size, show(total), show(metrics[f"AP{size[0]}"]), show(metrics[f"AR{size[0]}"]), show(recall)])
    return [Table(["size", "boxes", "AP", "AR", "recall at the threshold"], rows), report_plots.by_size(metrics)]


def _mistakes(scored: Scored) -> list[Block]:
    kept = scored.found.scores >= (np.inf if scored.metrics["threshold"] is None else scored.metrics["threshold"])
    costs = error_costs(scored.truth, scored.found, scored.errors)
    of_kept, right = scored.errors.kind[kept], int((scored.errors.outcome[kept] == TRUE).sum())
    totals = {
        "false positives": int((of_kept != NO_ERROR).sum()),
        "false negatives": int((~ignored_boxes(scored.truth)).sum()) - right,
    }
    rows = []
    for kind, meaning in MEANINGS.items():
        at_threshold = int((of_kept == KINDS.index(kind)).sum()) if kind in KINDS else totals.get(kind)
        count, gain = costs[kind]["count"], costs[kind]["gain"]
        rows.append([kind, show(count), show(at_threshold), show(gain), meaning])
    text = (
        "Kinds after TIDE (arXiv 2008.08115): of all detections, at any score, and the points of AP50 that correcting "
        "one kind alone would add. The gains do not add up."
    )
    head = ["mistake", "count", "at the threshold", "AP50 lost", "what it is"]
    plot = report_plots.error_gains(costs, [kind for kind in MEANINGS if not kind.startswith("false ")])
    return [Table(head, rows, text=(0, 4)), text, plot]


def _confusion(scored: Scored) -> list[Block]:
    matrix = confusion_matrix(scored.truth, scored.kept)
    pairs = matrix[:-1, :-1].copy()
    np.fill_diagonal(pairs, 0)
    order = np.argsort(-pairs, axis=None, kind="stable")[:CONFUSIONS]
    rows = []
    for row, column in zip(*np.unravel_index(order, pairs.shape), strict=True):
        if count := int(pairs[row, column]):
            share = 100 * count / int(matrix[row].sum())
            rows.append([scored.names[row], scored.names[column], show(count), show(share)])
    table = Table(["annotated as", "found as", "boxes", "% of the class"], rows, text=(0, 1))
    return [report_plots.confusion(matrix, scored.names), table if rows else "No class was taken for another."]


def _images(scored: Scored, annotations: Path | str | dict, folder: Path | None) -> list[Section]:
    if folder is None:
        return [Section("Images", ["No pictures: the folder with the images is not known."])]
    read = image_reader(annotations, scored.truth.image_ids, folder)
    worst, best = worst_and_best(scored.truth, scored.kept, read)
    none = ["There are none."]
    return [
        Section("Worst images", [f"By F1, then by the number of mistakes. {LEGEND}", *(worst or none)]),
        Section("Best images", best or none),
    ]
