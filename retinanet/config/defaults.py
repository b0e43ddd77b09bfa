"""Every key of the configuration, in pipeline order: unit, options and source beside each. No logic.

Sources: "Detectron" is facebookresearch/Detectron `detectron/core/config.py` and its RetinaNet YAMLs, "RetinaNet" is
arXiv 1708.02002, "GN" arXiv 1803.08494, "MABN" arXiv 2001.06838, "BCN" arXiv 1911.09738.
"""

from yacs.config import CfgNode as CN

_C = CN()
_C.OUTPUT_DIR = "output/run"  # folder for everything that a run writes; made when missing
_C.SEED = 0  # int >= 0; data order, augmentation and initial weights follow from it alone
_C.DETERMINISTIC = False  # True: only deterministic kernels, slower; a re-run then gives identical weights
_C.DEVICE = "auto"  # auto (cuda where there is one), cuda, cpu

_C.MODEL = CN()
_C.MODEL.WEIGHTS = ""  # path, URL or zoo alias of the starting weights; the format is recognised from the content
_C.MODEL.WEIGHTS_CLASSES = ()  # class names of foreign weights in their order, to copy class rows by name
_C.MODEL.ALLOW_MISSING_WEIGHTS = False  # True: a frozen backbone may start without, or with incomplete, weights
_C.MODEL.NUM_CLASSES = 0  # K without background; 0: counted in the training set
_C.MODEL.PIXEL_MEAN = [102.9801, 115.9465, 122.7717]  # 0..255, in CHANNEL_ORDER (Detectron, ImageNet in BGR)
_C.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]  # 0..255, in CHANNEL_ORDER (Detectron divides by nothing)
_C.MODEL.CHANNEL_ORDER = "BGR"  # BGR (Detectron, detectron2), RGB (torchvision, timm)

_C.MODEL.BACKBONE = CN()
_C.MODEL.BACKBONE.NAME = "R50"  # R18 R34 R50 R101 R152 X101_32x8d X101_64x4d
_C.MODEL.BACKBONE.NORM = "AffineChannel"  # AffineChannel FrozenBN BN SyncBN GN MABN BCN or "" (none)
_C.MODEL.BACKBONE.CONV = "auto"  # auto (what the norm's paper uses), plain, standardized, centralized
_C.MODEL.BACKBONE.STRIDE_IN_1X1 = True  # stride in the first 1x1 of a bottleneck (Detectron), False: in the 3x3
_C.MODEL.BACKBONE.FREEZE_AT = 2  # 0: train all; 1: stem frozen; 2: stem and res2 frozen (Detectron); ... 5

_C.MODEL.FPN = CN()
_C.MODEL.FPN.NORM = ""  # as BACKBONE.NORM; GN is Detectron's FPN.USE_GN
_C.MODEL.FPN.CONV = "auto"  # as BACKBONE.CONV
_C.MODEL.FPN.CHANNELS = 256  # channels of P3..P7 (RetinaNet, section 4)
_C.MODEL.FPN.P6_FROM = "C5"  # C5 (RetinaNet, Detectron, detectron2, torchvision v2), P5 (torchvision v1)

_C.MODEL.HEAD = CN()
_C.MODEL.HEAD.NORM = ""  # as BACKBONE.NORM; norms that keep statistics get one set per level, sharing scale and shift
_C.MODEL.HEAD.CONV = "auto"  # as BACKBONE.CONV
_C.MODEL.HEAD.NUM_CONVS = 4  # convs of each of the two towers before the prediction conv (RetinaNet, section 4)
_C.MODEL.HEAD.PRIOR_PROB = 0.01  # initial foreground score of every anchor (RetinaNet, section 4.1)

