"""The report of an evaluation: its numbers are those of the functions below it, and a browser shows it."""

import json
import re

import cv2
import numpy as np
import pytest
from html_pages import checked, screenshot
from simulated_detections import coco_json, detection, simulated

from retinanet.engine.coco_metrics import METRICS, coco_metrics
from retinanet.engine.report import report_page, write_report
from retinanet.errors import UserError

NAMES = {1: "cat", 2: "dog & <b>$x_1$</b>"}
CAT, DOG = [10, 10, 40, 40], [50, 50, 30, 30]


def write(folder, annotations, rows, images=None, **more):
    """Return the parsed report.html and the text of report.md."""
    page = report_page("small set", annotations, rows, coco_metrics(annotations, rows), images, **more)
    web, markdown = write_report(page, folder)
    return checked(web), markdown.read_text(encoding="utf-8")


@pytest.fixture
def small(tmp_path):
    """Images 1 to 4 in a folder: 1 is perfect, 2 has a miss and a false alarm, 3 is empty, 4 is only annotated."""
    annotations = coco_json({1: [(1, *CAT), (2, *DOG)], 2: [(1, *CAT)], 3: [], 4: [(2, *DOG)]}, NAMES)
    rows = [detection(1, 1, CAT, 0.9), detection(1, 2, DOG, 0.8), detection(2, 1, DOG, 0.7)]
    for number in range(1, 5):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), np.full((100, 100, 3), 120, np.uint8))
    return tmp_path, annotations, rows


def test_page_holds_the_numbers_of_the_metrics(small):
    folder, annotations, rows = small
    page, markdown = write(folder / "out", annotations, rows, folder, facts={"weights": "some/best.pth"})
    metrics = coco_metrics(annotations, rows)
    for text in (page.text, markdown):
        for word in ("Evaluation of small set", "some/best.pth", "Confusion", "localisation", *METRICS):
            assert word in text
        for value in (f"{metrics['AP']:.2f}", f"{metrics['AR100']:.2f}", f"score {metrics['threshold']:.3f}"):
            assert value in text
    assert "dog & <b>$x_1$</b>" in page.text  # a name is text, not markup
    assert r"dog & \<b\>\$x\_1\$\</b\>" in markdown
    assert page.tags.count("svg") == 5 and page.tags.count("img") == 3


def test_worst_images_come_first_and_the_empty_one_is_not_shown(small):
    folder, annotations, rows = small
    page, markdown = write(folder / "out", annotations, rows, folder)
    shown = re.findall(r"(\d).jpg \(image \d\): F1 ([\d.]+), (\d) right, (\d) false, (\d) missed", page.text)
    assert shown == [("2", "0.0", "0", "0", "1"), ("4", "0.0", "0", "0", "1"), ("1", "100.0", "2", "0", "0")]
    files = re.findall(r"\]\((\S+)\)", markdown)
    assert len(files) == 8 and all((folder / "out" / file).stat().st_size > 500 for file in files)


def test_colours_of_pictures_tell_right_false_and_missed(small):
    """The threshold is 0.7 where the false alarm is worth it: here there are two more boxes that it finds nearly."""
    folder, annotations, _ = small
    rows = [detection(1, 1, CAT, 0.5), detection(1, 2, [0, 80, 20, 20], 0.6)]
    write(folder / "out", annotations, rows, folder)
    picture = cv2.imread(str(folder / "out/report_files/worst-3.jpg")).astype(int)
    blue, green, red = picture[..., 0], picture[..., 1], picture[..., 2]
    assert ((green > 140) & (red < 80)).any() and ((red > 150) & (green < 90)).any()  # right, false
    assert ((red > 200) & (green > 130) & (blue < 80)).any()  # missed


def test_images_that_are_not_known_or_not_readable_are_said_to_be(small):
    folder, annotations, rows = small
    page, _ = write(folder / "out", annotations, rows)
    assert "No pictures: the folder with the images is not known." in page.text and "img" not in page.tags
    (folder / "2.jpg").write_bytes(b"no picture")
    page, _ = write(folder / "out", annotations, rows, folder)
    assert "Not shown" in page.text and "2.jpg: not an image" in page.text and page.tags.count("img") == 2


@pytest.mark.parametrize("rows", [[], [detection(3, 1, CAT, 0.9)]])
def test_without_a_right_detection_there_is_a_page_too(small, rows):
    folder, annotations, _ = small
    page, _ = write(folder / "out", annotations, rows, folder)
    assert "there is no threshold to choose" in page.text and "There are none." in page.text


def test_a_set_of_empty_images_has_a_page(tmp_path):
    page, _ = write(tmp_path, coco_json({1: [], 2: []}, {1: "cat"}), [])
    assert "No class was taken for another." in page.text


def test_eighty_classes_on_a_real_set(tmp_path, shared):
    path = shared("data/coco_mini/annotations/instances_val2017.json")
    rows = simulated(json.loads(path.read_text()), seed=0, crowded=0, clutter=5)
    page, markdown = write(tmp_path, path, rows, path.parent.parent / "val2017")
    assert page.tags.count("img") == 12 and markdown.count("\n| hair drier |") == 1
    assert (tmp_path / "report.html").stat().st_size < 3e6


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    annotations = coco_json({1: []}, {1: "cat"})
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="out: cannot be written"):
        write(tmp_path / "out", annotations, [])


def test_a_browser_shows_text_plots_and_pictures(small):
    folder, annotations, rows = small
    write(folder / "out", annotations, rows, folder)
    shown = screenshot(folder / "out/report.html", 1000, 4500)
    assert shown.shape == (4500, 1000, 3)
    colours = {tuple(colour) for colour in shown.reshape(-1, 3).tolist()}
    assert (255, 255, 255) in colours and (0xB2, 0x72, 0x00) in colours  # paper, and the first colour of the plots
    assert (np.abs(shown.astype(int) - 120).max(-1) < 3).sum() > 3 * 200 * 200  # three grey pictures
