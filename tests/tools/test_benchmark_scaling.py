"""`tools/benchmark_scaling.py`: one quantity grows at a time; a table, a file and a picture come out."""

import json
import sys

import cv2
import pytest
from conftest import ROOT

from retinanet.config.load import load_config_text
from retinanet.errors import UserError


@pytest.fixture
def tool(monkeypatch):
    """The module of the tool, with made-up measurements: time and memory grow with everything."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("benchmark_scaling", None)
    import benchmark_scaling as tool

    measured = tool.measured = []

    def measure(jobs, settings):
        (job,) = jobs
        classes = load_config_text(job.config, "").MODEL.NUM_CLASSES
        work = float(job.size[0] ** 2 * job.batch) + job.boxes + classes
        host = {"device": "cpu", "threads": 1, "tuned": ""}
        assert job.floor and settings.steps == 2 and not settings.cost
        measured.append((*job.size, job.batch, job.boxes, classes))
        return [{"ms": work, "cpu_ms": 2 * work, "memory_mib": 1.5 * work, "floor_mib": work, "host": host}]

    monkeypatch.setattr(tool, "measure", measure)
    return tool


def run(tool, *arguments):
    tool.main(list(map(str, arguments)))


def test_every_axis_grows_alone(tool, tmp_path, capsys):
    config = ("--config", ROOT / "configs/retinanet_R18_gn_small.yaml", "--steps", 2)
    run(tool, *config, "--json", tmp_path / "out.json", "--plot", tmp_path / "new/plot.png")
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["axis"], row["value"]) for row in rows] == [
        (axis, int(256 * value) if axis == "size" else value)
        for axis, (values, _) in tool.AXES.items()
        for value in values
    ]
    assert len(set(tool.measured)) == len(tool.measured) == len(rows) - 3  # the point that all axes share, once
    times = {(row["axis"], row["value"]): row["time_ms"] for row in rows}
    assert times["size", 512] == 2 * (512 * 512 * 2 + 90) and times["classes", 1200] == 2 * (256 * 256 * 2 + 1210)
    assert "| boxes | 1000 | " in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "new/plot.png")).std() > 10


def test_mistakes_are_named(tool):
    with pytest.raises(UserError, match="--config FILE is missing"):
        run(tool)
    with pytest.raises(UserError, match="--steps: 0"):
        run(tool, "--config", ROOT / "configs/retinanet_R18_gn_small.yaml", "--steps", 0)
    with pytest.raises(UserError, match="--side: 100 has to be a multiple of 64"):
        run(tool, "--config", ROOT / "configs/retinanet_R18_gn_small.yaml", "--side", 100)


def test_side_makes_everything_smaller(tool, capsys):
    run(tool, "--config", ROOT / "configs/retinanet_R18_gn_small.yaml", "--steps", 2, "--side", 64)
    assert {point[0] for point in tool.measured} == {64, 96, 128, 192}
    assert "| size | 192 | " in capsys.readouterr().out
