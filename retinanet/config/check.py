"""Rules for values and between keys, all checked before any work starts.

`check_config` raises one `UserError` that lists everything that is wrong, one line each, and returns the warnings for
the log. A rule is a line in `CHOICES` or `RANGES`, or a small generator of messages in `ERRORS`, `TRAINING_ERRORS` or
`WARNINGS`. What depends on the machine is checked by `check_device` and `check_world_size`, once that is known.
"""

from collections.abc import Collection, Iterator

from retinanet.config.keys import get_key
from retinanet.config.limits import beyond_limits
from retinanet.errors import UserError, nearest

NORMS = ("AffineChannel", "FrozenBN", "BN", "SyncBN", "GN", "MABN", "BCN")
BACKBONES = ("R18", "R34", "R50", "R101", "R152", "X101_32x8d", "X101_64x4d")
PARTS = ("BACKBONE", "FPN", "HEAD")
GIVEN_AFFINE = ("AffineChannel", "FrozenBN")  # scale and shift come from the weights file; they normalize nothing
NO_NORM = ""

_CONVENTIONS = ("detectron", "detectron2", "torchvision")
CHOICES = {
    "DEVICE": ("auto", "cuda", "cpu"),
    "MODEL.CHANNEL_ORDER": ("BGR", "RGB"),
    "MODEL.FPN.P6_FROM": ("C5", "P5"),
    "MODEL.ANCHORS.CONVENTION": _CONVENTIONS,
    "MODEL.BOX.CONVENTION": _CONVENTIONS,
    "MODEL.MATCHER.LOW_QUALITY": ("detectron", "detectron2", "none"),
    "MODEL.LOSS.BOX": ("smooth_l1", "l1", "giou", "diou", "ciou"),
    "MODEL.LOSS.NORMALIZER": ("batch", "image", "ema"),
    "INPUT.RESIZE": ("cv2", "cv2_float", "pil", "torchvision"),
    "SOLVER.SCHEDULE": ("multistep", "cosine"),
    "SOLVER.AMP": ("off", "bf16", "fp16"),
    "SOLVER.CHANNELS_LAST": ("auto", "True", "False"),
    "TEST.AMP": ("auto", "off", "bf16", "fp16"),
    "TEST.EVALUATOR": ("numpy", "faster", "pycocotools"),
    **{f"MODEL.{part}.CONV": ("auto", "plain", "standardized", "centralized") for part in PARTS},
}

