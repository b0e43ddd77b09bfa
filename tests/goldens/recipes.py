"""Weights and images of the reference runs, made from names alone: the recipes of the READMEs beside the data.

Every tensor has a generator of its own, seeded by the CRC-32 of its name, so that nothing depends on an order. Values
are drawn in float64 and cast to float32 at the end.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np

_GN_STAGES = {3: 4, 4: 6, 5: 3}  # blocks of res3..res5 of a ResNet-50, whose last one names the pyramid's blobs


def generator(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)


def caffe2_blob(name: str, shape: list[int], training: bool = False) -> np.ndarray:
    """Return one blob of the Caffe2 reference nets; `training` uses the smaller class weights of the train runs."""
    rng = generator(name)
    if name.endswith(("_bn_s", "_gn_s")):
        value = (0.5 + rng.rand(*shape)) * (0.2 if "branch2c" in name else 1.0)
    elif name.endswith(("_bn_b", "_gn_b")):
        value = 0.1 * rng.randn(*shape)
    elif name == "retnet_cls_pred_fpn3_b":
        value = -np.log(99) + 0.1 * rng.randn(*shape)
    elif name.endswith("_b"):
        value = 0.05 * rng.randn(*shape)
    else:
        value = rng.randn(*shape) * np.sqrt(2 / math.prod(shape[1:])) * _caffe2_gain(name, training)
    return value.astype(np.float32)


def _caffe2_gain(name: str, training: bool) -> float:
    if name == "retnet_cls_pred_fpn3_w":
        return 0.1 if training else 1.0
    return {"conv1_w": 0.02, "retnet_bbox_pred_fpn3_w": 0.3}.get(name, 0.5 if name.startswith("fpn_") else 1.0)


def caffe2_blobs(shapes: dict[str, list[int]], training: bool = False) -> dict[str, np.ndarray]:
    return {name: caffe2_blob(name, shape, training) for name, shape in shapes.items()}


def caffe2_shapes(fpn_gn: bool = False, backbone_gn: bool = False) -> dict[str, list[int]]:
    """Return name -> shape of every blob of retinanet_R-50-FPN, AffineChannel or GN in the backbone and the FPN."""
    shapes: dict[str, list[int]] = {}

    def conv(name: str, out: int, inner: int, kernel: int, norm: str = "") -> None:
        shapes[f"{name}_w"] = [out, inner, kernel, kernel]
        for leaf in ("s", "b") if norm else ():
            shapes[f"{name}_{norm}_{leaf}"] = [out]
        if not norm:
            shapes[f"{name}_b"] = [out]

    norm = "gn" if backbone_gn else "bn"
    conv("conv1", 64, 3, 7, norm)
    if not backbone_gn:  # the frozen norm of the stem alone carries another name
        for leaf in ("s", "b"):
            shapes[f"res_conv1_bn_{leaf}"] = shapes.pop(f"conv1_bn_{leaf}")
    inner = 64
    for stage, blocks in {2: 3, **_GN_STAGES}.items():
        width = 64 * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"res{stage}_{block}_branch"
            conv(f"{name}2a", width, inner, 1, norm)
            conv(f"{name}2b", width, width, 3, norm)
            conv(f"{name}2c", width * 4, width, 1, norm)
            if block == 0:
                conv(f"{name}1", width * 4, inner, 1, norm)
            inner = width * 4
    for stage, blocks in _GN_STAGES.items():
        blob = f"res{stage}_{blocks - 1}_sum"
        lateral = f"fpn_inner_{blob}" if stage == 5 else f"fpn_inner_{blob}_lateral"
        conv(lateral, 256, 256 * 2 ** (stage - 2), 1, "gn" if fpn_gn else "")
        conv(f"fpn_{blob}", 256, 256, 3, "gn" if fpn_gn else "")
    conv("fpn_6", 256, 2048, 3)
    conv("fpn_7", 256, 256, 3)
    for branch, out in (("cls", 720), ("bbox", 36)):
        for layer in range(4):
            conv(f"retnet_{branch}_conv_n{layer}_fpn3", 256, 256, 3)
        conv(f"retnet_{branch}_pred_fpn3", out, 256, 3)
    return shapes


def torch_tensor(name: str, shape: list[int], gain: float = 1.0, last_norms: str = "conv3.norm.weight") -> np.ndarray:
    """Return one tensor of the detectron2 and torchvision reference models. last_norms: end of the names of the norms
    that close a residual branch."""
    rng = generator(name)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_mean"):
        value = 0.1 * rng.randn(*shape)
    elif name.endswith("running_var"):
        value = 0.5 + rng.rand(*shape)
    elif len(shape) == 4:
        value = rng.randn(*shape) * np.sqrt(2 / math.prod(shape[1:])) * 0.7
    elif name.endswith(".weight"):
        value = (0.5 + rng.rand(*shape)) * (0.2 if name.endswith(last_norms) else 1.0)
    elif name.endswith(("cls_score.bias", "cls_logits.bias")):
        value = np.full(shape, -np.log(99))
    else:
        value = (0.1 if _is_norm(name) else 0.05) * rng.randn(*shape)
    return (value * gain).astype(np.float32)


def _is_norm(name: str) -> bool:
    parts = name.split(".")[:-1]
    in_head = len(parts) == 5 and parts[:1] == ["head"] and parts[-1] == "1"  # head.*.conv.{i}.1 of torchvision v2
    return "norm" in parts or parts[-1].startswith("bn") or parts[-2:] == ["downsample", "1"] or in_head


def torch_tensors(folder: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """Return all tensors of a reference model: `prefix` is "" for detectron2, "v1" or "v2" for torchvision."""
    shapes = json.loads((folder / (f"{prefix}_state_dict.json" if prefix else "state_dict.json")).read_text())
    cases = json.loads((folder / "cases.json").read_text())
    gains = (cases["models"][prefix] if prefix else cases)["facts"]["gains"]
    last = "bn3.weight" if prefix else "conv3.norm.weight"
    return {name: torch_tensor(name, shape, gains.get(name, 1.0), last) for name, shape in shapes.items()}


def caffe2_image(height: int, width: int) -> np.ndarray:
    """Return the BGR image (H, W, 3) uint8 of the Caffe2 runs; `input.npz` stores it, for libm may round otherwise."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    planes = [
        128
        + 60 * np.sin(2 * np.pi * (x / (40 + 10 * c) + y / (55 - 5 * c)))
        + 30 * np.cos(2 * np.pi * x * y / (4000 + 500 * c))
        for c in range(3)
    ]
    noise = 12 * np.random.RandomState(20171225).randn(height, width, 3)
    return np.clip(np.rint(np.stack(planes, -1) + noise), 0, 255).astype(np.uint8)
