"""Plots as SVG for a page that may be light or dark, or as PNG; drawn by matplotlib without a screen or a state."""

import io
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

INK = "#010203"  # stands for the text colour of the page until the SVG is finished; nobody draws in it by chance
# Okabe and Ito's colours for every kind of colour vision, without black and yellow, which vanish on dark and light
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6d31", "#7f7f7f")

Draw = Callable  # takes an empty matplotlib Figure
Size = tuple[float, float]  # inches, of 72 points


def svg(name: str, size: Size, draw: Draw) -> str:
    """Return the drawing as an `<svg>` element without a background, whose lines and text have the page's colour.

    `name` is part of every id, so that drawings of one page do not share them; the same drawing gives the same text.
    """
    with _figure(size, draw) as figure:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", text)
    return text.strip()


def png(path: Path, size: Size, draw: Draw, dots_per_inch: int = 110) -> None:
    """Write the drawing to `path` on white; raises `OSError`."""
    with _figure(size, draw, ink="black") as figure:
        figure.savefig(path, format="png", dpi=dots_per_inch)


@contextmanager
def _figure(size: Size, draw: Draw, ink: str = INK):
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(ink)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the reader's browser has fonts of its own
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        yield figure


def _style(ink: str) -> dict:
    import matplotlib

    coloured = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    return {
        **dict.fromkeys(coloured, ink),
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
        "axes.grid": True,
        "grid.alpha": 0.2,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.fontsize": "small",
        "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's colour
        "svg.hashsalt": "retinanet",
    }


def plain(text: str) -> str:
    """Return `text` so that matplotlib shows it as it is: no formulas, and no leading underscore, which hides it."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
