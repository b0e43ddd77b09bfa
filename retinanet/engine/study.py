"""A study of several training runs: what a finished run says, means and spreads over seeds, and the tables of them.

Every run has a folder, as `tools/train_net.py` leaves it, and beside its files `run.json`, written when it is finished:
what the run was asked for and what it gave. All tables and plots follow from these files alone.
"""

import csv
import io
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from retinanet.engine.coco_json import read_json, write_json
from retinanet.engine.run import config_changes
from retinanet.errors import UserError

DONE = "run.json"
# column of a run -> title, digits
MEASURES = {
    "AP": ("AP", 2),
    "AP50": ("AP50", 2),
    "precision": ("precision", 2),
    "recall": ("recall", 2),
    "images_per_s": ("train images/s", 1),
    "memory_mib": ("peak MiB", 0),
}
LATENCIES = {"plain_ms": ("detect ms", 1), "folded_ms": ("folded ms", 1)}


@dataclass(frozen=True)
class Run:
    """One training run of a study: `norm` in the parts that the study varies, `batch` images a step, one seed."""

    norm: str
    batch: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.norm or 'none'}_batch{self.batch}_seed{self.seed}"


def finished(folder: Path, config: str) -> dict | None:
    """Return what `folder` says about its finished run, None when it is not finished.

    Raises `UserError` when it was finished with another configuration than `config` (YAML text).
    """
    path = folder / DONE
    if not path.exists():
        return None
    row = read_json(path, "finished run")
    changes = config_changes(yaml.safe_load(row.pop("config")), yaml.safe_load(config))
    known = {key: pair for key, pair in changes.items() if None not in pair}  # a release may add keys
    if known:
        key, (old, new) = next(iter(known.items()))
        raise UserError(
            f"{folder}: holds a finished run of another configuration ({key} {old!r}, now {new!r}"
            f"{', ...' if len(known) > 1 else ''}); choose another --output, or delete that folder"
        )
    return row


def finish(folder: Path, run: Run, config: str, dataset: str, usage: dict) -> dict:
    """Return the results of the run that has just ended in `folder`, and write them to `run.json` there.

    dataset: name of the evaluated data set. usage: `seconds` and `resident_mib` of the process.
    AP, AP50, and precision and recall at the score of the highest F1 are those of the last evaluation, in percent;
    images_per_s is the median over the lines of metrics.jsonl; memory_mib the peak on the GPU, or of the process.
    """
    metrics = read_json(folder / "inference" / dataset / "metrics.json", "metrics")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "images_per_s" in line]
    on_gpu = [line["memory"] for line in steps if "memory" in line]
    row = {
        **asdict(run),
        **{key: metrics[key] for key in ("AP", "AP50", "precision", "recall", "f1", "threshold")},
        "images_per_s": statistics.median(line["images_per_s"] for line in steps),
        "memory_mib": max(on_gpu) if on_gpu else usage.get("resident_mib"),
        "last_loss": steps[-1]["loss"],
        "iterations": steps[-1]["iteration"],
        "seconds": usage["seconds"],
    }
    write_json(folder / DONE, {**row, "config": config})
    return row


def groups(rows: list[dict], latencies: dict[str, dict]) -> list[dict]:
    """Return one dict for each norm and batch size, in the order of `rows`.

    `seeds` is their number; each of `MEASURES` is (mean, spread): the sample standard deviation over seeds, None for
    one seed; None where no run has the value. latencies: norm -> `LATENCIES`.
    """
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["norm"], row["batch"]), []).append(row)
    return [
        {
            **{"norm": norm, "batch": batch, "seeds": len(members)},
            **{key: spread([row[key] for row in members if row[key] is not None]) for key in MEASURES},
            **latencies.get(norm, {}),
        }
        for (norm, batch), members in found.items()
    ]


def spread(values: list[float]) -> tuple[float, float | None] | None:
    """Return mean and sample standard deviation of `values`; the latter None of one value, all None of none."""
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def as_csv(rows: list[dict]) -> str:
    """Return the runs, one a line, with every number that `finish` gave."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_markdown(table: list[dict]) -> str:
    """Return `groups` as a table: mean, and +- the spread over seeds where there are several."""
    columns = {**MEASURES, **{key: value for key, value in LATENCIES.items() if any(key in row for row in table)}}
    lines = [["norm", "batch", "seeds", *(title for title, _ in columns.values())]]
    for row in table:
        cells = [_cell(row.get(key), digits) for key, (_, digits) in columns.items()]
        lines.append([row["norm"] or "none", str(row["batch"]), str(row["seeds"]), *cells])
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(value: float | tuple[float, float | None] | None, digits: int) -> str:
    if value is None:
        return "-"
    mean, deviation = value if isinstance(value, tuple) else (value, None)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" +- {deviation:.{digits}f}")
