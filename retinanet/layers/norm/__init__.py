"""The norms by name. A new norm is one file in this folder and one line in `NORMS`.

A norm is an `nn.Module` made as `NORMS[name](channels, **options)`; the options are the lower-cased keys of
`MODEL.NORM_OPTIONS.<NAME>`. It maps x (N, C, H, W) to the same shape, dtype and memory format, with statistics in
float32, and it has:

- `weight` and `bias` (C,) and, where it keeps any, `running_mean` and `running_var`, as parameters or buffers. All
  state is in its own `state_dict`; `PerLevelNorm` shares the parameters between levels.
- `folded() -> (scale, shift, rest)`: y = rest(scale * x + shift) is what `forward` computes on inputs whose statistics
  do not count. scale and shift are (C,), or None when nothing folds; rest is a module, or None when all of it folds.
- `folds_in_training`: True when `folded()` holds in training mode too, because x never enters the statistics.
- `has_statistics`: True when it keeps running statistics of its input, so that levels must not share one.
- `conv_kind`: the kind of convolution that its paper puts before it, a key of `retinanet.layers.conv.CONVS`.
- `takes_images_per_batch`, only where it is True: the constructor also gets `images_per_batch`, the images of one
  micro-batch of one process, which set the length of a window.
- `options_of`, only where it differs from its own name: the norm whose `MODEL.NORM_OPTIONS` it takes.
"""

from torch import nn

from retinanet.errors import pick
from retinanet.layers.norm.affine_channel import AffineChannel
from retinanet.layers.norm.batch_norm import BN, FrozenBN, SyncBN
from retinanet.layers.norm.bcn import BCN
from retinanet.layers.norm.control import set_loss_scale, sync_statistics
from retinanet.layers.norm.est_bn import EstBN
from retinanet.layers.norm.group_norm import GN
from retinanet.layers.norm.mabn import MABN
from retinanet.layers.norm.per_level import PerLevelNorm

__all__ = [
    "NORMS", "AffineChannel", "BCN", "BN", "EstBN", "FrozenBN", "GN", "MABN", "PerLevelNorm", "SyncBN", "default_conv",
    "make_norm", "set_loss_scale", "sync_statistics",
]  # fmt: skip

NORMS = {
    "AffineChannel": AffineChannel,
    "FrozenBN": FrozenBN,
    "BN": BN,
    "SyncBN": SyncBN,
    "GN": GN,
    "MABN": MABN,
    "BCN": BCN,
}


def make_norm(name: str, channels: int, **options) -> nn.Module | None:
    """Return a new norm over `channels`, None for the empty name; an unknown name raises `UserError`."""
    return pick(NORMS, name, "norm")(channels, **options) if name else None


def default_conv(name: str) -> str:
    """Return the conv kind that the paper of the norm puts before it; "plain" for the empty name."""
    return pick(NORMS, name, "norm").conv_kind if name else "plain"
