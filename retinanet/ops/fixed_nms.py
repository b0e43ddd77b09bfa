"""Non-maximum suppression whose work and shapes follow from the sizes alone: for GPUs, CUDA graphs and compilers.

`ops/nms.py` ends early, and asks the device whether it may; here nothing is asked. Every image takes as many steps as
boxes may be returned: the best box that is left stays, and what it overlaps too much goes. No chain of overlaps can
make that longer. On CUDA one kernel does it (`ops/fixed_nms_kernel.py`), where it works; elsewhere, and for compilers,
tensor operations, which are the reference of the kernel and give what `ops/nms.py` gives, position for position.
"""

import importlib.util
import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from retinanet.ops.nms import clashes, nms, take

_log = logging.getLogger(__name__)


@torch.no_grad()
def fixed_nms(
    boxes: Tensor,
    labels: Tensor,
    valid: Tensor,
    iou_thresh: float,
    max_dets: int,
    plus_one: bool = False,
    inclusive: bool = False,
) -> Tensor:
    """Return what `ops.nms.nms` returns, without a wait for the device; the arguments are those described there."""
    num_images, width = valid.shape
    if width == 0:
        return torch.full((num_images, max_dets), -1, device=boxes.device)
    compiling = torch.compiler.is_compiling()
    if boxes.is_cuda and boxes.dtype == torch.float32 and not compiling and kernel_works(boxes.device):
        from retinanet.ops.fixed_nms_kernel import scan

        return scan(boxes, labels, valid, iou_thresh, max_dets, plus_one, inclusive)
    return _by_tensors(boxes, labels, valid, iou_thresh, max_dets, plus_one, inclusive)


def _by_tensors(
    boxes: Tensor, labels: Tensor, valid: Tensor, iou_thresh: float, max_dets: int, plus_one: bool, inclusive: bool
) -> Tensor:
    num_images, width = valid.shape
    columns = torch.arange(width, device=boxes.device)
    left = torch.where(valid, columns, width)  # (N, n), the own column of what is still a candidate
    kept = []
    for _ in range(min(max_dets, width)):
        best = left.amin(1, keepdim=True)  # (N, 1), `width` where nothing is left
        goes = clashes(take(boxes, best), take(labels, best), boxes, labels, iou_thresh, plus_one, inclusive).squeeze(1)
        left = torch.where(goes | (columns == best), width, left)  # a box without area does not overlap itself
        kept.append(best)
    position = torch.cat(kept, dim=1)
    return F.pad(torch.where(position < width, position, -1), (0, max_dets - len(kept)), value=-1)


def device_nms(boxes: Tensor, *args) -> Tensor:
    """`ops.nms.nms` by the way that is faster on the device of `boxes`: by the kernel where there is one, else by its
    own, because outside a graph the tensor operations of this file are hundreds of launches."""
    return (fixed_nms if boxes.is_cuda and kernel_works(boxes.device) else nms)(boxes, *args)


@cache
def kernel_works(device: torch.device) -> bool:
    """Whether the kernel gives the right positions on this GPU; tried once, and the log says why it does not.

    Triton comes with PyTorch for CUDA on Linux, but it needs a C compiler and a GPU that it knows.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    generator = torch.Generator().manual_seed(0)
    corners, sides = (torch.rand(2, 200, 2, generator=generator) * size for size in (100, 40))
    labels = torch.randint(3, (2, 200), generator=generator)
    inputs = (torch.cat([corners, corners + sides], 2), labels, labels < 3)
    settings = (0.5, 50, False, False)
    try:
        from retinanet.ops.fixed_nms_kernel import scan

        found = scan(*(tensor.to(device) for tensor in inputs), *settings).cpu()
    except Exception as error:  # of Triton, the compiler or the driver
        _log.warning("the NMS kernel cannot be used, PyTorch's operations take its place: %s", error)
        return False
    right = torch.equal(found, nms(*inputs, *settings))
    if not right:
        _log.warning("the NMS kernel gives other positions than it should, PyTorch's operations take its place")
    return right
