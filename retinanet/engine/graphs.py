"""The whole training step as one CUDA graph for each input shape: the CPU then launches one thing instead of thousands.

At one or two images per GPU the step is otherwise as slow as Python. A graph repeats recorded kernels on recorded
addresses, so inputs are copied into buffers of their own, the learning rate is a tensor on the device, and everything
that a step changes (weights, momentum, statistics, the flag of a failed step) is changed in place. Capturing needs some
real steps for warm-up, which are undone afterwards: a run with graphs equals one without.
Source of the rules: the CUDA graphs notes of PyTorch, and NVIDIA's MLPerf SSD (`model_capture.py`, v3.0).
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from retinanet.engine.train import Trainer, train_step
from retinanet.layers.conv import kept_by_frozen
from retinanet.modeling.retinanet import RetinaNet
from retinanet.structures import Batch

_log = logging.getLogger(__name__)
WARM_UP = 3  # runs before the capture: cuDNN chooses its kernels, caches fill
_Result = TypeVar("_Result")
_INPUTS = ("images", "image_sizes", "gt_boxes", "gt_labels")  # what `train_step` reads of a batch


class CudaCapture:
    """Records what a function launches. All graphs share one pool of memory: only one of them runs at a time."""

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object], times: int) -> None:
        """Call `run` on a side stream, as a capture requires."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                run()
        torch.cuda.current_stream().wait_stream(stream)

    def capture(self, run: Callable[[], _Result]) -> tuple[Callable[[], None], _Result]:
        """Return what repeats `run`, and the tensors that hold its result then; `run` itself changes nothing here."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread that pins memory may go on meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


class _Recorded:
    """The step on inputs of one shape: static inputs, what repeats the step, its result as one tensor."""

    def __init__(self, trainer: Trainer, batches: list[Batch], capture):
        self.inputs = [replace(batch, **{name: getattr(batch, name).clone() for name in _INPUTS}) for batch in batches]
        self.names: list[str] = []

        def run() -> Tensor:
            values = train_step(trainer, self.inputs)
            self.names = list(values)
            return torch.stack([value.float() for value in values.values()])

        before = [(tensor, tensor.detach().clone()) for tensor in changed_tensors(trainer)]
        capture.warm_up(run, WARM_UP)
        with torch.no_grad():
            for tensor, value in before:
                if not tensor.equal(
                    value
                ):  # frozen weights stay untouched, or what is cached of them would be made anew
                    tensor.copy_(value)
        self.held = [held_by(trainer.model, batch.images) for batch in self.inputs]
        self.replay, self.result = capture.capture(run)

    def __call__(self, batches: list[Batch]) -> dict[str, Tensor]:
        for own, batch in zip(self.inputs, batches, strict=True):
            for name in _INPUTS:
                getattr(own, name).copy_(getattr(batch, name), non_blocking=True)
        self.replay()
        return dict(zip(self.names, self.result.clone().unbind(), strict=True))  # the next replay overwrites it


class GraphedStep:
    """`train_step` by replaying a graph of the shape at hand; called with the micro-batches of one step.

    most: shapes that get a graph. Further ones run eagerly, and the log says so once: each graph takes time to make.
    capture: a `CudaCapture`; tests give something that runs on a CPU.
    """

    def __init__(self, trainer: Trainer, most: int, capture=None):
        self.trainer, self.most = trainer, most
        self._capture = capture if capture is not None else CudaCapture()
        self._graphs: dict[tuple, _Recorded] = {}
        self._warned = False
        for group in trainer.optimizer.param_groups:
            group["lr"] = torch.full((), float(group["lr"]), device=group["params"][0].device)

    def __call__(self, batches: list[Batch]) -> dict[str, Tensor]:
        key = tuple((*batch.images.shape, batch.images.dtype, batch.gt_labels.shape[1]) for batch in batches)
        recorded = self._graphs.get(key)
        if recorded is None and len(self._graphs) >= self.most:
            if not self._warned:
                _log.warning(
                    "a batch of another shape than the %d that have a CUDA graph: it and later ones run without, more "
                    "slowly. Fewer canvas shapes (INPUT.*) or a larger SOLVER.CUDA_GRAPHS avoid it",
                    self.most,
                )
                self._warned = True
            return train_step(self.trainer, batches)
        if recorded is None:
            shapes = ", ".join("x".join(map(str, batch.images.shape)) for batch in batches)
            number = len(self._graphs) + 1
            _log.info("CUDA graph %d of at most %d: capturing the step for %s", number, self.most, shapes)
            self.trainer.guard.begin()  # moves its flag to the device, before anything refers to it
            recorded = self._graphs[key] = _Recorded(self.trainer, batches, self._capture)
        return recorded(batches)


def held_by(model: RetinaNet, images: Tensor) -> list:
    """Return the tensors made before a capture that a graph for `images` reads and the model may drop: anchors, whose
    cache is bounded, and what frozen convolutions prepared. Whoever keeps the graph has to keep them."""
    return [model.anchors(tuple(images.shape[-2:]), images.device), kept_by_frozen(model)]


def changed_tensors(trainer: Trainer) -> list[Tensor]:
    """Return every tensor that a step changes: weights, statistics, momentum, the loss's normalizer, the guard's."""
    momentum = [value for state in trainer.optimizer.state.values() for value in state.values()]
    tensors = [*trainer.model.parameters(), *trainer.model.buffers(), *trainer.loss.buffers(), *momentum]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)] + trainer.guard.tensors()
