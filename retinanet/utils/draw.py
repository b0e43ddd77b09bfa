"""Boxes with labels on a picture, and many pictures on one sheet; arrays (H, W, 3) uint8 BGR in and out.

Line width and text grow with the picture, so that labels stay readable when a large photo is shown small. A class has
the same colour in every picture: hues a golden section apart, so that neighbouring classes differ most.
"""

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

GOLDEN = (math.sqrt(5) - 1) / 2
FONT = cv2.FONT_HERSHEY_SIMPLEX
TEXT_SHARE = 0.029  # height of a line of text, of the picture's short side
MIN_TEXT = 12  # pixels: the smallest that can be read
LINE_SHARE = 1 / 240  # width of a line, of the picture's short side
SHEET_COLOUR = (40, 40, 40)


def class_colour(label: int) -> tuple[int, int, int]:
    """Return the BGR colour of a class; lightness alternates with every turn of the hue."""
    turn = int(label * GOLDEN)
    red, green, blue = colorsys.hsv_to_rgb((label * GOLDEN) % 1, 0.9 - 0.3 * (turn % 2), 1.0 - 0.25 * (turn // 2 % 2))
    return round(255 * blue), round(255 * green), round(255 * red)


def text_colour(background: Sequence[float]) -> tuple[int, int, int]:
    """Return black or white, whichever contrasts more with a BGR colour (WCAG 2.1, relative luminance)."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in background]
    luminance = 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)  # 0.179: equal contrast with both


class Label(NamedTuple):
    """A line of text that fits a picture: `size` is (width, height above the baseline, below it) in pixels."""

    text: str
    scale: float
    stroke: int
    size: tuple[int, int, int]
    colour: tuple[int, int, int]


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    scores: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    min_side: int = 0,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> np.ndarray:
    """Return a copy of `image (H, W, 3) uint8 BGR` with boxes and labels; higher scores lie on top.

    boxes: (D, 4) xyxy pixels of this image; parts outside are cut off, boxes wholly outside are not drawn.
    labels: (D,) class numbers, which choose the colours. scores: (D,), shown after the name.
    names: the name of each class number, or None to show the numbers. What OpenCV's font lacks appears as "?".
    min_side: a picture with a shorter side is enlarged by a whole factor first, because labels would hide it.
    colours: the BGR colour of each box, when something else than its class is to be told.
    """
    assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8, (image.shape, image.dtype)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    assert len(labels) == len(boxes) and np.isfinite(boxes).all(), (boxes.shape, len(labels))
    canvas, factor = _enlarged(image, min_side)
    height, width = canvas.shape[:2]
    corners = _pixels(boxes * factor, width, height)
    order = np.arange(len(boxes)) if scores is None else np.argsort(np.asarray(scores, dtype=np.float64), kind="stable")
    order = [index for index in order if corners[index] is not None]
    colours = [class_colour(int(label)) for label in labels] if colours is None else colours
    line = max(1, round(min(height, width) * LINE_SHARE))
    for index in order:
        x1, y1, x2, y2 = corners[index]
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colours[index], line)
    placed: list[tuple[Label, tuple]] = []
    for index in reversed(order):  # the best choose their places first ...
        text = str(int(labels[index])) if names is None else names[int(labels[index])]
        text = text if scores is None else f"{text} {float(scores[index]):.2f}"
        label = _fit(text, width, height, colours[index])
        placed.append((label, _place(label, corners[index], width, height, [place for _, place in placed])))
    for label, place in reversed(placed):  # ... and are painted last
        _paint(canvas, label, place)
    return canvas


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, colours: Sequence[tuple[int, int, int]], width: int = 1, min_side: int = 0
) -> np.ndarray:
    """Return a copy of `image (H, W, 3) uint8 BGR` with bare boxes (D, 4) xyxy, the last on top.

    colours: BGR, of each box. width: of the lines, in pixels. The rest as in `draw_detections`.
    """
    assert len(boxes) == len(colours), (len(boxes), len(colours))
    canvas, factor = _enlarged(image, min_side)
    corners = _pixels(np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * factor, canvas.shape[1], canvas.shape[0])
    for corner, colour in zip(corners, colours, strict=True):
        if corner is not None:
            cv2.rectangle(canvas, tuple(corner[:2]), tuple(corner[2:]), colour, width)
    return canvas


def _enlarged(image: np.ndarray, min_side: int) -> tuple[np.ndarray, int]:
    """Return a copy of `image` whose short side is `min_side` or more, and the whole factor that it grew by."""
    factor = max(1, math.ceil(min_side / min(image.shape[:2])))
    return np.array(image.repeat(factor, 0).repeat(factor, 1), order="C"), factor


def _pixels(boxes: np.ndarray, width: int, height: int) -> list[list[int] | None]:
    """Return first and last pixel (x1, y1, x2, y2) that each box covers, None for a box outside of the picture."""
    limit = [width - 1, height - 1]
    first = np.rint(boxes[:, :2])
    last = np.maximum(np.rint(boxes[:, 2:]) - 1, first)
    outside = (boxes[:, :2] >= [width, height]).any(1) | (boxes[:, 2:] <= 0).any(1)
    corners = np.hstack([first.clip(0, limit), last.clip(0, limit)]).astype(int).tolist()
    return [None if out else box for out, box in zip(outside, corners, strict=True)]


def _fit(text: str, width: int, height: int, colour: tuple[int, int, int]) -> Label:
    """Return `text` as a label; one wider than the picture is shortened rather than made too small to read."""
    wanted = max(MIN_TEXT, min(height, width) * TEXT_SHARE)
    (_, above), below = cv2.getTextSize("X", FONT, 1, 1)  # OpenCV 4 and 5 have different fonts
    scale = wanted / (above + below)
    stroke = max(1, round(wanted / 10))
    for length in range(len(text), -1, -1):
        shown = text if length == len(text) else text[:length] + ".."
        (text_width, text_height), below = cv2.getTextSize(shown, FONT, scale, stroke)
        if text_width + text_height < width:
            break
    return Label(shown, scale, stroke, (text_width, text_height, below), colour)


def _extent(label: Label) -> tuple[int, int, int]:
    """Return width, height and margin of the label's background."""
    text_width, text_height, below = label.size
    margin = max(1, text_height // 4)
    return text_width + 2 * margin, text_height + below + 2 * margin, margin


def _place(label: Label, box: list[int], width: int, height: int, taken: list[tuple]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the label at a corner of its box, free where there is such a place."""
    wide, tall, _ = _extent(label)
    x1, y1, x2, y2 = box[0], box[1], box[2] + 1, box[3] + 1
    wishes = [(x1, y1 - tall), (x1, y1), (x1, y2), (x2 - wide, y1 - tall), (x2 - wide, y2), (x1, y2 - tall), (x2, y1)]
    places = []
    for left, top in wishes:
        left, top = max(0, min(left, width - wide)), max(0, min(top, height - tall))
        places.append((left, top, left + wide, top + tall))
    return next((place for place in places if not any(_overlap(place, other) for other in taken)), places[0])


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _paint(canvas: np.ndarray, label: Label, place: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = place
    margin = _extent(label)[2]
    cv2.rectangle(canvas, (left, top), (right - 1, bottom - 1), label.colour, cv2.FILLED)
    start = (left + margin, top + margin + label.size[1])
    cv2.putText(canvas, label.text, start, FONT, label.scale, text_colour(label.colour), label.stroke, cv2.LINE_AA)


def tile(
    images: Sequence[np.ndarray],
    columns: int | None = None,
    cell: tuple[int, int] = (360, 480),
    gap: int = 6,
    captions: Sequence[str] | None = None,
) -> np.ndarray:
    """Return one sheet with `images`, each (H, W, 3) uint8 BGR of any size, scaled to fit cells of (height, width).

    Row by row in `columns` columns, as square as possible when None; `captions` stand in a strip above
    the picture, so that they hide no label.
    """
    assert images, "a sheet needs an image"
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    tall, wide = cell
    strip = _extent(_fit("X", wide, tall, SHEET_COLOUR))[1] if captions is not None else 0
    sheet = np.empty((rows * (tall + strip + gap) + gap, columns * (wide + gap) + gap, 3), np.uint8)
    sheet[:] = SHEET_COLOUR
    for index, image in enumerate(images):
        factor = min(tall / image.shape[0], wide / image.shape[1])
        size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST)
        top = gap + (index // columns) * (tall + strip + gap) + strip + (tall - size[1]) // 2
        left = gap + (index % columns) * (wide + gap) + (wide - size[0]) // 2
        if captions is not None:
            caption = _fit(captions[index], wide - (wide - size[0]) // 2, tall, SHEET_COLOUR)
            caption_wide, caption_tall, _ = _extent(caption)
            _paint(sheet, caption, (left, top - strip, left + caption_wide, top - strip + caption_tall))
        sheet[top : top + size[1], left : left + size[0]] = small
    return sheet
