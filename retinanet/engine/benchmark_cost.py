"""What a run of a benchmark has to cost at least: arithmetic and memory traffic of its convolutions, host waits.

Convolutions are counted on meta tensors, which have shapes and no values. Each takes at least the larger of its FLOPs
over the arithmetic rate and its bytes over the bandwidth, every input read once and every output written once. What a
device reaches of both is measured beside the run: a matrix product of random numbers and a copy.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from retinanet.modeling.build import build_model

# side of the matrices, elements of the copy: large enough to leave every cache, small enough for seconds
_SIZES = {"cuda": (8192, 2**28), "cpu": (1536, 2**26)}
_REPEATS = 5


class Ceiling(NamedTuple):
    """What the device reached: multiply-adds as 2 FLOPs per second, bytes read and written per second."""

    flops: float
    bandwidth: float


class Convolution(NamedTuple):
    """One convolution, or one gradient of one. flops: 2 per multiply-add. elements: read and written, each once."""

    flops: int
    elements: int


class _Convolutions(TorchDispatchMode):
    """Notes the convolutions that run, forward and backward."""

    def __init__(self):
        super().__init__()
        self.found: list[Convolution] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            x, weight = args[:2]
            self._add(result, weight, x)
        elif name == "convolution_backward":
            grad, x, weight = args[:3]
            for wanted in result[:2]:  # of x, of the weight: as much arithmetic each as forward
                if wanted is not None:
                    self._add(grad, weight, x)
        return result

    def _add(self, y: Tensor, weight: Tensor, x: Tensor) -> None:
        self.found.append(Convolution(2 * y.numel() * weight[0].numel(), x.numel() + weight.numel() + y.numel()))


def build_convolutions(cfg, batch: int, size: tuple[int, int], training: bool) -> list[Convolution]:
    """Return the convolutions of one run of the configured model: all micro-batches, with gradients in training."""
    with torch.random.fork_rng(devices=[]):  # the model that is timed draws its weights afterwards
        model = build_model(cfg).to("meta").train(training)
    images = torch.empty(batch, 3, *size, device="meta")
    with _Convolutions() as noted, torch.set_grad_enabled(training):
        pyramid = model.fpn(model.backbone(images))
        outputs = [tensor for part in model.head(pyramid) for tensor in part]
        if training:
            torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    return noted.found * (cfg.SOLVER.ACCUMULATE if training else 1)


def floor_seconds(convolutions: list[Convolution], ceiling: Ceiling, itemsize: int) -> float:
    """Return the time below which the convolutions cannot run; itemsize: bytes of an element of an activation."""
    return sum(max(one.flops / ceiling.flops, itemsize * one.elements / ceiling.bandwidth) for one in convolutions)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Return what a matrix product in `dtype` and a copy reach on `device` now; takes seconds."""
    side, count = _SIZES[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    product = _median_seconds(lambda: a @ b, device)
    copy = _median_seconds(lambda: target.copy_(source), device)
    return Ceiling(2 * side**3 / product, 2 * source.numel() * source.element_size() / copy)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(_REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class HostWaits(TorchDispatchMode):
    """Counts operations, and those among them that make the CPU wait for a GPU, on a CPU as well.

    waits: reads of a value, sizes that depend on values, indices by a mask. operations: everything dispatched.
    """

    _WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal")

    def __init__(self):
        super().__init__()
        self.operations = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.operations += 1
        self.waits += name in self._WAITING or by_mask
        return func(*args, **(kwargs or {}))
