"""Inputs of the reference traces for the norms, and where the traces are.

The traces were recorded by running the authors' code in float64 (megvii-model/MABN 995e8f5, joe-siyuan-qiao/
Batch-Channel-Normalization 0244c3e and pytorch-classification e6355f8, labmlai/
annotated_deep_learning_paper_implementations e6b3c8a). Their inputs follow from seeds: NumPy's legacy generator does
not change with its version, and every array is rounded to float32 first, so both precisions see the same numbers.
"""

from pathlib import Path

import numpy as np
import torch
from conftest import shared_path

HERE = Path(__file__).resolve().parent / "files" / "norms"

# real_B / B is the window; momentum the keep rate; start: iterations already done in the state that is loaded
MABN_KEYS = ("real_B", "warmup", "eps", "momentum", "T", "shape", "seed", "base", "shock", "start")
MABN_SETTINGS = {
    "m1_short_warmup": (8, 10, 1e-5, 0.98, 1100, (2, 4, 5), 1000000, 1.0, (1040, 1048), 0),
    "m2_buffer_rules": (16, 2, 1e-5, 0.98, 40, (2, 4, 5), 2000000, 1.0, (20, 22), 0),
    "m3_long_warmup": (8, 1020, 1e-5, 0.98, 1060, (2, 3, 4), 3000000, 1.0, (1030, 1034), 0),
    "m4_eps_momentum": (8, 10, 1e-2, 0.9, 1020, (2, 3, 4), 4000000, 0.05, (1006, 1009), 0),
    "m5_varying_shapes": (8, 10, 1e-5, 0.98, 40, None, 5000000, 1.0, (0, 0), 0),
    "m6_resume": (8, 100, 1e-5, 0.98, 30, (2, 4, 5), 6000000, 1.0, (1010, 1014), 990),
    "m7_buffer_one": (2, 3, 1e-5, 0.98, 30, (2, 4, 5), 7000000, 1.0, (1010, 1014), 985),
}
MABN = {name: {"C": 6, "B": 2} | dict(zip(MABN_KEYS, values, strict=True)) for name, values in MABN_SETTINGS.items()}

# in, out, kernel, stride, padding, dilation, groups, bias
CONV_CASES = [(4, 6, 3, 1, 1, 1, 1, False), (4, 6, 1, 2, 0, 1, 1, False), (4, 6, 3, 2, 2, 2, 2, True)]


def golden(name: str) -> dict[str, np.ndarray]:
    """Return a reference trace; skips the test when it is neither tracked here nor among the reference data."""
    tracked = HERE / f"{name}.npz"
    with np.load(tracked if tracked.exists() else shared_path(f"goldens/norms/{name}.npz")) as arrays:
        return dict(arrays)


def normals(seed: int, shape) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape)


def rounded(array) -> np.ndarray:
    return np.asarray(array, np.float64).astype(np.float32)


def tensor(array, dtype=torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)


def mabn_shape(step: int, c: dict) -> tuple[int, int, int]:
    return tuple(c["shape"]) if c["shape"] else (1 + step % 2, 3 + step % 3, 4 + step % 4)


def mabn_x(step: int, c: dict) -> np.ndarray:
    n, h, w = mabn_shape(step, c)
    k = np.arange(c["C"])
    scale = c["base"] * (0.5 + 0.25 * k) * (1 + 0.3 * np.sin(0.05 * step + k))
    if c["shock"][0] <= step < c["shock"][1]:
        scale = scale * np.where(k < 2, 20.0, np.where(k < 4, 0.02, 1.0))
    offset = c["base"] * 0.1 * (k - 2.5)
    noise = normals(c["seed"] + step, (n, c["C"], h, w))
    return rounded(noise * scale[None, :, None, None] + offset[None, :, None, None])


def mabn_w(step: int, c: dict) -> np.ndarray:
    n, h, w = mabn_shape(step, c)
    seed = c["seed"] - 1000 if c["shape"] else c["seed"] + 500000 + step
    return rounded(normals(seed, (n, c["C"], h, w)))


def mabn_affine(c: dict) -> tuple[np.ndarray, np.ndarray]:
    return rounded(1 + 0.2 * normals(c["seed"] - 10, c["C"])), rounded(0.1 * normals(c["seed"] - 9, c["C"]))


def mabn_start(c: dict) -> dict:
    rows, channels = c["real_B"] // c["B"], c["C"]
    return {
        "running_var": rounded(0.5 + 0.1 * np.abs(normals(c["seed"] - 20, (1, channels, 1, 1)))),
        "buffer_x2": rounded(0.3 + np.abs(normals(c["seed"] - 21, (rows, channels)))),
        "buffer_gz": rounded(0.1 * normals(c["seed"] - 22, (rows, channels))),
        "iters": np.array([c["start"]]),
    }


def bcn_x(step: int, seed: int, channels: int = 8) -> np.ndarray:
    k = np.arange(channels)
    scale = (0.5 + 0.2 * k) * (1 + 0.2 * np.sin(0.3 * step + k))
    offset = 0.4 * (k - channels / 2) + 0.05 * step
    noise = normals(seed + step, (2, channels, 5, 4))
    return rounded(noise * scale[None, :, None, None] + offset[None, :, None, None])


def bcn_w(seed: int) -> np.ndarray:
    return rounded(normals(seed - 1000, (2, 8, 5, 4)))


def bcn_speed(step: int) -> float:
    """Return the rate that the traces write into EstBN's buffer before step 1, 2, ..., 20."""
    return 0.0 if step < 3 else 0.02 if step < 11 else 0.1 if step < 16 else 0.0 if step < 19 else 0.5


def conv_inputs(seed: int, case: tuple, scale: float, offset: float):
    """Return x, weight and bias (None without) of a convolution case."""
    inputs, outputs, kernel, _, _, _, groups, bias = case
    weight = rounded(scale * normals(seed + 1, (outputs, inputs // groups, kernel, kernel)) + offset)
    return (
        rounded(normals(seed, (2, inputs, 9, 8))),
        weight,
        rounded(0.1 * normals(seed + 2, outputs)) if bias else None,
    )


def relative_error(value: torch.Tensor, reference) -> float:
    """Return max |value - reference| / max |reference|."""
    reference = torch.as_tensor(reference, dtype=torch.float64)
    difference = value.detach().double().reshape(reference.shape) - reference
    return float(difference.abs().max() / reference.abs().max().clamp(min=1e-300))
