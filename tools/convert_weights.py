"""Convert weights of any known format to a checkpoint of ours, or ours to the names of torchvision or detectron2."""

from pathlib import Path

import _cli
import torch

from retinanet.config import dump_config
from retinanet.engine.checkpoint import write_checkpoint
from retinanet.engine.trained import build_classes, check_whole
from retinanet.errors import UserError
from retinanet.modeling.build import build_model
from retinanet.utils.files import write_atomically
from retinanet.weights.export import to_detectron2, to_torchvision
from retinanet.weights.load import build_inputs, build_weights

EXAMPLES = """  python tools/convert_weights.py --config configs/caffe2/retinanet_R50_FPN.yaml --output r50.pth MODEL.WEIGHTS model_final.pkl
  python tools/convert_weights.py --config configs/retinanet_R50_affine_fpn.yaml --output backbone.pth MODEL.WEIGHTS detectron://R-50
  python tools/convert_weights.py --config configs/torchvision/retinanet_resnet50_fpn.yaml --to torchvision --output tv.pth MODEL.WEIGHTS best.pth

The configuration describes the model that the weights are for; the format of the file is recognised from its content.
docs/weights.md lists formats and public weights. The result of the first two loads as MODEL.WEIGHTS."""  # noqa: E501

EXPORTS = {"torchvision": to_torchvision, "detectron2": to_detectron2}


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--output", required=True, metavar="FILE", help="the file to write; must not exist yet")
    made.add_argument("--to", choices=["native", *EXPORTS], default="native", help="names to write; default: native")
    made.add_argument("--names", action="store_true", help="print what became of every tensor")
    args = _cli.parse(made, argv)
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output: {output} exists; choose another name, nothing is overwritten")
    cfg, _ = _cli.load(args, training=False)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("MODEL.WEIGHTS: is empty; name the weights to convert, a file, a URL or a public name")
    classes = build_classes(cfg)
    cfg.defrost()
    cfg.MODEL.NUM_CLASSES = len(classes)
    model = build_model(cfg).eval()
    report = build_weights(cfg, model, [entry["name"] for entry in classes])
    print(report.summary(), *(f"warning: {warning}" for warning in report.warnings), sep="\n")
    if args.names:
        print(report.details())
    if args.to == "native":
        write_native(output, cfg, model, classes, report)
    else:
        check_whole(report)
        exported = EXPORTS[args.to](model, build_inputs(cfg), cfg.MODEL.BOX.CONVENTION)
        state = exported.tensors if args.to == "torchvision" else {"model": exported.tensors}
        write_atomically(output, lambda file: torch.save(state, file))
        print(f"for a model of {args.to} with", *exported.notes, sep="\n  ")
    print(f"wrote {output}")


def write_native(output: Path, cfg, model: torch.nn.Module, classes: list[dict], report) -> None:
    """Write a checkpoint with what the file held: a whole detector, or a backbone alone."""
    left_out = {*report.initialised, *report.reinitialised}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    write_checkpoint(
        output, {"model": state, "iteration": 0, "config": dump_config(cfg), "classes": classes, "ema": {}}
    )


if __name__ == "__main__":
    _cli.run(main)
