"""A model as a file that runs without this package: torch.export (.pt2) or ONNX.

| file  | needs to run                | batch and size | opset |
|-------|-----------------------------|----------------|-------|
| .pt2  | torch, torchvision          | dynamic        | -     |
| .onnx | an ONNX runtime for opset 18| dynamic        | 18    |

The graph takes raw pixels; normalization, anchors and post-processing are inside (`deploy/graph.py`). What a user must
know beside it, the facts, is stored in the file as json: under `retinanet` in ONNX's metadata_props, and as the extra
file `retinanet.json` of a .pt2.
"""

import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import torch
import torch.fx.experimental._config as symbolic_shapes
from torch import Tensor
from torch.export import Dim, ExportedProgram

from retinanet.data.transforms import FLOAT_MODES
from retinanet.deploy.fold import fold, summary
from retinanet.deploy.graph import CandidateGraph, DetectionGraph, apart_nms
from retinanet.deploy.onnx_nms import OPSET, onnx_suppress, translation_table
from retinanet.errors import UserError, pick
from retinanet.modeling.build import build_postprocess
from retinanet.modeling.postprocess import stable_topk
from retinanet.modeling.retinanet import RetinaNet
from retinanet.modeling.views import Postprocessor

FORMAT, VERSION, KEY = "retinanet-export", 1, "retinanet"
FORMATS = ("pt2", "onnx")
NMS = ("inside", "outside")
PACKAGES = {"pt2": (), "onnx": ("onnx", "onnxscript")}  # what writing needs beside requirements.txt
_EXAMPLE = (2, 3, 4)  # images, and height and width in multiples: unequal, so that no two sizes are taken for one


def build_facts(cfg, classes: list[dict], threshold: float | None, nms: str) -> dict:
    """Return what the file says about itself.

    cfg: as trained and evaluated; classes: K dicts of "id" and "name" in the order of the labels; threshold: the score
    of the highest F1 when known; nms: a value of `NMS`.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "classes": classes,
        "threshold": threshold,
        "nms": pick(dict.fromkeys(NMS, nms), nms, "nms"),
        "image_dtype": "float32" if cfg.INPUT.RESIZE in FLOAT_MODES else "uint8",
        "channel_order": cfg.MODEL.CHANNEL_ORDER,
        "size_multiple": cfg.INPUT.SIZE_DIVISIBILITY,
        "resize": {
            "mode": cfg.INPUT.RESIZE,
            "short_side": cfg.INPUT.MIN_SIZE_TEST,
            "long_side": cfg.INPUT.MAX_SIZE_TEST,
        },
        "selection": vars(build_postprocess(cfg)),
        "torch": torch.__version__,
        "config": cfg.dump(),
    }


def make_graph(model: RetinaNet, facts: dict, selection: Postprocessor, kind: str) -> tuple[CandidateGraph, str]:
    """Return the graph module of `model`, folded and in evaluation mode, and a line about the folding.

    selection: of `modeling.build.build_postprocess`. kind: a value of `FORMATS`, which decides about the operators.
    """
    folded, report = fold(model)
    folded.set_memory_format(torch.contiguous_format)
    topk = _plain_topk if kind == "onnx" else stable_topk
    if facts["nms"] == "outside":
        return CandidateGraph(folded, selection, topk).eval(), summary(report)
    suppress = onnx_suppress(len(facts["classes"])) if kind == "onnx" else apart_nms
    return DetectionGraph(folded, selection, suppress, topk).eval(), summary(report)


def _plain_topk(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """ONNX's TopK puts the first of equals first, as `stable_topk` does with bits that ONNX cannot shift."""
    return torch.topk(values, count, dim=1)


def trace(graph: CandidateGraph, facts: dict) -> ExportedProgram:
    """Return the program of `graph` for any number of images and any size that is a multiple of `size_multiple`."""
    multiple, device = facts["size_multiple"], next(graph.parameters()).device
    batch = Dim("batch")
    count, rows, columns = _EXAMPLE
    height, width = rows * multiple, columns * multiple
    sizes = torch.tensor([[height, width - 1]] * count, device=device)
    example = {
        "images": torch.zeros(count, 3, height, width, dtype=getattr(torch, facts["image_dtype"]), device=device),
        "image_sizes": sizes,
        "original_sizes": sizes.clone(),
        "scales": torch.ones(count, 2, device=device),
    }
    shapes = {name: {0: batch} for name in graph.inputs}
    shapes["images"] |= {2: multiple * Dim("rows"), 3: multiple * Dim("columns")}
    arguments = tuple(example[name] for name in graph.inputs)
    # Sizes of 1 (one image, the one cell of P7) would otherwise be refused or baked in, as the example has none.
    with torch.no_grad(), _quiet(), symbolic_shapes.patch(backed_size_oblivious=True):
        return torch.export.export(graph, arguments, dynamic_shapes=shapes)


def write_pt2(graph: CandidateGraph, facts: dict) -> Callable[[BinaryIO], None]:
    """Return what writes `graph` as a .pt2 to an open binary file."""
    program, content = trace(graph, facts), io.BytesIO()
    with _quiet():
        torch.export.save(program, content, extra_files={f"{KEY}.json": json.dumps(facts)})
    return lambda file: file.write(content.getbuffer())


def write_onnx(graph: CandidateGraph, facts: dict) -> Callable[[BinaryIO], None]:
    """Return what writes `graph` as an ONNX model to an open binary file; it has passed ONNX's own checker."""
    import onnx

    program = trace(graph, facts)
    facts = facts | {"opset": OPSET}
    with _quiet():
        made = torch.onnx.export(
            program,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translation_table(),
            verbose=False,
        )
    made.model.metadata_props[KEY] = json.dumps(facts)
    made.model.doc_string = _doc(facts, graph)
    proto = made.model_proto
    onnx.checker.check_model(proto, full_check=True)
    return lambda file: file.write(proto.SerializeToString())


def _doc(facts: dict, graph: CandidateGraph) -> str:
    return (
        f"RetinaNet, {len(facts['classes'])} classes, NMS {facts['nms']}. images: (N, 3, H, W) {facts['image_dtype']}, "
        f"{facts['channel_order']}, 0 to 255, zero at the bottom and right, H and W multiples of "
        f"{facts['size_multiple']}. Inputs {', '.join(graph.inputs)}; outputs {', '.join(graph.outputs)}. Sizes are "
        "(height, width). More in metadata_props."
    )


WRITERS = {"pt2": write_pt2, "onnx": write_onnx}


def require(packages: tuple[str, ...], purpose: str) -> None:
    """Raise `UserError` that names the packages of `packages` that cannot be imported, and how to install them."""
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            missing.append(f"{package} ({error})")
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}: pip install -r requirements-export.txt")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporters say to developers of exporters."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def export(
    model: RetinaNet, facts: dict, selection: Postprocessor, kind: str
) -> tuple[Callable[[BinaryIO], None], str]:
    """Return what writes the file of this kind, a value of `FORMATS`, and a line about the folding.

    Raises `UserError` when a package for it is not installed.
    """
    require(PACKAGES[pick(dict.fromkeys(FORMATS, kind), kind, "format")], f"export to {kind}")
    graph, folded = make_graph(model, facts, selection, kind)
    return WRITERS[kind](graph, facts), folded