_C.MODEL.NORM_OPTIONS = CN()
_C.MODEL.NORM_OPTIONS.AffineChannel = CN()
_C.MODEL.NORM_OPTIONS.AffineChannel.LEARNABLE = False  # False: scale and shift are fixed (Detectron)
_C.MODEL.NORM_OPTIONS.FrozenBN = CN()
_C.MODEL.NORM_OPTIONS.FrozenBN.EPS = 1e-5  # inside the root; torchvision's published v1 checkpoint needs 0
_C.MODEL.NORM_OPTIONS.BN = CN()  # BN and SyncBN
_C.MODEL.NORM_OPTIONS.BN.EPS = 1e-5  # inside the root
_C.MODEL.NORM_OPTIONS.BN.UPDATE_RATE = 0.1  # weight of the new batch in the running statistics (torch's momentum)
_C.MODEL.NORM_OPTIONS.GN = CN()
_C.MODEL.NORM_OPTIONS.GN.GROUPS = 32  # groups per layer (GN, section 4.1; Detectron)
_C.MODEL.NORM_OPTIONS.GN.EPS = 1e-5  # inside the root (Detectron)
_C.MODEL.NORM_OPTIONS.MABN = CN()
_C.MODEL.NORM_OPTIONS.MABN.SIMULATED_BATCH = 32  # images in the window: its length is this / images per rank (MABN)
_C.MODEL.NORM_OPTIONS.MABN.KEEP_RATE = 0.98  # weight of the OLD value in the running second moment (MABN, section 4)
_C.MODEL.NORM_OPTIONS.MABN.WARMUP_ITERS = 100  # iterations with batch statistics (authors' detection code)
_C.MODEL.NORM_OPTIONS.BCN = CN()
_C.MODEL.NORM_OPTIONS.BCN.GROUPS = 32  # groups of the channel normalization (BCN)
_C.MODEL.NORM_OPTIONS.BCN.ESTIMATE = True  # True: EstBN (micro-batches), False: BN, in the batch half (BCN)
_C.MODEL.NORM_OPTIONS.BCN.UPDATE_RATE = 0.01  # weight of the new batch in EstBN's running statistics; see docs
_C.MODEL.NORM_OPTIONS.BCN.DECAY_ITERS = 0  # micro-batches after which that rate falls as 1/t; 0: it stays

_C.MODEL.ANCHORS = CN()
_C.MODEL.ANCHORS.SCALE = 4.0  # side of the first anchor of a level, in strides of that level (RetinaNet: 32 px at P3)
_C.MODEL.ANCHORS.SCALES_PER_OCTAVE = 3  # sizes per level, 2^(i/this) apart (RetinaNet, section 4)
_C.MODEL.ANCHORS.ASPECT_RATIOS = [0.5, 1.0, 2.0]  # height / width; the order is the channel order of the head
_C.MODEL.ANCHORS.CONVENTION = "detectron2"  # detectron, detectron2, torchvision: rounding, centres, order (anchors.py)
_C.MODEL.BOX = CN()
_C.MODEL.BOX.CONVENTION = "detectron2"  # detectron: widths are x2 - x1 + 1; detectron2, torchvision: x2 - x1
_C.MODEL.MATCHER = CN()
_C.MODEL.MATCHER.FG_IOU = 0.5  # an anchor with at least this IoU is positive (RetinaNet, section 4)
_C.MODEL.MATCHER.BG_IOU = 0.4  # below: background; between the two: ignored (RetinaNet, section 4)
_C.MODEL.MATCHER.LOW_QUALITY = "detectron2"  # anchors tied for a box's best IoU: detectron (positive above BG_IOU),
# detectron2 (always positive; torchvision too), none (the paper's text)
_C.MODEL.LOSS = CN()
_C.MODEL.LOSS.GAMMA = 2.0  # focusing exponent (RetinaNet, equation 5)
_C.MODEL.LOSS.ALPHA = 0.25  # weight of positives, 1 - this for negatives (RetinaNet, equation 5)
_C.MODEL.LOSS.BOX = "smooth_l1"  # smooth_l1 l1 giou diou ciou
_C.MODEL.LOSS.BETA = 0.11  # in encoded units: where smooth_l1 turns from quadratic to linear (Detectron)
_C.MODEL.LOSS.BOX_WEIGHT = 1.0  # factor of the box loss (Detectron)
_C.MODEL.LOSS.NORMALIZER = "batch"  # batch: sum over images of (positives + 1) (Detectron); image: positives of each
# image, then the mean (torchvision); ema: running mean of the batch's positives, 0.9 (detectron2)

