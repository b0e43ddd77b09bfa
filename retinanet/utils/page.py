"""A page of text, tables, plots and pictures, as one HTML file that needs nothing else, or as Markdown.

The HTML has no script and loads nothing: plots are inline SVG, pictures are data URIs. Its colours follow the reader's
light or dark setting.
"""

import base64
import html
import re
from pathlib import Path
from typing import NamedTuple

LONG_TABLE = 15  # rows from which a table scrolls inside its frame

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #57606a; --paper: #ffffff; --line: #d0d7de; --shade: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ec; --soft: #98a2ae; --paper: #14181d; --line: #343b44; --shade: #1e242b }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line) }
p { margin: .75rem 0; max-width: 60rem; overflow-wrap: anywhere }
nav { font-size: .9rem } nav a { margin-right: 1rem; white-space: nowrap } a { color: inherit }
.frame { overflow: auto; margin: .75rem 0 } .long { max-height: 36rem; border: 1px solid var(--line) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { background: var(--shade); position: sticky; top: 0 } td.text, th.text { text-align: left }
td.wide { white-space: normal; min-width: 16rem }
tbody tr:hover { background: var(--shade) }
figure { margin: 1rem 0 }
figcaption { color: var(--soft); font-size: .88rem; max-width: 60rem; overflow-wrap: anywhere }
figure svg { display: block; max-width: 100%; height: auto }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: 1rem }
.gallery figure { margin: 0 } .gallery img { display: block; max-width: 100%; height: auto }
"""


class Table(NamedTuple):
    """Cells as they are shown; empty texts as a head stand for none. text: the columns that hold words and stand at the
    left; the others hold numbers."""

    head: list[str]
    rows: list[list[str]]
    text: tuple[int, ...] = (0,)


class Plot(NamedTuple):
    """name: unique on its page, made of letters and dashes. svg: see `plot.svg`."""

    name: str
    svg: str
    caption: str


class Picture(NamedTuple):
    """name: unique on its page. jpeg: the content of a JPEG file."""

    name: str
    jpeg: bytes
    caption: str


class Gallery(NamedTuple):
    """Pictures side by side."""

    pictures: list[Picture]


Block = str | Table | Plot | Gallery  # a text is a paragraph


class Section(NamedTuple):
    title: str
    blocks: list[Block]


class Page(NamedTuple):
    title: str
    sections: list[Section]


def to_html(page: Page) -> str:
    """Return the page as one HTML document."""
    links = "".join(f'<a href="#{_anchor(section)}">{html.escape(section.title)}</a> ' for section in page.sections)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',  # browsers would ask the server for one
        f"<title>{html.escape(page.title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(page.title)}</h1><nav>{links}</nav>",
    ]
    for section in page.sections:
        parts.append(f'<section><h2 id="{_anchor(section)}">{html.escape(section.title)}</h2>')
        parts += [_html_block(block) for block in section.blocks]
        parts.append("</section>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _anchor(section: Section) -> str:
    return "section-" + re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")


def _html_block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Plot):
        return f"<figure>{block.svg}<figcaption>{html.escape(block.caption)}</figcaption></figure>"
    return f'<div class="gallery">{"".join(map(_html_picture, block.pictures))}</div>'


def _html_picture(picture: Picture) -> str:
    caption = html.escape(picture.caption)
    data = base64.b64encode(picture.jpeg).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/jpeg;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _html_table(table: Table) -> str:
    def row(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(_cell(tag, text, place in table.text) for place, text in enumerate(cells)) + "</tr>"

    frame = "frame long" if len(table.rows) >= LONG_TABLE else "frame"
    body = "".join(row("td", cells) for cells in table.rows)
    head = f"<thead>{row('th', table.head)}</thead>" if any(table.head) else ""
    return f'<div class="{frame}"><table>{head}<tbody>{body}</tbody></table></div>'


def _cell(tag: str, text: str, is_text: bool) -> str:
    kinds = (["text"] if is_text else []) + (["wide"] if len(text) > 40 else [])
    mark = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<{tag}{mark}>{html.escape(text)}</{tag}>"


def write_markdown(page: Page, path: Path) -> None:
    """Write the page as GitHub's Markdown; plots and pictures go to a folder beside it, named after it."""
    folder = path.with_name(path.stem + "_files")
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"# {_escape(page.title)}"]
    for section in page.sections:
        parts.append(f"## {_escape(section.title)}")
        parts += [_markdown_block(block, folder) for block in section.blocks]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _markdown_block(block: Block, folder: Path) -> str:
    if isinstance(block, str):
        return _escape(block)
    if isinstance(block, Table):
        return _markdown_table(block)
    if isinstance(block, Plot):
        white = block.svg.replace("<svg ", '<svg style="background: white; color: black" ', 1)
        (folder / f"{block.name}.svg").write_text('<?xml version="1.0" encoding="utf-8"?>\n' + white, encoding="utf-8")
        return f"![{_escape(block.caption)}]({folder.name}/{block.name}.svg)\n\n{_escape(block.caption)}"
    for picture in block.pictures:
        (folder / f"{picture.name}.jpg").write_bytes(picture.jpeg)
    shown = [(_escape(each.caption), f"{folder.name}/{each.name}.jpg") for each in block.pictures]
    return "\n\n".join(f"![{caption}]({file})\n\n{caption}" for caption, file in shown)


def _markdown_table(table: Table) -> str:
    rule = ["---" if place in table.text else "---:" for place in range(len(table.head))]
    rows = [list(map(_escape, table.head)), rule, *(list(map(_escape, row)) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _escape(text: str) -> str:
    """Return `text` so that Markdown shows it as it is, on one line."""
    text = re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(text.split()))
    return re.sub(r"^([-+]|\d+\.)(?=\s)", r"\\\1", text)
