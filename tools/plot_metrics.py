"""Draw loss, learning rate, AP and speed of one or several training runs, finished or going on, on one page."""

from pathlib import Path

import _cli

from retinanet.engine.report import write_report
from retinanet.engine.runs import PANELS, draw_panels, read_runs, runs_page
from retinanet.errors import UserError
from retinanet.utils.plot import png

EXAMPLES = """  python tools/plot_metrics.py output/demo
  python tools/plot_metrics.py output/gn output/bn --output comparison.html
  python tools/plot_metrics.py output/* --output comparison.png

RUN is the OUTPUT_DIR of a training run. An .html file needs nothing else to be read; its .md is written beside it"""


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES, config=False)
    made.add_argument("runs", nargs="+", metavar="RUN", help="the OUTPUT_DIR of a run, or its metrics.jsonl")
    made.add_argument("--output", default="metrics.html", metavar="FILE", help=".html or .png (default metrics.html)")
    args = made.parse_args(argv)
    path = Path(args.output)
    if path.suffix not in (".html", ".png"):
        raise UserError(f"--output: {path} ends with neither .html nor .png")
    runs = read_runs(args.runs)
    page = runs_page(runs)
    if path.suffix == ".html":
        write_report(page, path.parent, path.stem)
    else:
        draw_picture(path, runs)
    for row in (page.sections[0].blocks[0].head, *page.sections[0].blocks[0].rows):
        print("  ".join(cell.rjust(12) for cell in row))
    print(f"written to {path}")


def draw_picture(path: Path, runs: list) -> None:
    """Write all panels as one PNG."""
    keys = [key for key in PANELS if any(run.curve(key)[0] for run in runs)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        png(path, (13, 3.4 * -(-len(keys) // 3)), lambda figure: draw_panels(figure, runs, keys))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from error


if __name__ == "__main__":
    _cli.run(main)
