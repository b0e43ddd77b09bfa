"""What a run chooses by the machine that it is on: allocator, precision, memory format. Tools log what was chosen."""

import torch

from retinanet.deploy.exported import Exported
from retinanet.engine.evaluate import build_amp
from retinanet.engine.graphed_detection import GraphedDetection, build_graphed_detection
from retinanet.layers.conv import fuse_epilogues
from retinanet.modeling.retinanet import RetinaNet
from retinanet.utils.cpu import has_bf16, keep_freed_memory, prefers_channels_last


def tune_process(device: torch.device) -> list[str]:
    """Set what a process on this kind of device profits from; return a line for the log about each setting."""
    return [keep_freed_memory()] if device.type == "cpu" else []


def build_device_warnings(cfg, device: torch.device) -> list[str]:
    """Return the warnings about settings that this machine runs, but slowly."""
    if device.type != "cpu" or has_bf16():
        return []
    slow = [key for key, value in (("SOLVER.AMP", cfg.SOLVER.AMP), ("TEST.AMP", cfg.TEST.AMP)) if value == "bf16"]
    return [
        f"{key}: this CPU has neither AVX512_BF16 nor AMX, it emulates bf16 at a quarter of the speed of float32; "
        "set it to off"
        for key in slow
    ]


def build_memory_format(cfg, device: torch.device) -> torch.memory_format:
    """Return the memory format of `SOLVER.CHANNELS_LAST`; "auto" takes the faster one.

    That is NHWC on CUDA wherever tensor cores run half precision, and on a CPU where `prefers_channels_last` says so.
    """
    asked = str(cfg.SOLVER.CHANNELS_LAST)  # a program may have set True or False, a file sets text
    if asked != "auto":
        channels_last = asked == "True"
    elif device.type == "cuda":
        channels_last = cfg.SOLVER.AMP != "off"
    else:
        channels_last = prefers_channels_last()
    return torch.channels_last if channels_last else torch.contiguous_format


def pad_stem(model: RetinaNet, device: torch.device, amp: str) -> None:
    """Let the stem take images of four channels, the last zero, on CUDA in NHWC and half precision, and nowhere else.

    amp: the precision that the model is going to run in. A model or backbone without `pad_images` stays as it is.
    """
    backbone = getattr(model, "backbone", None)
    if hasattr(backbone, "pad_images"):
        pads = device.type == "cuda" and amp != "off" and model.memory_format == torch.channels_last
        backbone.pad_images(4 if pads else 3)


def build_placed(
    cfg, model: RetinaNet | Exported, device: torch.device
) -> RetinaNet | Exported | GraphedDetection:
    """Return `model` in evaluation mode on `device`, in the memory format in which it detects fastest there, with the
    fused convolutions (`SOLVER.FUSE_CONVS`) and CUDA graphs (`TEST.CUDA_GRAPHS`) that the configuration asks for."""
    model.set_memory_format(build_memory_format(cfg, device))
    pad_stem(model, device, build_amp(cfg, device))
    if cfg.SOLVER.FUSE_CONVS:
        fuse_epilogues(model)
    return build_graphed_detection(cfg, model.to(device).eval(), device)
