"""Draw docs/images/norms.svg: which elements give one element its statistics, for every norm.

    python docs/draw_norms.py

Each panel shows the last three micro-batches of one process and the newest one of another. A square is the map of one
channel in one image; the outlined one is normalized, and the filled ones are those that its statistics come from.
"""

from collections.abc import Callable
from pathlib import Path

TARGET = Path(__file__).parent / "images" / "norms.svg"
IMAGES, CHANNELS, GROUP = 2, 6, 3  # per micro-batch, per layer, channels per group
OWN = (0, 1)  # image and channel of the outlined square, in the newest micro-batch (age 0) of process 0
SIDE, GAP, TITLE, WIDTH = 12, 22, 40, 2
BATCHES = [(0, 2), (0, 1), (0, 0), (1, 0)]  # process and age, from left to right
LABELS = ["t - 2", "t - 1", "t", "t, other process"]
NOW, BEFORE, GROUPED, EMPTY = "#d95f02", "#fdbf6f", "#1f78b4", "#f2f2f2"

Shares = Callable[[int, int, int, int], str | None]  # process, age, image, channel -> colour, None where not shared


def nothing(process: int, age: int, image: int, channel: int) -> None:
    return None


def batch(process: int, age: int, image: int, channel: int) -> str | None:
    return NOW if (process, age, channel) == (0, 0, OWN[1]) else None


def all_processes(process: int, age: int, image: int, channel: int) -> str | None:
    return NOW if (age, channel) == (0, OWN[1]) else None


def over_time(process: int, age: int, image: int, channel: int) -> str | None:
    if process or channel != OWN[1]:
        return None
    return BEFORE if age else NOW


def group(process: int, age: int, image: int, channel: int) -> str | None:
    same = (process, age, image) == (0, 0, OWN[0]) and channel // GROUP == OWN[1] // GROUP
    return GROUPED if same else None


def estimates_then_group(process: int, age: int, image: int, channel: int) -> str | None:
    return over_time(process, age, image, channel) or group(process, age, image, channel)


PANELS: list[tuple[str, str, Shares]] = [
    ("AffineChannel, FrozenBN", "constants: nothing is measured", nothing),
    ("BN", "mean and variance of the batch", batch),
    ("SyncBN", "of the batches of all processes", all_processes),
    ("GN", "of the group, in one image", group),
    ("MABN", "second moment over a window of batches", over_time),
    ("BCN", "running estimates, then the group", estimates_then_group),
]


def panel(left: int, top: int, title: str, note: str, shares: Shares) -> list[str]:
    parts = [
        f'<text x="{left}" y="{top + 14}" font-size="15" font-weight="bold">{title}</text>',
        f'<text x="{left}" y="{top + 31}" font-size="12" fill="#555">{note}</text>',
    ]
    outline = ""
    for index, (process, age) in enumerate(BATCHES):
        x0, y0 = left + index * (CHANNELS * SIDE + GAP), top + TITLE
        for image in range(IMAGES):
            for channel in range(CHANNELS):
                colour = shares(process, age, image, channel) or EMPTY
                box = f'x="{x0 + channel * SIDE}" y="{y0 + image * SIDE}" width="{SIDE}" height="{SIDE}"'
                parts.append(f'<rect {box} fill="{colour}" stroke="#999" stroke-width="0.5"/>')
                if (process, age, image, channel) == (0, 0, *OWN):
                    outline = f'<rect {box} fill="none" stroke="#000" stroke-width="2.5"/>'
        y = y0 + IMAGES * SIDE + 13
        parts.append(f'<text x="{x0}" y="{y}" font-size="10" fill="#555">{LABELS[index]}</text>')
    return [*parts, outline]


def picture() -> str:
    across, down = len(BATCHES) * (CHANNELS * SIDE + GAP) + 20, TITLE + IMAGES * SIDE + 36
    rows = -(-len(PANELS) // WIDTH)
    width, height = 20 + WIDTH * across, 46 + rows * down
    parts = []
    for index, (title, note, shares) in enumerate(PANELS):
        parts += panel(20 + index % WIDTH * across, 10 + index // WIDTH * down, title, note, shares)
    legend = [(NOW, "this batch"), (BEFORE, "earlier batches"), (GROUPED, "group of channels (with the outlined one)")]
    for index, (colour, text) in enumerate(legend):
        x, y = 20 + index * 150, height - 24
        parts.append(f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" fill="{colour}" stroke="#999"/>')
        parts.append(f'<text x="{x + SIDE + 6}" y="{y + 10}" font-size="12">{text}</text>')
    start = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([start, f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(picture())
    print(f"wrote {TARGET}")
