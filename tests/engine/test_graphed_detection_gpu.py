"""Detection in CUDA graphs on a GPU: the detections of eager detection, and no wait before the counts."""

import pytest
import torch
from model_cases import randomize, small_cfg
from step_cases import new_batch

from retinanet.deploy.fold import fold
from retinanet.engine.evaluate import detect
from retinanet.engine.graphed_detection import GraphedDetection
from retinanet.modeling.build import build_model, build_postprocess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def both(norms, folded, amp):
    torch.manual_seed(0)
    cfg = small_cfg("MODEL.PIXEL_STD", [58.0] * 3, "TEST.SCORE_THRESH", 0.0, "NORMS", norms)
    model = randomize(build_model(cfg)).eval()
    model = (fold(model)[0] if folded else model).cuda()
    model.set_memory_format(torch.channels_last)
    return model, build_postprocess(cfg), GraphedDetection(model, build_postprocess(cfg), amp, most=2)


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert len(other["scores"]) > 0
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(one[key], other[key])


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("norms", [(name,) * 3 for name in ("FrozenBN", "BN", "GN", "MABN", "BCN")], ids="-".join)
def test_detections_equal_eager_ones_on_two_shapes_and_with_other_weights(norms, folded, amp, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model, postprocess, graphed = both(norms, folded, amp)
    for seed, count in enumerate((2, 1, 2, 3, 2)):  # three shapes, of which two get a graph
        batch = new_batch(count, seed).to("cuda")
        assert_equal(detect(graphed, batch, postprocess), detect(model, batch, postprocess, amp))
    with torch.no_grad():
        model.head.cls_pred.bias.add_(torch.randn(27, device="cuda"))
    assert_equal(detect(graphed, batch, postprocess), detect(model, batch, postprocess, amp))


def test_a_replay_waits_for_nothing():
    _, _, graphed = both(("GN",) * 3, False, "bf16")
    batch = new_batch(2).to("cuda")
    graphed(batch)
    (recorded,) = graphed._graphs.values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        padded = recorded(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(padded.counts.min()) > 0
