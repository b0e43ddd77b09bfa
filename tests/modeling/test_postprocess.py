"""Detections against stored ones of Caffe2 Detectron, torchvision's own function, and slow loops for detectron2."""

import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from detection_cases import SyncWatch, reference
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.transform import resize_boxes

from retinanet.errors import UserError
from retinanet.modeling.anchors import AnchorGenerator
from retinanet.modeling.postprocess import CONVENTIONS, postprocess, postprocess_padded, split
from retinanet.ops.boxes import decode
from retinanet.ops.fixed_nms import fixed_nms
from retinanet.structures import HeadOutputs

SIZES = torch.tensor([[64, 96], [60, 50]])  # resized, unpadded
ORIGINAL = torch.tensor([[128, 192], [91, 76]])
SCALES = torch.tensor([[0.5, 0.5], [0.66, 0.66]])
SETTINGS = {"score_thresh": 0.05, "pre_nms_topk": 100, "nms_iou": 0.5, "max_dets": 20}


def random_outputs(convention, num_images=2, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    anchors = AnchorGenerator(2, 2, (0.5, 1.0), convention, strides=(8, 16, 32))((64, 96))
    return HeadOutputs(
        logits=[torch.randn(num_images, len(level), classes, generator=generator) * 2 - 2 for level in anchors],
        deltas=[torch.randn(num_images, len(level), 4, generator=generator) * 0.5 for level in anchors],
        anchors=anchors,
    )


def one_anchor(logits, box=(10.0, 10.0, 30.0, 20.0), levels=1):
    """Return the outputs of one image with one anchor a level, all the same, and no change to it."""
    return HeadOutputs(
        logits=[torch.tensor(logits).view(1, 1, -1)] * levels,
        deltas=[torch.zeros(1, 1, 4)] * levels,
        anchors=[torch.tensor([box])] * levels,
    )


def run(outputs, convention, sizes=(100, 100), original=(200, 200), scale=0.5, **settings):
    """Post-process one image."""
    sizes, original, scales = (torch.tensor([pair]) for pair in (sizes, original, (scale, scale)))
    (detections,) = postprocess(outputs, sizes, original, scales, **{**SETTINGS, **settings}, convention=convention)
    return detections


def assert_same(found, expected, rtol=1e-5, atol=1e-4):
    assert torch.equal(found["labels"], expected["labels"])
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=rtol, atol=atol)


def detectron2_loops(outputs, image, settings):
    """detectron2's inference for one image: threshold, top k of each level, suppression, scaling, clipping."""
    boxes, scores, labels = [], [], []
    for logits, deltas, anchors in zip(outputs["logits"], outputs["deltas"], outputs["anchors"], strict=True):
        probability = logits[image].sigmoid().flatten()
        chosen = torch.where(probability > settings["score_thresh"])[0]
        best = chosen[probability[chosen].argsort(descending=True)[: settings["pre_nms_topk"]]]
        rows, columns = best // logits.shape[2], best % logits.shape[2]
        boxes.append(decode(deltas[image, rows], anchors[rows]))
        scores.append(probability[best])
        labels.append(columns)
    boxes, scores, labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    kept = []
    for label in labels.unique():
        index = torch.where(labels == label)[0]
        kept.append(index[torchvision.ops.nms(boxes[index], scores[index], settings["nms_iou"])])
    kept = torch.cat(kept)
    kept = kept[scores[kept].argsort(descending=True)[: settings["max_dets"]]]
    height, width = ORIGINAL[image].tolist()
    factor = torch.tensor([width / SIZES[image, 1], height / SIZES[image, 0]]).repeat(2)
    boxes = torchvision.ops.clip_boxes_to_image(boxes[kept] * factor, (height, width))
    filled = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return {"boxes": boxes[filled], "scores": scores[kept][filled], "labels": labels[kept][filled]}


def test_scores_are_sigmoids_and_boxes_are_in_original_pixels():
    found = run(one_anchor([0.0, -9.0, 2.0]), "detectron2")
    assert found["labels"].tolist() == [2, 0]
    torch.testing.assert_close(found["scores"], torch.tensor([0.880797, 0.5]))
    assert found["boxes"].tolist() == [[20, 20, 60, 40]] * 2


def test_a_score_must_be_above_the_threshold():
    assert run(one_anchor([0.0]), "torchvision", score_thresh=0.5)["scores"].tolist() == []
    assert run(one_anchor([0.0]), "torchvision", score_thresh=0.4999)["scores"].tolist() == [0.5]


def test_detectron_takes_any_score_on_the_last_level():
    outputs = one_anchor([-9.0], levels=2)
    assert len(run(outputs, "detectron")["scores"]) == 1
    assert len(run(outputs, "detectron2")["scores"]) == 0
    assert len(run(one_anchor([-200.0]), "detectron")["scores"]) == 0  # the float32 sigmoid is exactly 0


def test_detectron_clips_to_the_last_pixel_of_the_original():
    outputs = one_anchor([3.0], box=(-20.0, 10.0, 300.0, 20.0))
    assert run(outputs, "detectron", original=(200, 150))["boxes"].tolist() == [[0, 20, 149, 40]]


