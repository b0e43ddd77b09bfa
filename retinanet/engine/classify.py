"""The classification step and its evaluation; the loop around them is that of detection (`engine/train.py`)."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from retinanet.data.image_folder import LabelledImages, build_folder_test_loader
from retinanet.engine.ema import model_ema
from retinanet.engine.evaluate import autocast, build_amp
from retinanet.engine.machine import build_memory_format
from retinanet.engine.optim import build_optimizer
from retinanet.engine.prefetch import prefetched
from retinanet.engine.train import Trainer, apply_gradients
from retinanet.layers.norm import set_loss_scale
from retinanet.modeling.build import build_classifier
from retinanet.modeling.classifier import Classifier
from retinanet.utils import distributed

TOPS = (1, 5)
SCORE = "top1"  # what `best.pth` follows


def classification_step(trainer: Trainer, batches: list[LabelledImages]) -> dict[str, Tensor]:
    """Change the weights once and return the 0-d tensors loss (cross-entropy), grad_norm and top1 in percent.

    batches: the micro-batches of this process, on the device of the model. The values are means over all micro-batches
    and processes. A step that is not finite leaves the weights as they are, as in `train_step`.
    """
    device, loss_scale = batches[0].images.device, None
    trainer.guard.begin()
    if trainer.scaler:
        loss_scale = trainer.scaler.scale(torch.ones((), device=device))
        set_loss_scale(trainer.model, loss_scale)
    total, right, images = 0.0, 0.0, sum(map(len, batches))
    for index, batch in enumerate(batches):
        with distributed.no_gradient_sync(trainer.net, index + 1 < len(batches)):
            with autocast(device, trainer.amp):
                logits = trainer.net(batch.images)
            loss = trainer.loss(logits.float(), batch.labels) * (len(batch) / images)
            scaled = trainer.scaler.scale(loss * trainer.guard.factor(loss)) if trainer.scaler else loss
            scaled.backward()
        total = total + loss.detach()
        right = right + (logits.detach().argmax(dim=1) == batch.labels).sum()
    reported = distributed.all_reduce_mean(torch.stack([total, 100.0 * right / images]))
    grad_norm = apply_gradients(trainer, reported[0], loss_scale)
    values = {"loss": reported[0], "grad_norm": grad_norm, "top1": reported[1]}
    return values if loss_scale is None else {**values, "loss_scale": loss_scale}


def accuracy(model: Classifier, loader: Iterable[LabelledImages], device: torch.device, amp: str = "off") -> dict:
    """Return `top1` and `top5` in percent of the images of all processes, and `images`; the model's mode stays.

    With fewer than five classes every image is right in `top5`.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    counts = torch.zeros(len(TOPS) + 1, dtype=torch.float64, device=device)
    try:
        for batch in prefetched(loader, device):
            with torch.no_grad(), autocast(device, amp):
                logits = model(batch.images)
            best = logits.topk(min(max(TOPS), logits.shape[1]), dim=1).indices  # (N, 5)
            hits = best == batch.labels[:, None]
            counts += torch.stack([*(hits[:, :top].any(dim=1).sum() for top in TOPS), torch.tensor(len(batch))])
    finally:
        for module, training in modes.items():
            module.training = training
    *right, images = distributed.all_reduce_sum(counts).tolist()
    return {
        **{f"top{top}": 100 * found / images for top, found in zip(TOPS, right, strict=True)},
        "images": int(images),
    }


def build_accuracy(cfg, folder, small: bool, device: torch.device) -> Callable[[Classifier, int], dict]:
    """Return what evaluates a model on `folder`: (model, iteration) -> metrics."""
    loader = build_folder_test_loader(cfg, folder, small, distributed.rank(), distributed.world_size())
    amp = build_amp(cfg, device)
    return lambda model, iteration: accuracy(model, loader, device, amp)


def build_classification_trainer(cfg, device: torch.device, small: bool) -> Trainer:
    """Return backbone and classifier, cross-entropy and optimizer on `device`."""
    model = build_classifier(cfg, small)
    model.set_memory_format(build_memory_format(cfg, device))
    model.to(device)
    net = distributed.data_parallel(model, device)
    return Trainer(
        model=model,
        net=torch.compile(net) if cfg.SOLVER.COMPILE else net,
        loss=nn.CrossEntropyLoss(),
        optimizer=build_optimizer(cfg, model),
        amp=cfg.SOLVER.AMP,
        clip_grad_norm=cfg.SOLVER.CLIP_GRAD_NORM,
        scaler=torch.amp.GradScaler(device.type) if cfg.SOLVER.AMP == "fp16" else None,
        ema=model_ema(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None,
        score=SCORE,
    )
