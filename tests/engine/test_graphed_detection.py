"""Detection as a graph: the detections of eager detection, on several shapes, with other weights, and without waits."""

import logging

import pytest
import torch
from detection_cases import SyncWatch
from model_cases import randomize, small_cfg
from step_cases import new_batch

from retinanet.deploy.fold import fold
from retinanet.engine.detector import Detector
from retinanet.engine.evaluate import detect
from retinanet.engine.graphed_detection import GraphedDetection
from retinanet.engine.machine import build_placed
from retinanet.modeling.build import build_model, build_postprocess
from retinanet.structures import Batch

CPU = torch.device("cpu")
KEYS = ("boxes", "scores", "labels")
NORMS = [("FrozenBN", "", ""), ("BN", "BN", ""), ("GN", "GN", "GN"), ("MABN", "MABN", "MABN")]


class Repeat:
    """Stands for `CudaCapture` on a CPU: a "graph" detects again on the tensors it was made with, into its results."""

    def __init__(self):
        self.captures = 0

    def warm_up(self, run, times):
        for _ in range(times):
            run()

    def capture(self, run):
        self.captures += 1
        results = run()

        def replay():
            for old, new in zip(results, run(), strict=True):
                old.copy_(new)

        return replay, results


def both(*opts, most=4, amp="off", folded=False):
    """Return a model, its post-processing, the same behind graphs and their capture."""
    torch.manual_seed(0)
    cfg = small_cfg("MODEL.PIXEL_STD", [58.0] * 3, "TEST.SCORE_THRESH", 0.0, "TEST.MAX_DETS", 30, *opts)
    model, postprocess, capture = randomize(build_model(cfg)).eval(), build_postprocess(cfg), Repeat()
    model = fold(model)[0] if folded else model
    return model, postprocess, GraphedDetection(model, postprocess, amp, most, capture), capture


def batch_of(count, seed=0, width=64) -> Batch:
    batch = new_batch(count, seed)
    batch.images = batch.images[..., :width]
    batch.image_sizes = torch.tensor([[64, width - 4]] * count)
    batch.original_sizes = batch.image_sizes * 2
    batch.scales = torch.full((count, 2), 0.5)
    return batch


def assert_equal(found, expected):
    assert any(len(one["scores"]) for one in expected)
    for one, other in zip(found, expected, strict=True):
        for key in KEYS:
            assert torch.equal(one[key], other[key])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("norms", NORMS, ids="-".join)
def test_detections_equal_eager_ones_on_two_shapes(norms, folded):
    model, postprocess, graphed, capture = both("NORMS", norms, folded=folded)
    for batch in (batch_of(2), batch_of(2, seed=1), batch_of(1, seed=2, width=32), batch_of(2, seed=3)):
        assert_equal(detect(graphed, batch, postprocess), detect(model, batch, postprocess))
    assert capture.captures == 2


@pytest.mark.parametrize("convention", ["detectron", "detectron2", "torchvision"])
def test_detections_equal_eager_ones_in_every_convention_and_precision(convention):
    model, postprocess, graphed, _ = both("MODEL.BOX.CONVENTION", convention, amp="bf16", folded=True)
    batch = batch_of(2)
    assert_equal(graphed(batch), detect(model, batch, postprocess, "bf16"))


def test_several_views_of_a_batch_are_merged_as_eagerly():
    model, postprocess, graphed, capture = both()
    batch, mirrored = batch_of(2), batch_of(2, seed=1, width=32)
    mirrored.mirrored = True
    batch.views = [mirrored]
    assert_equal(detect(graphed, batch, postprocess), detect(model, batch, postprocess))
    assert capture.captures == 2


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded"])
def test_changed_weights_are_captured_again(change, caplog):
    model, postprocess, graphed, capture = both("NORMS", NORMS[0], "MODEL.BACKBONE.FREEZE_AT", 2)
    batch = batch_of(2)
    before = detect(graphed, batch, postprocess)
    with torch.no_grad():
        if change == "in place":
            next(model.backbone.parameters()).mul_(1.5)
        elif change == "replaced":
            model.head.cls_pred.bias = torch.nn.Parameter(model.head.cls_pred.bias + torch.randn(27))
        else:
            model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=True)
    with caplog.at_level(logging.INFO, logger="retinanet"):
        found = detect(graphed, batch, postprocess)
    assert_equal(found, detect(model, batch, postprocess))
    assert any(not torch.equal(one["scores"], other["scores"]) for one, other in zip(found, before, strict=True))
    assert capture.captures == 2 and "the weights changed" in caplog.text


def test_shapes_beyond_the_limit_run_eagerly_and_the_log_says_so_once(caplog):
    model, postprocess, graphed, capture = both(most=1)
    with caplog.at_level(logging.INFO, logger="retinanet"):
        for batch in (batch_of(2), batch_of(1), batch_of(1, seed=1), batch_of(2, seed=2)):
            assert_equal(detect(graphed, batch, postprocess), detect(model, batch, postprocess))
    assert capture.captures == 1
    assert sum("another shape than the 1" in record.message for record in caplog.records) == 1
    assert "capturing detection for 2x3x64x64" in caplog.text


def test_detections_outlive_the_next_batch():
    _, _, graphed, _ = both()
    first = graphed(batch_of(2))
    kept = [{key: one[key].clone() for key in KEYS} for one in first]
    graphed(batch_of(2, seed=1))
    assert_equal(first, kept)


def test_what_becomes_a_graph_waits_for_no_device_and_has_a_fixed_size():
    _, _, graphed, _ = both("NORMS", NORMS[2])
    with SyncWatch() as watch, torch.no_grad():
        padded = graphed.padded(batch_of(2))
    assert not watch.waits
    assert [tuple(tensor.shape) for tensor in padded] == [(2, 30, 4), (2, 30), (2, 30), (2,)]


def test_anchors_of_a_graph_outlive_their_cache():
    model, _, graphed, _ = both()
    graphed(batch_of(2))
    (recorded,) = graphed._graphs.values()
    assert recorded.held[0] is model.anchors((64, 64), CPU)


def test_a_cpu_detects_without_graphs_and_says_why(caplog):
    cfg = small_cfg("TEST.CUDA_GRAPHS", 2)
    with caplog.at_level(logging.WARNING, logger="retinanet"):
        model = build_placed(cfg, build_model(cfg), CPU)
    assert not isinstance(model, GraphedDetection)
    assert "TEST.CUDA_GRAPHS: detection runs without, because it runs on a CPU" in caplog.text


def test_a_detector_takes_a_model_behind_graphs():
    model, postprocess, graphed, capture = both()
    names = [{"id": label, "name": f"class {label}"} for label in range(3)]
    plain, behind = (Detector(net, _Batcher(), postprocess, names, CPU) for net in (model, graphed))
    picture = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    assert_equal([behind(picture)], [plain(picture)])
    assert capture.captures == 1


class _Batcher:
    """Stands for `ImageBatcher`: every picture becomes the same batch."""

    def canvas(self, image):
        return image.shape

    def __call__(self, images):
        return batch_of(len(images))
