"""The data path on one core: image files to a resized batch, the way of this project and of its peers.

ours: what the workers of evaluation do (`data/loader.py`): read, check, decode and resize in uint8 into the slots of
one batch; normalization is left to the device. floor: OpenCV's decoder and its resize into slots that are there
already, and nothing else. pil: detectron2's way, PIL decodes and resizes in uint8. float: torchvision's way, PIL
decodes, the rest is in float32 on the CPU, by torchvision's own `GeneralizedRCNNTransform`.
"""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from retinanet.config.load import load_config_text
from retinanet.data.catalog import build_dataset
from retinanet.data.image import ImageError, read_image
from retinanet.data.loader import EvalBatches, build_views
from retinanet.data.sampler import eval_batches
from retinanet.data.transforms import resize_geometry
from retinanet.engine.benchmark import Settings
from retinanet.engine.benchmark_here import Piece, take_turns
from retinanet.engine.benchmark_tasks import Job
from retinanet.engine.machine import tune_process
from retinanet.errors import UserError
from retinanet.structures import Batch, Target

VARIANTS = ("ours", "floor", "pil", "float")
_AS_IT_IS = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
SUFFIXES = (".jpg", ".jpeg", ".png")


class FolderImages:
    """The images of a folder behind the interface of `CocoDataset`, without ground truth."""

    def __init__(self, folder: Path):
        self.files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise UserError(f"--images: {folder} holds no {', '.join(SUFFIXES)} file")
        self.sizes = np.array([self._size(path) for path in self.files])
        self.image_ids = np.arange(len(self.files))
        self.nothing = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))

    @staticmethod
    def _size(path: Path) -> tuple[int, int]:
        try:
            with Image.open(path) as image:  # reads the head of the file only
                return image.height, image.width
        except (OSError, UnidentifiedImageError) as error:
            raise ImageError(f"--images: {path} is not an image that can be read ({error})") from None

    def __len__(self) -> int:
        return len(self.files)

    def file(self, row: int) -> Path:
        return self.files[row]

    def image_size(self, row: int) -> tuple[int, int]:
        return tuple(self.sizes[row].tolist())

    def read(self, row: int) -> tuple[np.ndarray, Target]:
        return read_image(self.files[row], self.image_size(row)), self.nothing


def measure_data(
    jobs: list[Job], settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> list[dict]:
    """Return a row of `summary` per job, in milliseconds per image; `settings.steps` batches are a turn.

    jobs: one for each of `VARIANTS`, which are in `variant`. Their `source` is a folder of images; "": the training
    set of the configuration. Batches hold images of similar shape, as in training and evaluation.
    """
    cfg = load_config_text(jobs[0].config, "")
    tune_process(torch.device("cpu"))  # as in training, whose workers inherit it
    dataset = FolderImages(Path(jobs[0].source)) if jobs[0].source else build_dataset(cfg, cfg.DATASETS.TRAIN)
    batches = eval_batches(dataset.sizes, jobs[0].batch, 0, 1)
    chosen = np.linspace(0, len(batches) - 1, min(settings.steps, len(batches))).astype(int)
    batches = [batches[number] for number in chosen]
    work = [_BUILDERS[job.variant](cfg, dataset, batches) for job in jobs]
    images = sum(map(len, batches))
    mean = float(dataset.sizes[sum(batches, [])].prod(axis=1).mean()) / 1e6
    progress(f"data: {images} images, {mean:.2f} megapixels on average, in batches of {jobs[0].batch}")
    return take_turns(jobs, work, len(batches), images, settings, progress)


def build_ours(cfg, dataset, batches: list[list[int]]) -> Piece:
    """Return what reads batch i as the workers of evaluation do."""
    loader = EvalBatches(dataset, build_views(cfg))

    def run(number: int) -> Batch:
        batch = loader[batches[number]]
        if isinstance(batch, UserError):
            raise batch
        return batch

    return run


def build_floor(cfg, dataset, batches: list[list[int]]) -> Piece:
    """Return what decodes and resizes batch i and does nothing else; the slots of the largest batch are made before."""
    sides = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "cv2"
    sizes = {row: resize_geometry(dataset.image_size(row), *sides).size for rows in batches for row in rows}
    height, width = (max(size[axis] for size in sizes.values()) for axis in (0, 1))
    slots = np.zeros((max(map(len, batches)), height, width, 3), np.uint8)

    def run(number: int) -> np.ndarray:
        for slot, row in zip(slots, batches[number], strict=False):
            image = cv2.imdecode(np.fromfile(dataset.file(row), np.uint8), _AS_IT_IS)
            height, width = sizes[row]
            cv2.resize(image, (width, height), dst=slot[:height, :width], interpolation=cv2.INTER_LINEAR)
        return slots

    return run


def build_pil(cfg, dataset, batches: list[list[int]]) -> Piece:
    """Return what reads batch i as a list of (3, h, w) uint8 BGR, decoded and resized by PIL."""

    def one(row: int) -> Tensor:
        image = np.asarray(Image.open(dataset.file(row)).convert("RGB"))
        height, width = resize_geometry(image.shape[:2], cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "pil").size
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.ascontiguousarray(np.asarray(resized)[:, :, ::-1].transpose(2, 0, 1)))

    return lambda number: [one(row) for row in batches[number]]


def build_float(cfg, dataset, batches: list[list[int]]) -> Piece:
    """Return what reads batch i as normalized float32 (N, 3, H, W), by torchvision's own transform."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.transforms.functional import to_tensor

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # any numbers cost the same
    transform = GeneralizedRCNNTransform(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, mean, std)

    def run(number: int) -> Tensor:
        images = [to_tensor(Image.open(dataset.file(row)).convert("RGB")) for row in batches[number]]
        return transform(images)[0].tensors

    return run


_BUILDERS = {"ours": build_ours, "floor": build_floor, "pil": build_pil, "float": build_float}
