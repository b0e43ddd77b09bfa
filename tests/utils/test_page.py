"""Pages as HTML and Markdown: what is text stays text, and tables keep their shape."""

import cv2
import numpy as np
from html_pages import checked

from retinanet.utils.page import Gallery, Page, Picture, Plot, Section, Table, to_html, write_markdown
from retinanet.utils.plot import INK, png, svg

HOSTILE = 'a|b_c*d<e>&"f" $g$'


def bars(figure):
    figure.subplots().bar(["one", "two"], [1, 2], label="x")


def page() -> Page:
    jpeg = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    blocks = [
        HOSTILE,
        Table(["name", "value"], [[HOSTILE, "1"]] * 20),
        Plot("bars", svg("bars", (3, 2), bars), "two bars"),
        Plot("more-bars", svg("more-bars", (3, 2), bars), "again"),
        Gallery([Picture("black", jpeg, HOSTILE)]),
    ]
    return Page(HOSTILE, [Section("First & last", blocks), Section("Empty", [])])


def test_html_is_whole_loads_nothing_and_escapes(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(to_html(page()), encoding="utf-8")
    read = checked(path)
    assert read.text.count(HOSTILE) == 1 + 1 + 1 + 20 + 1  # title, heading, paragraph, table, caption
    assert read.tags.count("tr") == 21 and "section-first-last" in read.ids
    assert INK not in path.read_text() and "currentColor" in path.read_text()


def test_markdown_names_its_files_and_escapes(tmp_path):
    write_markdown(page(), tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert {file.name for file in (tmp_path / "page_files").iterdir()} == {"bars.svg", "more-bars.svg", "black.jpg"}
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 22 and rows[1] == "| --- | ---: |"
    assert rows[2] == r'| a\|b\_c\*d\<e\>&"f" \$g\$ | 1 |'
    assert "![two bars](page_files/bars.svg)" in text


def test_markdown_rows_that_look_like_lists_stay_text(tmp_path):
    write_markdown(Page("1. title", [Section("- x", ["+ plus"])]), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().split("\n\n") == [r"# \1. title", r"## \- x", "\\+ plus\n"]


def test_the_same_drawing_gives_the_same_text_and_ids_of_its_own():
    assert svg("bars", (3, 2), bars) == svg("bars", (3, 2), bars)
    assert 'id="bars-figure_1"' in svg("bars", (3, 2), bars)


def test_png_is_black_on_white(tmp_path):
    png(tmp_path / "bars.png", (3, 2), bars)
    picture = cv2.imread(str(tmp_path / "bars.png"))
    assert picture.shape == (220, 330, 3) and picture[0, 0].tolist() == [255, 255, 255] and (picture == 0).any()
