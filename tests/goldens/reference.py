"""Opens the reference runs of Caffe2 Detectron, detectron2 and torchvision, and compares with them.

The whole files lie outside the repository. A small extract of some is tracked in `tests/files/goldens`, with the same
names and keys but fewer samples, so that the comparison also runs without them.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, shared_path

from retinanet.config import load_config
from retinanet.modeling.build import build_model
from retinanet.structures import Batch, Target, pad_targets
from retinanet.weights.load import build_weights

EXTRACTS = ROOT / "tests" / "files" / "goldens"  # written by extract.py
NUM_ANCHORS = 9


def reference_folder() -> Path:
    """Return the folder of the whole references where it is on this machine, else that of the extracts."""
    try:
        return shared_path("goldens")
    except pytest.skip.Exception:
        return EXTRACTS


def present(pattern: str) -> list[str]:
    """Return the part that * stands for in every reference file that matches, such as "caffe2/forward_*.npz"."""
    before, after = Path(pattern).name.split("*")
    names = sorted(path.name for path in reference_folder().glob(pattern))
    return [name.removeprefix(before).removesuffix(after) for name in names]


def arrays(relative: str) -> dict[str, np.ndarray]:
    with np.load(reference_folder() / relative) as file:
        return dict(file)


def numbers(relative: str) -> dict:
    return json.loads((reference_folder() / relative).read_text())


def load_model(config: str, weights: Path, *opts):
    """Return (cfg, model in evaluation mode) of a file under configs/ with these weights; nothing may be left over."""
    cfg = load_config(ROOT / "configs" / config, ["MODEL.WEIGHTS", str(weights), *map(str, opts)])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    report = build_weights(cfg, model)
    assert not [*report.missing, *report.initialised, *report.reinitialised, *report.refused, *report.unexpected]
    assert report.warnings == []
    return cfg, model


def with_boxes(batch: Batch, targets: list[tuple]) -> Batch:
    """Return `batch` with ground truth: (boxes, labels) of each image, in resized pixels."""
    made = [Target(boxes=torch.tensor(boxes).float().reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.int64))
            for boxes, labels in targets]  # fmt: skip
    batch.gt_boxes, batch.gt_labels = pad_targets(made)
    return batch


def channels_first(level: torch.Tensor, height: int, width: int) -> np.ndarray:
    """Return an output (N, H*W*A, X) as a head's convolution gives it, (N, A*X, H, W)."""
    columns = level.detach().unflatten(1, (height, width, NUM_ANCHORS)).permute(0, 3, 4, 1, 2)
    return columns.flatten(1, 2).numpy()


def largest_gap(found: np.ndarray, reference: dict, name: str) -> float:
    """Return the largest difference from `name` of a reference, which holds it whole, or as samples idx and val."""
    if name in reference:
        return float(np.abs(found.reshape(reference[name].shape) - reference[name]).max())
    return float(np.abs(found.reshape(-1)[reference[f"{name}/idx"]] - reference[f"{name}/val"]).max())


def assert_detections(found: dict, boxes, scores, labels, box_atol: float, score_atol: float) -> None:
    """Compare the detections of an image by rank; ranks whose scores are within 1e-6 of each other may trade places."""
    assert len(found["scores"]) == len(scores)
    np.testing.assert_allclose(found["scores"].numpy(), scores, rtol=0, atol=score_atol)
    left = set(range(len(scores)))
    for box, score, label in zip(found["boxes"].numpy(), scores, found["labels"].numpy(), strict=True):
        near = [rank for rank in left if abs(scores[rank] - score) < 1e-6 and labels[rank] == label
                and np.abs(boxes[rank] - box).max() < box_atol]  # fmt: skip
        assert near, (box, score, label)
        left.remove(near[0])


def assert_gradients(model: torch.nn.Module, native: dict[str, str], case: dict, samples: dict, rtol: float) -> None:
    """Compare d(loss) of the parameters in `case["grad"]` (their names there -> `native`) with l2, sum and samples."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in case["grad"].items():
        gradient = gradients[native[name]].double().numpy()
        tolerance = rtol * expected["absmax"]
        assert abs(np.abs(gradient).max() - expected["absmax"]) <= tolerance, name
        assert np.linalg.norm(gradient) == pytest.approx(expected["l2"], rel=rtol), name
        sampled = gradient.reshape(-1)[samples[f"grad_idx/{name}"]]
        np.testing.assert_allclose(sampled, samples[f"grad_val/{name}"], rtol=0, atol=tolerance, err_msg=name)


def assert_matches(loss, outputs: dict, batch: Batch, samples: dict) -> None:
    """Compare which anchors of each image are positive, for which box, and which are ignored."""
    matched = loss.assign(outputs["anchors"], batch.gt_boxes, batch.gt_labels).matched_idx.numpy()
    for image, row in enumerate(matched):
        positive = np.flatnonzero(row >= 0)
        np.testing.assert_array_equal(positive, samples.get(f"match/{image}/pos_anchor", []))
        np.testing.assert_array_equal(row[positive], samples.get(f"match/{image}/pos_gt", []))
        np.testing.assert_array_equal(np.flatnonzero(row == -2), samples.get(f"match/{image}/ignored_anchor", []))
