"""Runs side by side: what is read, what the table says, and that a run may be going on."""

import json

import pytest
from html_pages import checked

from retinanet.engine.report import write_report
from retinanet.engine.runs import read_runs, runs_page
from retinanet.errors import UserError

LINES = [
    {"iteration": 10, "lr": 0.1, "loss": 2.0, "loss_cls": 1.5, "images_per_s": 5.0, "data_wait": 0.1},
    {"iteration": 10, "AP": 30.0, "AP50": 50.0, "APl": None},
    {"iteration": 20, "lr": 0.1, "loss": 1.0, "loss_cls": 0.5, "images_per_s": 9.0, "data_wait": 0.3},
    {"iteration": 20, "AP": 20.0, "AP50": 40.0},
]


def write(folder, lines=LINES, tail="", config="SOLVER: {MAX_ITER: 40, BASE_LR: 0.1}\nOUTPUT_DIR: x\n"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    (folder / "config.yaml").write_text(config)
    return str(folder)


def test_table_holds_last_and_best(tmp_path):
    page = runs_page(read_runs([write(tmp_path / "gn", tail='{"iteration": 30, "lo')]))
    table = page.sections[0].blocks[0]
    row = dict(zip(table.head, table.rows[0], strict=True))
    assert row == {
        "run": "gn",
        "iteration": "20",
        "of": "40",
        "loss": "1.0000",
        "AP": "20.00",
        "best AP": "30.00",
        "at": "10",
        "images / s": "7.0",
        "waiting for data": "20 %",
    }


def test_half_a_line_at_the_end_is_no_problem_and_a_damaged_one_before_is_named(tmp_path):
    (run,) = read_runs([write(tmp_path / "a", tail='{"iteration": 3')])
    assert run.curve("loss") == ([10, 20], [2.0, 1.0]) and not run.problems
    (run,) = read_runs([write(tmp_path / "b", tail='{"iterat\n{"iteration": 30, "loss": 0.5}\n')])
    assert run.curve("loss") == ([10, 20, 30], [2.0, 1.0, 0.5])
    assert run.problems == [f"{tmp_path}/b/metrics.jsonl: line 5 is damaged and left out"]


def test_runs_of_one_name_are_told_apart_and_differing_keys_are_listed(tmp_path):
    one = write(tmp_path / "x/run")
    other = write(tmp_path / "y/run", config="SOLVER: {MAX_ITER: 40, BASE_LR: 0.2}\nOUTPUT_DIR: y\n")
    runs = read_runs([one, f"{other}/metrics.jsonl"])
    assert [run.name for run in runs] == [one, f"{other}/metrics.jsonl"]
    table = runs_page(runs).sections[0].blocks[-1]
    assert table.rows == [["SOLVER.BASE_LR", "0.1", "0.2"]]


def test_page_is_whole_for_many_runs_and_for_one_that_has_just_begun(tmp_path):
    places = [write(tmp_path / f"run_{number}") for number in range(11)]
    places.append(write(tmp_path / "_begun", lines=LINES[:1], config="[damaged"))
    web, markdown = write_report(runs_page(read_runs(places)), tmp_path / "out", "runs")
    page = checked(web)
    assert page.tags.count("svg") == 4 and "_begun" in page.text and "run_0" in page.text and markdown.is_file()
    (alone,) = read_runs(places[-1:])
    assert "No line has these numbers yet." in [
        block for section in runs_page([alone]).sections for block in section[1]
    ]


@pytest.mark.parametrize(("lines", "message"), [(None, "cannot be read .*give the OUTPUT_DIR"), ([], "no whole line")])
def test_a_folder_without_numbers_is_named(tmp_path, lines, message):
    place = str(tmp_path / "none") if lines is None else write(tmp_path / "empty", lines=lines, tail='{"ite')
    with pytest.raises(UserError, match=message):
        read_runs([place])
