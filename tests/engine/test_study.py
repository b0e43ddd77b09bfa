"""What a study makes of its runs: means and spreads by hand, tables, plots, and runs that it does not take."""

import csv
import io
import json
import statistics

import pytest

from retinanet.engine.study import Run, as_csv, as_markdown, finish, finished, groups, spread
from retinanet.engine.study_plots import write_plots
from retinanet.errors import UserError


def row(norm: str, batch: int, seed: int, **values) -> dict:
    usual = {"AP": 10.0, "AP50": 20.0, "precision": 30.0, "recall": 40.0, "images_per_s": 5.0, "memory_mib": 100.0}
    return {"norm": norm, "batch": batch, "seed": seed, **usual, **values}


ROWS = [row("GN", 2, 0, AP=10.0), row("GN", 2, 1, AP=14.0), row("GN", 16, 0, AP=12.5), row("", 2, 0, precision=None)]


def write_run(folder, iterations=(2, 4)) -> None:
    metrics = {"AP": 12.0, "AP50": 30.0, "precision": 50.0, "recall": None, "f1": None, "threshold": 0.3, "AP75": 1.0}
    (folder / "inference/val").mkdir(parents=True)
    (folder / "inference/val/metrics.json").write_text(json.dumps(metrics))
    lines = [{"iteration": i, "loss": 1.0 / i, "images_per_s": float(10 * i)} for i in iterations]
    lines.append({"iteration": iterations[-1], "AP": 12.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_mean_and_spread_by_hand():
    assert spread([10.0, 14.0]) == (12.0, pytest.approx(8**0.5))
    assert spread([3.0]) == (3.0, None) and spread([]) is None


def test_runs_of_one_norm_and_batch_are_one_group():
    first, second, third = groups(ROWS, {"GN": {"plain_ms": 9.0, "folded_ms": 8.0}})
    assert (first["norm"], first["batch"], first["seeds"]) == ("GN", 2, 2)
    assert first["AP"] == (12.0, pytest.approx(statistics.stdev([10, 14]))) and first["plain_ms"] == 9.0
    assert second["AP"] == (12.5, None) and (third["norm"], third["precision"]) == ("", None)


def test_table_shows_means_spreads_and_what_is_unknown():
    lines = as_markdown(groups(ROWS, {"GN": {"plain_ms": 9.04, "folded_ms": 8.0}})).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 5
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:5] == ["norm", "batch", "seeds", "AP", "AP50"] and cells[0][-2:] == ["detect ms", "folded ms"]
    assert cells[2][:4] == ["GN", "2", "2", "12.00 +- 2.83"] and cells[2][-2:] == ["9.0", "8.0"]
    assert cells[3][3] == "12.50" and cells[4][0] == "none" and "-" in cells[4]
    assert "detect ms" not in as_markdown(groups(ROWS, {}))


def test_csv_holds_every_run():
    read = list(csv.DictReader(io.StringIO(as_csv(ROWS))))
    assert [float(line["AP"]) for line in read] == [10, 14, 12.5, 10] and read[3]["precision"] == ""


def test_finished_run_is_read_back_and_another_configuration_refused(tmp_path):
    assert finished(tmp_path, "a: 1") is None
    write_run(tmp_path)
    made = finish(tmp_path, Run("GN", 2, 7), "a: 1", "val", {"seconds": 3.0, "resident_mib": 50.0})
    assert made["AP"] == 12.0 and made["recall"] is None and made["images_per_s"] == 30.0  # median of 20 and 40
    assert (made["memory_mib"], made["last_loss"], made["iterations"], made["seed"]) == (50.0, 0.25, 4, 7)
    assert finished(tmp_path, "a: 1") == made
    assert finished(tmp_path, "a: 1\nb: 5") == made  # a key that is newer than the run
    with pytest.raises(UserError, match="finished run of another configuration .a 1, now 2"):
        finished(tmp_path, "a: 2")


def test_names_of_runs_differ():
    runs = [Run(norm, batch, seed) for norm in ("GN", "") for batch in (2, 16) for seed in (0, 1)]
    assert len({run.name for run in runs}) == 8 and Run("", 2, 1).name == "none_batch2_seed1"


def test_plots_are_written(tmp_path):
    table = groups(ROWS, {"GN": {"plain_ms": 9.0, "folded_ms": 8.0}})
    paths = write_plots(tmp_path, ROWS, table)
    assert [path.name for path in paths] == ["quality.png", "cost.png", "latency.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(write_plots(tmp_path, ROWS, groups(ROWS, {}))) == 2