# What is allowed, its test, and the keys; of a list every item is tested.
RANGES = (
    ("at least 0", lambda value: value >= 0, (
        "MODEL.NUM_CLASSES", "MODEL.HEAD.NUM_CONVS", "MODEL.LOSS.GAMMA", "MODEL.LOSS.BETA", "MODEL.LOSS.BOX_WEIGHT",
        "MODEL.NORM_OPTIONS.FrozenBN.EPS", "MODEL.NORM_OPTIONS.MABN.WARMUP_ITERS",
        "MODEL.NORM_OPTIONS.BCN.DECAY_ITERS",
        "DATALOADER.NUM_WORKERS", "DATALOADER.REPEAT_THRESHOLD", "DATALOADER.MAX_BAD_IMAGES",
        "SOLVER.REFERENCE_BATCH", "SOLVER.WARMUP_ITERS", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM",
        "SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.BIAS_LR_FACTOR", "SOLVER.CLIP_GRAD_NORM", "SOLVER.CHECKPOINT_KEEP",
        "SOLVER.CUDA_GRAPHS", "TEST.CUDA_GRAPHS", "TEST.EVAL_PERIOD",
    )),
    ("at least 1", lambda value: value >= 1, (
        "MODEL.FPN.CHANNELS", "MODEL.NORM_OPTIONS.GN.GROUPS", "MODEL.NORM_OPTIONS.BCN.GROUPS",
        "MODEL.NORM_OPTIONS.MABN.SIMULATED_BATCH", "MODEL.ANCHORS.SCALES_PER_OCTAVE",
        "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST",
        "SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.LOG_PERIOD", "TEST.PRE_NMS_TOPK", "TEST.MAX_DETS", "TEST.IMS_PER_BATCH",
    )),
    ("more than 0", lambda value: value > 0, (
        "SOLVER.BASE_LR", "MODEL.NORM_OPTIONS.BN.EPS", "MODEL.NORM_OPTIONS.GN.EPS",
    )),
    ("from 0.001 to 1000", lambda value: 1e-3 <= value <= 1e3, (
        "MODEL.PIXEL_STD", "MODEL.ANCHORS.SCALE", "MODEL.ANCHORS.ASPECT_RATIOS", "INPUT.AUGMENT.LSJ",
        "TEST.AUG.SCALES",
    )),
    ("from 0 to 1", lambda value: 0 <= value <= 1, (
        "MODEL.LOSS.ALPHA", "MODEL.MATCHER.FG_IOU", "MODEL.MATCHER.BG_IOU", "INPUT.FLIP_PROB", "SOLVER.WARMUP_FACTOR",
        "INPUT.AUGMENT.MOSAIC", "INPUT.AUGMENT.PHOTOMETRIC", "INPUT.AUGMENT.MIN_VISIBLE",
    )),
    ("more than 0 and at most 1", lambda value: 0 < value <= 1, (
        "MODEL.NORM_OPTIONS.BN.UPDATE_RATE", "MODEL.NORM_OPTIONS.BCN.UPDATE_RATE", "SOLVER.GAMMA", "TEST.NMS_IOU",
        "INPUT.AUGMENT.CROP",
    )),
    ("at least 0 and less than 1", lambda value: 0 <= value < 1, (
        "MODEL.NORM_OPTIONS.MABN.KEEP_RATE", "SOLVER.MOMENTUM", "SOLVER.EMA_DECAY", "TEST.SCORE_THRESH",
    )),
    ("at least 1e-9 and less than 1", lambda value: 1e-9 <= value < 1, ("MODEL.HEAD.PRIOR_PROB",)),
    ("from 0 to 255", lambda value: 0 <= value <= 255, ("MODEL.PIXEL_MEAN",)),
    ("from 0 to 5", lambda value: 0 <= value <= 5, ("MODEL.BACKBONE.FREEZE_AT",)),
    ("from 0 to 2^32 - 1", lambda value: 0 <= value < 2**32, ("SEED",)),
    ("a positive multiple of 32", lambda value: value > 0 and value % 32 == 0, ("INPUT.SIZE_DIVISIBILITY",)),
)  # fmt: skip

def check_config(
    cfg, training: bool = True, norms: Collection[str] = NORMS, backbones: Collection[str] = BACKBONES
) -> list[str]:
    """Return the warnings about `cfg`; raise one `UserError` with a line for everything that is wrong.

    `training` False leaves out what matters to training alone, such as missing weights. `norms` and `backbones` are
    the names that exist; tools pass the tables themselves, so that a new entry needs no change here.
    """
    names = {f"MODEL.{part}.NORM": (*norms, NO_NORM) for part in PARTS} | {"MODEL.BACKBONE.NAME": tuple(backbones)}
    wrong = [*_outside(cfg, CHOICES | names), *beyond_limits(cfg)]
    for rule in (*ERRORS, *(TRAINING_ERRORS if training else ())):
        wrong += rule(cfg)
    if wrong:
        raise UserError("\n".join(wrong))
    if training:
        check_device(cfg, cfg.DEVICE)
    return [message for rule in WARNINGS for message in rule(cfg)]


def check_device(cfg, device_type: str) -> None:
    """Raise `UserError` for what cannot be trained on "cuda" or "cpu"."""
    for key in ("SOLVER.AMP", "TEST.AMP"):
        if device_type == "cpu" and get_key(cfg, key) == "fp16":
            raise UserError(f"{key}: fp16 needs CUDA, this run is on the CPU; use bf16 or off")


def check_world_size(cfg, world_size: int) -> list[str]:
    """Return the warnings about `world_size` processes; `UserError` when they cannot share a micro-batch evenly."""
    batch = cfg.SOLVER.IMS_PER_BATCH
    share, rest = divmod(batch, world_size)
    if rest:
        near = max(share, 1) * world_size
        raise UserError(f"SOLVER.IMS_PER_BATCH: {batch} images cannot be shared by {world_size} processes; use {near}")
    window = cfg.MODEL.NORM_OPTIONS.MABN.SIMULATED_BATCH
    used = {cfg.MODEL[part].NORM for part in PARTS}
    if "MABN" in used and window % share:
        raise UserError(
            f"MODEL.NORM_OPTIONS.MABN.SIMULATED_BATCH: {window} is not a multiple of the {share} images per process; "
            f"use {max(round(window / share), 1) * share}"
        )
    if "BN" in used and share < 4:
        # arXiv 1803.08494, table 2: ImageNet error of BN 24.8 % at 8 images per GPU, 27.3 % at 4, 34.7 % at 2; GN 24 %
        return [f"BN with {share} images per process has noisy statistics; GN, MABN, BCN and SyncBN are made for this"]
    return []


