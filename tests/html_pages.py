"""What tests of written pages share: a parser that a page must satisfy, and a real browser where there is one."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

VOID = {"meta", "link", "img", "br", "hr", "input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Checked(HTMLParser):
    """Elements that are closed in order, ids, links, and the text outside of styles."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.words = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[key] for key in ("src", "href", "xlink:href") if key in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.words))


def checked(path: Path) -> Checked:
    """Return the parsed page; fails on elements that are left open, shared ids, and whatever a page would load."""
    text = path.read_text(encoding="utf-8")
    page = Checked(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert link.startswith("data:") or link.removeprefix("#") in page.ids, link[:100]
    assert "<script" not in text and "@import" not in text and "url(http" not in text
    return page


def screenshot(path: Path, width: int, height: int) -> np.ndarray:
    """Return the page as headless Chromium shows it, (height, width, 3) uint8 BGR; skips without a Chromium."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)}")
    picture = path.with_suffix(".shot.png")
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={path.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--window-size={width},{height}", f"--screenshot={picture}", path.as_uri()]
    subprocess.run(command, capture_output=True, timeout=100, check=True)
    return cv2.imread(str(picture))