_C.DATASETS = CN()
_C.DATASETS.CATALOG = "datasets/catalog.yaml"  # YAML: name -> images, annotations; paths relative to that file
_C.DATASETS.TRAIN = ("coco_2017_train",)  # names in the catalog
_C.DATASETS.TEST = ("coco_2017_val",)  # names in the catalog; empty: no evaluation

_C.INPUT = CN()
_C.INPUT.MIN_SIZE_TRAIN = (800,)  # pixels of the short side; several: one is drawn for each image
_C.INPUT.MAX_SIZE_TRAIN = 1333  # pixels, cap of the long side
_C.INPUT.MIN_SIZE_TEST = 800  # pixels of the short side
_C.INPUT.MAX_SIZE_TEST = 1333  # pixels, cap of the long side
_C.INPUT.FLIP_PROB = 0.5  # probability of a horizontal flip in training
_C.INPUT.RESIZE = "cv2"  # cv2 (bilinear on uint8), cv2_float (Detectron: bilinear on floats, one scale
# for both axes), pil (detectron2: antialiased bilinear), torchvision (bilinear on floats, without antialias)
_C.INPUT.SIZE_DIVISIBILITY = 32  # batches are padded to a multiple of this; Detectron 128
_C.INPUT.AUGMENT = CN()  # training only, beside size and flip; tools/visualize.py shows what it does
_C.INPUT.AUGMENT.CROP = 1.0  # smallest share of each side that a random crop keeps (detectron2); 1: no crop
_C.INPUT.AUGMENT.LSJ = (1.0, 1.0)  # least, most random factor of the size, 0.1, 2.0 in arXiv 2012.07177; 1, 1: off
_C.INPUT.AUGMENT.MOSAIC = 0.0  # probability of four images in one (YOLOv4, arXiv 2004.10934); 0: off
_C.INPUT.AUGMENT.PHOTOMETRIC = 0.0  # 0..1: brightness, contrast, saturation by 1 - this to 1 + this, hue by up to
# this x 90 degrees; 0: off
_C.INPUT.AUGMENT.MIN_VISIBLE = 0.3  # share of its area from which a box that was cut is kept; below, it is background

_C.DATALOADER = CN()
_C.DATALOADER.NUM_WORKERS = 2  # processes per rank; 0: in the training process
_C.DATALOADER.ASPECT_GROUPING = True  # batches hold only wide or only tall images: less padding
_C.DATALOADER.SHAPE_BUCKETS = False  # True: batches have one of a few fixed shapes that follow from MIN_SIZE_TRAIN and
# MAX_SIZE_TRAIN (data/buckets.py), one short side is drawn for a step, ASPECT_GROUPING has no effect
_C.DATALOADER.REPEAT_THRESHOLD = 0.0  # classes in fewer than this share of images are repeated (LVIS); 0: off
_C.DATALOADER.SKIP_EMPTY = False  # True: images without boxes are left out of training
_C.DATALOADER.MAX_BAD_IMAGES = 0  # unreadable images that training may replace and count before it stops

