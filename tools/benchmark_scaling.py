"""How time and memory of the training step grow with image size, batch, boxes and classes: a table and a plot."""

import sys
from pathlib import Path

import _cli

from retinanet.config.load import dump_config, load_config
from retinanet.engine.benchmark import Settings, machine, measure
from retinanet.engine.benchmark_tasks import CONFIGURED, Job
from retinanet.engine.coco_json import write_json
from retinanet.errors import UserError

EXAMPLES = """  python tools/benchmark_scaling.py --config configs/retinanet_R50_gn_fpn.yaml --plot scaling.png
  python tools/benchmark_scaling.py --config configs/retinanet_R50_gn_fpn.yaml --side 128 --steps 2 --plot small.png
  python tools/benchmark_scaling.py --config configs/retinanet_R18_gn_small.yaml --json scaling.json SOLVER.AMP off

One quantity grows at a time, the others stay at 256 x 256 pixels (--side), 2 images, 10 boxes in each, 80 classes. Time
is that of the CPU where the model runs there. The floor is what training has to hold: weights, gradients, momentum, and
what autograd keeps for backward."""
BASE = {"batch": 2, "boxes": 10, "classes": 80}
AXES = {
    "size": ((1, 1.5, 2, 3), "side of the images, pixels"),  # times --side
    "batch": ((1, 2, 4, 8), "images"),
    "boxes": ((1, 10, 100, 1000), "boxes in each image"),
    "classes": ((1, 20, 80, 400, 1200), "classes"),
}


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--steps", type=int, metavar="N", default=3, help="timed steps of every point (%(default)s)")
    made.add_argument("--side", type=int, metavar="N", default=256, help="of the smallest images, pixels (%(default)s)")
    made.add_argument("--plot", metavar="FILE", help="draw the curves")
    made.add_argument("--json", metavar="FILE", help="write everything measured")
    args = _cli.parse(made, argv)
    if not args.config:
        raise UserError("--config FILE is missing; the files in configs/ are ready to use")
    if args.steps < 1:
        raise UserError(f"--steps: {args.steps} has to be at least 1")
    if args.side < 64 or args.side % 64:
        raise UserError(f"--side: {args.side} has to be a multiple of 64, so that it can grow by half")
    before, rows, base = machine(), [], {**BASE, "size": args.side}
    known: dict[tuple, dict] = {}  # all axes start from or pass through the same point
    for axis, (values, _) in AXES.items():
        for value in (int(value * args.side) if axis == "size" else value for value in values):
            at = {**base, axis: value}
            key = tuple(sorted(at.items()))
            known[key] = known.get(key) or measure_point(args, **at)
            rows.append({"axis": axis, "value": value, **known[key]})
            print(line(rows[-1]), file=sys.stderr, flush=True)
    host = rows[0]["host"]
    print(f"{before['date']}, {host['device']}, {before['cpu']}, {host['threads']} threads, torch {before['torch']}")
    print(host["tuned"])
    print("| grows | to | ms | peak MiB | floor MiB | peak / floor |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(line(row) for row in rows))
    if args.json:
        write_json(Path(args.json), {"machine": before, "base": base, "results": rows})
    if args.plot:
        draw(rows, Path(args.plot))


def measure_point(args, size: int, batch: int, boxes: int, classes: int) -> dict:
    """Return what the training step costs on `batch` images of `size` x `size` pixels; time_ms is the time to plot."""
    opts = ["SOLVER.IMS_PER_BATCH", str(batch), "MODEL.NUM_CLASSES", str(classes)]
    cfg = load_config(args.config, [*args.opts, "MODEL.WEIGHTS", "''", *opts])
    job = Job(CONFIGURED, "train", dump_config(cfg), (size, size), batch, boxes, floor=True)
    (row,) = measure([job], Settings(rounds=1, steps=args.steps, warm_up=1, cost=False))
    on_cpu = row["host"]["device"] == "cpu"
    return {"time_ms": row["cpu_ms"] if on_cpu else row["ms"], **row}


def line(row: dict) -> str:
    memory = [row["memory_mib"], row["floor_mib"]]
    shown = [f"{part:.0f}" if part else "-" for part in memory]
    share = f"{memory[0] / memory[1]:.2f}" if all(memory) else "-"
    return f"| {row['axis']} | {row['value']} | {row['time_ms']:.4g} | {shown[0]} | {shown[1]} | {share} |"


def draw(rows: list[dict], path: Path) -> None:
    """Draw time and memory over each quantity, both axes logarithmic, with a line of proportional growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, plots = plt.subplots(2, len(AXES), figsize=(14, 6), layout="constrained", sharey="row")
    for column, (axis, (_, title)) in enumerate(AXES.items()):
        own = [row for row in rows if row["axis"] == axis]
        values, times = [row["value"] for row in own], [row["time_ms"] for row in own]
        power = 2 if axis == "size" else 1
        plots[0][column].plot(values, times, "o-", label="training step")
        plots[0][column].plot(
            values, [times[-1] * (value / values[-1]) ** power for value in values], ":", color="grey",
            label="pixels" if power == 2 else "proportional",
        )  # fmt: skip
        plots[1][column].plot(values, [row["memory_mib"] for row in own], "o-", label="peak")
        plots[1][column].plot(values, [row["floor_mib"] for row in own], "s--", label="floor")
        plots[1][column].set_xlabel(title)
        for plot in plots[:, column]:
            plot.set_xscale("log")
            plot.set_yscale("log")
            plot.set_xticks(values, map(str, values))
            plot.set_xticks([], minor=True)
            plot.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            for labels in (plot.yaxis.set_major_formatter, plot.yaxis.set_minor_formatter):
                labels("{x:.0f}")
            plot.grid(alpha=0.3, which="both")
            plot.legend(fontsize="small", loc="upper left")
    plots[0][0].set_ylim(bottom=min(row["time_ms"] for row in rows) / 2)
    plots[0][0].set_ylabel("ms of a step")
    plots[1][0].set_ylabel("MiB")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=90)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --plot") from error
    plt.close(figure)


if __name__ == "__main__":
    _cli.run(main)
