"""A results file that grows: whole at the end, whole after Ctrl-C, and never half."""

import json

import pytest

from retinanet.engine.coco_json import write_json
from retinanet.engine.results_file import ResultsFile
from retinanet.errors import UserError

ROWS = [{"image_id": 1, "bbox": [0.5, 1, 2, 3]}, {"image_id": 2}, {"image_id": 3}]


def test_equals_the_file_written_at_once(tmp_path):
    write_json(tmp_path / "whole.json", ROWS)
    with ResultsFile(tmp_path / "new/grown.json") as results:
        results.write(ROWS[:1])
        results.write([])
        results.write(ROWS[1:])
        assert not (tmp_path / "new/grown.json").exists() and results.count == 3
    assert (tmp_path / "new/grown.json").read_text() == (tmp_path / "whole.json").read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grown.json"]


def test_without_rows_it_is_an_empty_list(tmp_path):
    with ResultsFile(tmp_path / "x.json"):
        pass
    assert json.loads((tmp_path / "x.json").read_text()) == []


def test_an_interrupt_closes_the_list(tmp_path):
    with pytest.raises(KeyboardInterrupt), ResultsFile(tmp_path / "x.json") as results:
        results.write(ROWS[:2])
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "x.json").read_text()) == ROWS[:2]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="x.json: cannot be written"), ResultsFile(tmp_path / "file/x.json"):
        pass