_C.SOLVER = CN()
_C.SOLVER.IMS_PER_BATCH = 16  # images of one micro-batch, all ranks together
_C.SOLVER.ACCUMULATE = 1  # micro-batches per optimizer step
_C.SOLVER.REFERENCE_BATCH = 16  # images per step that LR, schedule and periods below are stated for; 0: no rescaling
_C.SOLVER.BASE_LR = 0.01  # at REFERENCE_BATCH (Detectron)
_C.SOLVER.MAX_ITER = 90000  # optimizer steps at REFERENCE_BATCH (Detectron 1x)
_C.SOLVER.SCHEDULE = "multistep"  # multistep, cosine (to zero at MAX_ITER)
_C.SOLVER.STEPS = (60000, 80000)  # iterations at which the rate is multiplied by GAMMA; multistep only
_C.SOLVER.GAMMA = 0.1  # factor of the rate at each of STEPS (Detectron)
_C.SOLVER.WARMUP_ITERS = 500  # iterations of linear warm-up (Detectron)
_C.SOLVER.WARMUP_FACTOR = 1.0 / 3  # share of the rate at iteration 0 (Detectron)
_C.SOLVER.MOMENTUM = 0.9  # of SGD, in the form V = m V + g, p -= lr V (Detectron)
_C.SOLVER.WEIGHT_DECAY = 0.0001  # of conv weights (Detectron)
_C.SOLVER.WEIGHT_DECAY_NORM = 0.0  # of norm scales (Detectron: WEIGHT_DECAY_GN)
_C.SOLVER.WEIGHT_DECAY_BIAS = 0.0  # of biases and norm shifts (Detectron; detectron2 and torchvision decay them)
_C.SOLVER.BIAS_LR_FACTOR = 2.0  # rate of biases and norm shifts, as a multiple of the others' (Detectron)
_C.SOLVER.CLIP_GRAD_NORM = 0.0  # cap of the total gradient norm; 0: off
_C.SOLVER.AMP = "off"  # off, bf16, fp16 (with loss scaling; CUDA only)
_C.SOLVER.COMPILE = False  # torch.compile of model and loss, once for each input shape (minutes)
_C.SOLVER.FUSE_CONVS = False  # on CUDA in half precision: convolution, bias, addition and ReLU in one cuDNN call
_C.SOLVER.CUDA_GRAPHS = 0  # input shapes whose whole training step becomes one CUDA graph; 0: off. Pays at few images
_C.SOLVER.CHANNELS_LAST = "auto"  # NHWC memory: True, False, auto (the faster one on this device, docs/performance.md)
_C.SOLVER.EMA_DECAY = 0.0  # decay of the averaged weights that are evaluated and saved as well; 0: off
_C.SOLVER.CHECKPOINT_PERIOD = 5000  # iterations at REFERENCE_BATCH
_C.SOLVER.CHECKPOINT_KEEP = 2  # newest checkpoints kept beside the best and the last; 0: all
_C.SOLVER.LOG_PERIOD = 20  # iterations between lines of metrics.jsonl; reading them waits for the device

_C.TEST = CN()
_C.TEST.EVAL_PERIOD = 0  # iterations at REFERENCE_BATCH; 0: only at the end
_C.TEST.EVALUATOR = "numpy"  # numpy (ours, the fastest), faster (faster-coco-eval), pycocotools (the reference);
# all give the same numbers
_C.TEST.OVERLAP_SCORING = True  # score many detections in a process of its own while training goes on, same metrics
_C.TEST.SCORE_THRESH = 0.05  # only detections above (Detectron)
_C.TEST.PRE_NMS_TOPK = 1000  # (anchor, class) pairs per level before decoding (Detectron)
_C.TEST.NMS_IOU = 0.5  # suppress above, per class over all levels (Detectron)
_C.TEST.MAX_DETS = 100  # detections per image (COCO)
_C.TEST.IMS_PER_BATCH = 8  # images per batch and rank
_C.TEST.AMP = "auto"  # auto (SOLVER.AMP on a GPU, off on a CPU), off, bf16 (pays on CPUs with AMX or AVX512_BF16), fp16
_C.TEST.CUDA_GRAPHS = 0  # shapes of a batch whose detection becomes one CUDA graph, in test_net.py, predict.py and
# programs; 0: off. Pays at one or two images
_C.TEST.FOLD = True  # fold the norms that can be folded into the convs before evaluation
_C.TEST.AUG = CN()  # test-time augmentation: every image is seen several times, the detections are merged by NMS
_C.TEST.AUG.FLIP = False  # True: mirrored as well
_C.TEST.AUG.SCALES = (1.0,)  # factors of MIN_SIZE_TEST and MAX_SIZE_TEST, a view each


def get_cfg() -> CN:
    """Return a fresh copy of the default configuration."""
    return _C.clone()
