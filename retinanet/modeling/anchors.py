"""Anchors: the boxes that the head's predictions start from, in the conventions of three projects.

All have `scales_per_octave` sizes, 2^(i / scales_per_octave) apart, times `aspect_ratios` (height / width) per cell of
each level, laid out by row, column, anchor. They differ where checkpoints notice:

| convention | centre of cell (x, y)  | rounding                                | order of the anchors in a cell |
|------------|------------------------|-----------------------------------------|--------------------------------|
| detectron  | x * s + (s - 1) / 2    | width and height at size s, then scaled | sizes outer, ratios inner      |
| detectron2 | x * s                  | none                                    | sizes outer, ratios inner      |
| torchvision| x * s', s' = H_0 // H_l| corners, sizes beyond the first as int  | ratios outer, sizes inner      |

s is the stride of the level, H_0 and H_l the sizes of input and level along an axis: torchvision's stride differs from
s on levels whose size was rounded up. Detectron's boxes include their last pixel (`ops/boxes.py`, plus_one).
Sources: Detectron `modeling/generate_anchors.py` and `core/test_retinanet.py`, detectron2
`modeling/anchor_generator.py`, torchvision `models/detection/anchor_utils.py` and `retinanet.py`.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retinanet.errors import pick


def _detectron_cell(stride: int, scale: float, octaves: list[float], ratios: list[float]) -> list[list[float]]:
    center = 0.5 * (stride - 1)
    shapes = []
    for ratio in ratios:
        width = float(round(math.sqrt(stride * stride / ratio)))  # half to even, as numpy's
        shapes.append((width, float(round(width * ratio))))
    # Half of what is added to the centre on either side; a box ends on its last pixel, hence the 1.
    halves = [((scale * o * w - 1) / 2, (scale * o * h - 1) / 2) for o in octaves for w, h in shapes]
    return [[center - x, center - y, center + x, center + y] for x, y in halves]


def _detectron2_cell(stride: int, scale: float, octaves: list[float], ratios: list[float]) -> list[list[float]]:
    anchors = []
    for octave in octaves:
        for ratio in ratios:
            width = math.sqrt((stride * scale * octave) ** 2 / ratio)
            height = ratio * width
            anchors.append([-width / 2, -height / 2, width / 2, height / 2])
    return anchors


def _torchvision_cell(stride: int, scale: float, octaves: list[float], ratios: list[float]) -> list[list[float]]:
    sizes = [stride * scale] + [float(int(stride * scale * octave)) for octave in octaves[1:]]
    sizes, ratios = torch.tensor(sizes, device="cpu"), torch.tensor(ratios, device="cpu")  # under any default device
    roots = ratios.sqrt()  # in float32, as there, for the sake of the rounding
    widths, heights = ((1 / roots)[:, None] * sizes).flatten(), (roots[:, None] * sizes).flatten()
    return (torch.stack((-widths, -heights, widths, heights), dim=1) / 2).round().tolist()


# MODEL.ANCHORS.CONVENTION -> function(stride, scale, octaves, ratios): the A anchors of the cell at the origin.
CELL_ANCHORS: dict[str, Callable[[int, float, list[float], list[float]], list[list[float]]]] = {
    "detectron": _detectron_cell,
    "detectron2": _detectron2_cell,
    "torchvision": _torchvision_cell,
}


class AnchorGenerator:
    """Makes the anchors of an input size, and keeps those of the last sizes.

    scale: side of the first anchor of a level in strides of that level. scales_per_octave: sizes per level.
    aspect_ratios: height / width, in the order of the head's channels. convention: a key of `CELL_ANCHORS`; another
    one raises `UserError`. strides: pixels between the cells of each level.

    num_anchors: A, the anchors per cell.
    """

    # Multi-scale training and evaluation see a few dozen shapes; 200,000 anchors are 3 MiB.
    _MAX_CACHED = 64

    def __init__(
        self,
        scale: float,
        scales_per_octave: int,
        aspect_ratios: Sequence[float],
        convention: str,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
    ):
        cell_anchors = pick(CELL_ANCHORS, convention, "MODEL.ANCHORS.CONVENTION")
        octaves = [2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        ratios = [float(ratio) for ratio in aspect_ratios]
        self.num_anchors = len(octaves) * len(ratios)
        self.strides = tuple(strides)
        # detectron2 rounds the cell's anchors to float32 before it adds the offset, Detectron only the sum
        dtype = torch.float64 if convention == "detectron" else torch.float32
        cells = [cell_anchors(stride, scale, octaves, ratios) for stride in self.strides]
        self.cells = [torch.tensor(cell, dtype=dtype, device="cpu") for cell in cells]
        self._adapt_stride = convention == "torchvision"
        self._cache: dict[tuple, list[Tensor]] = {}

    def __call__(self, image_size: tuple[int, int], device: torch.device | str = "cpu") -> list[Tensor]:
        """Return, for each level, its anchors (H*W*A, 4) float32, xyxy pixels of the padded input.

        image_size: (height, width) of the padded input; level l has ceil(size / stride) rows and columns. The tensors
        are shared between calls: do not write to them.
        """
        if torch.compiler.is_compiling():  # the trace may neither ask for inference mode nor fill the cache
            return [self._level(level, image_size, device) for level in range(len(self.strides))]
        # Tensors made in inference mode cannot take part in training, so they are kept apart.
        key = (*image_size, str(device), torch.is_inference_mode_enabled())
        anchors = self._cache.get(key)
        if anchors is None:
            anchors = [self._level(level, image_size, device) for level in range(len(self.strides))]
            if all(type(tensor) is Tensor for tensor in anchors):
                while len(self._cache) >= self._MAX_CACHED:
                    self._cache.pop(next(iter(self._cache)))
                self._cache[key] = anchors
        return anchors

    def _level(self, level: int, image_size: tuple[int, int], device: torch.device | str) -> Tensor:
        cell, stride = self.cells[level].to(device), self.strides[level]
        rows, columns = ((size + stride - 1) // stride for size in image_size)  # ONNX would round -size / stride up
        step_y, step_x = (image_size[0] // rows, image_size[1] // columns) if self._adapt_stride else (stride, stride)
        shift_y = torch.arange(rows, device=device).mul(step_y).to(cell.dtype)
        shift_x = torch.arange(columns, device=device).mul(step_x).to(cell.dtype)
        shifts = torch.stack((*torch.meshgrid(shift_x, shift_y, indexing="xy"),) * 2, dim=-1)  # (H, W, 4)
        return (shifts.unsqueeze(2) + cell).reshape(-1, 4).to(torch.float32)
