"""What TensorBoard reads back: scalars, tables of runs, curves and pictures, each point once."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.plugins.pr_curve.plugin_data_pb2 import PrCurvePluginData
from tensorboard.util.tensor_util import make_ndarray

from retinanet.utils.log import MetricsWriter


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


def points(folder, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def test_numbers_are_scalars_and_tables_are_not(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(5, {"loss": 0.5, "per_class": {"a": 1.0}, "APl": None})
    writer.close()
    assert events(tmp_path).Tags()["scalars"] == ["loss"] and points(tmp_path, "loss") == [(5, 0.5)]


def test_a_resumed_run_has_every_point_once(tmp_path):
    """Stopped at 30, resumed from 20, with other values from there."""
    writer = MetricsWriter(tmp_path)
    for iteration in (10, 20, 30):
        writer.write(iteration, {"loss": 1.0})
        writer.image(iteration, "page", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    writer = MetricsWriter(tmp_path, iteration=20)
    for iteration in (30, 40):
        writer.write(iteration, {"loss": 2.0})
        writer.image(iteration, "page", np.zeros((4, 4, 3), np.uint8))
    writer.close()
    assert points(tmp_path, "loss") == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]
    assert [image.step for image in events(tmp_path).Images("page")] == [10, 20, 30, 40]


def test_a_run_that_starts_again_before_its_first_checkpoint_has_every_point_once(tmp_path):
    for value in (1.0, 2.0):
        writer = MetricsWriter(tmp_path)
        writer.write(10, {"loss": value})
        writer.close()
    assert points(tmp_path, "loss") == [(10, 2.0)]


def test_an_evaluation_that_runs_again_at_the_iteration_of_the_checkpoint_counts_once(tmp_path):
    """The checkpoint at 10 was written with one line; the evaluation after it was not in it."""
    writer = MetricsWriter(tmp_path)
    writer.write(10, {"loss": 1.0})
    writer.write(10, {"AP": 50.0})
    writer.close()
    writer = MetricsWriter(tmp_path, iteration=10, lines=1)
    writer.write(10, {"AP": 50.0})
    writer.close()
    assert points(tmp_path, "AP") == [(10, 50.0)] and points(tmp_path, "loss") == [(10, 1.0)]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"iteration": 10, "loss": 1.0},
        {"iteration": 10, "AP": 50.0},
    ]


def test_hyperparameters_and_the_scalars_beside_them(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.hyperparameters({"NORM": "GN", "LR": 0.01, "SEED": 3}, ["AP", "loss"])
    writer.close()
    read = events(tmp_path)
    data = {
        name: HParamsPluginData.FromString(read.SummaryMetadata(f"_hparams_/{name}").plugin_data.content)
        for name in ("experiment", "session_start_info", "session_end_info")
    }
    values = data["session_start_info"].session_start_info.hparams
    assert values["NORM"].string_value == "GN" and values["LR"].number_value == 0.01
    assert values["SEED"].number_value == 3
    assert [each.name.tag for each in data["experiment"].experiment.metric_infos] == ["AP", "loss"]


def test_a_precision_recall_curve_by_hand(tmp_path):
    """Two boxes; from 0 on one right and one false, from 0.5 on one right, from 1 on nothing, where precision is 1."""
    writer = MetricsWriter(tmp_path)
    counts = {"true": [1, 1, 0], "false": [1, 0, 0], "missed": [1, 1, 2]}
    writer.precision_recall(7, "set/cat", {key: np.array(value) for key, value in counts.items()})
    writer.close()
    read = events(tmp_path)
    (event,) = read.Tensors("set/cat")
    np.testing.assert_allclose(
        make_ndarray(event.tensor_proto),
        [[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 2], [0.5, 1, 1], [0.5, 0.5, 0]],
    )
    metadata = read.SummaryMetadata("set/cat").plugin_data
    assert (event.step, metadata.plugin_name) == (7, "pr_curves")
    assert PrCurvePluginData.FromString(metadata.content).num_thresholds == 3


@pytest.mark.parametrize("tensorboard", [True, False])
def test_nothing_fails_where_nothing_is_written(tmp_path, tensorboard):
    writer = MetricsWriter(tmp_path, tensorboard=tensorboard)
    writer.hyperparameters({"SEED": 1}, ["AP"])
    writer.image(1, "page", np.zeros((2, 2, 3), np.uint8))
    counts = np.zeros(3, int)
    writer.precision_recall(1, "set", {"true": counts, "false": counts, "missed": counts})
    writer.close()
    assert bool(list(tmp_path.glob("events*"))) == tensorboard
