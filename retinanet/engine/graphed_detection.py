"""Detection as one CUDA graph for each shape of a batch, from uint8 pixels to a fixed number of detections.

At one or two images a GPU otherwise waits for Python, which launches some hundred kernels. Everything in the graph has
a fixed size and never waits for the device (`ops/fixed_nms.py`); the one wait is for the counts, behind it. A graph
refers to the weights that it was captured with, so those of changed weights are thrown away and captured again.
"""

import logging

import torch
from torch import Tensor, nn

from retinanet.deploy.exported import Exported
from retinanet.engine.evaluate import autocast, build_amp
from retinanet.engine.graphs import WARM_UP, CudaCapture, held_by
from retinanet.modeling.build import build_postprocess
from retinanet.modeling.postprocess import Padded, split
from retinanet.modeling.retinanet import RetinaNet
from retinanet.modeling.views import Postprocessor
from retinanet.structures import Batch, Detections

_log = logging.getLogger(__name__)
_INPUTS = ("images", "image_sizes", "original_sizes", "scales")  # what detection reads of a batch


class GraphedDetection(nn.Module):
    """`model`, in evaluation mode, with its post-processing: `graphed(batch)` are the detections of each image.

    amp: off, bf16 or fp16. most: shapes that get a graph; further ones run eagerly, and the log says so once.
    capture: a `CudaCapture`; tests give something that runs on a CPU.
    """

    def __init__(self, model: RetinaNet, postprocess: Postprocessor, amp: str, most: int, capture=None):
        super().__init__()
        self.model, self.postprocess, self.amp, self.most = model, postprocess, amp, most
        self._capture = capture if capture is not None else CudaCapture()
        self._graphs: dict[tuple, _Recorded] = {}
        self._weights: list[tuple] = []
        self._warned = False

    @torch.no_grad()
    def forward(self, batch: Batch) -> list[Detections]:
        """Return the detections of one view, in original pixels; the batch is on the device of the model."""
        assert not self.model.training
        if self._graphs and not all(map(_is_as_it_was, self._weights)):
            _log.info("the weights changed: their CUDA graphs are captured again")
            self._graphs.clear()
        key = (*batch.images.shape, batch.images.dtype)
        recorded = self._graphs.get(key)
        if recorded is None and len(self._graphs) >= self.most:
            self._warn()
            return split(self.padded(batch))
        if recorded is None:
            number, shape = len(self._graphs) + 1, "x".join(map(str, batch.images.shape))
            _log.info("CUDA graph %d of at most %d: capturing detection for %s", number, self.most, shape)
            recorded = self._graphs[key] = _Recorded(self, batch, self._capture)
            self._weights = snapshot(self.model)
        return split(recorded(batch))

    def padded(self, batch: Batch) -> Padded:
        """Return the detections in tensors of a fixed size, without a wait for the device: what becomes a graph."""
        with autocast(batch.images.device, self.amp):
            outputs = self.model(self.model.normalize(batch.images, batch.image_sizes))
        return self.postprocess.padded(outputs, batch)

    def _warn(self) -> None:
        if not self._warned:
            _log.warning(
                "a batch of another shape than the %d that have a CUDA graph: it and later ones run without, more "
                "slowly. A larger TEST.CUDA_GRAPHS avoids it",
                self.most,
            )
        self._warned = True


class _Recorded:
    """Detection on inputs of one shape: static inputs, what repeats it, its static results."""

    def __init__(self, graphed: GraphedDetection, batch: Batch, capture):
        copies = {name: getattr(batch, name).clone() for name in _INPUTS}
        self.batch = Batch(**copies, gt_boxes=batch.gt_boxes[:0], gt_labels=batch.gt_labels[:0])

        def run() -> Padded:
            return graphed.padded(self.batch)

        capture.warm_up(run, WARM_UP)
        self.held = held_by(graphed.model, self.batch.images)
        self.replay, self.result = capture.capture(run)

    def __call__(self, batch: Batch) -> Padded:
        for name in _INPUTS:
            getattr(self.batch, name).copy_(getattr(batch, name), non_blocking=True)
        self.replay()
        return Padded(*(tensor.clone() for tensor in self.result))  # the next replay overwrites it


def snapshot(model: nn.Module) -> list[tuple]:
    """Return for every parameter and buffer of `model` where it is registered, and what tells that it changes."""
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    return [
        (table, name, tensor, tensor._version, tensor.data_ptr())
        for table in tables
        for name, tensor in table.items()
        if tensor is not None
    ]


def _is_as_it_was(entry: tuple[dict, str, Tensor, int, int]) -> bool:
    table, name, tensor, version, address = entry
    return table.get(name) is tensor and tensor._version == version and tensor.data_ptr() == address


def build_graphed_detection(
    cfg, model: RetinaNet | Exported, device: torch.device
) -> RetinaNet | Exported | GraphedDetection:
    """Return `model` behind CUDA graphs where `TEST.CUDA_GRAPHS` asks for them; as it is, and the log says why, where
    there can be none."""
    if not cfg.TEST.CUDA_GRAPHS:
        return model
    reasons = {"it runs on a CPU": device.type != "cuda", "the file is exported": isinstance(model, Exported)}
    against = [reason for reason, holds in reasons.items() if holds]
    if against:
        _log.warning("TEST.CUDA_GRAPHS: detection runs without, because %s", " and ".join(against))
        return model
    return GraphedDetection(model, build_postprocess(cfg), build_amp(cfg, device), cfg.TEST.CUDA_GRAPHS)
