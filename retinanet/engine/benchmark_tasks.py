"""What a benchmark runs: the real training step, the real detection, or one norm, on made-up inputs.

Each `build_*` function returns a `Task`, whose `run` does the work once. Inputs are made before and stay on the device;
several batches rotate, so that nothing is found in a cache that training would not find there.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from retinanet.deploy.fold import fold
from retinanet.engine.benchmark_exported import build_exported
from retinanet.engine.evaluate import autocast, build_amp, detect
from retinanet.engine.machine import build_placed
from retinanet.engine.run import build_trainer
from retinanet.engine.train import Trainer, train_step
from retinanet.layers.norm import make_norm
from retinanet.modeling.build import build_model, build_postprocess, norm_options
from retinanet.structures import Batch, pad_targets

NUM_BATCHES = 8
RATE = 1e-5  # changes weights and leaves every random model finite; no part of the work depends on it
REFERENCE_NORM = "BatchNorm2d"  # torch's own layer, beside ours in the layer tasks
CONFIGURED = "config"  # the variant that leaves the norms as the configuration has them
MEMORY_FORMATS = {"layer_contiguous": torch.contiguous_format, "layer_channels_last": torch.channels_last}


@dataclass(frozen=True)
class Job:
    """One variant and what it shall do; small and plain, since it travels to another process.

    variant: a norm, `CONFIGURED`, `REFERENCE_NORM` or a peer of `benchmark_peer.py`. task: "train", "detect",
    "end_to_end", which takes sizes and boxes from a data set, or a key of `MEMORY_FORMATS`. config: YAML text of the
    whole configuration. size: (height, width) of the images, or of the map of a layer with `channels`. batch: images of
    a micro-batch. boxes: per image. scores: (anchor, class) pairs per image above `TEST.SCORE_THRESH` in detection.
    folded: detect with the norms folded, as with `TEST.FOLD`.
    allocator: on a CPU, with glibc told to keep freed memory, as our tools do (`utils/cpu.py`). label: ends the name of
    a variant that occurs several times.
    source: a folder of images for the task "data". exported: a form of `benchmark_exported.FORMS` that detects, or "".
    floor: in training, also tell what memory it needs at least.
    """

    variant: str
    task: str
    config: str
    size: tuple[int, int]
    batch: int
    boxes: int = 7
    channels: int = 64
    scores: int = 2000
    folded: bool = False
    allocator: bool = True
    label: str = ""
    source: str = ""
    exported: str = ""
    floor: bool = False

    @property
    def name(self) -> str:
        return self.variant + (" folded" if self.folded else "") + (self.exported and f" {self.exported}") + self.label


@dataclass(frozen=True)
class Task:
    """run: does the work once. images: of one run. facts: what the report says beside the times, a flat dict.

    turn: called as `turn(steps, lead)`, times a turn in a way of its own, see `Worker.time`.
    """

    run: Callable[[], object]
    images: int
    facts: Callable[[], dict]
    turn: Callable[[int, int], dict[str, list[float]]] | None = None


def make_batches(job: Job, num_classes: int, count: int, device: torch.device) -> list[Batch]:
    """Return `count` batches of random pixels (zeros are faster) and random boxes, on `device`; the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [_make_batch(job, num_classes, generator).to(device) for _ in range(count)]


def _make_batch(job: Job, num_classes: int, generator: torch.Generator) -> Batch:
    (height, width), n = job.size, job.batch
    images = torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)
    targets = [_make_target(job, num_classes, generator) for _ in range(n)]
    sizes = torch.tensor([job.size] * n)
    return Batch(images, sizes, sizes, torch.ones(n, 2), *pad_targets(targets), image_ids=list(range(n)))


def _make_target(job: Job, num_classes: int, generator: torch.Generator) -> dict:
    """Return boxes with sides from a tenth to a half of the image's, anywhere inside it."""
    room = torch.tensor([job.size[1], job.size[0]], dtype=torch.float32)
    sides = room * (0.1 + 0.4 * torch.rand(job.boxes, 2, generator=generator))
    corners = (room - sides) * torch.rand(job.boxes, 2, generator=generator)
    labels = torch.randint(0, num_classes, (job.boxes,), generator=generator)
    return {"boxes": torch.cat([corners, corners + sides], 1), "labels": labels}


def build_train(cfg, job: Job, batches: list[Batch]) -> Task:
    """Return the training step that `tools/train_net.py` makes, from random weights, at a rate of nearly zero."""
    trainer = build_trainer(cfg, batches[0].images.device, [], pretrained=False)
    slow_down(trainer.optimizer)
    trainer.model.train()
    steps, losses = rotate(batches, cfg.SOLVER.ACCUMULATE), []

    def run() -> None:
        batches = next(steps)
        values = train_step(trainer, batches) if trainer.step is None else trainer.step(batches)
        losses.append(values["loss"])

    def facts() -> dict:
        held = {"floor_mib": held_bytes(trainer, batches[0]) / 2**20} if job.floor else {}
        return {**loss_facts(losses), **held}

    return Task(run, job.batch * cfg.SOLVER.ACCUMULATE, facts)


