"""Time every norm beside `nn.BatchNorm2d`: one layer, and a training step of R50-FPN with the norm in both parts.

    python docs/time_norms.py            the layer, 2x64x128x128
    python docs/time_norms.py --step     the network, 2x3x320x320, forward and backward

One CPU thread, CPU time, best of some runs in a row, in several rounds over the norms: other processes then matter
little. Page faults on memory that the allocator gave back cost more than a norm does, so set
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=10000000000 in the environment (glibc); runs in a row reuse their memory.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from retinanet.config import get_cfg  # noqa: E402
from retinanet.layers.norm import make_norm  # noqa: E402
from retinanet.modeling.build import build_model  # noqa: E402

NAMES = ("BN", "GN", "MABN", "BCN")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def best(steps: dict[str, Callable[[], None]], rounds: int, runs: int) -> dict[str, float]:
    """Return the shortest CPU time of each step in seconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(runs):
                start = time.thread_time()
                step()
                times[name].append(time.thread_time() - start)
    return {name: min(values) for name, values in times.items()}


def layer_steps(memory_format: torch.memory_format) -> dict[str, Callable[[], None]]:
    x = torch.randn(2, 64, 128, 128).contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn(2, 64, 128, 128).contiguous(memory_format=memory_format)
    norms = {"BatchNorm2d": torch.nn.BatchNorm2d(64)} | {name: make_norm(name, 64) for name in NAMES}
    return {
        name: lambda norm=norm: torch.autograd.grad(norm(x), [x, *norm.parameters()], grad)
        for name, norm in norms.items()
    }


def network_steps(memory_format: torch.memory_format) -> dict[str, Callable[[], None]]:
    images = torch.randn(2, 3, 320, 320).contiguous(memory_format=memory_format)
    steps = {}
    for name in NAMES:
        cfg = get_cfg()
        cfg.MODEL.NUM_CLASSES, cfg.MODEL.BACKBONE.FREEZE_AT = 80, 0
        cfg.MODEL.BACKBONE.NORM = cfg.MODEL.FPN.NORM = name
        model = build_model(cfg).to(memory_format=memory_format)

        def step(model=model):
            outputs = model(images)
            loss = sum(x.square().mean() for x in outputs["logits"] + outputs["deltas"])
            torch.autograd.grad(loss, list(model.parameters()))

        steps[name] = step
    return steps


def main() -> None:
    torch.set_num_threads(1)
    whole = "--step" in sys.argv[1:]
    for name, memory_format in FORMATS.items():
        steps = network_steps(memory_format) if whole else layer_steps(memory_format)
        times = best(steps, rounds=2, runs=2) if whole else best(steps, rounds=5, runs=20)
        base = next(iter(times.values()))
        print(name, *(f"{norm} {1000 * t:.1f} ms ({t / base:.2f}x)" for norm, t in times.items()), sep="   ")


if __name__ == "__main__":
    main()
