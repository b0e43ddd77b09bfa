"""Configurations by machine: every key gets every kind of value, files are damaged, and what is accepted has to run."""

import pytest
import torch
from fuzz_profile import count, tried, within
from hypothesis import given
from hypothesis import strategies as st
from loader_cases import write_nine_images
from tiny_backbone import TINY, TinyBackbone

from retinanet.config import check_config, dump_config, get_cfg, load_config
from retinanet.config.check import CHOICES
from retinanet.config.keys import all_keys, get_key
from retinanet.config.load import load_config_text
from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_test_loader, build_train_loader
from retinanet.deploy.fold import fold
from retinanet.engine.evaluate import detect
from retinanet.engine.optim import build_schedule
from retinanet.engine.run import build_trainer, resolve_num_classes
from retinanet.engine.train import train_step
from retinanet.errors import UserError
from retinanet.modeling.backbone import BACKBONES
from retinanet.modeling.build import build_postprocess

ELSEWHERE = {"MODEL.WEIGHTS", "SOLVER.COMPILE"}  # files of weights have tests of their own; compiling takes minutes
KEYS = [key for key in all_keys(get_cfg()) if key not in ELSEWHERE]
WHOLE = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**63, -(2**63), 10**30]), st.integers())
REAL = st.one_of(st.floats(-2, 2), st.sampled_from([1e-300, 1e-30, 1e10, 1e38, 1e300, 5e-324]), st.floats())
TEXT = st.one_of(st.sampled_from(["", "None", "null", "x", "()", "[", "(,)", "True", "1e400"]), st.text(max_size=6))
NUMBERS = st.one_of(WHOLE, REAL).map(str)


def values_of(key: str):
    """Return texts for a key: of its type in and out of range, its choices, and of other types."""
    default = get_key(get_cfg(), key)
    likely = {bool: st.sampled_from(["True", "False", "true", "0", "yes"]), int: WHOLE.map(str), float: REAL.map(str)}
    if isinstance(default, (tuple, list)):
        element = NUMBERS if default and not isinstance(default[0], str) else TEXT
        one = st.lists(element, max_size=4).map(lambda items: f"({', '.join(items)})")
    elif key in CHOICES:
        one = st.sampled_from(CHOICES[key])
    else:
        one = likely.get(type(default), TEXT)
    return one | NUMBERS | TEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def dataset(folder):
    write_nine_images(folder)
    return CocoDataset(folder, folder / "x.json")


@pytest.fixture(autouse=True)
def tiny_backbones(monkeypatch):
    for name in BACKBONES:
        monkeypatch.setitem(BACKBONES, name, TinyBackbone)


def run(cfg, dataset) -> float:
    """Take one step and detect on one batch, as training does; return the loss."""
    torch.manual_seed(0)
    cfg = resolve_num_classes(cfg, dataset).clone()
    trainer = build_trainer(cfg, torch.device("cpu"), dataset.class_names)
    schedule = build_schedule(cfg)
    assert all(schedule.lr(i) >= 0 for i in (0, schedule.warmup_iters, schedule.max_iter - 1))
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = iter(build_train_loader(cfg, dataset))
    trainer.model.train()
    loss = train_step(trainer, [next(loader) for _ in range(min(cfg.SOLVER.ACCUMULATE, 3))])["loss"]
    model = (fold(trainer.evaluated_model())[0] if cfg.TEST.FOLD else trainer.evaluated_model()).eval()
    for found in detect(model, next(iter(build_test_loader(cfg, dataset))), build_postprocess(cfg)):
        assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) <= cfg.TEST.MAX_DETS
        assert loss.isnan() or found["boxes"].isfinite().all()
    return float(loss)


def answer(pairs: list[tuple[str, str]], dataset, kind: str) -> None:
    """What is refused names a key that was given; what is accepted survives a dump and trains."""
    sections = [part for key, _ in pairs for part in (key, key.split(".")[-1])]
    try:
        cfg = load_config_text("", "test", [*TINY, *(word for pair in pairs for word in pair)])
        check_config(cfg)
        assert load_config_text(dump_config(cfg), "dump") == cfg
        if max(cfg.MODEL.FPN.CHANNELS, cfg.SOLVER.IMS_PER_BATCH, cfg.TEST.IMS_PER_BATCH) <= 64:  # more are only slow
            run(cfg, dataset)
    except UserError as error:
        assert any(name in str(error) for name in sections), error
        count(kind, "refused")
    else:
        count(kind, "right")


@tried(60)
@given(key=st.sampled_from(KEYS), data=st.data())
def test_every_value_of_every_key_is_refused_by_name_or_trains(dataset, key, data):
    with within(60):
        answer([(key, data.draw(values_of(key), label=key))], dataset, "configuration, one value")


@tried(60)
@given(keys=st.lists(st.sampled_from(KEYS), min_size=2, max_size=5, unique=True), data=st.data())
def test_values_together_are_refused_by_name_or_train(dataset, keys, data):
    with within(60):
        answer([(key, data.draw(values_of(key), label=key)) for key in keys], dataset, "configuration, several values")


LINES = st.one_of(
    st.sampled_from(KEYS).flatmap(lambda key: values_of(key).map(lambda value: f"{key}: {value}")),
    st.sampled_from(
        ["MODEL:", "  FPN:", "    NORM: GN", "_BASE_: base.yaml", "_BASE_: x.yaml", "MODEL: 1", "- 1", "---"]
    ),
    st.sampled_from(["a: &a [*a]", "SOLVER: *s", "SOLVER: &s {STEPS: [*s]}", "!!python/object/apply:os.system [ls]"]),
    st.sampled_from(
        ["<<: {SEED: 1}", "? [1, 2]\n: 3", "SEED: 1\nSEED: 2", "\tSEED: 1", "SEED: |\n  1", "{", "%YAML 9"]
    ),
    st.text(max_size=12),
)


@tried(80)
@given(lines=st.lists(LINES, max_size=6), tail=st.binary(max_size=4))
def test_any_file_is_a_configuration_or_refused_with_its_name(folder, lines, tail):
    (folder / "base.yaml").write_text("SEED: 5\n")
    (folder / "x.yaml").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + tail)
    with within(20):
        try:
            check_config(cfg := load_config(folder / "x.yaml"), training=False)
        except UserError as error:
            assert str(error)
            count("configuration, file", "refused")
        else:
            assert load_config_text(dump_config(cfg), "dump") == cfg
            count("configuration, file", "right")


def test_a_circle_of_base_files_and_a_deep_nest_are_refused(folder):
    (folder / "a.yaml").write_text("_BASE_: b.yaml\n")
    (folder / "b.yaml").write_text(f"_BASE_: ../{folder.name}/a.yaml\n")
    with pytest.raises(UserError, match="circle"):
        load_config(folder / "a.yaml")
    for text in ("[" * 100_000, "{a: " * 100_000, "- " * 100_000):
        (folder / "deep.yaml").write_text(text)
        with within(20), pytest.raises(UserError, match="nested too deeply|not valid YAML"):
            load_config(folder / "deep.yaml")
