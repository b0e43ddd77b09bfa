"""Trains torchvision's RetinaNet on our data path, schedule and metrics: what a study sets beside our own runs.

The model, its matching, its loss and its post-processing are torchvision's; images, augmentation, batches, learning
rates, clipping, precision and the COCO metrics are those of the configuration, so that two runs differ in the detector
alone. Both see the same images in the same order.
"""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD

from retinanet.config.load import dump_config
from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_test_loader, build_train_loader
from retinanet.engine.benchmark_peer import build_peer, build_peer_format
from retinanet.engine.benchmark_tasks import Job
from retinanet.engine.checkpoint import write_atomically
from retinanet.engine.evaluate import autocast, build_amp, score, to_coco
from retinanet.engine.optim import Schedule, build_schedule, clip_gradients, parameter_groups, set_lr
from retinanet.engine.run import build_datasets, resolve_num_classes
from retinanet.structures import PAD_LABEL, Batch, Detections


def build_peer_run(cfg, folder: Path, device: torch.device, variant: str = "torchvision_bn") -> dict:
    """Train torchvision's RetinaNet by `cfg`, evaluate it, and return the metrics of the first evaluation set.

    variant: "torchvision_bn" has BatchNorm2d in the backbone, "torchvision" its frozen form; the FPN and the head have
    no norm. Weights start at random, the backbone's depth and frozen stages are those of `cfg`. `folder` gets
    config.yaml, metrics.jsonl and inference/NAME as `tools/train_net.py` leaves them. Raises `UserError` for a
    configuration that torchvision cannot build (256 channels and 4 convs are fixed there).
    """
    train_set, tests = build_datasets(cfg)
    cfg = resolve_num_classes(cfg, train_set)
    torch.manual_seed(cfg.SEED)
    solver, bgr, size = cfg.SOLVER, cfg.MODEL.CHANNEL_ORDER == "BGR", (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    model = build_peer(cfg, Job(variant, "train", dump_config(cfg), size, solver.IMS_PER_BATCH))
    model = model.to(device, memory_format=build_peer_format(cfg, device))
    groups = parameter_groups(
        model, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS, solver.BIAS_LR_FACTOR
    )
    optimizer = SGD(groups, lr=solver.BASE_LR, momentum=solver.MOMENTUM, foreach=True)
    stream = iter(build_train_loader(cfg, train_set))
    losses = peer_losses(model, stream, solver.ACCUMULATE, device, solver.AMP, bgr)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", lambda file: file.write(dump_config(cfg).encode()))
    with open(folder / "metrics.jsonl", "w", buffering=1) as file:
        for line in train_peer(losses, optimizer, build_schedule(cfg), solver.CLIP_GRAD_NORM, solver.LOG_PERIOD):
            images_per_s = line.pop("iterations_per_s") * solver.IMS_PER_BATCH
            file.write(json.dumps({**line, "images_per_s": images_per_s}) + "\n")
        scored = []
        for dataset in tests:
            rows = predict_peer(model, build_test_loader(cfg, dataset), dataset, device, build_amp(cfg, device), bgr)
            scored.append(score(rows, dataset, folder / "inference" / dataset.name, cfg.TEST.EVALUATOR))
        numbers = {key: value for key, value in scored[0].items() if isinstance(value, (int, float))}
        file.write(json.dumps({"iteration": line["iteration"], **numbers}) + "\n")
    return scored[0]


def peer_losses(
    model: nn.Module, loader: Iterator[Batch], accumulate: int, device: torch.device, amp: str, bgr: bool
) -> Iterator[Tensor]:
    """Yield, without end, the 0-d loss of one optimizer step, after its backward passes have added up gradients."""
    model.train()
    while True:
        loss = torch.zeros((), device=device)
        for _ in range(accumulate):
            batch = next(loader).to(device)
            with autocast(device, amp):
                part = sum(model(images(batch, bgr), targets(batch)).values()) / accumulate
            part.backward()
            loss += part.detach()
        yield loss


def train_peer(
    losses: Iterator[Tensor], optimizer: SGD, schedule: Schedule, clip_grad_norm: float, log_period: int
) -> Iterator[dict]:
    """Step after every loss; yield {"iteration", "lr", "loss", "iterations_per_s"} every `log_period` iterations."""
    start, since = time.perf_counter(), 0
    for iteration in range(schedule.max_iter):
        set_lr(optimizer, schedule.lr(iteration))
        optimizer.zero_grad(set_to_none=True)
        loss, done = next(losses), iteration + 1
        clip_gradients(optimizer, clip_grad_norm)
        optimizer.step()
        if done % log_period == 0 or done == schedule.max_iter:
            speed = (done - since) / (time.perf_counter() - start)
            yield {"iteration": done, "lr": schedule.lr(iteration), "loss": loss.item(), "iterations_per_s": speed}
            start, since = time.perf_counter(), done


def predict_peer(
    model: nn.Module, loader: Iterable[Batch], dataset: CocoDataset, device: torch.device, amp: str, bgr: bool
) -> list[dict]:
    """Return the COCO results of `model` on the images of `loader`, by rising image id."""
    model.eval()
    rows = []
    for batch in loader:
        with torch.no_grad(), autocast(device, amp):
            found = model(images(batch.to(device), bgr))
        rows += to_coco(originals(found, batch), batch.image_ids, dataset.category_ids)
    return sorted(rows, key=lambda row: row["image_id"])


def images(batch: Batch, bgr: bool) -> list[Tensor]:
    """Return the images without padding, as torchvision takes them: a list of (3, H, W) RGB floats in 0..1."""
    pixels = batch.images.float() / 255
    pixels = pixels.flip(1) if bgr else pixels
    sizes = batch.image_sizes.tolist()
    return [image[:, :height, :width] for image, (height, width) in zip(pixels, sizes, strict=True)]


def targets(batch: Batch) -> list[dict]:
    """Return the ground truth without padding rows, as torchvision takes it."""
    real = batch.gt_labels != PAD_LABEL
    rows = zip(batch.gt_boxes, batch.gt_labels, real, strict=True)
    return [{"boxes": boxes[mask], "labels": labels[mask]} for boxes, labels, mask in rows]


def originals(found: list[dict], batch: Batch) -> list[Detections]:
    """Return torchvision's detections in pixels of the original images."""
    scales = batch.scales.to(found[0]["boxes"].device)
    return [{**one, "boxes": one["boxes"] / scale.repeat(2)} for one, scale in zip(found, scales, strict=True)]
