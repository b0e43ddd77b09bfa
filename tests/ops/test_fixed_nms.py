"""Suppression of fixed size: the positions of torchvision's operator class by class, without a host wait."""

import os
import subprocess
import sys

import pytest
import torch
from detection_cases import SyncWatch, random_boxes, torchvision_nms

from retinanet.ops.fixed_nms import device_nms, fixed_nms, kernel_works
from retinanet.ops.nms import nms


def cases():
    """Yield name, boxes (2, n, 4), labels (2, n) and valid (2, n), by falling score."""
    generator = torch.Generator().manual_seed(0)
    labels, valid = torch.randint(4, (2, 150), generator=generator), torch.rand(2, 150, generator=generator) > 0.1
    boxes = random_boxes(2, 150, seed=1)
    yield "random", boxes, labels, valid
    yield "rounded to few places, so that many are equal", (boxes / 16).round() * 16, labels, valid
    yield "one class", boxes, torch.zeros_like(labels), valid
    yield "all the same box", boxes[:, :1].expand(-1, 150, -1), labels, valid
    places = torch.arange(150.0) * 4  # each overlaps its neighbours by 6 / 14 and no other by more than 2 / 18
    chain = torch.stack([places, torch.zeros(150), places + 10, torch.full((150,), 10.0)], 1).expand(2, -1, -1)
    yield "a chain of overlaps", chain, torch.zeros_like(labels), torch.ones_like(valid)
    flat = boxes.clone()
    flat[:, ::3, 2:] = flat[:, ::3, :2]  # without area: their overlap with themselves is 0 / 0
    yield "boxes without area", flat, labels, valid
    yield "inside out", boxes[..., [2, 3, 0, 1]], labels, valid
    yield "no candidates in one image", boxes, labels, valid & torch.tensor([[True], [False]])
    yield "a single one", boxes[:, :1], labels[:, :1], valid[:, :1]


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize("max_dets", [1, 40, 200])
@pytest.mark.parametrize("name", CASES)
def test_positions_are_those_of_torchvision_for_each_image_and_class(name, max_dets):
    boxes, labels, valid = CASES[name]
    expected = torchvision_nms(boxes, labels, valid, 0.375, max_dets)
    with SyncWatch() as watch:
        found = fixed_nms(boxes, labels, valid, 0.375, max_dets)
    assert torch.equal(found, expected) and not watch.waits
    assert torch.equal(nms(boxes, labels, valid, 0.375, max_dets), expected)


@pytest.mark.parametrize("name", CASES)
def test_detectrons_rule_gives_the_positions_of_the_other_implementation(name):
    boxes, labels, valid = CASES[name]
    settings = (0.5, 40, True, True)
    assert torch.equal(fixed_nms(boxes, labels, valid, *settings), nms(boxes, labels, valid, *settings))


def test_a_chain_keeps_every_other_box():
    boxes, labels, valid = CASES["a chain of overlaps"]
    assert fixed_nms(boxes, labels, valid, 0.375, 3).tolist() == [[0, 2, 4]] * 2


def test_without_candidates_nothing_stays():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert fixed_nms(torch.zeros(2, 0, 4), nothing, nothing.bool(), 0.5, 3).tolist() == [[-1] * 3] * 2


def test_a_cpu_keeps_the_way_that_ends_early():
    with SyncWatch() as watch:
        device_nms(*CASES["random"], 0.5, 40)
    assert watch.waits


@pytest.mark.slow
def test_it_can_be_exported():
    class Suppress(torch.nn.Module):
        def forward(self, boxes, labels, valid):
            return fixed_nms(boxes, labels, valid, 0.5, 4)

    inputs = [tensor[:, :50] for tensor in CASES["random"]]
    program = torch.export.export(Suppress(), tuple(inputs))
    assert torch.equal(program.module()(*inputs), nms(*inputs, 0.5, 4))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by the next test in a process of its own")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_gives_the_same_positions(name, monkeypatch):
    from retinanet.ops import fixed_nms_kernel

    monkeypatch.setattr(fixed_nms_kernel, "_BLOCK", 64)  # several blocks
    boxes, labels, valid = CASES[name]
    for settings in ((0.375, 40, False, False), (0.5, 3, True, True)):
        expected = nms(boxes, labels, valid, *settings)
        assert torch.equal(fixed_nms_kernel.scan(boxes, labels, valid, *settings), expected)
    assert kernel_works.__wrapped__(torch.device("cpu"))


@pytest.mark.slow
def test_kernel_gives_the_same_positions_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # has to stand before Triton is imported
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "interpreted_kernel"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and f"{len(CASES)} passed" in found.stdout, found.stdout


def test_a_kernel_that_does_not_work_is_not_used_and_the_log_says_why(caplog):
    pytest.importorskip("triton")
    assert not kernel_works.__wrapped__(torch.device("cpu"))  # which Triton does not compile for
    assert "the NMS kernel cannot be used" in caplog.text and "take its place" in caplog.text
