"""metrics.jsonl is complete after a kill and a resume."""

import json

from retinanet.utils.log import MetricsWriter


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resume_drops_the_lines_that_run_again_and_half_lines(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for iteration in (10, 20, 30):
        writer.write(iteration, {"loss": iteration / 10})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 40, "lo')
    writer = MetricsWriter(tmp_path, iteration=20, tensorboard=False)
    writer.write(30, {"loss": 7.0})
    writer.close()
    assert lines(tmp_path) == [{"iteration": i, "loss": v} for i, v in ((10, 1.0), (20, 2.0), (30, 7.0))]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    MetricsWriter(tmp_path, tensorboard=False).close()
    assert lines(tmp_path) == []
