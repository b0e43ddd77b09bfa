"""Reference arrays and made-up boxes for the tests of `ops` and `modeling`, and a watch for host synchronizations.

`files/<source>/` holds numbers that the original projects computed on a CPU: Caffe2 Detectron at 04155a01, detectron2
0.6 and torchvision 0.29.1. Only arrays are stored, no code and no weights.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FILES = Path(__file__).resolve().parent / "files"


def reference(name: str) -> dict[str, Tensor]:
    """Return the arrays of `files/<name>.npz` as tensors of their dtype."""
    with np.load(FILES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.array(arrays[key])) for key in arrays.files}


def random_boxes(*shape: int, seed: int = 0, size: float = 200.0) -> Tensor:
    """Return boxes (*shape, 4) with centres in a square of side `size` and sides from 2 to a third of it."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(*shape, 2, generator=generator) * size
    half = 1 + torch.rand(*shape, 2, generator=generator) * size / 6
    return torch.cat((center - half, center + half), dim=-1)


def caffe2_ground_truth(case: str) -> tuple[Tensor, Tensor]:
    """Return `gt_boxes (N, M, 4)` and `gt_labels (N, M)` of a case of `caffe2/targets`, without its crowd boxes."""
    arrays = reference("caffe2/targets")
    num_images = sum(key.startswith(f"{case}/gt_boxes_") for key in arrays)
    boxes, labels = torch.zeros(num_images, 8, 4), torch.full((num_images, 8), -1)
    for image in range(num_images):
        single = ~arrays[f"{case}/is_crowd_{image}"]
        count = int(single.sum())
        boxes[image, :count] = arrays[f"{case}/gt_boxes_{image}"][single]
        labels[image, :count] = arrays[f"{case}/gt_classes_{image}"][single].long() - 1
    return boxes, labels


def torchvision_nms(boxes, labels, valid, iou_thresh, max_dets):
    """Return what `ops.nms.nms` shall return, by one call of torchvision's operator per image and class."""
    rows = []
    for image in range(len(boxes)):
        kept = []
        for label in labels[image].unique():
            index = torch.where((labels[image] == label) & valid[image])[0]
            falling = -torch.arange(len(index), dtype=torch.float32, device=boxes.device)
            kept.append(index[torchvision.ops.nms(boxes[image, index], falling, iou_thresh)])
        kept = torch.cat(kept).sort().values[:max_dets]
        rows.append(torch.nn.functional.pad(kept, (0, max_dets - len(kept)), value=-1))
    return torch.stack(rows)


class SyncWatch(TorchDispatchMode):
    """Counts the operations that would make a CPU wait for a GPU, and keeps the largest number of elements made."""

    SYNCING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "equal"}

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in self.SYNCING or by_mask:
            self.waits[name] += 1
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result
