"""What training runs wrote to metrics.jsonl, side by side on a page: curves, and a table of what came out.

A run may be going on: half a line at the end is left out, as it will be whole at the next look.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import yaml

from retinanet.errors import UserError
from retinanet.utils.page import Block, Page, Plot, Section, Table
from retinanet.utils.plot import COLOURS, plain, svg

FILE = "metrics.jsonl"
PANELS = {  # key of metrics.jsonl -> what the axis says
    "loss": "loss",
    "loss_cls": "class loss",
    "loss_box": "box loss",
    "AP": "AP, %",
    "AP50": "AP50, %",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_s": "images / s",
    "data_wait": "share of time waiting for data",
}
FROM_ZERO = ("AP", "AP50", "images_per_s", "data_wait")
LINE_STYLES = ("-", "--", ":", "-.")  # beside the colours: as many runs as anyone compares


@dataclass
class Run:
    """rows: the lines of metrics.jsonl by rising position. config: the flat keys of config.yaml. problems: texts."""

    name: str
    rows: list[dict]
    config: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Return iterations and values of one key, where it is a number."""
        points = [(row["iteration"], row[key]) for row in self.rows if isinstance(row.get(key), (int, float))]
        return [at for at, _ in points], [value for _, value in points]


def read_runs(places: list[str]) -> list[Run]:
    """Return the runs in these folders (or metrics.jsonl files), named by their folder, by the whole path where names
    are equal; `UserError` for one that is not there or has no line yet."""
    names = [_folder(Path(place)).resolve().name for place in places]
    return [
        read_run(Path(place), name if names.count(name) == 1 else place)
        for place, name in zip(places, names, strict=True)
    ]


def _folder(place: Path) -> Path:
    return place.parent if place.name.endswith(".jsonl") else place


def read_run(place: Path, name: str) -> Run:
    """Return the run in a folder; lines that are damaged are left out and named in `problems`."""
    path = place if place.name.endswith(".jsonl") else place / FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the OUTPUT_DIR of a training run") from None
    run = Run(name, [], _config(path.with_name("config.yaml")))
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: nothing, or half a line
        try:
            row = json.loads(line)
            row["iteration"] = int(row["iteration"])
            run.rows.append(row)
        except (ValueError, KeyError, TypeError):
            run.problems.append(f"{path}: line {number} is damaged and left out")
    if not run.rows:
        raise UserError(f"{path}: has no whole line yet; SOLVER.LOG_PERIOD says when the first is written")
    return run


def _config(path: Path) -> dict:
    """Return the keys of a config.yaml as KEY.KEY -> value; nothing where it is missing or damaged."""
    try:
        return _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return {}


def _flat(nested: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + str(key): value}
    return flat


def runs_page(runs: list[Run]) -> Page:
    """Return the page about these runs."""
    problems = [problem for run in runs for problem in run.problems]
    sections = [Section("Runs", [_outcomes(runs), *problems, *_differences(runs)])]
    for title, keys in {
        "Loss": ("loss", "loss_cls", "loss_box"),
        "Evaluation": ("AP", "AP50"),
        "Learning rate and gradient": ("lr", "grad_norm"),
        "Speed": ("images_per_s", "data_wait"),
    }.items():
        shown = [key for key in keys if any(run.curve(key)[0] for run in runs)]
        sections.append(Section(title, [_plot(runs, shown)] if shown else ["No line has these numbers yet."]))
    return Page("Training of " + ", ".join(run.name for run in runs), sections)


def _outcomes(runs: list[Run]) -> Table:
    head = ["run", "iteration", "of", "loss", "AP", "best AP", "at", "images / s", "waiting for data"]
    rows = []
    for run in runs:
        places, values = run.curve("AP")
        best = max(range(len(values)), key=values.__getitem__) if values else None
        loss, speed, waits = (run.curve(key)[1] for key in ("loss", "images_per_s", "data_wait"))
        rows.append(
            [
                run.name,
                str(run.rows[-1]["iteration"]),
                str(run.config.get("SOLVER.MAX_ITER", "-")),
                f"{loss[-1]:.4f}" if loss else "-",
                *([f"{values[-1]:.2f}", f"{values[best]:.2f}", str(places[best])] if values else ["-"] * 3),
                f"{median(speed):.1f}" if speed else "-",
                f"{100 * median(waits):.0f} %" if waits else "-",
            ]
        )
    return Table(head, rows)


def _differences(runs: list[Run]) -> list[Block]:
    """Return the keys of the configuration in which the runs differ."""
    known = [run for run in runs if run.config]
    if len(known) < 2:
        return []
    keys = sorted({key for run in known for key in run.config} - {"OUTPUT_DIR"})
    rows = [[key, *(str(run.config.get(key, "-")) for run in known)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    columns = tuple(range(len(known) + 1))
    table = Table(["key", *(run.name for run in known)], rows, text=columns)
    return ["Keys in which the configurations differ:", table] if rows else ["The configurations are equal."]


def _plot(runs: list[Run], keys: list[str]) -> Plot:
    name = "-".join(keys).replace("_", "-")

    def draw(figure):
        draw_panels(figure, runs, keys, columns=len(keys))

    caption = "Means since the line before, over iterations. " if "loss" in keys else ""
    caption += "Images per second of all processes." if "images_per_s" in keys else ""
    return Plot(name, svg(name, (11 if len(keys) > 1 else 6, 3.6), draw), caption)


def draw_panels(figure, runs: list[Run], keys: list[str], columns: int = 3) -> None:
    """Draw one panel for each key, every run in its colour, into an empty matplotlib figure."""
    rows = -(-len(keys) // columns)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, key in zip(panels, keys, strict=False):
        for number, run in enumerate(runs):
            places, values = run.curve(key)
            style = LINE_STYLES[number // len(COLOURS) % len(LINE_STYLES)]
            marker = "o" if key.startswith("AP") else None
            colour = COLOURS[number % len(COLOURS)]
            panel.plot(places, values, style, color=colour, lw=1.3, marker=marker, ms=3.5, label=plain(run.name))
        panel.set(xlabel="iteration", ylabel=PANELS[key])
        if key in FROM_ZERO:
            panel.set_ylim(bottom=0)
    for panel in panels[len(keys) :]:
        panel.remove()
    panels[0].legend()