def _outside(cfg, choices: dict[str, Collection[str]]) -> Iterator[str]:
    """Yield a message for each value that is none of its choices or outside its range."""
    for key, names in choices.items():
        value = get_key(cfg, key)
        if value not in names:
            listed = ", ".join(name or "'' (none)" for name in names)
            yield f"{key}: {value!r} is not one of {listed}{nearest(value, names)}"
    for allowed, holds, keys in RANGES:
        for key in keys:
            value = get_key(cfg, key)
            if not all(holds(item) for item in (value if isinstance(value, (tuple, list)) else [value])):
                yield f"{key}: {value} has to be {allowed}"


def _lists(cfg) -> Iterator[str]:
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        if len(get_key(cfg, key)) != 3:
            yield f"{key}: {get_key(cfg, key)} has to be three numbers, in the order of MODEL.CHANNEL_ORDER"
    for key in ("MODEL.ANCHORS.ASPECT_RATIOS", "INPUT.MIN_SIZE_TRAIN", "TEST.AUG.SCALES"):
        if len(get_key(cfg, key)) == 0:
            yield f"{key}: is empty; give at least one number"
    jitter = cfg.INPUT.AUGMENT.LSJ
    if len(jitter) != 2 or jitter[0] > jitter[1]:
        yield f"INPUT.AUGMENT.LSJ: {jitter} has to be the least and the most factor, such as 0.1,2.0; 1,1 is none"
    steps = cfg.SOLVER.STEPS
    if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        yield f"SOLVER.STEPS: {steps} has to grow from step to step"


def _order(cfg) -> Iterator[str]:
    fg_iou, bg_iou = cfg.MODEL.MATCHER.FG_IOU, cfg.MODEL.MATCHER.BG_IOU
    if bg_iou > fg_iou:
        yield f"MODEL.MATCHER.BG_IOU: {bg_iou} is above MODEL.MATCHER.FG_IOU {fg_iou}; lower it"
    for split in ("TRAIN", "TEST"):
        sizes, most = cfg.INPUT[f"MIN_SIZE_{split}"], cfg.INPUT[f"MAX_SIZE_{split}"]
        if (max(sizes, default=0) if split == "TRAIN" else sizes) > most:
            yield (
                f"INPUT.MIN_SIZE_{split}: {sizes} for the short side is above INPUT.MAX_SIZE_{split} {most}, the cap "
                "of the long side; lower the first or raise the second"
            )


def _groups(cfg) -> Iterator[str]:
    """GN and BCN need as many groups as divide every channel count: 64 is the smallest in all backbones."""
    for part in PARTS:
        name = cfg.MODEL[part].NORM
        if name not in ("GN", "BCN"):
            continue
        groups, channels = cfg.MODEL.NORM_OPTIONS[name].GROUPS, 64 if part == "BACKBONE" else cfg.MODEL.FPN.CHANNELS
        if groups >= 1 and channels % groups:
            fits = max(divisor for divisor in range(1, min(groups, channels) + 1) if channels % divisor == 0)
            yield (
                f"MODEL.NORM_OPTIONS.{name}.GROUPS: {groups} groups do not divide the {channels} channels of "
                f"MODEL.{part}; use {fits} groups" + (f", or {groups} x n channels" if part != "BACKBONE" else "")
            )


def _names(cfg) -> Iterator[str]:
    for key in ("OUTPUT_DIR", "DATASETS.CATALOG"):
        if not get_key(cfg, key):
            yield f"{key}: is empty; give a path"
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        names = get_key(cfg, key)
        if len(set(names)) < len(names):
            yield f"{key}: {names} names a data set twice"


