"""From the norm of a file to the norm of the model, where the one has a meaning in the other.

What a norm is shows in its state and in `folds_in_training`, so no norm is named here:

| kind | state | example |
|---|---|---|
| affine | weight, bias, both fixed; statistics already folded in | AffineChannel |
| frozen | and running_mean, running_var, all fixed | FrozenBN |
| batch | the same, moving in training | BN, SyncBN |
| group | weight, bias of a normalization without running statistics | GN |
| moment | weight, bias, running_var that is a second moment, windows | MABN |
| channel | a batch norm inside, and weight, bias per group | BCN |
"""

import torch
from torch import Tensor, nn

Leaves = dict[str, Tensor]  # name within the norm -> tensor
_BATCH = ("weight", "bias", "running_mean", "running_var")
_WHY = {  # (kind in the file, kind in the model): why the one cannot become the other, and what to do
    ("affine", "batch"): "its scale and shift already contain the statistics, which training on batches would apply "
    "again; use weights that keep them apart (detectron2://ImageNetPretrained/MSRA/R-50.pkl) or a frozen norm",
    ("batch", "moment"): "batch norm statistics are about the mean, this norm's about zero, and the shift by the mean "
    "would be lost; use weights that were trained with this norm",
    ("batch", "group"): "batch norm statistics have no place in a norm without running statistics, and without them "
    "scale and shift mean something else; use weights that were trained with this norm (R-50-GN.pkl)",
    ("affine", "group"): "a scale and a shift with folded statistics are not those of a normalized activation; use "
    "weights that were trained with this norm (R-50-GN.pkl)",
    ("batch", "channel"): "the statistics belong to convolutions without standardized weights and to a norm without a "
    "channel half; use weights that were trained with this norm",
}


class NormRefused(Exception):
    """The values of the file have no meaning in the model's norm; the message says why and what to do."""


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost norms of `model` by name."""
    norms = {name: module for name, module in model.named_modules() if hasattr(module, "folded")}
    inner = {name for name in norms if any(name.startswith(f"{outer}.") for outer in norms)}
    return {name: module for name, module in norms.items() if name not in inner}


def kind_of(norm: nn.Module) -> str:
    """Return the kind of a norm of the model, a word of the table above."""
    norm = norm.levels[0] if hasattr(norm, "levels") else norm
    names = set(norm.state_dict())
    if any("." in name for name in names):
        return "channel"
    if "running_mean" in names:
        return "frozen" if norm.folds_in_training else "batch"
    if "running_var" in names:
        return "moment"
    return "affine" if norm.folds_in_training else "group"


def kind_of_leaves(leaves: Leaves, folded: bool, bare: str) -> str:
    """Return the kind of a norm in a file; "" when weight and bias are all and nothing says what they are."""
    names = {name.removeprefix("levels.0.") for name in leaves}
    if any(name.startswith("bn.") for name in names):
        return "channel"
    if "running_mean" in names:
        return "batch"
    if "running_var" in names:
        return "moment"
    return "affine" if folded else bare


def convert_norm(leaves: Leaves, kind: str, norm: nn.Module, eps: float, groups: int = 32) -> Leaves:
    """Return the state of `norm` that computes in evaluation what the file's norm computes.

    eps: of the file's batch norms; where the model's differs, weight or running_var takes up the difference.
    groups: of the file's group norms; the model's must have as many.
    What the file lacks is absent from the result. Raises `NormRefused`.
    """
    wanted = kind_of(norm)
    needed = {("batch", "affine"): _BATCH, ("affine", "frozen"): _BATCH[:2]}.get((kind, wanted), ())
    if not all(name in leaves for name in needed):
        return {}  # half a norm: the loader then reports the model's tensors as missing
    own_eps = getattr(norm.levels[0] if hasattr(norm, "levels") else norm, "eps", eps)
    if kind == "batch" and wanted in ("batch", "frozen"):
        return _same_batch_norm(leaves, norm, eps, own_eps)
    if kind == "batch" and wanted == "affine":
        return fold(leaves, eps)
    if kind == "affine" and wanted == "frozen":
        zero = torch.zeros_like(leaves["weight"])
        return {**leaves, "running_mean": zero, "running_var": zero + 1 - own_eps}
    if kind == wanted == "moment":
        return _same_moment_norm(leaves, norm)
    if kind == wanted == "channel":
        return _same_channel_norm(leaves, norm)
    if kind == wanted == "group" and getattr(norm, "groups", groups) != groups:
        raise NormRefused(f"made for {groups} groups, not {norm.groups}; set MODEL.NORM_OPTIONS.GN.GROUPS {groups}")
    if kind == wanted or (kind == "" and wanted in ("affine", "group")):
        return leaves
    reason = f"its values are those of another kind of norm ({kind or 'bare'} in the file, {wanted} in the model)"
    raise NormRefused(_WHY.get((kind, wanted), f"{reason}; use weights that were trained with this norm"))


def fold(leaves: Leaves, eps: float) -> Leaves:
    """Return weight / sqrt(running_var + eps) and bias - running_mean * that, in float64 and back, as weight, bias."""
    wide = {name: tensor.double() for name, tensor in leaves.items()}
    scale = wide["weight"] / torch.sqrt(wide["running_var"] + eps)
    shift = wide["bias"] - wide["running_mean"] * scale
    return {"weight": scale.float(), "bias": shift.float()}


def _same_batch_norm(leaves: Leaves, norm: nn.Module, eps: float, own_eps: float) -> Leaves:
    """Where the eps differ, a fixed norm gets another weight, a moving one (its weight learns) another running_var."""
    state = norm.state_dict()
    converted = {name: leaves[name] for name in leaves if name in state}
    if eps != own_eps and norm.folds_in_training and {"weight", "running_var"} <= leaves.keys():
        var = leaves["running_var"].double()
        converted["weight"] = (leaves["weight"] * torch.sqrt((var + own_eps) / (var + eps))).float()
    elif eps != own_eps:
        moved = {name: tensor.double() + eps - own_eps for name, tensor in converted.items()}
        converted |= {name: tensor.float() for name, tensor in moved.items() if name.endswith("running_var")}
    counters = [name for name in state if name.endswith("num_batches_tracked") and name not in converted]
    return converted | {name: torch.zeros_like(state[name]) for name in counters}


def _same_moment_norm(leaves: Leaves, norm: nn.Module) -> Leaves:
    """Without windows in the file the iterations start again, so that empty windows are not averaged."""
    state = norm.state_dict()
    windows = [name for name in state if name.startswith("buffer_") or ".buffer_" in name]
    if all(name in leaves for name in windows):
        return leaves
    fresh = {name: torch.zeros_like(state[name]) for name in state if name in windows or name.endswith("iters")}
    return {**leaves, **fresh}


def _same_channel_norm(leaves: Leaves, norm: nn.Module) -> Leaves:
    """The batch half may be batch norm here and estimates there: only the rate of the estimates is not in both."""
    state = norm.state_dict()
    rates = {name: torch.zeros_like(state[name]) for name in state if name.endswith("estbn_moving_speed")}
    return rates | {name: tensor for name, tensor in leaves.items() if name in state}
