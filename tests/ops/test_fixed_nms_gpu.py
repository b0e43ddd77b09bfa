"""The suppression kernel on a GPU: the positions of the tensor version on a CPU, bit for bit, in a CUDA graph too."""

import pytest
import torch
from detection_cases import random_boxes, torchvision_nms

from retinanet.ops.fixed_nms import fixed_nms
from retinanet.ops.nms import nms

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def candidates(width, classes, step=0.0, seed=0):
    """Return boxes (4, n, 4), labels and valid (4, n) on the GPU; step: corners are multiples of it, 0: of nothing."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes(4, width, seed=seed, size=800.0)
    boxes = (boxes / step).round() * step if step else boxes
    labels = torch.randint(classes, (4, width), generator=generator)
    valid = torch.rand(4, width, generator=generator) > 0.05
    valid[3] = False
    return boxes.cuda(), labels.cuda(), valid.cuda()


def on_cpu(inputs, *settings):
    return fixed_nms(*(tensor.cpu() for tensor in inputs), *settings).cuda()


@pytest.mark.parametrize("step", [0.0, 0.25, 16.0])
@pytest.mark.parametrize("classes", [1, 5, 80])
@pytest.mark.parametrize("width", [1, 33, 1000, 1024, 1025, 5000])
def test_kernel_gives_the_positions_of_the_tensor_version_and_of_torchvision(width, classes, step):
    inputs = candidates(width, classes, step, seed=width)
    for rule in ((False, False), (True, True)):
        assert torch.equal(fixed_nms(*inputs, 0.5, 100, *rule), on_cpu(inputs, 0.5, 100, *rule))
    assert torch.equal(fixed_nms(*inputs, 0.5, 100).cpu(), torchvision_nms(*inputs, 0.5, 100).cpu())


def test_kernel_settles_a_chain_as_long_as_the_candidates():
    places = torch.arange(5000.0) * 4
    chain = torch.stack([places, torch.zeros(5000), places + 10, torch.full((5000,), 10.0)], 1)[None].cuda()
    nothing = torch.zeros(1, 5000, dtype=torch.int64, device="cuda")
    found = fixed_nms(chain, nothing, nothing == 0, 0.375, 3000)
    assert torch.equal(found[0, :2500], torch.arange(0, 5000, 2, device="cuda")) and (found[0, 2500:] == -1).all()


def test_kernel_in_a_graph_follows_its_inputs_and_waits_for_nothing():
    inputs = candidates(5000, 80)
    fixed_nms(*inputs, 0.5, 100)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = fixed_nms(*inputs, 0.5, 100)
    for own, other in zip(inputs, candidates(5000, 80, seed=7), strict=True):
        own.copy_(other)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, nms(*(tensor.cpu() for tensor in inputs), 0.5, 100).cuda())
