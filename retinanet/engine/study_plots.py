"""The plots of a study: every run a point, every norm a colour, so that the spread over seeds is seen."""

from pathlib import Path

import numpy as np

from retinanet.utils.plot import COLOURS, plain, png

PANELS = {"AP": "AP, %", "precision": "precision at the best F1, %", "recall": "recall at the best F1, %"}
COSTS = {"images_per_s": "images per second in training", "memory_mib": "peak memory in training, MiB"}
_WIDTH = 0.7  # of the room of a batch size that the norms share


def write_plots(folder: Path, rows: list[dict], table: list[dict]) -> list[Path]:
    """Write quality.png, cost.png and, where it was measured, latency.png; return their paths.

    rows, table: as `finish` and `groups` of `study.py` return them. Raises `OSError`.
    """
    paths = [folder / "quality.png", folder / "cost.png"]
    png(paths[0], (4.2 * len(PANELS), 3.8), lambda figure: _panels(figure, rows, PANELS))
    png(paths[1], (4.8 * len(COSTS), 3.8), lambda figure: _panels(figure, rows, COSTS, from_zero=True))
    timed = {row["norm"]: row for row in table if "plain_ms" in row}
    if timed:
        paths.append(folder / "latency.png")
        png(paths[2], (1.6 + 1.3 * len(timed), 3.6), lambda figure: _latencies(figure, timed))
    return paths


def write_noise(path: Path, found: dict[int, dict], noises: dict[int, dict[str, float]], layer: str) -> None:
    """Draw each statistic of one channel over the batches, a line for each batch size. Raises `OSError`.

    found: batch size -> name -> (batches, C); noises: batch size -> name -> its noise (`batch_noise.py`). The channel
    is the one whose mean is in the middle of all: no channel is picked for its looks.
    """
    names = list(next(iter(found.values())))
    means = next(iter(found.values()))[names[0]].mean(dim=0)
    channel = int(means.argsort()[len(means) // 2])

    def draw(figure):
        for axis, name in zip(figure.subplots(1, len(names)), names, strict=True):
            for place, (size, values) in enumerate(sorted(found.items())):
                line = {"color": COLOURS[-1] if place == 0 else COLOURS[place - 1], "lw": 1.2 + 0.6 * place}
                axis.plot(
                    values[name][:, channel].numpy(), **line, label=f"batch {size}: noise {noises[size][name]:.2f}"
                )
            axis.set(title=name, xlabel="batch")
            axis.legend(fontsize=8)
        figure.suptitle(f"{plain(layer)}, channel {channel}")

    png(path, (4 * len(names), 3.6), draw)


def _panels(figure, rows: list[dict], panels: dict[str, str], from_zero: bool = False) -> None:
    """Points of each run and a line at their mean; batch sizes side by side, norms within them."""
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    for axis, (key, title) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        for place, norm in enumerate(norms):
            colour = COLOURS[place % len(COLOURS)]
            label = plain(norm or "none")
            for number, batch in enumerate(batches):
                own = [row for row in rows if (row["norm"], row["batch"]) == (norm, batch)]
                values = [row[key] for row in own if row[key] is not None]
                if not values:
                    continue
                middle = number + _WIDTH * ((place + 0.5) / len(norms) - 0.5)
                half = 0.4 * _WIDTH / len(norms)
                axis.plot([middle - half, middle + half], [np.mean(values)] * 2, color=colour, lw=2.5, label=label)
                axis.plot([middle] * len(values), values, "o", color=colour, ms=4, alpha=0.7)
                label = None
        axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axis.set(title=title, xlim=(-0.5, len(batches) - 0.5))
        if from_zero:
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(norms))


def _latencies(figure, timed: dict[str, dict]) -> None:
    axis = figure.subplots()
    for shift, key, label in ((-0.2, "plain_ms", "as trained"), (0.2, "folded_ms", "norms folded")):
        bars = axis.bar(np.arange(len(timed)) + shift, [row[key] for row in timed.values()], 0.38, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(range(len(timed)), [plain(norm or "none") for norm in timed])
    axis.set(ylabel="ms for one image", title="detection")
    axis.margins(y=0.15)
    figure.legend(loc="outside lower center", ncols=2)
