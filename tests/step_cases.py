"""What the tests of training steps share: a trainer of a small model, batches of noise with boxes."""

import copy

import torch
from model_cases import small_cfg

from retinanet.engine.optim import build_optimizer, set_lr
from retinanet.engine.train import Trainer
from retinanet.modeling.build import build_loss, build_model
from retinanet.structures import Batch, pad_targets

GN = ("NORMS", ("GN", "GN", "GN"))
NORMS = [*((name,) * 3 for name in ("GN", "MABN", "BCN", "BN")), ("AffineChannel", "GN", "")]


def new_trainer(*opts, **kwargs) -> Trainer:
    torch.manual_seed(0)
    cfg = small_cfg("MODEL.PIXEL_STD", [58.0, 58.0, 58.0], "MODEL.NORM_OPTIONS.BCN.GROUPS", 8, *opts)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    set_lr(optimizer, 0.01)
    return Trainer(model, model, build_loss(cfg), optimizer, **kwargs)


def new_batch(count: int, seed: int = 0, boxes: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)
    corners = torch.rand(count, boxes, 2, generator=generator) * 30
    targets = [{"boxes": torch.cat([c, c + 24], 1), "labels": torch.arange(boxes) % 3} for c in corners]
    sizes = torch.tensor([[64, 64]] * count)
    return Batch(images, sizes, sizes, torch.ones(count, 2), *pad_targets(targets), list(range(count)))


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Return the batch of some of the images."""
    tensors = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return Batch(**tensors, image_ids=batch.image_ids[rows])


def state(trainer: Trainer) -> dict:
    return copy.deepcopy(trainer.model.state_dict())
