"""Rules between keys: each mistake is found before any work, with its key, its value and a remedy."""

import pytest

from retinanet.config import check_config, get_cfg
from retinanet.config.check import BACKBONES, CHOICES, NORMS, PARTS, RANGES, check_device, check_world_size
from retinanet.config.keys import all_keys, get_key
from retinanet.config.load import load_config_text
from retinanet.errors import UserError

WEIGHTS = ("MODEL.WEIGHTS", "R-50.pkl")


def config(*opts: str):
    return load_config_text("", "test", opts)


def errors(*opts: str) -> str:
    with pytest.raises(UserError) as caught:
        check_config(config(*WEIGHTS, *opts))
    return str(caught.value)


def warnings(*opts: str) -> str:
    return "\n".join(check_config(config(*WEIGHTS, *opts)))


def test_defaults_with_weights_pass_without_a_warning():
    assert check_config(config(*WEIGHTS)) == []


def test_every_key_is_a_switch_a_name_or_has_a_rule():
    ruled = {*CHOICES, *(key for _, _, keys in RANGES for key in keys)}
    ruled |= {f"MODEL.{part}.NORM" for part in PARTS} | {"MODEL.BACKBONE.NAME"}
    free = {"OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.WEIGHTS_CLASSES", *(f"DATASETS.{k}" for k in get_cfg().DATASETS)}
    cfg = get_cfg()
    switches = {key for key in all_keys(cfg) if isinstance(get_key(cfg, key), bool)}
    assert ruled | free | switches == set(all_keys(cfg))


@pytest.mark.parametrize("key", [*CHOICES, "MODEL.FPN.NORM", "MODEL.BACKBONE.NAME"])
def test_unknown_names_are_errors_that_list_the_choices(key):
    found = errors(key, "nonsense")
    assert found.startswith(f"{key}: 'nonsense' is not one of ")
    assert all(choice in found for choice in CHOICES.get(key, ()))


def test_near_miss_names_the_choice():
    assert "did you mean 'GN'?" in errors("MODEL.FPN.NORM", "gn")
    assert "did you mean 'SyncBN'?" in errors("MODEL.BACKBONE.NORM", "SynchBN")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", "-1"),
        ("MODEL.NUM_CLASSES", "-1"),
        ("MODEL.BACKBONE.FREEZE_AT", "6"),
        ("MODEL.HEAD.PRIOR_PROB", "0"),
        ("MODEL.HEAD.PRIOR_PROB", "1"),
        ("MODEL.PIXEL_STD", "1,0,1"),
        ("MODEL.PIXEL_MEAN", "1,256,1"),
        ("MODEL.ANCHORS.ASPECT_RATIOS", "1,-2"),
        ("MODEL.NORM_OPTIONS.BCN.UPDATE_RATE", "0"),  # EstBN would never move
        ("INPUT.MIN_SIZE_TRAIN", "0"),
        ("INPUT.FLIP_PROB", "1.5"),
        ("INPUT.SIZE_DIVISIBILITY", "33"),
        ("INPUT.AUGMENT.CROP", "0"),
        ("INPUT.AUGMENT.PHOTOMETRIC", "1.5"),
        ("INPUT.AUGMENT.LSJ", "(0.0, 2.0)"),
        ("SOLVER.IMS_PER_BATCH", "0"),
        ("SOLVER.BASE_LR", "0"),
        ("SOLVER.EMA_DECAY", "1"),
        ("SOLVER.LOG_PERIOD", "0"),
        ("TEST.NMS_IOU", "0"),
    ],
)
def test_values_outside_their_range_are_errors(key, value):
    found = errors(key, value)
    assert found.startswith(f"{key}: ")
    assert "has to be" in found


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        (("MODEL.PIXEL_MEAN", "100"), ["MODEL.PIXEL_MEAN", "three numbers"]),
        (("MODEL.ANCHORS.ASPECT_RATIOS", "()"), ["MODEL.ANCHORS.ASPECT_RATIOS", "empty"]),
        (("SOLVER.STEPS", "20,10"), ["SOLVER.STEPS: (20, 10)", "grow"]),
        (("SOLVER.STEPS", "10,10"), ["SOLVER.STEPS"]),
        (("MODEL.MATCHER.BG_IOU", "0.6"), ["MODEL.MATCHER.BG_IOU: 0.6", "FG_IOU 0.5"]),
        (("INPUT.MIN_SIZE_TRAIN", "1400"), ["INPUT.MIN_SIZE_TRAIN: (1400,)", "INPUT.MAX_SIZE_TRAIN 1333"]),
        (("INPUT.AUGMENT.LSJ", "(2.0, 0.1)"), ["INPUT.AUGMENT.LSJ: (2.0, 0.1)", "least", "0.1,2.0"]),
        (("INPUT.AUGMENT.LSJ", "(0.5,)"), ["INPUT.AUGMENT.LSJ: (0.5,)", "1,1 is none"]),
        (("TEST.AUG.SCALES", "()"), ["TEST.AUG.SCALES: is empty"]),
        (("INPUT.MAX_SIZE_TEST", "600"), ["INPUT.MIN_SIZE_TEST: 800", "600"]),
        (("MODEL.FPN.NORM", "GN", "MODEL.FPN.CHANNELS", "200"), ["32 groups", "200 channels", "use 25 groups"]),
        (("MODEL.HEAD.NORM", "BCN", "MODEL.NORM_OPTIONS.BCN.GROUPS", "48"), ["256 channels", "use 32 groups"]),
        (("MODEL.BACKBONE.NORM", "GN", "MODEL.NORM_OPTIONS.GN.GROUPS", "128"), ["64 channels", "use 64 groups"]),
        (("DATASETS.TRAIN", "()"), ["DATASETS.TRAIN: is empty"]),
        (("DATASETS.TEST", "a,a"), ["DATASETS.TEST", "twice"]),
        (("OUTPUT_DIR", ""), ["OUTPUT_DIR: is empty"]),
        (("DEVICE", "cpu", "SOLVER.AMP", "fp16"), ["SOLVER.AMP: fp16", "bf16 or off"]),
        (("MODEL.WEIGHTS", ""), ["AffineChannel", "MODEL.WEIGHTS", "FREEZE_AT 0", "ALLOW_MISSING_WEIGHTS True"]),
        (("MODEL.WEIGHTS", "", "MODEL.BACKBONE.NORM", "GN"), ["FREEZE_AT: 2", "random layers", "FREEZE_AT 0"]),
    ],
)
def test_contradictions_are_errors_with_a_remedy(opts, parts):
    found = errors(*opts)
    assert all(part in found for part in parts), found


