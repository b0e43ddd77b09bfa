"""From a model's detections to COCO results and files, with a stand-in for the network."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulated_detections import coco_json, detection
from torch import nn

from retinanet.engine import evaluate as evaluation
from retinanet.engine.coco_metrics import coco_metrics
from retinanet.engine.evaluate import evaluate, merge, picture_page, predict, to_coco
from retinanet.structures import Batch, Detections

CPU = torch.device("cpu")


class Echo(nn.Module):
    """Returns the images' mean as "outputs"; one part is in training mode, one frozen in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.frozen.eval()
        self.modes = []

    def normalize(self, images, image_sizes):
        return images.float()

    def forward(self, images):
        self.modes.append((self.training, self.norm.training, self.frozen.training))
        return self.norm(images).mean((1, 2, 3))


def batch(*image_ids) -> Batch:
    count = len(image_ids)
    sizes = torch.full((count, 2), 32)
    gt_boxes, gt_labels = torch.zeros(count, 8, 4), torch.full((count, 8), -1)
    return Batch(
        torch.zeros(count, 3, 32, 32, dtype=torch.uint8), sizes, sizes, torch.ones(count, 2), gt_boxes, gt_labels,
        list(image_ids),
    )  # fmt: skip


def found(boxes, labels, scores) -> Detections:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Detections(boxes=boxes, labels=torch.tensor(labels, dtype=torch.int64), scores=torch.tensor(scores).float())


def one_per_image(outputs, images: Batch) -> list[Detections]:
    """A box whose corner is the image id; image 3 has none."""
    return [found([] if i == 3 else [[i, 0, i + 10, 20]], [] if i == 3 else [1], [] if i == 3 else [0.5])
            for i in images.image_ids]  # fmt: skip


def test_results_have_the_data_sets_ids_and_xywh_boxes():
    rows = to_coco([found([[1, 2, 4, 8], [0, 0, 0.5, 0]], [1, 0], [0.75, 0.5]), found([], [], [])], [44, 7], (3, 90))
    assert rows == [
        {"image_id": 44, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.75},
        {"image_id": 44, "category_id": 3, "bbox": [0, 0, 0.5, 0], "score": 0.5},
    ]


def test_detectron_boxes_hold_their_last_pixel():
    (row,) = to_coco([found([[1, 2, 4, 8]], [0], [0.5])], [1], (1,), plus_one=True)
    assert row["bbox"] == [1, 2, 4, 7]


def test_a_box_turned_inside_out_by_scaling_has_no_extent():
    """Detectron's y2 = y1 + h - 1 of h 0.3, on an image that was shrunk to a quarter: 4 * (0.3 - 1) + 1 = -1.8."""
    (row,) = to_coco([found([[4, 8, 10, 5.2]], [0], [0.5])], [1], (1,), plus_one=True)
    assert row["bbox"] == [4, 8, 7, 0]


def test_results_survive_json_unchanged():
    values = np.random.default_rng(0).random(4).astype(np.float32)
    rows = to_coco([found([[0.1, 0.2, *(values[:2] + 1)]], [0], [values[3]])], [1], (1,))
    assert json.loads(json.dumps(rows)) == rows
    assert np.float32(rows[0]["score"]) == values[3]


def test_predict_runs_in_evaluation_mode_and_restores_every_mode():
    model = Echo()
    before = model.norm.running_mean.clone()
    rows = predict(model, [batch(1, 2), batch(3)], one_per_image, CPU, (5, 6))
    assert [row["image_id"] for row in rows] == [1, 2] and {row["category_id"] for row in rows} == {6}
    assert model.modes == [(False, False, False)] * 2
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)
    torch.testing.assert_close(model.norm.running_mean, before, rtol=0, atol=0)


def test_modes_are_restored_when_the_model_fails():
    model = Echo()

    def fail(outputs, images):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        predict(model, [batch(1)], fail, CPU, (5, 6))
    assert model.training and model.norm.training and not model.frozen.training


def test_predict_keeps_no_graph_and_no_inference_tensors():
    """Tensors made under inference mode, such as cached anchors, could not be used in training afterwards."""
    seen = []
    predict(Echo(), [batch(1)], lambda outputs, images: seen.append(outputs) or [found([], [], [])], CPU, (1,))
    assert not seen[0].requires_grad and not seen[0].is_inference()


def test_progress_wraps_the_loader():
    calls = []
    predict(Echo(), [batch(1)], one_per_image, CPU, (5, 6), progress=lambda loader: calls.append(1) or loader)
    assert calls == [1]


