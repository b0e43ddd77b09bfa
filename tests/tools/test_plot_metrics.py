"""`tools/plot_metrics.py` on two runs, one of them going on."""

import json

import cv2
import pytest
from conftest import ROOT
from html_pages import checked, screenshot

from retinanet.errors import UserError


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The tool's `main(argv)`, in a folder with the runs gn and bn."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.chdir(tmp_path)
    import plot_metrics

    for name, factor in (("gn", 1.0), ("bn", 2.0)):
        (tmp_path / name).mkdir()
        lines = [{"iteration": 10 * k, "loss": factor / k, "lr": 0.1, "images_per_s": 5.0} for k in range(1, 9)]
        lines.append({"iteration": 80, "AP": 10 * factor})
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 90, "loss": 0.'
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return lambda *arguments: plot_metrics.main(list(arguments))


def test_a_browser_shows_both_runs(main, tmp_path, capsys):
    main("gn", "bn", "--output", "pages/both.html")
    assert "20.00" in capsys.readouterr().out
    page = checked(tmp_path / "pages/both.html")
    assert "Training of gn, bn" in page.text and (tmp_path / "pages/both.md").is_file()
    colours = {tuple(colour) for colour in screenshot(tmp_path / "pages/both.html", 1000, 1500).reshape(-1, 3).tolist()}
    assert {(0xB2, 0x72, 0x00), (0x00, 0x5E, 0xD5)} <= colours  # a line in the colour of each run


def test_a_picture_of_all_panels(main, tmp_path):
    main("gn", "--output", "one.png")
    assert cv2.imread(str(tmp_path / "one.png")).std() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gn", "--output", "x.gif"], r"--output: x\.gif ends with neither \.html nor \.png"),
        (["gone"], r"gone/metrics\.jsonl: cannot be read"),
        (["gn", "--output", "gn/metrics.jsonl/x.png"], "cannot be written"),
        (["gn", "--output", "gn/metrics.jsonl/x.html"], "cannot be written"),
    ],
)
def test_mistakes_are_named(main, arguments, message):
    with pytest.raises(UserError, match=message):
        main(*arguments)
