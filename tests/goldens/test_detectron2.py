"""detectron2's own RetinaNet, with the configuration of configs/detectron2: forward, detections, losses, gradients."""

import numpy as np
import pytest
import torch
from goldens.recipes import torch_tensors
from goldens.reference import (
    arrays,
    assert_detections,
    assert_gradients,
    assert_matches,
    channels_first,
    largest_gap,
    load_model,
    numbers,
    present,
    reference_folder,
    with_boxes,
)

from retinanet.engine.optim import build_optimizer, set_lr
from retinanet.modeling.build import build_loss, build_postprocess
from retinanet.structures import Batch
from retinanet.weights.detectron2 import _table

CONFIG = "detectron2/retinanet_R50_FPN_1x.yaml"
OPTIONS = {"a_beta0.1": ("MODEL.LOSS.BETA", 0.1), "a_giou": ("MODEL.LOSS.BOX", "giou")}


@pytest.fixture(scope="module")
def cases() -> dict:
    return numbers("detectron2/cases.json")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    tensors = torch_tensors(reference_folder() / "detectron2")
    path = tmp_path_factory.mktemp("detectron2") / "model_final.pth"
    torch.save({"model": {name: torch.from_numpy(value) for name, value in tensors.items()}, "iteration": 9}, path)
    return path


@pytest.fixture(scope="module")
def loaded(weights):
    return load_model(CONFIG, weights)


def make_batch(case: dict) -> Batch:
    """The images of a case, BGR, padded together as they are: the reference was not resized."""
    images, stored = case["images"], arrays("detectron2/images.npz")
    height, width = case.get("padded_hw", (128, 160))
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    sizes = torch.tensor([stored[name].shape[:2] for name in images])
    for row, name in enumerate(images):
        h, w = stored[name].shape[:2]
        padded[row, :, :h, :w] = torch.from_numpy(stored[name][..., ::-1].copy()).permute(2, 0, 1)
    return Batch(padded, sizes, sizes, torch.ones(len(images), 2), torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("name", present("detectron2/eval_*.npz"))
def test_logits_deltas_and_anchors_of_every_level(name, loaded, cases):
    case, reference = cases["cases"][f"eval_{name}"], arrays(f"detectron2/eval_{name}.npz")
    model, batch = loaded[1], make_batch(case)
    with torch.no_grad():
        outputs = model(model.normalize(batch.images, batch.image_sizes))
    for level in range(5):
        size = [-(-side // 2 ** (level + 3)) for side in case["padded_hw"]]
        for kind in ("logits", "deltas"):
            found = channels_first(outputs[kind][level], *size)
            assert largest_gap(found, reference, f"{kind}/p{level + 3}") < 1e-4
        anchors = outputs["anchors"][level].double().numpy()
        assert len(anchors) == case["anchors"][level]["count"]
        np.testing.assert_allclose(anchors.sum(0), case["anchors"][level]["sum_xyxy"], rtol=1e-5)
        np.testing.assert_allclose(anchors[:20], reference[f"anchors/p{level + 3}/first"][:20], atol=1e-4)
        np.testing.assert_allclose(anchors[-20:], reference[f"anchors/p{level + 3}/last"][-20:], atol=1e-4)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", present("detectron2/eval_*.npz"))
def test_detections_by_rank(name, times, loaded, cases):
    case, reference = cases["cases"][f"eval_{name}"], arrays(f"detectron2/eval_{name}.npz")
    cfg, model = loaded
    batch = make_batch(case)
    batch.original_sizes, batch.scales = batch.original_sizes * times, batch.scales / times
    with torch.no_grad():
        outputs = model(model.normalize(batch.images, batch.image_sizes))
    for image, found in enumerate(build_postprocess(cfg)(outputs, batch)):
        scores, classes = (reference[f"det/{image}/{key}"] for key in ("scores", "classes"))
        boxes = reference[f"{'det' if times == 1 else 'det_x2'}/{image}/boxes"]
        assert len(scores) == case["detections"][image]
        assert_detections(found, boxes, scores, classes, box_atol=4e-3 * times, score_atol=1e-4)


@pytest.mark.parametrize("name", present("detectron2/train_*.npz"))
def test_losses_gradients_and_matches(name, weights, cases):
    case, samples = cases["cases"][f"train_{name}"], arrays(f"detectron2/train_{name}.npz")
    cfg, model = load_model(CONFIG, weights, *OPTIONS.get(name, ()))
    model.train()
    batch = with_boxes(make_batch(case), [cases["facts"]["boxes"][boxes] for boxes in case["boxes"]])
    loss = build_loss(cfg)
    outputs = model(model.normalize(batch.images, batch.image_sizes))
    losses = loss(outputs, batch.gt_boxes, batch.gt_labels)
    assert losses["loss_cls"].item() == pytest.approx(case["loss"]["loss_cls"], rel=1e-4, abs=1e-4)
    assert losses["loss_box"].item() == pytest.approx(case["loss"]["loss_box_reg"], rel=1e-4, abs=1e-4)
    assert loss.running_positives.item() == pytest.approx(case["normalizer_after"], rel=1e-6)
    assert_matches(loss, outputs, batch, samples)
    sum(losses.values()).backward()
    frozen = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert frozen
    assert all(name.startswith(("backbone.conv1", "backbone.res2")) for name in frozen)
    native = {theirs: _table(2).translate(theirs) for theirs in case["grad"]}
    assert_gradients(model, native, case, samples, rtol=1e-3)


def test_three_steps_of_sgd(weights, cases):
    case = cases["cases"]["sgd_ab"]
    opts = ("SOLVER.MOMENTUM", case["momentum"], "SOLVER.WEIGHT_DECAY", case["weight_decay"])
    opts += ("SOLVER.WEIGHT_DECAY_NORM", case["weight_decay_norm"])
    cfg, model = load_model(CONFIG, weights, *opts)
    model.train()
    batch = with_boxes(make_batch(case), [cases["facts"]["boxes"][boxes] for boxes in case["boxes"]])
    loss, optimizer = build_loss(cfg), build_optimizer(cfg, model)
    set_lr(optimizer, case["lr"])
    for step in case["steps"]:
        outputs = model(model.normalize(batch.images, batch.image_sizes))
        losses = loss(outputs, batch.gt_boxes, batch.gt_labels)
        assert losses["loss_cls"].item() == pytest.approx(step["loss_cls"], rel=1e-4)
        assert losses["loss_box"].item() == pytest.approx(step["loss_box_reg"], rel=1e-4)
        assert loss.running_positives.item() == pytest.approx(step["normalizer"], rel=1e-6)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    for name, norm in case["l2_after"].items():
        found = parameters[_table(2).translate(name)].detach().double().norm().item()
        assert found == pytest.approx(norm, rel=1e-5), name
