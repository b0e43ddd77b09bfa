"""What training and evaluation see, as pictures (H, W, 3) uint8 BGR with captions; `tools/visualize.py` shows them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from retinanet.engine.coco_json import GroundTruth, Results
from retinanet.engine.confusion import ImageCounts, rank_images
from retinanet.engine.matching import TRUE, Matches, ignored_boxes
from retinanet.engine.report_images import COLOURS, MISSED
from retinanet.modeling.loss import Assignment
from retinanet.structures import IGNORE, PAD_LABEL, Batch
from retinanet.utils.draw import class_colour, draw_boxes, draw_detections

MIN_SIDE = 240  # pixels: smaller pictures are enlarged, or their labels would cover them
LINE_EVERY = 300  # pixels of the short side for each pixel of a line: it has to stay visible on a sheet
IGNORED_COLOUR, BOX_COLOUR = (150, 150, 150), (255, 255, 255)  # BGR
CROWD_COLOUR = (150, 150, 150)


class Shown(NamedTuple):
    """A picture (H, W, 3) uint8 BGR and the line that says what it is."""

    caption: str
    image: np.ndarray


def batch_images(batch: Batch, channel_order: str) -> list[np.ndarray]:
    """Return the N images of a batch as the model gets them before normalization, without padding, in BGR."""
    pixels = batch.images.permute(0, 2, 3, 1)
    pixels = (pixels.round().clamp(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels).numpy()
    images = [image[:height, :width] for image, (height, width) in zip(pixels, batch.image_sizes.tolist(), strict=True)]
    return [np.ascontiguousarray(image[..., ::-1] if channel_order == "RGB" else image) for image in images]


def truth_pictures(batch: Batch, names: Sequence[str], channel_order: str, plus_one: bool = False) -> list[Shown]:
    """Return the images of a training batch, resized and augmented, with their boxes.

    plus_one: x2 and y2 are inside the box (Detectron), and are drawn so.
    """
    shown = []
    for place, image in enumerate(batch_images(batch, channel_order)):
        boxes, labels = _truth(batch, place, plus_one)
        picture = draw_detections(image, boxes, labels, None, names, MIN_SIDE)
        caption = f"image {batch.image_ids[place]}: {_count(len(labels))}, {image.shape[1]} x {image.shape[0]}"
        shown.append(Shown(caption, picture))
    return shown


def anchor_pictures(
    batch: Batch,
    anchors: list[torch.Tensor],
    assignment: Assignment,
    strides: Sequence[int],
    channel_order: str,
    plus_one: bool = False,
) -> list[list[Shown]]:
    """Return, for each image, a picture for each level: positive anchors in the colour of their class, ignored ones in
    grey, the boxes in white.

    anchors: per level (H*W*A, 4). The first caption also tells how many boxes no anchor of any level learns.
    """
    rows = []
    levels = [len(level) for level in anchors]
    for place, image in enumerate(batch_images(batch, channel_order)):
        boxes, _ = _truth(batch, place, plus_one)
        matched = assignment.matched_idx[place]
        alone = len(boxes) - len(matched[matched >= 0].unique())
        row = []
        parts = zip(anchors, matched.split(levels), assignment.labels[place].split(levels), strides, strict=True)
        for number, (level, level_matched, labels, stride) in enumerate(parts, start=3):
            positive, ignored = level_matched >= 0, level_matched == IGNORE
            chosen = torch.cat([level[ignored], level[positive]]).numpy() + (0, 0, plus_one, plus_one)
            colours = [IGNORED_COLOUR] * int(ignored.sum()) + [class_colour(k) for k in labels[positive].tolist()]
            line = max(1, round(min(image.shape[:2]) / LINE_EVERY))
            picture = draw_boxes(image, chosen, colours, line, MIN_SIDE)
            factor = picture.shape[0] // image.shape[0]
            picture = draw_boxes(picture, boxes * factor, [BOX_COLOUR] * len(boxes), 2 * line)
            caption = f"P{number}, stride {stride}: {int(positive.sum())} positive, {int(ignored.sum())} ignored"
            if number == 3:
                caption = f"image {batch.image_ids[place]}, {alone} of {len(boxes)} boxes without anchor; {caption}"
            row.append(Shown(caption, picture))
        rows.append(row)
    return rows


def _truth(batch: Batch, place: int, plus_one: bool) -> tuple[np.ndarray, list[int]]:
    """Return boxes (M, 4) to draw and labels of one image."""
    real = batch.gt_labels[place] != PAD_LABEL
    return batch.gt_boxes[place][real].numpy() + (0, 0, plus_one, plus_one), batch.gt_labels[place][real].tolist()


def order_images(counts: ImageCounts, by: str) -> np.ndarray:
    """Return the places of the images to show: "f1": worst F1 first, of equals most mistakes; "mistakes": most mistakes
    first, of equals the lower F1; "id": by image id. Further ties go by image id.

    Images without boxes and detections are left out, but for "id".
    """
    if by == "id":
        return np.arange(len(counts.right))
    worst = rank_images(counts)
    mistakes = (counts.false + counts.missed)[worst]
    return worst if by == "f1" else worst[np.argsort(-mistakes, kind="stable")]


def comparison(
    image: np.ndarray, truth: GroundTruth, kept: Results, matches: Matches, counts: ImageCounts, place: int
) -> list[Shown]:
    """Return the ground truth and the detections of image `place`: green what matches, orange boxes that were missed,
    red false alarms, grey crowds and what lies in them."""
    here, found = np.flatnonzero(truth.images == place), np.flatnonzero(kept.images == place)
    right = matches.outcome[found] == TRUE
    colour_of = dict.fromkeys(here.tolist(), MISSED)
    colour_of |= dict.fromkeys(matches.box[found[right]].tolist(), COLOURS[TRUE])
    colour_of |= dict.fromkeys(here[ignored_boxes(truth)[here]].tolist(), CROWD_COLOUR)
    colours = [colour_of[box] for box in here.tolist()]
    outcomes = [COLOURS[outcome] for outcome in matches.outcome[found].tolist()]
    names = truth.names
    left = draw_detections(image, _xyxy(truth.boxes[here]), truth.labels[here], None, names, MIN_SIDE, colours)
    boxes, labels, scores = _xyxy(kept.boxes[found]), kept.labels[found], kept.scores[found]
    numbers = f"{counts.right[place]} right, {counts.false[place]} false, {counts.missed[place]} missed"
    return [
        Shown(f"image {truth.image_ids[place]}: {_count(len(here))}", left),
        Shown(numbers, draw_detections(image, boxes, labels, scores, names, MIN_SIDE, outcomes)),
    ]


def _count(boxes: int) -> str:
    return f"{boxes} box{'es' * (boxes != 1)}"


def _xyxy(xywh: np.ndarray) -> np.ndarray:
    return np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]])
