"""Detection as one graph: equal to the eager post-processing, image by image, before anything is exported."""

import math

import pytest
import torch
from model_cases import randomize, small_cfg

from retinanet.deploy.export import build_facts, make_graph
from retinanet.deploy.graph import apart_nms, strict_threshold
from retinanet.deploy.onnx_nms import onnx_suppress
from retinanet.engine.evaluate import detect
from retinanet.modeling.build import build_model, build_postprocess
from retinanet.modeling.postprocess import CONVENTIONS
from retinanet.ops.nms import nms
from retinanet.structures import Batch

CLASSES = [{"id": number, "name": f"class {number}"} for number in (1, 4, 9)]


def detector(*opts, norms=("FrozenBN", "BCN", "GN")):
    """Return configuration and model whose scores lie between 0 and 1 and not at their ends."""
    groups = ["MODEL.NORM_OPTIONS.GN.GROUPS", 4, "MODEL.NORM_OPTIONS.BCN.GROUPS", 4]
    cfg = small_cfg("NORMS", norms, *groups, "TEST.PRE_NMS_TOPK", 60, *opts)
    torch.manual_seed(0)
    model = randomize(build_model(cfg)).eval()
    images = batch_of(2, 128, 128)
    with torch.no_grad():
        logits = torch.cat(model(model.normalize(images.images, images.image_sizes))["logits"], 1)
        model.head.cls_pred.weight.div_(logits.std())
        model.head.cls_pred.bias.fill_(-float(logits.mean() / logits.std()) - 2)
    return cfg, model


def batch_of(count: int, height: int, width: int, seed: int = 0) -> Batch:
    """Return noise of blotches in `count` images, each a little smaller than the one before."""
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(count, 3, height // 8, width // 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").to(torch.uint8)
    sizes = torch.tensor([[height - 7 * i, width - 11 * i] for i in range(count)])
    originals = (sizes * 1.7).long()
    scales = (sizes / originals).flip(1).float()
    return Batch(images, sizes, originals, scales, torch.zeros(count, 8, 4), torch.full((count, 8), -1))


def inputs(batch: Batch) -> tuple:
    return batch.images, batch.image_sizes, batch.original_sizes, batch.scales


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("convention", list(CONVENTIONS))
def test_graph_gives_the_detections_of_eager_in_every_convention(convention, kind):
    opts = ("MODEL.BOX.CONVENTION", convention, "MODEL.ANCHORS.CONVENTION", convention, "TEST.MAX_DETS", 30)
    cfg, model = detector(*opts)
    graph, _ = make_graph(model, build_facts(cfg, CLASSES, None, "inside"), build_postprocess(cfg), kind)
    for shape in ((1, 64, 64), (3, 96, 160)):  # P7 is one cell; padding differs
        batch = batch_of(*shape, seed=shape[0])
        expected = detect(model, batch, build_postprocess(cfg))
        with torch.no_grad():
            boxes, scores, labels, counts = graph(*inputs(batch))
        assert boxes.shape == (shape[0], 30, 4) and counts.tolist() == [len(one["scores"]) for one in expected]
        assert counts.min() > 5
        for image, one in enumerate(expected):
            count = int(counts[image])
            torch.testing.assert_close(boxes[image, :count], one["boxes"], rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(scores[image, :count], one["scores"], rtol=1e-4, atol=1e-5)
            assert labels[image, :count].tolist() == one["labels"].tolist()
            assert not boxes[image, count:].any() and not scores[image, count:].any()
            assert (labels[image, count:] == -1).all()


def test_candidates_are_sorted_and_those_below_the_threshold_have_score_zero():
    cfg, model = detector("TEST.SCORE_THRESH", 0.2)
    graph, _ = make_graph(model, build_facts(cfg, CLASSES, None, "outside"), build_postprocess(cfg), "pt2")
    with torch.no_grad():
        boxes, scores, labels = graph(*inputs(batch_of(2, 64, 96))[:2])
    assert boxes.shape == (2, 300, 4) and (scores.diff(dim=1) <= 0).all()
    assert ((scores > 0.2) | (scores == 0)).all() and (scores == 0).any() and (scores > 0).any()
    assert ((labels == -1) == (scores == 0)).all()


def random_candidates(seed: int, far: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(3, 200, 2, generator=generator) * 100 + far
    boxes = torch.cat([corner, corner + 1 + 40 * torch.rand(3, 200, 2, generator=generator)], 2)
    labels = torch.randint(0, 80, (3, 200), generator=generator) // 30
    return boxes, labels, torch.arange(200).expand(3, 200) < torch.tensor([[200], [57], [0]])


@pytest.mark.parametrize("plus_one, inclusive", [(False, False), (True, True)])
@pytest.mark.parametrize("far", [0.0, 30000.0])
@pytest.mark.parametrize("suppress", [apart_nms, onnx_suppress(3)])
def test_suppression_of_the_graph_keeps_what_ours_keeps(suppress, far, plus_one, inclusive):
    """One image is full, one partly, one empty; far away, where a float32 offset of a class would cost precision."""
    boxes, labels, valid = random_candidates(0, far)
    expected = nms(boxes, labels, valid, 0.3, 200, plus_one, inclusive)
    kept = suppress(boxes, labels, valid, 0.3, plus_one, inclusive) & valid
    for image in range(3):
        found = expected[image][expected[image] >= 0]
        assert torch.nonzero(kept[image]).flatten().tolist() == found.tolist()
    assert 5 < int(kept[0].sum()) < 200 and not kept[2].any()


def test_an_overlap_at_the_threshold_goes_only_where_it_is_inclusive():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5]]])  # IoU 0.5, exactly
    labels, valid = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    assert apart_nms(boxes, labels, valid, 0.5, False, False).tolist() == [[True, True]]
    assert apart_nms(boxes, labels, valid, 0.5, False, True).tolist() == [[True, False]]
    assert apart_nms(boxes, labels + torch.tensor([0, 1]), valid, 0.5, False, True).tolist() == [[True, True]]
    assert strict_threshold(0.5, False) == 0.5 and 0.5 - 1e-12 < strict_threshold(0.5, True) < 0.5
    assert math.isclose(strict_threshold(0.5, True), 0.5)
