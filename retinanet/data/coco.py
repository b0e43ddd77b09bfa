"""A COCO-format data set: a folder of images and a json. COCO's xywh boxes and category ids end here."""

import os
from pathlib import Path

import numpy as np
import torch

from retinanet.data.annotations import load_annotations
from retinanet.data.image import read_image
from retinanet.errors import UserError
from retinanet.structures import Target

_PROBES = 16  # files looked for when a data set is opened: a wrong folder shows at once, a slow disk is not walked


class CocoDataset:
    """Images and ground truth of one COCO json, by position.

    Label k is the k-th of the sorted category ids: `category_ids[k]`, `class_names[k]`. Crowds are in no target; the
    evaluator reads them from the json itself. Everything per image or box is in flat arrays (see annotations.py).
    """

    def __init__(
        self,
        images_dir: str | Path,
        annotations_json: str | Path,
        name: str = "",
        plus_one_boxes: bool = False,
        max_degenerate: int = 0,
    ):
        """Read and check the json; raises `UserError` for whatever cannot be used, see `load_annotations`.

        name: what messages call the data set. plus_one_boxes: x2 = x1 + w - 1, for Detectron's checkpoints and
        conventions. max_degenerate: boxes without area that may be left out.
        """
        self.images_dir = Path(images_dir)
        self.annotations_file = Path(annotations_json)
        self.name = name or self.annotations_file.stem
        self.plus_one_boxes = plus_one_boxes
        if not self.images_dir.is_dir():
            raise UserError(f"{self.images_dir}: the image folder of data set {self.name!r} does not exist")
        self._data = load_annotations(annotations_json, plus_one_boxes, max_degenerate)
        self._probe_files()

    def _probe_files(self) -> None:
        rows = sorted(set(np.linspace(0, len(self) - 1, _PROBES).astype(int).tolist()))
        if not any(os.path.exists(self.file(row)) for row in rows):  # False too for a name that is too long
            raise UserError(
                f"{self.images_dir}: none of {len(rows)} images looked for is in this folder, the first is "
                f"{self._file_name(0)}; does {self.annotations_file} belong to it?"
            )

    def __len__(self) -> int:
        return len(self._data.image_ids)

    @property
    def num_classes(self) -> int:
        return len(self._data.category_ids)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The K category ids of the json, sorted; `category_ids[label]` undoes the labels of targets."""
        return self._data.category_ids

    @property
    def class_names(self) -> tuple[str, ...]:
        """The K category names in the order of `category_ids`."""
        return self._data.class_names

    @property
    def image_ids(self) -> np.ndarray:
        """(I,) int64 image ids in the order of the json."""
        return self._data.image_ids

    @property
    def sizes(self) -> np.ndarray:
        """(I, 2) int32 (height, width) as the json states them."""
        return self._data.sizes

    @property
    def box_labels(self) -> np.ndarray:
        """(B,) int32 in [0, K): the labels of all boxes, sorted by image."""
        return self._data.labels

    @property
    def box_counts(self) -> np.ndarray:
        """(I,) int64: how many boxes each image has, crowds not counted."""
        return np.diff(self._data.ends, prepend=0)

    @property
    def num_clipped(self) -> int:
        """Boxes that reached out of their image and were clipped to it."""
        return self._data.num_clipped

    @property
    def num_crowds(self) -> int:
        """Annotations that are crowds and therefore in no target."""
        return self._data.num_crowds

    def image_size(self, i: int) -> tuple[int, int]:
        """Return (height, width) of image `i` as the json states them."""
        height, width = self._data.sizes[i]
        return int(height), int(width)

    def file(self, i: int) -> Path:
        """Return the path of image `i`; an absolute `file_name` stays as it is."""
        return self.images_dir / self._file_name(i)

    def _file_name(self, i: int) -> str:
        start = self._data.name_ends[i - 1] if i > 0 else 0
        return self._data.names[start : self._data.name_ends[i]].decode()

    def target(self, i: int) -> Target:
        """Return the ground truth of image `i`: boxes (M, 4) in original pixels, labels (M,); crowds left out."""
        start, end = (self._data.ends[i - 1] if i > 0 else 0), self._data.ends[i]
        boxes = torch.from_numpy(self._data.boxes[start:end].copy())
        return Target(boxes=boxes, labels=torch.from_numpy(self._data.labels[start:end].astype(np.int64)))

    def read(self, i: int) -> tuple[np.ndarray, Target]:
        """Return image `i` as (H, W, 3) uint8 BGR in the orientation of the annotations, and its target.

        Raises `ImageError` when the file cannot be read, `UserError` when its size is not the one in the json.
        """
        return read_image(self.file(i), self.image_size(i)), self.target(i)
