"""Norms and weight reparametrizations folded into plain convolutions, for evaluation and export.

In evaluation a norm whose statistics are constants is y = scale * x + shift per channel, and after a convolution

    scale * conv(x, W) + shift = conv(x, scale * W) + shift

exactly, zero padding included. So every `Conv2d` becomes a plain one with the weight scale * effective_weight() and the
bias scale * bias + shift. What cannot be expressed this way stays behind it, and the report says so. This file asks the
layers (`effective_weight()`, `folded()`) and knows none of them by name.

A norm per level behind a conv that all levels share folds into one weight per level: the numbers are the same and the
pass over the activations is gone, for five times the memory of that weight (75 MB for the head of RetinaNet).
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retinanet.layers.conv import Conv2d

WHOLE, PART, NOTHING = "whole", "part", "nothing"


@dataclass(frozen=True)
class Folded:
    """What became of one convolution or norm.

    name: in the model. conv, norm: kinds as class names, "" where there is none. outcome: `WHOLE`, `PART` or `NOTHING`
    of the norm is folded; `WHOLE` for a conv without a norm. why: for people.
    """

    name: str
    conv: str
    norm: str
    outcome: str
    why: str


def fold(model: nn.Module) -> tuple[nn.Module, list[Folded]]:
    """Return a folded copy of `model` in evaluation mode, without gradients, and a report in the order of its modules.

    The outputs are those of `model.eval()` up to rounding; the products are taken in float64. `model` stays as it is.
    The copy has other parameters than the model, so its state does not load into one.
    """
    model = nn.ModuleDict({"model": copy.deepcopy(model).eval().requires_grad_(False)})  # so that each has an owner
    report, done = [], ()
    for path, module in list(model.named_modules()):
        if path.startswith(done) or not (isinstance(module, Conv2d) or hasattr(module, "folded")):
            continue
        done = (*done, f"{path}.")  # what belongs to it is dealt with
        name, (owner, _, attribute) = path.removeprefix("model").removeprefix("."), path.rpartition(".")
        if isinstance(module, Conv2d):
            folded, entry = _fold_conv(name, module)
            setattr(model.get_submodule(owner), attribute, folded)
        else:
            entry = Folded(
                name, "", type(module).__name__, NOTHING, "no convolution of this framework stands before it"
            )
        report.append(entry)
    return model["model"], report


def summary(report: list[Folded]) -> str:
    """Return one line for a log: how many norms of which kind are folded, and why some are not."""
    counts: dict[tuple[str, str, str], int] = {}
    for entry in report:
        if entry.norm:
            key = (entry.norm, entry.outcome, entry.why)
            counts[key] = counts.get(key, 0) + 1
    parts = [f"{count} {norm} {outcome} ({why})" for (norm, outcome, why), count in counts.items()]
    return "folded: " + ("; ".join(parts) if parts else "the model has no norms")


class ConvPerLevel(nn.Module):
    """A convolution with one weight for each pyramid level, where a norm per level was folded.

    convs: one plain `Conv2d` for each level. It is called as the `Conv2d` that it replaces.
    """

    takes_level = True

    def __init__(self, convs: list[Conv2d]):
        super().__init__()
        self.levels = nn.ModuleList(convs)

    def prepare(self) -> None:
        """Nothing is shared between the levels."""

    def forward(self, x: Tensor, level: int, prepared: None = None, residual=None, relu: bool = False) -> Tensor:
        return self.levels[level](x, residual=residual, relu=relu)


def _fold_conv(name: str, conv: Conv2d) -> tuple[nn.Module, Folded]:
    wide = copy.deepcopy(conv).double()
    levels = getattr(conv.norm, "levels", None)
    if levels is None:
        outcome, rest = _outcome(wide.norm)
        return _plain(conv, wide, wide.norm), _entry(name, conv, conv.norm, outcome, rest)
    outcome, rest = _outcome(wide.norm.levels[0])
    entry = _entry(name, conv, levels[0], outcome, rest, f", one weight for each of {len(levels)} levels")
    if outcome == NOTHING:
        return _plain(conv, wide, wide.norm), entry
    return ConvPerLevel([_plain(conv, wide, norm) for norm in wide.norm.levels]), entry


def _plain(conv: Conv2d, wide: Conv2d, norm: nn.Module | None) -> Conv2d:
    """Return a plain conv that computes what `conv` followed by `norm` does; wide: `conv` in float64."""
    weight, bias, dtype = wide.effective_weight(), wide.bias, conv.weight.dtype
    scale, shift, rest = (None, None, None) if norm is None else norm.folded()
    if scale is not None:
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = shift if bias is None else torch.addcmul(shift, scale, bias)
    outputs, inputs, kernel, _ = weight.shape
    with torch.random.fork_rng(devices=[]):  # a new conv draws its weight, which must not move the run that asks
        plain = Conv2d(
            inputs * conv.groups, outputs, kernel, conv.stride, conv.padding, conv.dilation, conv.groups,
            bias=bias is not None, norm=None if rest is None else rest.to(dtype),
        )  # fmt: skip
    plain.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        plain.bias = nn.Parameter(bias.to(dtype))
    return plain.eval().requires_grad_(False)


def _outcome(norm: nn.Module | None) -> tuple[str, nn.Module | None]:
    if norm is None:
        return WHOLE, None
    scale, _, rest = norm.folded()
    return (NOTHING if scale is None else WHOLE if rest is None else PART), rest


def _entry(name: str, conv: Conv2d, norm: nn.Module | None, outcome: str, rest: nn.Module | None, note="") -> Folded:
    kind = type(norm).__name__ if norm is not None else ""
    if outcome == NOTHING:
        why = "it normalizes by its own input"
    elif outcome == PART:
        why = f"its statistics are constants{note}, but {type(rest).__name__} normalizes by its own input and stays"
    else:
        why = f"its statistics are constants{note}" if kind else "no norm"
    baked = conv.effective_weight() is not conv.weight
    return Folded(
        name, type(conv).__name__, kind, outcome, why + ("; the weight is reparametrized once" if baked else "")
    )