def _start(cfg) -> Iterator[str]:
    """What starts from nothing must be able to learn."""
    backbone = cfg.MODEL.BACKBONE
    if cfg.MODEL.WEIGHTS or cfg.MODEL.ALLOW_MISSING_WEIGHTS:
        return
    if backbone.NORM in GIVEN_AFFINE:
        yield (
            f"MODEL.WEIGHTS: is empty, but MODEL.BACKBONE.NORM {backbone.NORM} takes its scale and shift from "
            "pre-trained weights; set MODEL.WEIGHTS (detectron://ImageNetPretrained/MSRA/R-50.pkl for R50), or train "
            "from scratch with MODEL.BACKBONE.NORM GN MODEL.BACKBONE.FREEZE_AT 0, or set MODEL.ALLOW_MISSING_WEIGHTS "
            "True"
        )
    elif backbone.FREEZE_AT:
        yield (
            f"MODEL.BACKBONE.FREEZE_AT: {backbone.FREEZE_AT} freezes random layers, because MODEL.WEIGHTS is empty; "
            "set MODEL.WEIGHTS, or MODEL.BACKBONE.FREEZE_AT 0, or MODEL.ALLOW_MISSING_WEIGHTS True"
        )


def _train_set(cfg) -> Iterator[str]:
    if not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN: is empty; name a data set of DATASETS.CATALOG"


def _schedule(cfg) -> Iterator[str]:
    solver = cfg.SOLVER
    late = [step for step in solver.STEPS if step >= solver.MAX_ITER]
    if late and solver.SCHEDULE == "multistep":
        yield f"SOLVER.STEPS: {late} are never reached, SOLVER.MAX_ITER is {solver.MAX_ITER}"
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        yield f"SOLVER.WARMUP_ITERS: {solver.WARMUP_ITERS} do not end before SOLVER.MAX_ITER {solver.MAX_ITER}"


def _convs(cfg) -> Iterator[str]:
    """Pairs of convolution and norm that no paper supports."""
    wanted = {"MABN": "centralized", "BCN": "standardized"}
    for part in PARTS:
        norm, conv = cfg.MODEL[part].NORM, cfg.MODEL[part].CONV
        if conv not in ("auto", wanted.get(norm, conv)):
            yield f"MODEL.{part}.CONV: {norm} is published with {wanted[norm]} convolutions, not {conv}"
        if conv in ("standardized", "centralized") and norm in (*GIVEN_AFFINE, NO_NORM):
            yield f"MODEL.{part}.CONV: {conv} weights need a norm with statistics after them, not {norm or 'none'}"
        if part != "BACKBONE" and norm in GIVEN_AFFINE and not cfg.MODEL.WEIGHTS:
            yield f"MODEL.{part}.NORM: {norm} without weights is the identity; GN, BN, MABN and BCN normalize"


def _colours(cfg) -> Iterator[str]:
    """ImageNet's mean is highest in red, so its order betrays the channel order."""
    mean, order = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.CHANNEL_ORDER
    if mean[0] != mean[2] and (mean[0] < mean[2]) != (order == "BGR"):
        yield f"MODEL.PIXEL_MEAN: {mean} looks like {'RGB' if order == 'BGR' else 'BGR'}, CHANNEL_ORDER is {order}"
    if 0 < max(mean) <= 1:
        yield f"MODEL.PIXEL_MEAN: {mean} looks like a mean of pixels in 0..1, but the unit of a pixel is 0..255 here"


def _one_convention(cfg) -> Iterator[str]:
    anchors, boxes = cfg.MODEL.ANCHORS.CONVENTION, cfg.MODEL.BOX.CONVENTION
    if (anchors == "detectron") != (boxes == "detectron"):
        yield f"MODEL.ANCHORS.CONVENTION: {anchors} goes with no checkpoint whose MODEL.BOX.CONVENTION is {boxes}"


def _evaluation(cfg) -> Iterator[str]:
    both = set(cfg.DATASETS.TRAIN) & set(cfg.DATASETS.TEST)
    if both:
        yield f"DATASETS.TEST: {', '.join(sorted(both))} is trained on as well; its AP says nothing about new images"
    if cfg.TEST.EVAL_PERIOD and not cfg.DATASETS.TEST:
        yield f"TEST.EVAL_PERIOD: {cfg.TEST.EVAL_PERIOD} has no effect, DATASETS.TEST is empty"


ERRORS = (_lists, _order, _groups, _names)
TRAINING_ERRORS = (_start, _train_set)
WARNINGS = (_schedule, _convs, _colours, _one_convention, _evaluation)
