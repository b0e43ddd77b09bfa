"""What a run has to cost at least: counted FLOPs and bytes, floors, host waits, and the verdict on a case."""

import pytest
import torch
from model_cases import small_cfg
from torch.utils.flop_counter import FlopCounterMode

from retinanet.engine.benchmark_cost import (
    Ceiling,
    Convolution,
    HostWaits,
    build_convolutions,
    floor_seconds,
    measure_ceiling,
)
from retinanet.engine.benchmark_suite import SUITES, Case, verdict
from retinanet.modeling.build import build_model


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_have_the_flops_that_torch_counts(training):
    cfg = small_cfg("MODEL.BACKBONE.FREEZE_AT", 2)
    found = build_convolutions(cfg, 2, (64, 96), training)
    model, images = build_model(cfg).to("meta").train(training), torch.empty(2, 3, 64, 96, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        outputs = [x for part in model.head(model.fpn(model.backbone(images))) for x in part]
        if training:
            torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    assert sum(one.flops for one in found) == counter.get_total_flops() > 0
    stem = found[0]  # 7x7 from 3 to 64 channels at half the size
    assert stem == Convolution(2 * 2 * 64 * 32 * 48 * 147, 2 * 3 * 64 * 96 + 64 * 147 + 2 * 64 * 32 * 48)


def test_accumulated_batches_count_each():
    once, twice = (build_convolutions(small_cfg("SOLVER.ACCUMULATE", n), 1, (64, 64), True) for n in (1, 2))
    assert len(twice) == 2 * len(once)


def test_floor_takes_the_slower_of_arithmetic_and_traffic():
    convolutions = [Convolution(1000, 1), Convolution(1, 50)]
    assert floor_seconds(convolutions, Ceiling(100.0, 10.0), 2) == 10 + 10


def test_ceiling_of_this_machine_is_positive_and_plausible():
    ceiling = measure_ceiling(torch.device("cpu"), torch.float32)
    assert 1e9 < ceiling.flops < 1e14 and 1e8 < ceiling.bandwidth < 1e13


def test_host_waits_are_counted_among_all_operations():
    x = torch.arange(4.0)
    with HostWaits() as watch:
        x.sum().item()
        x[x > 1]
        x + 1
    assert watch.waits == 2 and watch.operations >= 5


def test_verdict_compares_the_last_of_our_rows_with_each_peer():
    rows = [
        {"variant": "config", "ratio": 1.0, "images_per_s": 1},
        {"variant": "config folded", "ratio": 0.8, "images_per_s": 50},
        {"variant": "torchvision", "ratio": 1.6, "images_per_s": 1},
        {"variant": "torchvision + allocator", "ratio": 1.2, "images_per_s": 1},
    ]
    first, second, third = verdict(Case("x", (), 1.5, 40), rows).split("\n")
    assert first == "x: config folded is 2.00 times as fast as torchvision (wanted: 1.50)"
    assert "1.50 times as fast as torchvision + allocator" in second and "50 images/s (wanted on one H200: 40)" in third


def test_verdict_on_image_files_is_the_share_of_the_rate_of_the_steps():
    rows = [{"variant": "config", "ratio": 1.0, "images_per_s": 271, "of_steps": 0.968}]
    speed, share = verdict(Case("x", (), None, 280, 0.95), rows).split("\n")
    assert "271 images/s (wanted on one H200: 280)" in speed
    assert share == "x: config reaches 96.8 % of the rate of the steps alone (wanted: 95 %)"


def test_titles_of_the_suites_are_different():
    for cases in SUITES.values():
        assert len({case.title for case in cases}) == len(cases) > 0
