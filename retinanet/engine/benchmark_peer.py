"""torchvision's RetinaNet as a peer of ours: the same backbone, frozen stages, classes, inputs and precision.

Source: torchvision `models/detection/retinanet.py` and, for the step, `references/detection/engine.py`. It is given
what its users can give it: batches that need no resize, SGD with `foreach`, and memory format, precision and
compilation of the configuration.
"""

import torch
from torch import nn
from torch.optim import SGD
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinanet.engine.benchmark_tasks import (
    Job,
    Task,
    detection_facts,
    loss_facts,
    rotate,
    set_scores,
    slow_down,
)
from retinanet.engine.evaluate import autocast, build_amp
from retinanet.engine.machine import build_memory_format
from retinanet.errors import UserError, pick
from retinanet.structures import PAD_LABEL, Batch

PEERS = {"torchvision": FrozenBatchNorm2d, "torchvision_bn": nn.BatchNorm2d}
BACKBONES = {
    "R18": ("resnet18", 512),
    "R34": ("resnet34", 512),
    "R50": ("resnet50", 2048),
    "R101": ("resnet101", 2048),
    "R152": ("resnet152", 2048),
    "X101_32x8d": ("resnext101_32x8d", 2048),
    "X101_64x4d": ("resnext101_64x4d", 2048),
}
_CHANNELS, _HEAD_CONVS = 256, 4  # fixed in torchvision
_STRIDES = (8, 16, 32, 64, 128)


def build_peer(cfg, job: Job) -> nn.Module:
    """Return torchvision's model for `job`; `UserError` for a configuration that torchvision cannot build."""
    model, backbone = cfg.MODEL, cfg.MODEL.BACKBONE
    if (model.FPN.CHANNELS, model.HEAD.NUM_CONVS) != (_CHANNELS, _HEAD_CONVS):
        raise UserError(
            f"torchvision's RetinaNet has {_CHANNELS} channels in the FPN and {_HEAD_CONVS} convs "
            f"in a tower; the configuration has {model.FPN.CHANNELS} and {model.HEAD.NUM_CONVS}; "
            "leave it out of --norms, or use a configuration of configs/torchvision"
        )
    name, c5 = pick(BACKBONES, backbone.NAME, f"MODEL.BACKBONE.NAME, for {job.variant}")
    body = resnet_fpn_backbone(
        backbone_name=name,
        weights=None,
        norm_layer=PEERS[job.variant],
        trainable_layers=5 - backbone.FREEZE_AT,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(c5 if model.FPN.P6_FROM == "C5" else _CHANNELS, _CHANNELS),
    )
    made = RetinaNet(
        body,
        model.NUM_CLASSES,
        anchor_generator=_anchors(model.ANCHORS),
        min_size=min(job.size),
        max_size=max(job.size),
        score_thresh=cfg.TEST.SCORE_THRESH,
        nms_thresh=cfg.TEST.NMS_IOU,
        detections_per_img=cfg.TEST.MAX_DETS,
        topk_candidates=cfg.TEST.PRE_NMS_TOPK,
        _skip_resize=True,
    )
    if cfg.SOLVER.COMPILE:
        made.backbone, made.head = torch.compile(made.backbone), torch.compile(made.head)
    return made


def _anchors(anchors) -> AnchorGenerator:
    """Return torchvision's anchors of the configured sizes, in whole pixels as there."""
    octave = [2 ** (step / anchors.SCALES_PER_OCTAVE) for step in range(anchors.SCALES_PER_OCTAVE)]
    sizes = tuple(tuple(int(anchors.SCALE * stride * part) for part in octave) for stride in _STRIDES)
    return AnchorGenerator(sizes, (tuple(anchors.ASPECT_RATIOS),) * len(_STRIDES))


def build_peer_format(cfg, device: torch.device) -> torch.memory_format:
    """Return the memory format of the peer: as asked for; where the choice is ours, NHWC on a GPU in half precision, as
    tuned code has it, and on a CPU the contiguous one that torchvision's users get."""
    if device.type == "cpu" and str(cfg.SOLVER.CHANNELS_LAST) == "auto":
        return torch.contiguous_format
    return build_memory_format(cfg, device)


def build_peer_train(cfg, job: Job, batches: list[Batch]) -> Task:
    """Return the training step of `references/detection/engine.py`."""
    device, amp = batches[0].images.device, cfg.SOLVER.AMP
    model = build_peer(cfg, job).to(device, memory_format=build_peer_format(cfg, device)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SGD(trained, lr=0.0, momentum=cfg.SOLVER.MOMENTUM, weight_decay=cfg.SOLVER.WEIGHT_DECAY, foreach=True)
    slow_down(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    targets = {id(batch): _targets(batch) for batch in batches}
    steps, losses = rotate(batches, cfg.SOLVER.ACCUMULATE), []

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        for batch in next(steps):
            with autocast(device, amp):
                found = model(_images(batch), targets[id(batch)])
                loss = sum(found.values())
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())

    return Task(run, job.batch * cfg.SOLVER.ACCUMULATE, lambda: loss_facts(losses))


def build_peer_detection(cfg, job: Job, batches: list[Batch]) -> Task:
    """Return torchvision's forward in evaluation mode, post-processing included."""
    device = batches[0].images.device
    model = build_peer(cfg, job).to(device, memory_format=build_peer_format(cfg, device))
    amp = build_amp(cfg, device)
    set_scores(
        model.head.classification_head.cls_logits,
        lambda: _logits(model.eval(), batches[0]),
        cfg.TEST.SCORE_THRESH,
        job.scores * job.batch,
    )
    steps, found = rotate(batches, 1), []

    def run() -> None:
        with torch.no_grad(), autocast(device, amp):
            found[:] = model(_images(next(steps)[0]))

    return Task(run, job.batch, lambda: detection_facts(found))


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    images, _ = model.transform(_images(batch))
    return model.head(list(model.backbone(images.tensors).values()))["cls_logits"]


def _images(batch: Batch) -> list[torch.Tensor]:
    """Return the images as torchvision takes them: a list of (3, H, W) floats in 0..1."""
    return list(batch.images.float().div_(255))


def _targets(batch: Batch) -> list[dict]:
    real = batch.gt_labels != PAD_LABEL
    rows = zip(batch.gt_boxes, batch.gt_labels, real, strict=True)
    return [{"boxes": boxes[mask], "labels": labels[mask]} for boxes, labels, mask in rows]
