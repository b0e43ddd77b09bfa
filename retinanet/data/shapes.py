"""Outlines of the shapes that the synthetic data set is made of."""

import numpy as np


def _circle(count: int) -> np.ndarray:
    angles = np.arange(count) * 2 * np.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> np.ndarray:
    return _circle(10) * np.where(np.arange(10) % 2 == 0, 1.0, 0.42)[:, None]


# Corners in [-1, 1] x [-1, 1]; a part after the first is a hole.
_OUTLINES: dict[str, list[np.ndarray]] = {
    "disk": [_circle(40)],
    "ring": [_circle(40), _circle(40) * 0.55],
    "square": [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85],
    "triangle": [np.array([[0, -1], [0.95, 0.75], [-0.95, 0.75]])],
    "star": [_star()],
    "cross": [
        np.array(
            [
                [-0.33, -1],
                [0.33, -1],
                [0.33, -0.33],
                [1, -0.33],
                [1, 0.33],
                [0.33, 0.33],
                [0.33, 1],
                [-0.33, 1],
                [-0.33, 0.33],
                [-1, 0.33],
                [-1, -0.33],
                [-0.33, -0.33],
            ]
        )
    ],
}
SHAPES = tuple(_OUTLINES)


def outline(shape: str, width: float, height: float, angle: float) -> list[np.ndarray]:
    """Return the parts, (corners, 2) float64 (x, y) around the origin, of a shape of this size, turned by `angle`.

    The first part is the outline, the others are holes in it. width, height: pixels before turning. angle: radians.
    """
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return [part * (width / 2, height / 2) @ turn for part in _OUTLINES[shape]]
