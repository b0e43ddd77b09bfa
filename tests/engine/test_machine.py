"""What a run chooses by its device: the memory format, warnings, and that a model is in the format that was chosen."""

import pytest
import torch
from model_cases import small_cfg

from retinanet.config.load import dump_config, load_config_text
from retinanet.engine import machine
from retinanet.engine.benchmark_peer import build_peer_format
from retinanet.engine.evaluate import build_amp
from retinanet.engine.machine import build_device_warnings, build_memory_format, build_placed, pad_stem, tune_process
from retinanet.modeling.build import build_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NHWC, NCHW = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("asked", "amp", "device", "expected"),
    [
        ("True", "off", CUDA, NHWC),
        ("False", "bf16", CUDA, NCHW),
        ("auto", "bf16", CUDA, NHWC),
        ("auto", "off", CUDA, NCHW),
        ("auto", "off", CPU, NCHW),
        ("True", "off", CPU, NHWC),
    ],
)
def test_memory_format_follows_key_and_device(monkeypatch, asked, amp, device, expected):
    monkeypatch.setattr(machine, "prefers_channels_last", lambda: False)  # as without AVX2
    cfg = small_cfg("SOLVER.CHANNELS_LAST", repr(asked), "SOLVER.AMP", amp)
    assert build_memory_format(cfg, device) == expected


@pytest.mark.parametrize("text", ["true", "True", "auto", "False"])
def test_old_and_new_texts_of_the_key_are_read(text):
    cfg = load_config_text(f"SOLVER: {{CHANNELS_LAST: {text}}}", "test")
    assert text.capitalize() == cfg.SOLVER.CHANNELS_LAST.capitalize()
    assert load_config_text(dump_config(cfg), "test") == cfg


def test_a_program_may_set_the_key_to_true():
    cfg = small_cfg()
    cfg.SOLVER.CHANNELS_LAST = True
    assert build_memory_format(cfg, CPU) == NHWC
    assert build_model(cfg).memory_format == NHWC


@pytest.mark.parametrize(
    "asked, device, expected",
    [("auto", CPU, NCHW), ("False", CPU, NCHW), ("True", CPU, NHWC), ("auto", CUDA, NHWC), ("False", CUDA, NCHW)],
)
def test_the_peer_has_its_users_memory_format_on_a_cpu(asked, device, expected):
    assert build_peer_format(small_cfg("SOLVER.CHANNELS_LAST", repr(asked), "SOLVER.AMP", "bf16"), device) == expected


def test_a_cpu_has_nhwc_where_that_is_faster(monkeypatch):
    monkeypatch.setattr(machine, "prefers_channels_last", lambda: True)  # as with AVX2
    assert build_memory_format(small_cfg(), CPU) == NHWC
    assert build_memory_format(small_cfg("SOLVER.CHANNELS_LAST", "'False'"), CPU) == NCHW


@pytest.mark.parametrize(
    ("asked", "amp", "device", "expected"),
    [
        ("auto", "bf16", CUDA, 4),
        ("auto", "off", CUDA, 3),
        ("False", "fp16", CUDA, 3),
        ("True", "bf16", CPU, 3),
    ],
)
def test_images_of_four_channels_are_for_half_precision_in_nhwc_on_cuda(asked, amp, device, expected):
    cfg = small_cfg("SOLVER.CHANNELS_LAST", repr(asked), "SOLVER.AMP", amp)
    model = build_model(cfg)
    model.set_memory_format(build_memory_format(cfg, device))
    pad_stem(model, device, amp)
    assert model.backbone.in_channels == expected
    images = model.normalize(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert images.shape[1] == expected and images.is_contiguous(memory_format=model.memory_format)


def test_placed_model_detects_in_the_wanted_format():
    model = build_placed(small_cfg("SOLVER.CHANNELS_LAST", "'True'"), build_model(small_cfg()), CPU)
    assert not model.training
    assert model.backbone.res2[0].conv1.weight.is_contiguous(memory_format=NHWC)
    images = model.normalize(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    assert images.is_contiguous(memory_format=NHWC)


def test_emulated_bf16_is_warned_about(monkeypatch):
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    (line,) = build_device_warnings(small_cfg("SOLVER.AMP", "bf16"), CPU)
    assert line.startswith("SOLVER.AMP: this CPU")
    assert not build_device_warnings(small_cfg("SOLVER.AMP", "bf16"), CUDA)
    monkeypatch.setattr(machine, "has_bf16", lambda: True)
    assert not build_device_warnings(small_cfg("SOLVER.AMP", "bf16"), CPU)


def test_allocator_is_set_for_cpus_alone(monkeypatch):
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: "kept")
    assert tune_process(CPU) == ["kept"] and tune_process(CUDA) == []


@pytest.mark.parametrize(
    ("solver", "test", "device", "expected"),
    [("bf16", "auto", CPU, "off"), ("bf16", "auto", CUDA, "bf16"), ("off", "bf16", CPU, "bf16"),
     ("bf16", "off", CUDA, "off")],
)  # fmt: skip
def test_precision_of_detection(solver, test, device, expected):
    assert build_amp(small_cfg("SOLVER.AMP", solver, "TEST.AMP", test), device) == expected
