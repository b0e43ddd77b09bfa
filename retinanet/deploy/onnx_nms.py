"""Suppression for ONNX graphs: an operator of ours that becomes ONNX's NonMaxSuppression, classes and images apart."""

import functools

import torch
from torch import Tensor

from retinanet.deploy.graph import apart_nms, inclusive_corners, strict_threshold

OPSET = 18


@functools.cache
def _operator():
    """Return the operator `retinanet::class_nms`; what it computes in PyTorch serves the tracing alone."""

    def class_nms(boxes: Tensor, labels: Tensor, valid: Tensor, threshold: float, num_classes: int) -> Tensor:
        return apart_nms(boxes, labels, valid, threshold, False, False)

    made = torch.library.custom_op("retinanet::class_nms", class_nms, mutates_args=())
    made.register_fake(lambda boxes, labels, valid, threshold, num_classes: torch.empty_like(valid))
    return made


def onnx_suppress(num_classes: int):
    """Return the function that `DetectionGraph` takes as `suppress` when it shall become an ONNX graph."""
    operator = _operator()

    def suppress(boxes: Tensor, labels: Tensor, valid: Tensor, nms_iou: float, plus_one: bool, inclusive: bool):
        threshold = strict_threshold(nms_iou, inclusive)
        return operator(inclusive_corners(boxes, plus_one), labels, valid, threshold, num_classes)

    return suppress


def translation_table() -> dict:
    """Return what `torch.onnx.export` takes as `custom_translation_table`.

    NonMaxSuppression takes a score for every class and box: here the rank of the box in its own class, and 0, which is
    below its threshold, in all others. It returns (image, class, box) of what stays.
    """
    from onnxscript import opset18 as op

    def class_nms(boxes, labels, valid, threshold: float, num_classes: int):
        one, zero = op.Constant(value_ints=[1]), op.Constant(value_ints=[0])
        classes = op.Constant(value_ints=list(range(num_classes)))
        shape = op.Shape(valid)
        width = op.Slice(shape, one, op.Constant(value_ints=[2]))  # (1,)
        start, step = op.Constant(value_int=0), op.Constant(value_int=1)
        columns = op.Range(start, op.Squeeze(width), step)
        ranks = op.Cast(op.Sub(width, columns), to=1)  # (n,) float32, falling
        ranks = op.Where(valid, ranks, op.Constant(value_float=0.0))  # (N, n)
        own = op.Equal(op.Unsqueeze(labels, one), op.Unsqueeze(classes, op.Constant(value_ints=[0, 2])))  # (N, K, n)
        scores = op.Where(own, op.Unsqueeze(ranks, one), op.Constant(value_float=0.0))
        stays = op.NonMaxSuppression(
            boxes, scores, width, op.Constant(value_floats=[threshold]), op.Constant(value_floats=[0.0])
        )  # (S, 3)
        places = op.Gather(stays, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_float=1.0), op.Slice(op.Shape(places), zero, one))
        kept = op.ScatterND(op.Mul(ranks, op.Constant(value_float=0.0)), places, ones)
        return op.Cast(kept, to=9)  # bool

    def stable_sort(x, stable: bool = True, dim: int = -1, descending: bool = False):
        axis = op.Constant(value_ints=[dim])
        return op.TopK(x, op.Gather(op.Shape(x), axis), axis=dim, largest=descending, sorted=1)  # first of equals first

    return {torch.ops.retinanet.class_nms.default: class_nms, torch.ops.aten.sort.stable: stable_sort}