def held_bytes(trainer: Trainer, batch: Batch) -> int:
    """Return what a step has to hold: parameters, a gradient and a momentum of each, and what backward needs."""
    model = trainer.model

    def forward() -> dict:
        with autocast(batch.images.device, trainer.amp):
            outputs = model(model.normalize(batch.images, batch.image_sizes))
        return trainer.loss(outputs, batch.gt_boxes, batch.gt_labels)

    sizes = [(parameter.nbytes, 3 if parameter.requires_grad else 1) for parameter in model.parameters()]
    return saved_bytes(forward, model) + sum(size * copies for size, copies in sizes)


def build_detection(cfg, job: Job, batches: list[Batch]) -> Task:
    """Return detection as evaluation does it: normalize, model, post-processing."""
    device = batches[0].images.device
    model, postprocess, amp = build_model(cfg).eval().to(device), build_postprocess(cfg), build_amp(cfg, device)
    settle(model, batches)
    first = model.normalize(batches[0].images, batches[0].image_sizes)
    set_scores(
        model.head.cls_pred, lambda: torch.cat(model(first)["logits"], 1), cfg.TEST.SCORE_THRESH, job.scores * job.batch
    )
    if job.folded:
        model, _ = fold(model)
    if job.exported:
        model = build_exported(cfg, model, job.exported, job.size, device)
    model = build_placed(cfg, model, device)
    steps, found = rotate(batches, 1), []

    def run() -> None:
        found[:] = detect(model, next(steps)[0], postprocess, amp)

    return Task(run, job.batch, lambda: detection_facts(found))


def make_maps(job: Job, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return x and the gradient of y for a layer, (N, C, H, W) each, in the memory format of the task."""
    generator, shape = torch.Generator().manual_seed(0), (job.batch, job.channels, *job.size)
    x, grad = (
        torch.randn(shape, generator=generator).to(device, memory_format=MEMORY_FORMATS[job.task]) for _ in range(2)
    )
    return [(x.requires_grad_(), grad)]


def build_layer(cfg, job: Job, maps: list[tuple[Tensor, Tensor]]) -> Task:
    """Return forward and backward of one norm in training mode, with the options that the configuration gives it."""
    (x, grad), channels = maps[0], job.channels
    reference = job.variant == REFERENCE_NORM
    norm = nn.BatchNorm2d(channels) if reference else make_norm(job.variant, channels, **norm_options(cfg, job.variant))
    norm = norm.to(x.device).train()
    wanted = [x, *norm.parameters()]
    saved = saved_bytes(lambda: norm(x), norm) / 2**20
    return Task(lambda: torch.autograd.grad(norm(x), wanted, grad), job.batch, lambda: {"saved_mib": saved})


def saved_bytes(forward: Callable[[], object], module: nn.Module) -> int:
    """Return the bytes that `forward` keeps for backward, without the parameters of `module`; storage counts once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # alive until all is counted, so that no address is used twice
    del result
    return sum(kept.values())


def rotate(batches: list[Batch], per_step: int) -> Iterator[list[Batch]]:
    """Yield `per_step` batches at a time, in a circle, for ever."""
    circle = itertools.cycle(batches)
    while True:
        yield list(itertools.islice(circle, per_step))


def slow_down(optimizer: torch.optim.Optimizer) -> None:
    """Set `RATE` in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(RATE) if isinstance(group["lr"], Tensor) else RATE


@torch.no_grad()
def settle(model: nn.Module, batches: list[Batch]) -> None:
    """Let norms with statistics see some batches, so that activations in evaluation have the size that they should.

    Single images go in pairs: the last levels of a small one have one value per channel, and so no variance.
    """
    model.train()
    pair = 1 if len(batches[0]) > 1 else 2
    for start in range(0, min(len(batches), 2 * pair), pair):
        images, sizes = (
            torch.cat([getattr(batch, name) for batch in batches[start : start + pair]])
            for name in ("images", "image_sizes")
        )
        model(model.normalize(images, sizes))
    model.eval()


@torch.no_grad()
def set_scores(prediction: nn.Module, logits: Callable[[], Tensor], threshold: float, count: int) -> None:
    """Make `count` of `logits()` lie above the logit of `threshold`, with a standard deviation of one over all.

    A new head scores every anchor 0.01, and post-processing without candidates is free. prediction: the conv whose
    weight and bias give the logits.
    """
    prediction.weight.div_(logits().float().std().clamp(min=1e-12))
    flat = logits().float().flatten()
    limit = flat.topk(min(count + 1, flat.numel())).values[-1]
    prediction.bias.add_(math.log(threshold / (1 - threshold)) - limit)


def loss_facts(losses: list[Tensor]) -> dict:
    """Return the first and the last loss, None for one that is not finite; waits for the device."""
    first, last = (float(losses[place]) for place in (0, -1))
    return {name: x if math.isfinite(x) else None for name, x in (("first_loss", first), ("last_loss", last))}


def detection_facts(found: list[dict]) -> dict:
    """Return the mean number of detections per image."""
    return {"detections_per_image": sum(len(image["scores"]) for image in found) / len(found)}
