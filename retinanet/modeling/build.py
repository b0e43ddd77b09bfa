"""From the configuration to the objects of this package: the only file here that reads `cfg`."""

from collections.abc import Callable
from functools import partial

from torch import nn

from retinanet.errors import UserError, pick
from retinanet.layers.conv import CONVS, Conv2d
from retinanet.layers.norm import NORMS, PerLevelNorm, default_conv, make_norm
from retinanet.modeling.anchors import AnchorGenerator
from retinanet.modeling.backbone import BACKBONES
from retinanet.modeling.classifier import Classifier
from retinanet.modeling.fpn import FPN
from retinanet.modeling.head import Head
from retinanet.modeling.loss import RetinaNetLoss
from retinanet.modeling.retinanet import RetinaNet
from retinanet.modeling.views import Postprocessor
from retinanet.utils.distributed import world_size


def build_model(cfg) -> RetinaNet:
    """Return a new model in training mode; its weights follow from torch's random generator.

    `UserError` when `MODEL.NUM_CLASSES` is still 0 or a norm does not fit the channels that it would get.
    """
    model = cfg.MODEL
    if model.NUM_CLASSES < 1:
        raise UserError(f"MODEL.NUM_CLASSES: {model.NUM_CLASSES} is too few; set it to the classes of the data set")
    backbone = build_backbone(cfg)
    fpn = FPN(backbone.out_channels, model.FPN.CHANNELS, model.FPN.P6_FROM, conv=build_conv(cfg, "FPN"))
    anchors = build_anchors(cfg)
    head = Head(
        model.FPN.CHANNELS,
        anchors.num_anchors,
        model.NUM_CLASSES,
        model.HEAD.NUM_CONVS,
        model.HEAD.PRIOR_PROB,
        conv=build_conv(cfg, "HEAD"),
    )
    channels_last = str(cfg.SOLVER.CHANNELS_LAST) == "True"  # "auto" is decided where the device is known
    return RetinaNet(backbone, fpn, head, anchors, model.PIXEL_MEAN, model.PIXEL_STD, channels_last)


def build_anchors(cfg) -> AnchorGenerator:
    """Return what makes the anchors of an input size."""
    anchors = cfg.MODEL.ANCHORS
    return AnchorGenerator(anchors.SCALE, anchors.SCALES_PER_OCTAVE, anchors.ASPECT_RATIOS, anchors.CONVENTION)


def build_backbone(cfg) -> nn.Module:
    """Return the backbone alone, with `out_channels`; `tools/pretrain_backbone.py` trains it under a classifier."""
    settings = cfg.MODEL.BACKBONE
    make = pick(BACKBONES, settings.NAME, "MODEL.BACKBONE.NAME")
    return make(conv=build_conv(cfg, "BACKBONE"), stride_in_1x1=settings.STRIDE_IN_1X1, freeze_at=settings.FREEZE_AT)


def build_classifier(cfg, small_stem: bool) -> Classifier:
    """Return the backbone under a classifier of `MODEL.NUM_CLASSES`; `small_stem`: for images of about 32 pixels."""
    backbone = build_backbone(cfg)
    if small_stem:
        backbone.use_small_stem()
    return Classifier(backbone, cfg.MODEL.NUM_CLASSES, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)


def build_conv(cfg, part: str) -> Callable[..., Conv2d]:
    """Return what makes the convolutions of "BACKBONE", "FPN" or "HEAD", each with a norm of its own.

    It is called as `conv(in_channels, out_channels, kernel_size, stride=1, groups=1)`; padding keeps the size at
    stride 1. Norms that keep statistics come per level in the head, whose convs run over all levels.
    """
    norm, kind = cfg.MODEL[part].NORM, cfg.MODEL[part].CONV
    if norm:
        pick(NORMS, norm, f"MODEL.{part}.NORM")
    conv = pick({"auto": CONVS[default_conv(norm)], **CONVS}, kind, f"MODEL.{part}.CONV")
    per_level = part == "HEAD" and norm and NORMS[norm].has_statistics
    options = norm_options(cfg, norm)

    def make(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> Conv2d:
        new_norm = partial(make_norm, norm, out_channels, **options)
        return conv(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            norm=PerLevelNorm(new_norm) if per_level else new_norm(),
        )

    return make


def norm_options(cfg, norm: str) -> dict:
    """Return `MODEL.NORM_OPTIONS` of the norm as keyword arguments; a norm without an entry there has none.

    A norm that asks for it also gets the images of one micro-batch of one process.
    """
    if not norm:
        return {}
    node = getattr(NORMS[norm], "options_of", norm)
    options = {key.lower(): value for key, value in cfg.MODEL.NORM_OPTIONS.get(node, {}).items()}
    if getattr(NORMS[norm], "takes_images_per_batch", False):
        options["images_per_batch"] = max(1, cfg.SOLVER.IMS_PER_BATCH // world_size())
    return options


def build_loss(cfg) -> RetinaNetLoss:
    """Return the loss module; its buffers (the running normalizer of "ema") belong into checkpoints."""
    loss, matcher = cfg.MODEL.LOSS, cfg.MODEL.MATCHER
    return RetinaNetLoss(
        num_classes=cfg.MODEL.NUM_CLASSES,
        gamma=loss.GAMMA,
        alpha=loss.ALPHA,
        box=loss.BOX,
        beta=loss.BETA,
        box_weight=loss.BOX_WEIGHT,
        normalizer=loss.NORMALIZER,
        fg_iou=matcher.FG_IOU,
        bg_iou=matcher.BG_IOU,
        low_quality=matcher.LOW_QUALITY,
        plus_one=cfg.MODEL.BOX.CONVENTION == "detectron",
    )


def build_postprocess(cfg) -> Postprocessor:
    """Return the function from raw outputs and their batch to the detections of each image, in original pixels."""
    return Postprocessor(
        score_thresh=cfg.TEST.SCORE_THRESH,
        pre_nms_topk=cfg.TEST.PRE_NMS_TOPK,
        nms_iou=cfg.TEST.NMS_IOU,
        max_dets=cfg.TEST.MAX_DETS,
        convention=cfg.MODEL.BOX.CONVENTION,
    )
