"""Whether an exported file detects what the model detects: on pictures, and in COCO's AP.

Two runs of one model differ by rounding, and rounding decides who comes first among nearly equal scores and which of
two boxes with an overlap next to the threshold stays. So detections are compared as sets: each of one side with one of
its class on the other whose score and box agree.
"""

from dataclasses import dataclass

import numpy as np
import torch

from retinanet.data.synthetic import render
from retinanet.structures import Detections

BOX_TOLERANCE = 1e-3  # of the longer side of a box, or pixels for boxes below one pixel
SCORE_TOLERANCE = 1e-3
AP_TOLERANCE = 0.01  # percent, which is 1e-4 of AP
MOST_UNMATCHED = 0.005  # share of detections that rounding may decide otherwise
# Pictures (height, width) of one batch each: one image, two that need padding, and three of which one is tiny.
PICTURES = (((480, 640),), ((640, 480), (300, 400)), ((64, 64), (200, 200), (120, 200)))


@dataclass
class Parity:
    """images, expected, found: how many. unmatched: detections of both sides without a partner on the other.

    box, score: the largest difference between partners, in pixels of the original image.
    """

    images: int = 0
    expected: int = 0
    found: int = 0
    unmatched: int = 0
    box: float = 0.0
    score: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether both sides detect the same, up to what rounding decides."""
        return self.unmatched <= MOST_UNMATCHED * (self.expected + self.found)

    def add(self, expected: list[Detections], found: list[Detections]) -> None:
        """Count the detections of some images."""
        for one, other in zip(expected, found, strict=True):
            pairs = match(one, other)
            self.images += 1
            self.expected += len(one["scores"])
            self.found += len(other["scores"])
            self.unmatched += len(one["scores"]) + len(other["scores"]) - 2 * len(pairs)
            for i, j in pairs:
                self.box = max(self.box, float((one["boxes"][i] - other["boxes"][j]).abs().max()))
                self.score = max(self.score, float((one["scores"][i] - other["scores"][j]).abs()))


def match(one: Detections, other: Detections) -> list[tuple[int, int]]:
    """Return pairs of positions of equal detections, each position once: the nearest box of the class comes first."""
    if not len(one["scores"]) or not len(other["scores"]):
        return []
    boxes, others = one["boxes"].double().cpu(), other["boxes"].double().cpu()
    apart = (boxes[:, None] - others[None]).abs().amax(2)  # (D, D') pixels
    allowed = BOX_TOLERANCE * (boxes[:, 2:] - boxes[:, :2]).amax(1).clamp(min=1.0)
    same = (apart <= allowed[:, None]) & (one["labels"].cpu()[:, None] == other["labels"].cpu()[None])
    same &= (one["scores"].cpu()[:, None] - other["scores"].cpu()[None]).abs() <= SCORE_TOLERANCE
    pairs, free = [], torch.ones(len(others), dtype=torch.bool)
    for i in range(len(boxes)):
        candidates = same[i] & free
        if candidates.any():
            j = int(torch.where(candidates, apart[i], torch.inf).argmin())
            free[j] = False
            pairs.append((i, j))
    return pairs


def made_up_pictures(seed: int = 0) -> list[list[np.ndarray]]:
    """Return pictures (H, W, 3) uint8 of `PICTURES`, with shapes on them, for want of real ones."""
    generator = np.random.default_rng(seed)
    return [[render(generator, size)[0] for size in batch] for batch in PICTURES]
