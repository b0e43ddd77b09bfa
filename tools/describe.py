"""Print every norm of a configured model and what the model costs (parameters, FLOPs, memory for activations), or what
a checkpoint holds and where it comes from."""

import _cli
import torch

from retinanet.deploy.describe import Cost, NormRow, costs, norm_rows
from retinanet.engine.checkpoint import read_checkpoint
from retinanet.engine.provenance import describe_checkpoint
from retinanet.errors import UserError
from retinanet.modeling.build import build_model

EXAMPLES = """  python tools/describe.py --config configs/retinanet_R50_mabn_fpn.yaml
  python tools/describe.py --config configs/retinanet_R50_gn.yaml --size 800 1344 --batch 2 MODEL.HEAD.NORM GN
  python tools/describe.py --checkpoint output/demo/best.pth"""
COCO_CLASSES = 80
HEADER = ("after", "norm", "conv", "statistics", "affine", "parameters", "buffers", "folds")


def main() -> None:
    parser = _cli.parser(__doc__, EXAMPLES)
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), default=(800, 1344), help="padded image")
    parser.add_argument("--batch", type=int, metavar="N", default=1, help="images of a step in one process")
    parser.add_argument("--checkpoint", metavar="FILE", help="describe this file instead")
    parser.add_argument("--show-config", action="store_true", help="with --checkpoint: print its configuration as well")
    args = _cli.parse(parser)
    if args.checkpoint:
        state = read_checkpoint(args.checkpoint)
        print(describe_checkpoint(state) + (f"\n\n{state['config']}" if args.show_config else ""))
        return
    if min(*args.size, args.batch) < 1:
        raise UserError(f"--size {args.size[0]} {args.size[1]} --batch {args.batch}: all three must be at least 1")
    cfg, warnings = _cli.load(args, training=False)
    for warning in warnings:
        print(f"warning: {warning}")
    if cfg.MODEL.NUM_CLASSES == 0:
        print(f"MODEL.NUM_CLASSES is 0, the data set decides; described with {COCO_CLASSES}, as COCO has")
        cfg.defrost()
        cfg.MODEL.NUM_CLASSES = COCO_CLASSES
    with torch.device("meta"):
        model = build_model(cfg).train()
    print(norm_table(norm_rows(model)))
    print(f"\n{cost_table(costs(model, args.batch, *args.size), args.batch, *args.size)}")


def norm_table(rows: list[NormRow]) -> str:
    """Return one line for each norm, totals, and why some do not fold whole."""
    if not rows:
        return "The model has no norms."
    body = [
        (
            row.name,
            row.norm + (f" x{row.levels} levels" if row.levels > 1 else ""),
            row.conv,
            row.statistics,
            row.affine,
            f"{row.parameters:,}",
            f"{row.buffers:,}",
            row.folds,
        )
        for row in rows
    ]
    total = (
        f"{len(rows)} norms",
        "",
        "",
        "",
        "",
        *(f"{sum(getattr(row, n) for row in rows):,}" for n in HEADER[5:7]),
        "",
    )
    notes = dict.fromkeys(f"{row.norm} folds {row.folds}: {row.why}." for row in rows)
    return "\n".join([aligned([HEADER, *body, total]), "", *notes])


def cost_table(found: dict[str, Cost], batch: int, height: int, width: int) -> str:
    """Return one line for each part and their sum; FLOPs per image, activations of the whole batch."""

    def line(name: str, parts: list[Cost]) -> tuple[str, ...]:
        def total(field: str) -> int:
            return sum(getattr(part, field) for part in parts)

        flops = (f"{total(field) / batch / 1e9:.1f}" for field in ("forward", "backward"))
        counts = (f"{total(field) / 1e6:.2f}" for field in ("parameters", "trained"))
        return name, *counts, *flops, f"{total('saved') / 2**20:.0f}"

    header = ("part", "parameters (M)", "trained (M)", "forward (GFLOP)", "backward (GFLOP)", "activations (MiB)")
    lines = [header, *(line(name, [cost]) for name, cost in found.items()), line("total", list(found.values()))]
    note = (
        f"FLOPs of convolutions for one image of {height} x {width}, 2 per multiply-add. Activations: what backward "
        f"keeps of {batch} image{'s' if batch > 1 else ''} in float32, reparametrized weights included, parameters and "
        "loss not; bf16 halves them."
    )
    return f"{aligned(lines)}\n\n{note}"


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Return the lines as columns: the first to the left, numbers to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = [text.replace(",", "").replace(".", "").isdigit() for text in lines[1]]
    return "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    _cli.run(main)
