"""torchvision's own RetinaNets, with the configurations of configs/torchvision: forward, detections, training."""

import numpy as np
import pytest
import torch
from goldens.recipes import torch_tensors
from goldens.reference import (
    arrays,
    assert_detections,
    assert_gradients,
    assert_matches,
    largest_gap,
    load_model,
    numbers,
    present,
    reference_folder,
    with_boxes,
)

from retinanet.data.loader import build_image_batcher
from retinanet.modeling.build import build_loss, build_postprocess
from retinanet.structures import Batch
from retinanet.weights.torchvision import _TABLE

CONFIGS = {"v1": "torchvision/retinanet_resnet50_fpn.yaml", "v2": "torchvision/retinanet_resnet50_fpn_v2.yaml"}
EVAL = [(version, name) for version in CONFIGS for name in present(f"torchvision/{version}_eval_*.npz")]
TRAINING = [(version, name) for version in CONFIGS for name in present(f"torchvision/{version}_train_*.npz")]


@pytest.fixture(scope="module")
def cases() -> dict:
    return numbers("torchvision/cases.json")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict:
    """Version -> a file with its weights."""
    folder = tmp_path_factory.mktemp("torchvision")
    for version in CONFIGS:
        tensors = torch_tensors(reference_folder() / "torchvision", version)
        torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, folder / f"{version}.pth")
    return {version: folder / f"{version}.pth" for version in CONFIGS}


def resize_of(case: dict) -> tuple:
    return "INPUT.MIN_SIZE_TEST", case.get("min_size", 128), "INPUT.MAX_SIZE_TEST", case.get("max_size", 10000)


def make_batch(cfg, images: list[str]) -> Batch:
    stored = arrays("torchvision/images.npz")
    return build_image_batcher(cfg)([np.ascontiguousarray(stored[name][..., ::-1]) for name in images])


@pytest.mark.parametrize(("version", "name"), EVAL)
def test_outputs_and_detections(version, name, weights, cases):
    case = cases["models"][version]["cases"][f"eval_{name}"]
    reference = arrays(f"torchvision/{version}_eval_{name}.npz")
    cfg, model = load_model(CONFIGS[version], weights[version], *resize_of(case))
    batch = make_batch(cfg, case["images"])
    assert list(batch.images.shape[-2:]) == case["batched_hw"]
    assert batch.image_sizes.tolist() == case["resized_hw"]
    with torch.no_grad():
        outputs = model(model.normalize(batch.images, batch.image_sizes))
    for level in range(5):
        for kind in ("logits", "deltas"):
            assert largest_gap(outputs[kind][level].numpy(), reference, f"{kind}/p{level + 3}") < 1e-4
        anchors = outputs["anchors"][level].numpy()
        np.testing.assert_allclose(anchors[:20], reference[f"anchors/p{level + 3}/first"][:20], atol=1e-4)
        np.testing.assert_allclose(anchors[-20:], reference[f"anchors/p{level + 3}/last"][-20:], atol=1e-4)
    for image, found in enumerate(build_postprocess(cfg)(outputs, batch)):
        boxes, scores, labels = (reference[f"det/{image}/{key}"] for key in ("boxes", "scores", "labels"))
        assert_detections(found, boxes, scores, labels, box_atol=4e-3, score_atol=1e-4)


@pytest.mark.parametrize(("version", "name"), TRAINING)
def test_losses_gradients_and_matches(version, name, weights, cases):
    case = cases["models"][version]["cases"][f"train_{name}"]
    samples = arrays(f"torchvision/{version}_train_{name}.npz")
    opts = ("MODEL.BACKBONE.FREEZE_AT", 0, *resize_of(case))
    batch_statistics = name.endswith("batchstats")
    if batch_statistics:
        opts += ("MODEL.BACKBONE.NORM", "BN")
    cfg, model = load_model(CONFIGS[version], weights[version], *opts)
    model.train(batch_statistics)
    boxes = [cases["boxes"][which] for which in case["boxes"]]
    batch = make_batch(cfg, case["images"])
    scales = batch.scales.repeat(1, 2).tolist()
    targets = [  # labels there are class id + 1, and row 0 is the background
        ([[side * scale for side, scale in zip(box, row, strict=True)] for box in xyxy], [c + 1 for c in classes])
        for (xyxy, classes), row in zip(boxes, scales, strict=True)
    ]
    batch = with_boxes(batch, targets)
    loss = build_loss(cfg)
    outputs = model(model.normalize(batch.images, batch.image_sizes))
    losses = loss(outputs, batch.gt_boxes, batch.gt_labels)
    assert losses["loss_cls"].item() == pytest.approx(case["loss"]["classification"], rel=1e-4, abs=1e-4)
    assert losses["loss_box"].item() == pytest.approx(case["loss"]["bbox_regression"], rel=1e-4, abs=1e-4)
    if not batch_statistics:
        assert_matches(loss, outputs, batch, samples)
    sum(losses.values()).backward()
    native = {theirs: _TABLE.translate(theirs) for theirs in case["grad"]}
    assert_gradients(model, native, case, samples, rtol=1e-2 if batch_statistics else 1e-3)
