"""What a model is made of and what it costs, without running it: on meta tensors, which have shapes and no values."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from retinanet.deploy.fold import fold
from retinanet.modeling.retinanet import RetinaNet

PARTS = ("backbone", "fpn", "head")


@dataclass(frozen=True)
class NormRow:
    """One norm of a model.

    name: of the convolution that it follows. norm, conv: kinds as class names. levels: how many sets of statistics.
    statistics: "none" kept, "moving" in training, or "frozen". affine: scale and shift, "trained" or "frozen".
    parameters, buffers: numbers in them. folds: "whole", "part" or "nothing" (see `retinanet.deploy.fold`), and why.
    """

    name: str
    norm: str
    conv: str
    levels: int
    statistics: str
    affine: str
    parameters: int
    buffers: int
    folds: str
    why: str


@dataclass(frozen=True)
class Cost:
    """One part of a model, for one training step on a batch.

    parameters, trained: how many. forward, backward: FLOPs of convolutions, 2 per multiply-add. saved: bytes of
    activations and reparametrized weights that backward needs, without parameters and without the loss.
    """

    parameters: int
    trained: int
    forward: int
    backward: int
    saved: int


def norm_rows(model: nn.Module) -> list[NormRow]:
    """Return the norms of `model`, which is in training mode, in the order of its modules."""
    rows = []
    for entry in fold(model)[1]:
        if not entry.norm:
            continue
        owner = model.get_submodule(entry.name)
        norm = getattr(owner, "norm", owner)
        parameters = list(norm.parameters())
        rows.append(
            NormRow(
                name=entry.name,
                norm=entry.norm,
                conv=entry.conv,
                levels=len(getattr(norm, "levels", [norm])),
                statistics=_statistics(norm),
                affine="trained" if any(parameter.requires_grad for parameter in parameters) else "frozen",
                parameters=sum(parameter.numel() for parameter in parameters),
                buffers=sum(buffer.numel() for buffer in norm.buffers()),
                folds=entry.outcome,
                why=entry.why,
            )
        )
    return rows


def costs(model: RetinaNet, batch: int, height: int, width: int) -> dict[str, Cost]:
    """Return the costs of backbone, fpn and head for a batch of images of this size, padded.

    model: in training mode, on the meta device, float32. Activations count as they are saved, each storage once; under
    bf16 autocast convolutions and norms save half of that.
    """
    images = torch.empty(batch, 3, height, width, device="meta")
    steps: dict[str, Callable] = {
        "backbone": lambda images: list(model.backbone(images).items()),
        "fpn": lambda features: model.fpn(dict(features)),
        "head": lambda pyramid: [x for outputs in model.head(pyramid) for x in outputs],
    }
    found, inputs = {}, images
    for part in PARTS:
        outputs, forward, backward, saved = _measure(steps[part], inputs)
        parameters = list(getattr(model, part).parameters())
        found[part] = Cost(
            parameters=sum(parameter.numel() for parameter in parameters),
            trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            forward=forward,
            backward=backward,
            saved=saved,
        )
        inputs = outputs
    return found


def _measure(step: Callable, inputs) -> tuple[list, int, int, int]:
    """Return outputs (cut from the graph), forward and backward FLOPs, and bytes saved for backward of one part."""
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor  # kept, so that its identity is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as ahead:
        outputs = step(inputs)
    tensors = [output[1] if isinstance(output, tuple) else output for output in outputs]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    with FlopCounterMode(display=False) as back:
        torch.autograd.backward(leaves, [torch.empty_like(leaf) for leaf in leaves])
    cut = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    names = [output[0] for output in outputs if isinstance(output, tuple)]
    saved = sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
    return list(zip(names, cut, strict=True)) if names else cut, ahead.get_total_flops(), back.get_total_flops(), saved


def _statistics(norm: nn.Module) -> str:
    if not norm.has_statistics:
        return "frozen" if any("running" in name for name, _ in norm.named_buffers()) else "none"
    return "moving" if norm.training else "frozen"
