"""The tool as a user calls it: another working directory, exit statuses, and a catalog entry that works."""

import subprocess
import sys
from pathlib import Path

from retinanet.data.catalog import open_dataset

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_synthetic.py"


def call(folder, *arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def test_printed_catalog_entries_open_what_was_written(tmp_path):
    done = call(tmp_path, "--output", "shapes", "--train", 3, "--val", 2, "--size", 64, 80)
    assert done.returncode == 0, done.stderr
    (tmp_path / "catalog.yaml").write_text(done.stdout.split("DATASETS.CATALOG):\n")[1])
    for name, count in (("shapes_train", 3), ("shapes_val", 2)):
        dataset = open_dataset(tmp_path / "catalog.yaml", name)
        assert len(dataset) == count and dataset.read(0)[0].shape == (64, 80, 3)


def test_senseless_count_ends_with_status_2_and_no_traceback(tmp_path):
    done = call(tmp_path, "--output", "shapes", "--train", 0)
    assert done.returncode == 2 and done.stderr.startswith("error: train: 0 images")
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    done = call(tmp_path, "--output", "taken", "--train", 1)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: --output: ") and "taken cannot be written" in done.stderr


def test_help_shows_an_example(tmp_path):
    done = call(tmp_path, "--help")
    assert done.returncode == 0 and "--seed 1" in done.stdout
