"""What a file of weights turns out to be, in this project's names, and how names are translated.

The native names: `backbone.conv1`, `backbone.res{2..5}.{i}.conv{1..3}` and `.shortcut`, `fpn.lateral{l}`,
`fpn.output{l}`, `fpn.p6`, `fpn.p7`, `head.cls_convs.{i}`, `head.box_convs.{i}`, `head.cls_pred`, `head.box_pred`; each
a convolution with `weight`, `bias` and `norm.*`.
"""

import re
from dataclasses import dataclass, field

from torch import Tensor

DETECTRON_MEAN, IMAGENET_MEAN = (102.9801, 115.9465, 122.7717), (123.675, 116.28, 103.53)
NO_STD, IMAGENET_STD = (1.0, 1.0, 1.0), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class AnchorOrder:
    """The anchors of one cell, in the order of the head's channels.

    convention: "detectron" and "detectron2" run over the octaves and, inside, over the ratios; "torchvision" the other
    way round. ratios: height / width. octaves: sizes per octave. is_certain: False for the values of a project's
    published configurations, which a file of that project need not follow.
    """

    convention: str
    ratios: tuple[float, ...]
    octaves: int
    is_certain: bool = False

    def pairs(self) -> list[tuple[int, float]]:
        """Return the A pairs (octave, ratio) in channel order."""
        if self.convention == "torchvision":
            return [(octave, ratio) for ratio in self.ratios for octave in range(self.octaves)]
        return [(octave, ratio) for octave in range(self.octaves) for ratio in self.ratios]


@dataclass
class Source:
    """The tensors of a file under native names, with what its project does differently.

    title: the format in words. tensors: native name -> tensor as in the file. origin: native name -> name in the file.
    unused: names that belong to the format and have no place here (classifier, momentum). unknown: all others.
    bare_norm: what a norm of nothing but weight and bias is here: "group" (group normalization), or "" when the file
    does not say; those of `folded` (native names) are a scale and a shift with the statistics folded in.
    eps: of its batch norms. groups: of its group norms.
    channel_order: "BGR", "RGB", or "" when the file does not say; pixel_mean and pixel_std:
    0..255 in that order. stride_in_1x1: None when the file does not say.
    whole: a RetinaNet, not only a backbone. anchors: of a RetinaNet, None when the file does not say.
    background_row: row 0 of every anchor's classes is a background that nothing ever trains (torchvision).
    plain_convs: its convolutions used their weights as they are, neither standardized nor centralized.
    classes: the names of its classes in row order, where the file holds them.
    """

    title: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    bare_norm: str = "group"
    folded: set[str] = field(default_factory=set)
    eps: float = 1e-5
    groups: int = 32
    channel_order: str = ""
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()
    stride_in_1x1: bool | None = None
    whole: bool = False
    anchors: AnchorOrder | None = None
    background_row: bool = False
    plain_convs: bool = False
    classes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NameTable:
    """One project's names.

    modules: (pattern of a module's name, native name) pairs, the first that matches whole counts.
    leaves: end of a name -> native end; the longest that fits counts.
    unused: patterns of whole names that have no native counterpart.
    """

    modules: list[tuple[str, str]]
    leaves: dict[str, str]
    unused: list[str]

    def translate(self, name: str) -> str | None:
        """Return the native name of a tensor, or None."""
        for end in sorted(self.leaves, key=len, reverse=True):
            if name.endswith(end):
                for pattern, native in self.modules:
                    match = re.fullmatch(pattern, name.removesuffix(end))
                    if match:
                        return match.expand(native) + self.leaves[end]
        return None

    def sort(self, source: Source, tensors: dict[str, Tensor]) -> Source:
        """Place every tensor of a file: under its native name, or among the unused or the unknown ones."""
        for name, tensor in tensors.items():
            native = self.translate(name)
            if any(re.fullmatch(pattern, name) for pattern in self.unused):
                source.unused.append(name)
            elif native is None:
                source.unknown.append(name)
            else:
                source.tensors[native], source.origin[native] = tensor, name
        return source


BATCH_NORM_LEAVES = {
    f".{leaf}": f".{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}