def test_detectron_divides_by_the_scale_and_the_others_by_the_sizes():
    outputs = one_anchor([3.0])
    sizes = {"sizes": (100, 50), "original": (200, 200), "scale": 0.25}
    assert run(outputs, "detectron", **sizes)["boxes"].tolist() == [[40, 40, 120, 80]]
    assert run(outputs, "torchvision", **sizes)["boxes"].tolist() == [[40, 20, 120, 40]]


def test_detectron2_suppresses_before_it_clips_and_torchvision_after():
    anchors = torch.tensor([[40.0, 0.0, 200.0, 10.0], [40.0, 0.0, 100.0, 10.0]])  # IoU 60 / 160; clipped to 100, 1
    outputs = HeadOutputs(logits=[torch.tensor([[[2.0], [1.0]]])], deltas=[torch.zeros(1, 2, 4)], anchors=[anchors])
    assert len(run(outputs, "detectron2")["scores"]) == 2
    assert len(run(outputs, "torchvision")["scores"]) == 1


def test_only_detectron2_drops_boxes_outside_the_image():
    outputs = one_anchor([3.0], box=(110.0, 10.0, 130.0, 20.0))
    assert [len(run(outputs, convention)["scores"]) for convention in CONVENTIONS] == [1, 0, 1]


def test_levels_contribute_at_most_the_best_pairs():
    outputs = random_outputs("detectron2", num_images=1)
    found = run(outputs, "detectron2", nms_iou=1.0, score_thresh=0.0, pre_nms_topk=4, max_dets=100)
    expected = torch.cat([level.flatten().sigmoid().sort(descending=True).values[:4] for level in outputs["logits"]])
    torch.testing.assert_close(found["scores"], expected.sort(descending=True).values[: len(found["scores"])])
    assert 4 < len(found["scores"]) <= 12


def test_equal_scores_come_in_the_order_of_level_anchor_and_class():
    anchors = torch.tensor([[0.0, 0.0, 8.0, 8.0], [20.0, 0.0, 28.0, 8.0], [40.0, 0.0, 48.0, 8.0]])
    outputs = HeadOutputs(logits=[torch.zeros(1, 3, 2)], deltas=[torch.zeros(1, 3, 4)], anchors=[anchors])
    found = run(outputs, "torchvision", original=(100, 100), pre_nms_topk=5)
    assert found["boxes"][:, 0].tolist() == [0, 0, 20, 20, 40]
    assert found["labels"].tolist() == [0, 1, 0, 1, 0]