def test_all_mistakes_are_listed_at_once():
    found = errors("SEED", "-1", "MODEL.FPN.NORM", "X", "SOLVER.STEPS", "2,1")
    assert [line.split(":")[0] for line in found.splitlines()] == ["MODEL.FPN.NORM", "SEED", "SOLVER.STEPS"]


@pytest.mark.parametrize(
    "opts",
    [
        ("MODEL.BACKBONE.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", "0"),
        ("MODEL.ALLOW_MISSING_WEIGHTS", "True"),
    ],
)
def test_training_may_start_without_weights_when_that_is_meant(opts):
    assert check_config(config(*opts)) == []


def test_missing_weights_and_training_sets_matter_to_training_alone():
    check_config(config("DATASETS.TRAIN", "()"), training=False)


@pytest.mark.parametrize(
    ("opts", "part"),
    [
        (("SOLVER.MAX_ITER", "70000"), "SOLVER.STEPS: [80000] are never reached"),
        (("SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()"), "SOLVER.WARMUP_ITERS: 500"),
        (("MODEL.FPN.NORM", "MABN", "MODEL.FPN.CONV", "plain"), "MABN is published with centralized"),
        (("MODEL.FPN.NORM", "BCN", "MODEL.FPN.CONV", "centralized"), "BCN is published with standardized"),
        (("MODEL.HEAD.CONV", "standardized"), "need a norm with statistics after them, not none"),
        (("MODEL.CHANNEL_ORDER", "RGB"), "looks like BGR"),
        (("MODEL.PIXEL_MEAN", "0.4,0.45,0.48"), "0..255"),
        (("MODEL.ANCHORS.CONVENTION", "detectron"), "MODEL.ANCHORS.CONVENTION: detectron"),
        (("DATASETS.TEST", "coco_2017_train"), "trained on as well"),
        (("TEST.EVAL_PERIOD", "5", "DATASETS.TEST", "()"), "TEST.EVAL_PERIOD: 5 has no effect"),
    ],
)
def test_doubtful_settings_warn(opts, part):
    assert part in warnings(*opts)


def test_frozen_identity_norm_in_the_head_warns_when_nothing_is_loaded():
    found = check_config(config("MODEL.HEAD.NORM", "AffineChannel", "MODEL.ALLOW_MISSING_WEIGHTS", "True"))
    assert any("MODEL.HEAD.NORM: AffineChannel without weights is the identity" in line for line in found)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("part", PARTS)
def test_every_norm_is_accepted_in_every_part_with_its_own_convolution(norm, part):
    assert "CONV" not in warnings(f"MODEL.{part}.NORM", norm)


def test_gpu_runs_allow_what_the_cpu_does_not():
    cfg = config("SOLVER.AMP", "fp16", "MODEL.FPN.NORM", "SyncBN")
    check_device(cfg, "cuda")
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        check_device(cfg, "cpu")


def test_processes_must_share_the_batch_evenly():
    cfg = config("SOLVER.IMS_PER_BATCH", "16")
    assert check_world_size(cfg, 8) == check_world_size(cfg, 1) == []
    with pytest.raises(UserError, match="16 images cannot be shared by 3 processes; use 15"):
        check_world_size(cfg, 3)
    with pytest.raises(UserError, match="cannot be shared by 32 processes; use 32"):
        check_world_size(cfg, 32)


def test_mabn_window_must_hold_whole_batches():
    cfg = config("MODEL.FPN.NORM", "MABN", "SOLVER.IMS_PER_BATCH", "12")
    assert check_world_size(cfg, 6) == []
    with pytest.raises(UserError, match="32 is not a multiple of the 12 images per process; use 36"):
        check_world_size(cfg, 1)


def test_batch_norm_on_few_images_warns():
    cfg = config("MODEL.BACKBONE.NORM", "BN", "SOLVER.IMS_PER_BATCH", "16")
    assert check_world_size(cfg, 4) == []
    assert "2 images per process" in check_world_size(cfg, 8)[0]


def test_tools_may_pass_tables_with_more_names():
    cfg = config(*WEIGHTS, "MODEL.FPN.NORM", "Toy", "MODEL.BACKBONE.NAME", "Tiny")
    assert check_config(cfg, norms=[*NORMS, "Toy"], backbones=[*BACKBONES, "Tiny"]) == []
    with pytest.raises(UserError, match="Toy"):
        check_config(cfg)
