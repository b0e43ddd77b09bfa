"""The images on which a detector does best and worst, with its right and wrong detections and the boxes it missed."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from retinanet.data.image import read_image
from retinanet.engine.coco_json import GroundTruth, Results, read_json
from retinanet.engine.confusion import ImageCounts, count_by_image, rank_images
from retinanet.engine.matching import FALSE, IGNORED, TRUE, Matches, ignored_boxes, match
from retinanet.errors import UserError
from retinanet.utils.draw import draw_detections
from retinanet.utils.page import Block, Gallery, Picture

WORST, BEST = 8, 4  # pictures on a page
LONG_SIDE = 640  # pixels; a page with all pictures stays below 2 MB
QUALITY = 85  # of the JPEGs
COLOURS = {TRUE: (80, 175, 0), FALSE: (30, 30, 200), IGNORED: (150, 150, 150)}  # BGR
MISSED = (0, 165, 255)
LEGEND = "Green: right. Red: false alarm. Orange: a box that was missed. Grey: ignored, as it lies in a crowd."

# place of an image in `truth.image_ids` -> its file name, and the image (H, W, 3) uint8 BGR
Reader = Callable[[int], tuple[str, np.ndarray]]


def image_reader(annotations: Path | str | dict, image_ids: list, folder: Path) -> Reader:
    """Return what reads the images of a COCO json from `folder`; it raises `UserError` for one that it cannot read."""
    content = annotations if isinstance(annotations, dict) else read_json(annotations, "annotation file")
    entries = {entry["id"]: entry for entry in content["images"]}

    def read(place: int) -> tuple[str, np.ndarray]:
        entry = entries[image_ids[place]]
        if not isinstance(entry.get("file_name"), str):
            raise UserError(f"image {image_ids[place]} has no file_name")
        size = entry.get("height"), entry.get("width")
        return entry["file_name"], read_image(folder / entry["file_name"], size if None not in size else None)

    return read


def worst_and_best(truth: GroundTruth, kept: Results, read: Reader) -> tuple[list[Block], list[Block]]:
    """Return the blocks of the worst and of the best images at the threshold that `kept` was made with.

    What cannot be read is named in a paragraph.
    """
    matches = match(truth, kept)
    counts = count_by_image(truth, kept, matches)
    order = rank_images(counts)
    worst = [place for place in order[:WORST] if counts.false[place] + counts.missed[place]]
    best = [place for place in order[::-1][:BEST] if place not in worst and counts.right[place]]

    def gallery(kind: str, places: list[int]) -> list[Block]:
        pictures, problems = [], []
        for number, place in enumerate(places, start=1):
            try:
                file_name, image = read(place)
            except UserError as error:
                problems.append(f"Not shown: {error}")
                continue
            drawn = draw_image(image, truth, kept, matches, place)
            caption = f"{file_name} (image {truth.image_ids[place]}): {_score(counts, place)}"
            pictures.append(Picture(f"{kind}-{number}", _jpeg(drawn), caption))
        return [*([Gallery(pictures)] if pictures else []), *problems]

    return gallery("worst", worst), gallery("best", best)


def draw_image(image: np.ndarray, truth: GroundTruth, kept: Results, matches: Matches, place: int) -> np.ndarray:
    """Return the image with the detections and the missed boxes of image `place`.

    A large one is made `LONG_SIDE` pixels long; a small one is enlarged by a whole factor, for labels to fit beside it.
    """
    factor = LONG_SIDE / max(image.shape[:2])
    factor = float(int(factor)) if factor >= 1 else factor
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST)
    found_here = np.flatnonzero(kept.images == place)
    missed = ~ignored_boxes(truth) & (truth.images == place)
    missed[matches.box[found_here[matches.outcome[found_here] == TRUE]]] = False
    boxes = _xyxy(truth.boxes[missed]) * factor
    drawn = draw_detections(image, boxes, truth.labels[missed], None, truth.names, colours=[MISSED] * len(boxes))
    return draw_detections(
        drawn,
        _xyxy(kept.boxes[found_here]) * factor,
        kept.labels[found_here],
        kept.scores[found_here],
        truth.names,
        colours=[COLOURS[outcome] for outcome in matches.outcome[found_here].tolist()],
    )


def _xyxy(boxes: np.ndarray) -> np.ndarray:
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def _score(counts: ImageCounts, place: int) -> str:
    right, false, missed = (int(column[place]) for column in counts)
    return f"F1 {100 * counts.f1()[place]:.1f}, {right} right, {false} false, {missed} missed"


def _jpeg(image: np.ndarray) -> bytes:
    written, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert written, image.shape
    return data.tobytes()
