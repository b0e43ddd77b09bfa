"""A trained model as a function of pictures: `detector = load("model.pth"); detector("photo.jpg")`.

Pictures go through the resize of evaluation. Only those of one padded size run together: to norms that look at a whole
picture (GN, BCN) more padding is another picture, so what is found would depend on the rest of the batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from retinanet.config.check import check_config
from retinanet.config.load import load_config, load_config_text
from retinanet.data.image import read_image
from retinanet.data.loader import build_image_batcher
from retinanet.data.views import ImageBatcher
from retinanet.engine.evaluate import Postprocess, build_amp, detect
from retinanet.engine.machine import build_placed
from retinanet.engine.run import choose_device
from retinanet.engine.trained import build_trained, read_state
from retinanet.errors import UserError, pick
from retinanet.modeling.build import build_postprocess
from retinanet.modeling.retinanet import RetinaNet

Picture = str | Path | np.ndarray
YAML = (".yaml", ".yml")


class NamedDetections(TypedDict):
    """Detections of one picture, by falling score, on the CPU.

    boxes: (D, 4) xyxy pixels of the picture as given. scores: (D,) in [0, 1]. labels: (D,) int64 in [0, K).
    names: the D class names.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]


class Detector:
    """A model with everything between a picture and its detections.

    classes: K dicts with the category "id" and the "name" of each label.
    threshold: the score with the highest F1 in the evaluation of these weights, None when the weights do not tell.
    batch_size: the most pictures that run together.
    """

    def __init__(
        self,
        model: RetinaNet,
        batcher: ImageBatcher,
        postprocess: Postprocess,
        classes: list[dict],
        device: torch.device,
        amp: str = "off",
        batch_size: int = 8,
        threshold: float | None = None,
    ):
        """The arguments are described in the class, in `data.views.ImageBatcher` and in `evaluate.detect`."""
        self.model = model.to(device).eval()
        self.batcher, self.postprocess = batcher, postprocess
        self.classes, self.names = classes, [str(entry["name"]) for entry in classes]
        self.device, self.amp, self.batch_size, self.threshold = device, amp, batch_size, threshold

    def __call__(
        self, pictures: Picture | Sequence[Picture], score: float = 0.0, channel_order: str = "BGR"
    ) -> NamedDetections | list[NamedDetections]:
        """Return the detections of a picture, or a list of them for a list, a tuple or an array (N, H, W, 3).

        A picture is a file name or an array (H, W, 3) uint8 of any size, in the BGR order of `cv2.imread`, or in RGB
        with `channel_order="RGB"`. Files are turned as their EXIF note says. `score`: the lowest that is returned;
        below `TEST.SCORE_THRESH` there is nothing in any case.
        Raises `UserError` for a file that is missing or no image, and for an array of another type or shape.
        """
        pick({"BGR": 0, "RGB": 0}, channel_order, "channel_order")
        if isinstance(pictures, str | Path) or (isinstance(pictures, np.ndarray) and pictures.ndim != 4):
            return self._run([as_picture(pictures, channel_order)], score)[0]
        if not isinstance(pictures, list | tuple | np.ndarray):
            kind = type(pictures).__name__
            remedy = "; tensor.numpy() makes an array" if isinstance(pictures, Tensor) else ""
            raise UserError(f"pictures: {kind} is not a file name, an array (H, W, 3) or a list of them{remedy}")
        found = []
        for start in range(0, len(pictures), self.batch_size):
            chunk = pictures[start : start + self.batch_size]
            found += self._run([as_picture(picture, channel_order) for picture in chunk], score)
        return found

    def _run(self, images: list[np.ndarray], score: float) -> list[NamedDetections]:
        groups: dict[tuple, list[int]] = {}
        for place, image in enumerate(images):
            groups.setdefault(self.batcher.canvas(image), []).append(place)
        named = {}
        for places in groups.values():
            batch = self.batcher([images[place] for place in places]).to(self.device)
            found = detect(self.model, batch, self.postprocess, self.amp)
            named |= {place: self._named(one, score) for place, one in zip(places, found, strict=True)}
        return [named[place] for place in range(len(images))]

    def _named(self, found: dict, score: float) -> NamedDetections:
        columns = {key: found[key].cpu() for key in ("boxes", "scores", "labels")}
        kept = columns["scores"] >= score
        columns = {key: column[kept] for key, column in columns.items()}
        return NamedDetections(**columns, names=[self.names[label] for label in columns["labels"].tolist()])


def as_picture(picture: Picture, channel_order: str = "BGR") -> np.ndarray:
    """Return the (H, W, 3) uint8 BGR array of a file or an array; `UserError` for anything else."""
    if isinstance(picture, str | Path):
        return read_image(picture)
    if not isinstance(picture, np.ndarray):
        raise UserError(f"picture: {type(picture).__name__} is neither a file name nor a numpy array (H, W, 3) uint8")
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        planar = picture.ndim == 3 and picture.shape[0] == 3
        remedy = "picture.transpose(1, 2, 0) is" if planar else "cv2.cvtColor converts grey and BGRA"
        raise UserError(f"picture: shape {picture.shape} is not (H, W, 3); {remedy}")
    if picture.dtype != np.uint8:
        scaled = picture.dtype.kind == "f" and picture.max() <= 1
        remedy = "; (255 * picture).astype(np.uint8) is, for values up to 1" if scaled else ""
        raise UserError(f"picture: {picture.dtype} values; give uint8, 0 to 255{remedy}")
    return picture if channel_order == "BGR" else np.ascontiguousarray(picture[..., ::-1])


def load(config_or_checkpoint: str | Path, weights: str | Path | None = None, device: str = "auto") -> Detector:
    """Return a `Detector` for a YAML configuration and `weights` (default: its `MODEL.WEIGHTS`), or for a checkpoint.

    A checkpoint of this project and an exported file (.pt2, .onnx) carry their configuration and class names; weights
    of another format need a configuration beside them. device: auto, cuda or cpu.
    Raises `UserError` for files that are missing, damaged or do not fit each other.
    """
    path = Path(config_or_checkpoint)
    if path.suffix.lower() in YAML:
        return build_detector(load_config(path), weights, device)
    if weights is not None:
        raise UserError(f"{path}: with weights given beside it, this has to be a configuration (.yaml)")
    state = read_state(path)
    return build_detector(load_config_text(state["config"], f"the configuration in {path}"), path, device, state)


def build_detector(cfg, weights: str | Path | None = None, device: str = "auto", state: dict | None = None) -> Detector:
    """Return the `Detector` of a configuration, with `weights` and `state` as in `build_trained`."""
    pick(dict.fromkeys(("auto", "cuda", "cpu")), device, "device")
    check_config(cfg, training=False)
    trained = build_trained(cfg, weights, state)
    target = choose_device(device)
    return Detector(
        build_placed(cfg, trained.model, target),
        build_image_batcher(cfg),
        build_postprocess(cfg),
        trained.classes,
        target,
        build_amp(cfg, target),
        cfg.TEST.IMS_PER_BATCH,
        trained.threshold,
    )
