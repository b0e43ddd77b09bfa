"""Where the configuration of a model contradicts what the weights were trained with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.layers.conv import Conv2d
from retinanet.weights.source import AnchorOrder, Source

_DEPTHS = {  # blocks per stage, convolutions per block -> MODEL.BACKBONE.NAME
    ((2, 2, 2, 2), 2): "R18",
    ((3, 4, 6, 3), 2): "R34",
    ((3, 4, 6, 3), 3): "R50",
    ((3, 4, 23, 3), 3): "R101, X101_32x8d or X101_64x4d",
    ((3, 8, 36, 3), 3): "R152",
}


@dataclass(frozen=True)
class Inputs:
    """What a model expects of its images and how its bottlenecks and anchors are made; empty fields are not compared.

    channel_order: "BGR" or "RGB". pixel_mean, pixel_std: 0..255, in that order. anchors: in channel order.
    """

    channel_order: str = ""
    pixel_mean: Sequence[float] = ()
    pixel_std: Sequence[float] = ()
    stride_in_1x1: bool | None = None
    anchors: AnchorOrder | None = None


def check_depth(source: Source, wanted: dict[str, Tensor]) -> None:
    """Raise `UserError` when the backbones differ in their blocks, with the one that the file has."""
    theirs, ours = _depth(source.tensors), _depth(wanted)
    if theirs == ours or not any(ours[0]):
        return
    blocks, convs = theirs
    name = _DEPTHS.get(theirs)
    remedy = f"set MODEL.BACKBONE.NAME to {name}, or use other weights" if name else "use other weights"
    raise UserError(
        f"the {source.title} has {blocks} blocks of {convs} convolutions in res2 to res5, the model {ours[0]} of "
        f"{ours[1]}; {remedy}"
    )


def _depth(tensors: dict[str, Tensor]) -> tuple[tuple[int, ...], int]:
    """Return the blocks of res2..res5, counted by names, and the convolutions of the first block."""
    blocks = {tuple(name.split(".")[1:3]) for name in tensors if name.startswith("backbone.res")}
    convs = {name.split(".")[3] for name in tensors if name.startswith("backbone.res2.0.conv")}
    return tuple(sum(stage == f"res{level}" for stage, _ in blocks) for level in range(2, 6)), len(convs)


def anchor_order(theirs: AnchorOrder | None, ours: AnchorOrder | None) -> list[int]:
    """Return for each anchor of the model its place in the file; empty when nothing is to be moved.

    Under one convention, the ratios of the configuration are believed: what is known of a foreign file is only what
    its project usually does.
    """
    if theirs is None or ours is None or (theirs.convention == ours.convention and not theirs.is_certain):
        return []
    held, wanted = theirs.pairs(), ours.pairs()
    if held == wanted or sorted(held) != sorted(wanted):
        return []
    return [held.index(pair) for pair in wanted]


def contradictions(source: Source, model: nn.Module, inputs: Inputs) -> list[str]:
    """Return a sentence for each setting that contradicts the weights; none of them shows in names or shapes."""
    return [*_colours(source, inputs), *_structure(source, inputs), *_convolutions(source, model)]


def _colours(source: Source, inputs: Inputs) -> Iterator[str]:
    turned = bool(source.channel_order and inputs.channel_order and source.channel_order != inputs.channel_order)
    for key, theirs, ours, far in (
        ("PIXEL_STD", source.pixel_std, inputs.pixel_std, lambda a, b: max(a, b) > 1.5 * min(a, b)),
        ("PIXEL_MEAN", source.pixel_mean, inputs.pixel_mean, lambda a, b: abs(a - b) > 5),
    ):
        theirs = tuple(theirs[::-1]) if turned else tuple(theirs)
        if theirs and ours and any(far(a, b) for a, b in zip(theirs, ours, strict=True)):
            yield f"MODEL.{key}: is {list(ours)}, but these weights were trained with {list(theirs)}"


def _structure(source: Source, inputs: Inputs) -> Iterator[str]:
    ours, theirs = inputs.stride_in_1x1, source.stride_in_1x1
    if None not in (ours, theirs) and ours != theirs:
        yield f"MODEL.BACKBONE.STRIDE_IN_1X1: is {ours}, but these weights were trained with {theirs}"
    if source.anchors and inputs.anchors and source.anchors.convention != inputs.anchors.convention:
        yield (
            f"MODEL.ANCHORS.CONVENTION: is {inputs.anchors.convention}, but the head was trained with "
            f"{source.anchors.convention}; its boxes will be slightly off until it is fine-tuned"
        )


def _convolutions(source: Source, model: nn.Module) -> Iterator[str]:
    kinds = {type(conv) for name, conv in model.named_modules() if name.startswith("backbone.")}
    changed = [kind for kind in kinds if issubclass(kind, Conv2d) and kind is not Conv2d]
    if changed and source.plain_convs:
        yield f"MODEL.BACKBONE.CONV: the model has {changed[0].__name__}, these weights were trained with plain ones"
