"""Exported files as something that detects: opened, asked for their facts, run on a `Batch`."""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from retinanet.deploy.export import FORMAT, KEY, VERSION, require
from retinanet.errors import UserError
from retinanet.modeling.postprocess import Candidates, Padded, select, split
from retinanet.structures import Batch, Detections

SUFFIXES = (".pt2", ".onnx")


def is_exported(path: str | Path) -> bool:
    """Whether the name is that of an exported file."""
    return Path(path).suffix.lower() in SUFFIXES


class Exported(nn.Module):
    """An exported file: `exported(batch)` are its detections, in pixels of the original images.

    facts: what `deploy.export.build_facts` wrote. It has no parameters; `to(device)` reopens the file there.
    Raises `UserError` for a file that is missing, damaged or not written by `tools/export_model.py`.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu"):
        super().__init__()
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: there is no such file; tools/export_model.py writes one")
        self.is_onnx = self.path.suffix.lower() == ".onnx"
        self.facts = _onnx_facts(self.path) if self.is_onnx else _pt2_facts(self.path)
        self._device, self._run = torch.device(device), None

    def to(self, device: torch.device | str) -> "Exported":
        """Run on `device` from now on."""
        if torch.device(device) != self._device:
            self._device, self._run = torch.device(device), None
        return self

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Nothing: the file has the layout that it was exported with."""

    @torch.no_grad()
    def forward(self, batch: Batch) -> list[Detections]:
        outputs = self.tensors(batch)
        if self.facts["nms"] == "inside":
            return split(Padded(*outputs))
        rule, (boxes, scores, labels) = self.facts["selection"], outputs
        candidates = Candidates(boxes, scores, labels, scores > 0)
        sizes = (batch.image_sizes, batch.original_sizes, batch.scales)
        sizes = [size.to(boxes.device) for size in sizes]
        return split(select(candidates, *sizes, rule["nms_iou"], rule["max_dets"], rule["convention"]))

    def tensors(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the outputs of the file itself, as the graphs of `deploy/graph.py` document them."""
        self.open()
        names = ("images", "image_sizes") if self.facts["nms"] == "outside" else _BATCH_INPUTS
        inputs = {name: getattr(batch, name) for name in names}
        inputs["images"] = inputs["images"].to(getattr(torch, self.facts["image_dtype"]))
        return self._run(inputs)

    def open(self) -> None:
        """Read the file now, not at the first batch."""
        if self._run is None:
            self._run = _open_onnx(self.path, self._device) if self.is_onnx else _open_pt2(self.path, self._device)


_BATCH_INPUTS = ("images", "image_sizes", "original_sizes", "scales")


def _open_pt2(path: Path, device: torch.device):
    import torchvision  # noqa: F401  the graph calls its operator

    try:
        program = torch.export.load(path)
    except Exception as error:  # a damaged archive fails in many ways
        raise UserError(f"{path}: cannot be opened by torch {torch.__version__} ({_first_line(error)})") from error
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    module = program.module()
    return lambda inputs: module(*(tensor.to(device).contiguous() for tensor in inputs.values()))


def _open_onnx(path: Path, device: torch.device):
    require(("onnxruntime",), "running an .onnx file")
    import onnxruntime

    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError("DEVICE: cuda, but this onnxruntime has no CUDA; install onnxruntime-gpu, or DEVICE cpu")
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0}), *providers]
    session = onnxruntime.InferenceSession(str(path), _session_options(), providers=providers)

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        arrays = {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in inputs.items()}
        return tuple(torch.from_numpy(array).to(device) for array in session.run(None, arrays))

    return run


def _session_options():
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as eager uses
    options.log_severity_level = 3  # errors
    return options


def _onnx_facts(path: Path) -> dict:
    require(("onnxruntime",), "running an .onnx file")
    import onnxruntime

    options = _session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # only to read
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of onnxruntime's own kinds
        raise UserError(f"{path}: not an ONNX model, or damaged ({_first_line(error)})") from error
    return _checked(path, session.get_modelmeta().custom_metadata_map.get(KEY))


def _pt2_facts(path: Path) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path}: damaged (checksum of {damaged}); export it again")
            names = [name for name in archive.namelist() if name.endswith(f"extra/{KEY}.json")]
            text = archive.read(names[0]).decode() if names else None
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not a .pt2 file, or damaged ({_first_line(error)})") from error
    return _checked(path, text)


def _checked(path: Path, text: str | None) -> dict:
    """Return the facts of `text`; `UserError` when it holds none, or those of a newer release."""
    try:
        facts = json.loads(text or "null")
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise UserError(f"{path}: was not written by tools/export_model.py, so classes and resize are not known")
    if facts["version"] > VERSION:
        raise UserError(f"{path}: written by a newer release (version {facts['version']}, known: {VERSION}); update")
    return facts


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
