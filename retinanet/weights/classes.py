"""The rows of the class layer: which row of a file belongs to which class of the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from retinanet.errors import UserError

# COCO 2017 (cocodataset.org, instances_val2017.json): the 80 categories with boxes, id: name
COCO = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck",
    9: "boat", 10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench",
    16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra",
    25: "giraffe", 27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee",
    35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove",
    41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork",
    49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli",
    57: "carrot", 58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant",
    65: "bed", 67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip


@dataclass(frozen=True)
class RowPlan:
    """rows: for each class of the model its row in the file, or -1 for a new class. note: what was decided and why."""

    rows: list[int]
    note: str = ""

    @property
    def is_identity(self) -> bool:
        return not self.note

    @property
    def all_new(self) -> bool:
        return all(row < 0 for row in self.rows)


def plan_rows(
    held: int, wanted: int, candidates: list[list[str]], names: list[str], background_row: bool = False
) -> RowPlan:
    """Decide which of the `held` rows per anchor of a file each of the `wanted` classes of the model takes.

    By name where both sides have names; else one to one for equal counts; a background row 0 is left out when that
    makes the counts equal, and torchvision's 91 rows give COCO's 80 by category id. Otherwise every class is new.
    candidates: lists of names that the file's rows may have, by preference; the first that fits their count is taken.
    names: of the model's classes, in order. Raises `UserError` when there are candidates and none fits.
    """
    source_names, row_of = _rows_by_name(held, [list(given) for given in candidates if given], background_row)
    if row_of and len(names) == wanted and not (held == wanted and names == source_names):
        return _by_name(row_of, names, held)
    if held == wanted:
        return RowPlan(list(range(held)))
    if background_row and held == wanted + 1:
        return RowPlan(list(range(1, held)), "class layer: the background row of the file is left out")
    if background_row and held == 91 and wanted == len(COCO):
        return RowPlan(list(COCO), "class layer: the rows of COCO's 80 categories are taken from the file's 91")
    return RowPlan(
        [-1] * wanted,
        f"class layer: the file has {held} classes, the model {wanted}, and no names to match them by (set "
        "MODEL.WEIGHTS_CLASSES to the file's class names); it starts anew from MODEL.HEAD.PRIOR_PROB",
    )


def _rows_by_name(held: int, candidates: list[list[str]], background_row: bool) -> tuple[list[str], dict[str, int]]:
    for names in candidates:
        rows: Sequence[int] = ()
        if len(names) == held:
            rows = range(held)
        elif background_row and len(names) == held - 1:
            rows = range(1, held)
        elif background_row and held == 91 and len(names) == len(COCO):
            rows = list(COCO)
        if rows:
            return names, dict(zip(names, rows, strict=True))
    if candidates:
        raise UserError(
            f"MODEL.WEIGHTS_CLASSES: {len(candidates[0])} names, but the class layer of the file has {held} classes; "
            "name all of them in the file's order, or none"
        )
    return [], {}


def _by_name(row_of: dict[str, int], names: list[str], held: int) -> RowPlan:
    rows = [row_of.get(name, -1) for name in names]
    if rows == list(range(held)):
        return RowPlan(rows)
    new = [name for name, row in zip(names, rows, strict=True) if row < 0]
    if len(new) == len(names):
        return RowPlan(rows, f"class layer: none of the model's {len(names)} classes is in the file; it starts anew")
    note = f"class layer: {len(names) - len(new)} of {len(names)} classes are copied by name"
    return RowPlan(rows, f"{note}; new: {', '.join(new[:10])}{', ...' if len(new) > 10 else ''}" if new else note)


def take_rows(tensor: Tensor, num_anchors: int, rows: list[int], fresh: Tensor) -> Tensor:
    """Return `tensor` (A*K_file, ...) with the rows of every anchor as planned: (A*K, ...), new rows from `fresh`."""
    held = tensor.unflatten(0, (num_anchors, -1))
    taken = fresh.unflatten(0, (num_anchors, -1)).clone()
    copied = [place for place, row in enumerate(rows) if row >= 0]
    taken[:, copied] = held[:, [rows[place] for place in copied]].to(taken.dtype)
    return taken.flatten(0, 1)


def reorder_anchors(tensor: Tensor, order: list[int]) -> Tensor:
    """Return `tensor` (A*X, ...) with anchor `order[a]` of the file in place a."""
    return tensor.unflatten(0, (len(order), -1))[order].flatten(0, 1)