def test_amp_runs_the_model_in_the_lower_precision():
    seen = []

    class Dense(Echo):
        def forward(self, images):
            return nn.functional.linear(images.flatten(1), torch.ones(1, images[0].numel()))

    predict(Dense(), [batch(1)], lambda out, _: seen.append(out.dtype) or [found([], [], [])], CPU, (1,), amp="bf16")
    assert seen == [torch.bfloat16]


def test_image_seen_by_two_processes_counts_once():
    first = [detection(8, 1, [0, 0, 1, 1], 0.5), detection(8, 1, [0, 0, 2, 2], 0.4)]
    second = [detection(2, 1, [0, 0, 1, 1], 0.5), detection(8, 1, [0, 0, 1, 1], 0.5)]
    assert merge([first, second]) == [second[0], *first]


class Pictures:
    """Two images with one box each, as `CocoDataset` would show them."""

    name, category_ids, class_names, plus_one_boxes = "pictures", (5, 6), ("cat", "dog"), False

    def __init__(self, folder):
        self.annotations_file = folder / "pictures.json"
        boxes = {1: [(6, 1, 0, 10, 20)], 3: [(5, 0, 0, 30, 30)]}
        self.annotations_file.write_text(json.dumps(coco_json(boxes, {5: "cat", 6: "dog"})))
        self.image_ids = np.array([1, 3])

    def __len__(self):
        return 2

    def read(self, index):
        boxes, labels = torch.tensor([[[1.0, 0, 11, 20]], [[0.0, 0, 30, 30]]]), torch.tensor([[1], [0]])
        return np.full((100, 100, 3), 80, np.uint8), {"boxes": boxes[index], "labels": labels[index]}


def test_evaluate_writes_results_and_metrics(tmp_path):
    dataset = Pictures(tmp_path)
    metrics, rows = evaluate(Echo(), [batch(3), batch(1)], one_per_image, CPU, dataset, tmp_path / "inference")
    assert rows == [{"image_id": 1, "category_id": 6, "bbox": [1, 0, 10, 20], "score": 0.5}]
    assert json.loads((tmp_path / "inference/predictions.json").read_text()) == rows
    assert json.loads((tmp_path / "inference/metrics.json").read_text()) == metrics
    assert metrics == coco_metrics(dataset.annotations_file, rows)
    assert metrics["per_class"]["dog"]["AP"] == pytest.approx(100) and metrics["AP"] == pytest.approx(50)


def test_evaluation_of_two_sets_reports_the_first_and_prefixes_the_second(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "build_postprocess", lambda cfg: one_per_image)
    monkeypatch.setattr(evaluation, "build_test_loader", lambda cfg, dataset, rank, world_size: [batch(1, 3)])
    first, second = Pictures(tmp_path), Pictures(tmp_path)
    second.name = "more"
    test = SimpleNamespace(EVALUATOR="pycocotools", AMP="auto", OVERLAP_SCORING=True)
    cfg = SimpleNamespace(TEST=test, SOLVER=SimpleNamespace(AMP="fp16"))
    pages, curves = [], []
    writer = SimpleNamespace(
        image=lambda iteration, name, picture: pages.append((iteration, name, picture)),
        precision_recall=lambda iteration, name, counts: curves.append((iteration, name, counts)),
    )
    run = evaluation.build_evaluation(cfg, [first, second], CPU, tmp_path, writer)
    metrics = run(Echo(), 7)
    assert metrics["AP"] == metrics["more/AP"] == pytest.approx(50) and "pictures/AP" not in metrics
    assert (tmp_path / "inference/more/metrics.json").is_file()
    assert [page[:2] for page in pages] == [(7, "detections/pictures"), (7, "detections/more")]
    assert all(page[2].dtype == np.uint8 and page[2].shape[2] == 3 for page in pages)
    assert [curve[:2] for curve in curves[:3]] == [(7, f"pictures/{name}") for name in ("all classes", "cat", "dog")]
    assert curves[0][2]["true"][0] == 1 and curves[0][2]["missed"][0] == 1 and len(curves) == 6


def test_page_shows_ground_truth_beside_detections_above_the_threshold(tmp_path):
    dataset = Pictures(tmp_path)
    rows = [detection(1, 6, [50, 50, 40, 40], 0.6), detection(1, 6, [5, 60, 20, 20], 0.2)]
    low, high = (picture_page(dataset, rows, threshold) for threshold in (0.1, 0.5))
    none = picture_page(dataset, [], None)
    assert low.shape == high.shape == none.shape
    changed = [np.nonzero((page != none).any((0, 2)))[0] for page in (low, high)]
    assert changed[0].size > changed[1].size > 0
    assert changed[0].min() > low.shape[1] / 4  # nothing but the detections' picture of image 1 differs