def test_selection_equals_a_stable_sort_of_all_pairs():
    outputs = random_outputs("detectron2")
    coarse = HeadOutputs(**{**outputs, "logits": [(level * 2).round() / 2 for level in outputs["logits"]]})  # many ties
    arguments = (SIZES, ORIGINAL, SCALES)
    settings = {**SETTINGS, "nms_iou": 1.0, "score_thresh": 0.0, "max_dets": 300}
    found = postprocess(coarse, *arguments, **settings, convention="torchvision")
    for image, detections in enumerate(found):
        boxes, scores, labels = [], [], []
        for logits, deltas, anchors in zip(*coarse.values(), strict=True):
            order = logits[image].flatten().argsort(descending=True, stable=True)[:100]
            boxes.append(decode(deltas[image, order // 3], anchors[order // 3]))
            scores.append(logits[image].flatten()[order].sigmoid())
            labels.append(order % 3)
        order = torch.cat(scores).argsort(descending=True, stable=True)
        clipped = torchvision.ops.clip_boxes_to_image(torch.cat(boxes), SIZES[image].tolist())[order]
        ratio = (ORIGINAL[image] / SIZES[image]).flip(0).repeat(2)
        expected = {"boxes": clipped * ratio, "scores": torch.cat(scores)[order], "labels": torch.cat(labels)[order]}
        assert_same(detections, expected)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_postprocessing_of_fixed_size_gives_the_same_detections_without_a_host_wait(convention):
    outputs = random_outputs(convention, num_images=2, seed=5)
    outputs["logits"] = [(level * 4).round() / 4 for level in outputs["logits"]]  # many equal scores
    outputs["deltas"] = [level + torch.tensor([3.0, 0, 0, 0]) for level in outputs["deltas"]]  # some leave the image
    expected = postprocess(outputs, SIZES, ORIGINAL, SCALES, **SETTINGS, convention=convention)
    with SyncWatch() as watch:
        padded = postprocess_padded(
            outputs, SIZES, ORIGINAL, SCALES, **SETTINGS, convention=convention, suppress=fixed_nms
        )
    assert not watch.waits and padded.boxes.shape == (2, 20, 4)
    assert 0 < int(padded.counts.min()) and (convention != "detectron2" or int(padded.counts.max()) < 20)
    for one, other in zip(split(padded), expected, strict=True):
        for key in expected[0]:
            assert torch.equal(one[key], other[key])


def test_detections_of_caffe2_detectron():
    def blob(name, count, height, width, draw):
        rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
        values = torch.from_numpy(draw(rng, (1, 9 * count, height, width)))
        return values.view(1, 9, count, height, width).permute(0, 3, 4, 1, 2).reshape(1, -1, count)

    logits, deltas = [], []
    for level, factor in zip(range(3, 8), (0.6, 0.7, 0.8, 0.9, 1.0), strict=True):
        shape = -(-128 // 2**level), -(-256 // 2**level)
        scores = blob(f"synth_prob_fpn{level}", 80, *shape, lambda rng, s, f=factor: f * rng.rand(4, *s).prod(0))
        logits.append(torch.logit(scores.float().double()))
        deltas.append(blob(f"synth_bbox_fpn{level}", 4, *shape, lambda rng, s: np.float32(1.2 * rng.randn(*s))))
    anchors = AnchorGenerator(4, 3, (1, 2, 0.5), "detectron")((128, 256))
    found = run(
        HeadOutputs(logits=logits, deltas=deltas, anchors=anchors),
        "detectron",
        sizes=(120, 200),
        original=(240, 400),
        pre_nms_topk=1000,
        max_dets=100,
    )
    stored = reference("caffe2/detections_synthetic")["detections"]
    expected = {"boxes": stored[:, :4].float(), "scores": stored[:, 4].float(), "labels": stored[:, 5].long() - 1}
    assert_same(found, expected, rtol=0, atol=5e-4)


def test_detections_equal_torchvision():
    outputs = random_outputs("torchvision")
    model = SimpleNamespace(
        box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)),
        score_thresh=0.05,
        topk_candidates=100,
        nms_thresh=0.5,
        detections_per_img=20,
    )
    head_outputs = {"cls_logits": outputs["logits"], "bbox_regression": outputs["deltas"]}
    sizes = [tuple(size) for size in SIZES.tolist()]
    expected = TorchvisionRetinaNet.postprocess_detections(model, head_outputs, [outputs["anchors"]] * 2, sizes)
    found = postprocess(outputs, SIZES, ORIGINAL, SCALES, **SETTINGS, convention="torchvision")
    for image, detections in enumerate(expected):
        detections["boxes"] = resize_boxes(detections["boxes"], sizes[image], ORIGINAL[image].tolist())
        assert len(detections["scores"]) == 20
        assert_same(found[image], detections)


@pytest.mark.parametrize("max_dets", [20, 500])
def test_detections_equal_those_of_detectron2(max_dets):
    outputs = random_outputs("detectron2")
    settings = {**SETTINGS, "max_dets": max_dets}
    found = postprocess(outputs, SIZES, ORIGINAL, SCALES, **settings, convention="detectron2")
    for image in range(2):
        assert_same(found[image], detectron2_loops(outputs, image, settings))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_batch_gives_what_its_images_give_alone(convention):
    outputs = random_outputs(convention)
    together = postprocess(outputs, SIZES, ORIGINAL, SCALES, **SETTINGS, convention=convention)
    for image in range(2):
        one = slice(image, image + 1)
        alone = HeadOutputs(
            logits=[level[one] for level in outputs["logits"]],
            deltas=[level[one] for level in outputs["deltas"]],
            anchors=outputs["anchors"],
        )
        (expected,) = postprocess(alone, SIZES[one], ORIGINAL[one], SCALES[one], **SETTINGS, convention=convention)
        assert_same(together[image], expected, rtol=0, atol=0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_an_image_without_candidates_has_empty_detections(convention):
    outputs = random_outputs(convention)
    for level in outputs["logits"]:
        level[1] = -200.0
    found = postprocess(outputs, SIZES, ORIGINAL, SCALES, **SETTINGS, convention=convention)
    assert len(found[0]["scores"]) > 0
    assert found[1]["boxes"].shape == (0, 4)
    assert found[1]["scores"].shape == found[1]["labels"].shape == (0,)
    assert found[1]["labels"].dtype == torch.int64


def test_bfloat16_outputs_are_post_processed_in_float32():
    outputs = random_outputs("detectron2")
    narrow = HeadOutputs(
        logits=[level.bfloat16() for level in outputs["logits"]],
        deltas=[level.bfloat16() for level in outputs["deltas"]],
        anchors=outputs["anchors"],
    )
    wide = HeadOutputs(
        logits=[level.float() for level in narrow["logits"]],
        deltas=[level.float() for level in narrow["deltas"]],
        anchors=outputs["anchors"],
    )
    arguments = (SIZES, ORIGINAL, SCALES)
    found = postprocess(narrow, *arguments, **SETTINGS, convention="detectron2")
    for detections, expected in zip(
        found, postprocess(wide, *arguments, **SETTINGS, convention="detectron2"), strict=True
    ):
        assert detections["boxes"].dtype == detections["scores"].dtype == torch.float32
        assert_same(detections, expected, rtol=0, atol=0)


def test_unknown_convention_lists_the_choices():
    with pytest.raises(
        UserError, match="MODEL.BOX.CONVENTION: 'caffe2' is not one of detectron, detectron2, torchvision"
    ):
        run(one_anchor([0.0]), "caffe2")
