"""The twelve numbers: by hand, against pycocotools run as its authors do, and between the evaluators."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest
from simulated_detections import coco_json, detection, simulated

from retinanet.engine.coco_json import ground_truth, results
from retinanet.engine.coco_metrics import (
    EVALUATORS,
    METRICS,
    accumulate,
    coco_metrics,
    format_metrics,
    format_per_class,
)
from retinanet.errors import UserError

NAMES = {1: "cat", 5: "dog"}
both = pytest.mark.parametrize("evaluator", EVALUATORS)


@both
def test_metrics_by_hand(evaluator):
    """Two boxes; right at .9, wrong at .8, right at .7: precision is 1 up to recall .5 (51 of 101 points), then 2/3."""
    annotations = coco_json({1: [(1, 0, 0, 20, 20), (1, 40, 40, 50, 50)]}, NAMES)
    boxes = [([0, 0, 20, 20], 0.9), ([70, 0, 9, 9], 0.8), ([40, 40, 50, 50], 0.7)]
    metrics = coco_metrics(annotations, [detection(1, 1, *box) for box in boxes], evaluator)
    ap = 100 * (51 + 50 * 2 / 3) / 101
    expected = {"AP": ap, "AP50": ap, "AP75": ap, "APs": 100, "AR1": 50, "AR10": 100, "AR100": 100}
    expected |= {"APm": 100, "ARs": 100, "ARm": 100}  # sizes: the wrong box ranks below the small, outside the medium
    expected |= {"threshold": 0.7, "precision": 200 / 3, "recall": 100, "f1": 80}
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    assert metrics["APl"] is None and metrics["ARl"] is None
    cat, dog = metrics["per_class"]["cat"], metrics["per_class"]["dog"]
    assert cat["AP"] == pytest.approx(ap) and (cat["num_boxes"], cat["num_detections"]) == (2, 3)
    assert dog["AP"] is None and dog["recall"] is None and dog["num_boxes"] == 0


@both
def test_loose_box_counts_up_to_its_iou(evaluator):
    """IoU 0.8 passes 0.50, 0.55 .. 0.80: seven of the ten thresholds."""
    annotations = coco_json({1: [(1, 0, 0, 10, 10)]}, NAMES)
    metrics = coco_metrics(annotations, [detection(1, 1, [0, 0, 10, 8], 0.5)], evaluator)
    assert metrics["AP"] == pytest.approx(70) and metrics["AP75"] == pytest.approx(100)


@both
def test_annotation_id_zero_and_repeated_ids_count_like_others(evaluator):
    annotations = coco_json({1: [(1, 0, 0, 10, 10), (1, 30, 30, 10, 10)]}, NAMES)
    for ids in ((0, 1), (4, 4)):
        for row, number in zip(annotations["annotations"], ids, strict=True):
            row["id"] = number
        rows = [detection(1, 1, row["bbox"], 0.5) for row in annotations["annotations"]]
        assert coco_metrics(annotations, rows, evaluator)["AP"] == pytest.approx(100)


@both
def test_no_detections_score_zero(evaluator):
    metrics = coco_metrics(coco_json({1: [(1, 0, 0, 10, 10)], 2: []}, NAMES), [], evaluator)
    assert (metrics["AP"], metrics["AR100"], metrics["recall"]) == (0, 0, 0) and metrics["threshold"] is None


@both
def test_no_boxes_score_nothing(evaluator):
    metrics = coco_metrics(coco_json({1: []}, NAMES), [detection(1, 1, [0, 0, 10, 10], 0.5)], evaluator)
    assert all(metrics[name] is None for name in METRICS)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


@both
def test_nothing_reaches_the_console_and_the_input_stays_as_it_was(evaluator, capfd, caplog):
    caplog.set_level("INFO")
    annotations = coco_json({1: [(1, 0, 0, 10, 10)]}, NAMES)
    rows = [detection(1, 1, [0, 0, 10, 8], 0.5)]
    before = json.dumps([annotations, rows])
    coco_metrics(annotations, rows, evaluator)
    assert json.dumps([annotations, rows]) == before
    assert capfd.readouterr() == ("", "") and not caplog.records


def coco_case(shared):
    path = shared("data/coco_mini/annotations/instances_val2017.json")
    return path, simulated(json.loads(path.read_text()), seed=0, crowded=300)


def test_evaluators_agree_on_coco_with_crowds_and_more_than_100_detections(shared):
    path, rows = coco_case(shared)
    truth = ground_truth(path)
    assert truth.crowd.sum() == 16
    own, fast, slow = (accumulate(truth, results(rows, truth), name) for name in EVALUATORS)
    for key, cells in slow.items():
        np.testing.assert_array_equal(own[key], cells)
        np.testing.assert_allclose(fast[key], cells, rtol=0, atol=1e-11)


def test_metrics_equal_pycocotools_used_directly(shared, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path, rows = coco_case(shared)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO(str(path))
        reference = COCOeval(index, index.loadRes(str(tmp_path / "rows.json")), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    metrics = coco_metrics(path, tmp_path / "rows.json")
    np.testing.assert_allclose([metrics[name] for name in METRICS], 100 * reference.stats, rtol=0, atol=1e-9)
    person = reference.eval["precision"][:, :, 0, 0, 2]
    assert metrics["per_class"]["person"]["AP"] == pytest.approx(100 * person.mean(), abs=1e-9)


def test_classes_with_one_name_stay_apart():
    annotations = coco_json({1: [(1, 0, 0, 10, 10)]}, {1: "cat", 2: "cat"})
    metrics = coco_metrics(annotations, [detection(1, 2, [0, 0, 10, 10], 0.5)])
    assert list(metrics["per_class"]) == ["cat (1)", "cat (2)"]


def test_unknown_and_missing_evaluators_are_named(monkeypatch):
    annotations = coco_json({1: []}, NAMES)
    with pytest.raises(
        UserError, match="TEST.EVALUATOR: 'pycoco' is not one of numpy, faster, pycocotools; did you mean"
    ):
        coco_metrics(annotations, [], "pycoco")
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core.coco", None)
    with pytest.raises(UserError, match="install requirements.txt, or use TEST.EVALUATOR numpy"):
        coco_metrics(annotations, [], "faster")


def test_tables_show_every_metric_and_class():
    annotations = coco_json({1: [(1, 0, 0, 10, 10)]}, NAMES)
    metrics = coco_metrics(annotations, [detection(1, 1, [0, 0, 10, 8], 0.25)])
    heads, cells, point = format_metrics(metrics).splitlines()
    assert heads.split() == list(METRICS)
    assert cells.split()[:5] == ["70.00", "100.00", "100.00", "70.00", "-"]
    assert "score >= 0.250" in point and "precision 100.00, recall 100.00" in point
    rows = format_per_class(metrics).splitlines()
    assert len({len(row) for row in rows}) == 1
    assert rows[1].split()[:3] == ["cat", "1", "70.00"] and rows[2].split()[:3] == ["dog", "0", "-"]
    assert "no detection matches" in format_metrics(coco_metrics(annotations, []))
