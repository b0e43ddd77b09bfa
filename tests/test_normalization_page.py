"""docs/normalization.md and its picture say what the code does."""

import sys
from pathlib import Path

import pytest

from retinanet.config.defaults import get_cfg
from retinanet.layers.norm import NORMS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "normalization.md").read_text()


@pytest.fixture(scope="module")
def drawing():
    sys.path.insert(0, str(DOCS))
    import draw_norms

    yield draw_norms
    sys.path.remove(str(DOCS))


def test_picture_is_what_its_script_draws(drawing):
    assert drawing.TARGET.read_text() == drawing.picture(), "run: python docs/draw_norms.py"


def test_picture_and_page_name_every_norm(drawing):
    titles = " ".join(title for title, _, _ in drawing.PANELS).replace(",", "").split()
    assert sorted(titles) == sorted(NORMS)
    headings = " ".join(line for line in PAGE.splitlines() if line.startswith("## ")).split()
    assert set(NORMS) <= set(headings)


def test_only_the_outlined_channel_or_group_is_shared(drawing):
    image, channel = drawing.OWN
    assert drawing.batch(0, 0, 1 - image, channel) and not drawing.batch(0, 0, image, channel + 1)
    assert drawing.all_processes(1, 0, 1, channel) and not drawing.batch(1, 0, 1, channel)
    assert drawing.over_time(0, 2, 0, channel) and not drawing.over_time(1, 0, 0, channel)
    assert drawing.group(0, 0, image, channel + 1) and not drawing.group(0, 0, 1 - image, channel)


def test_numbers_on_the_page_are_the_defaults():
    options = get_cfg().MODEL.NORM_OPTIONS
    assert (options.MABN.KEEP_RATE, options.BCN.UPDATE_RATE) == (0.98, 0.01)
    assert "`KEEP_RATE` 0.98" in PAGE and "1 / `UPDATE_RATE` steps" in PAGE
