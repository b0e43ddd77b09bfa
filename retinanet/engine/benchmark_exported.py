"""A benchmark's model as an exported file, opened again: what its users run."""

import tempfile
from pathlib import Path

import torch

from retinanet.deploy.export import NMS, build_facts, export
from retinanet.deploy.exported import Exported
from retinanet.errors import UserError
from retinanet.modeling.build import build_postprocess
from retinanet.modeling.retinanet import RetinaNet

# What --exported takes: the format, and where NMS runs.
FORMS = {"pt2": ("pt2", NMS[0]), "pt2_raw": ("pt2", NMS[1]), "onnx": ("onnx", NMS[0]), "onnx_raw": ("onnx", NMS[1])}


def build_exported(cfg, model: RetinaNet, form: str, size: tuple[int, int], device: torch.device) -> Exported:
    """Return `model`, on the CPU, exported in a form of `FORMS` and opened on `device`; size: (height, width)."""
    kind, nms = FORMS[form]
    multiple = cfg.INPUT.SIZE_DIVISIBILITY
    if any(side % multiple for side in size):
        raise UserError(f"--size: {size[0]} {size[1]}; exported files take multiples of {multiple}")
    classes = [{"id": number, "name": f"class {number}"} for number in range(1, cfg.MODEL.NUM_CLASSES + 1)]
    write, _ = export(model.cpu().eval(), build_facts(cfg, classes, None, nms), build_postprocess(cfg), kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model.{kind}"
        with open(path, "wb") as file:
            write(file)
        made = Exported(path).to(device)
        made.open()
    return made
