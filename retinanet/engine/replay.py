"""A step that failed, once more on its saved batch: what was the first value that is not finite, and where?

The step runs without compilation and without other processes: each process's micro-batches in turn, with the running
statistics of that process and the normalizer of the whole step. SyncBN takes the batch of all processes at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from retinanet.engine.evaluate import autocast
from retinanet.engine.train import Trainer
from retinanet.layers.norm import SyncBN, set_loss_scale
from retinanet.structures import PAD_LABEL, Batch, HeadOutputs

_HUGE = 1e4  # weights of a detector stay below about 10; beyond this they have run away before this step


@dataclass
class Replayed:
    """What a replay found.

    lines: for the reader. reproduced: whether anything was not finite.
    """

    lines: list[str] = field(default_factory=list)
    reproduced: bool = False

    def tell(self, line: str, wrong: bool = False) -> None:
        self.lines.append(line)
        self.reproduced |= wrong


def replay(trainer: Trainer, failed: dict, device: torch.device) -> Replayed:
    """Run the step of `failed` (`failure.read_failed_batch`) forwards and backwards; no weight changes.

    The trainer is of the same model; its weights and statistics become those of the failed step.
    """
    model, found = trainer.model, Replayed()
    model.load_state_dict(failed["model"])
    trainer.loss.load_state_dict(failed["loss"])
    model.train()
    _check_state(model, found)
    ranks = _on_device(failed, model, device)
    scale = failed["values"].get("loss_scale", 1.0) if trainer.amp == "fp16" else 1.0
    set_loss_scale(model, torch.tensor(scale, device=device))
    divisor = _divisor(trainer, [batch for _, batches in ranks for batch in batches])
    watch = _Watch(model)
    for buffers, batches in ranks:
        model.load_state_dict(buffers, strict=False)
        for batch in batches:
            _run(trainer, batch, divisor / len(ranks), scale, failed.get("files", {}), found)
    watch.close()
    _summary(trainer, watch, scale * len(ranks), found)
    return found


def _on_device(failed: dict, model: nn.Module, device: torch.device) -> list[tuple[dict, list[Batch]]]:
    """Return (statistics, micro-batches) of each process, or of all together where SyncBN made them one."""
    ranks = [(part["buffers"], [Batch(**batch).to(device) for batch in part["batches"]]) for part in failed["ranks"]]
    if not any(isinstance(module, SyncBN) for module in model.modules()):
        return ranks
    return [(ranks[0][0], [_joined(parts) for parts in zip(*(batches for _, batches in ranks), strict=True)])]


def _joined(parts: tuple[Batch, ...]) -> Batch:
    """Return one batch of all `parts`, whose images have one size already; their boxes are padded to one count."""
    most = max(part.gt_labels.shape[1] for part in parts)
    columns: dict[str, list[Tensor]] = {}
    for part in parts:
        missing = most - part.gt_labels.shape[1]
        padded = {
            "gt_boxes": nn.functional.pad(part.gt_boxes, (0, 0, 0, missing)),
            "gt_labels": nn.functional.pad(part.gt_labels, (0, missing), value=PAD_LABEL),
        }
        for name, value in {**vars(part), **padded}.items():
            if isinstance(value, Tensor):
                columns.setdefault(name, []).append(value)
    ids = [image_id for part in parts for image_id in part.image_ids]
    return Batch(**{name: torch.cat(values) for name, values in columns.items()}, image_ids=ids)


def _check_state(model: nn.Module, found: Replayed) -> None:
    """Tell about weights and statistics that were wrong before the step began."""
    largest, where = 0.0, ""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if not torch.isfinite(tensor).all():
            found.tell(f"before the step, {name} has values that are not finite", wrong=True)
        elif float(tensor.abs().max()) > largest and not name.endswith(("running_var", "running_mean")):
            largest, where = float(tensor.abs().max()), name
    found.tell(f"before the step, the largest weight was {largest:.4g}, in {where}")
    if largest > _HUGE:
        found.tell(
            "weights of that size have run away in the steps before: lower SOLVER.BASE_LR, lengthen "
            "SOLVER.WARMUP_ITERS, set SOLVER.CLIP_GRAD_NORM"
        )


def _divisor(trainer: Trainer, batches: list[Batch]) -> Tensor:
    counts = [_assign(trainer, batch).num_fg for batch in batches]
    return trainer.loss.divisor(trainer.loss.count(torch.cat(counts)))


def _assign(trainer: Trainer, batch: Batch):
    anchors = trainer.model.anchors(tuple(batch.images.shape[-2:]), batch.images.device)
    return trainer.loss.assign(anchors, batch.gt_boxes, batch.gt_labels)


def _run(trainer: Trainer, batch: Batch, divisor: Tensor, scale: float, files: dict, found: Replayed) -> None:
    """Run one micro-batch and tell the losses of each of its images."""
    model, loss_fn = trainer.model, trainer.loss
    assigned = _assign(trainer, batch)
    with autocast(batch.images.device, trainer.amp):
        outputs = model(model.normalize(batch.images, batch.image_sizes))
    losses = loss_fn(outputs, batch.gt_boxes, batch.gt_labels, assigned, divisor)
    (sum(losses.values()) * scale).backward()
    for row, image_id in enumerate(batch.image_ids):
        one = slice(row, row + 1)
        with torch.no_grad():
            part = type(assigned)(*(column[one] for column in assigned))
            own = loss_fn(_of_image(outputs, one), batch.gt_boxes[one], batch.gt_labels[one], part, divisor)
        height, width = batch.image_sizes[row].tolist()
        values = {name: float(value) for name, value in own.items()}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        found.tell(
            f"image {image_id}{' ' + files[image_id] if files.get(image_id) else ''}: {height} x {width} pixels, "
            f"{int((batch.gt_labels[row] >= 0).sum())} boxes, {int(assigned.num_fg[row])} positive anchors: {shown}",
            wrong=not all(map(math.isfinite, values.values())),
        )


def _of_image(outputs: HeadOutputs, one: slice) -> HeadOutputs:
    levels = {name: [level[one] for level in outputs[name]] for name in ("logits", "deltas")}
    return HeadOutputs(**levels, anchors=outputs["anchors"])


def _summary(trainer: Trainer, watch: "_Watch", scale: float, found: Replayed) -> None:
    """Tell the first layer and the first gradient that are not finite, or that all are."""
    if watch.first_output:
        found.tell(f"first not finite on the way forwards: {watch.first_output}", wrong=True)
    else:
        found.tell("on the way forwards every layer's output is finite")
    if watch.first_gradient:
        found.tell(f"first not finite on the way back: the gradient of {watch.first_gradient}", wrong=True)
    else:
        norms = [p.grad.double().norm() for p in trainer.model.parameters() if p.grad is not None]
        norm = float(torch.stack(norms).norm()) / scale if norms else 0.0
        found.tell(f"on the way back every gradient is finite; their norm is {norm:.4g}")


class _Watch:
    """Hooks on every module and parameter of a model, which note the first value that is not finite."""

    def __init__(self, model: nn.Module):
        self.first_output, self.first_gradient = "", ""
        self._handles = []
        for name, module in model.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(self._before(name)))
                self._handles.append(module.register_forward_hook(self._after(name)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._gradient(name)))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, name: str):
        def hook(_module, args):
            for tensor in _tensors(args):
                self._note(f"what goes into {name}", tensor)

        return hook

    def _after(self, name: str):
        def hook(_module, _args, output):
            for tensor in _tensors(output):
                self._note(f"the output of {name}", tensor)

        return hook

    def _note(self, what: str, tensor: Tensor) -> None:
        if not self.first_output and not torch.isfinite(tensor).all():
            self.first_output = f"{what} {_described(tensor, 'images')}"

    def _gradient(self, name: str):
        def hook(gradient: Tensor) -> None:
            if not self.first_gradient and not torch.isfinite(gradient).all():
                self.first_gradient = f"{name} {_described(gradient)}"

        return hook


def _tensors(value) -> Iterator[Tensor]:
    """Yield the floating-point tensors in nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value.detach()
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _described(tensor: Tensor, what: str = "") -> str:
    """Return shape, dtype and how many values are not finite; `what` names the rows of the first axis, if anything."""
    good = torch.isfinite(tensor)
    rows = (~good).flatten(1).any(1).nonzero().flatten().tolist() if what and tensor.dim() > 1 else []
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    inside = f", in {what} {shown} of the batch" if rows else ""
    rest = f"; the largest of the others is {float(tensor[good].abs().max()):.4g}" if good.any() else ""
    return (
        f"({' x '.join(map(str, tensor.shape))}, {str(tensor.dtype).removeprefix('torch.')}): {int((~good).sum())} of "
        f"{tensor.numel()} values, {int(tensor.isnan().sum())} of them NaN{inside}{rest}"
    )
