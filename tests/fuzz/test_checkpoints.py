"""Checkpoints by machine: cut off, flipped, with other contents; refused with their name, or what they were."""

import copy
import io

import numpy as np
import pytest
import torch
from fuzz_profile import count, tried, within
from hypothesis import given
from hypothesis import strategies as st
from loader_cases import write_nine_images
from tiny_backbone import TINY, TinyBackbone

import retinanet
from retinanet.config import dump_config
from retinanet.config.load import load_config_text
from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_train_loader
from retinanet.engine.checkpoint import FORMAT, VERSION, Checkpointer
from retinanet.engine.run import build_trainer, class_list, resolve_num_classes, resume
from retinanet.engine.train import train_step
from retinanet.errors import UserError
from retinanet.modeling.backbone import BACKBONES

PICTURE = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)


@pytest.fixture(autouse=True)
def tiny_backbones(monkeypatch):
    monkeypatch.setitem(BACKBONES, "R50", TinyBackbone)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_nine_images(folder)
    return folder


@pytest.fixture(scope="module")
def trained(place):
    """Return (cfg, class names, state) after a step with averaged weights, as training saves it."""
    original, BACKBONES["R50"] = BACKBONES["R50"], TinyBackbone
    dataset = CocoDataset(place, place / "x.json")
    cfg = resolve_num_classes(load_config_text("", "test", [*TINY, "SOLVER.EMA_DECAY", "0.5"]), dataset)
    trainer = build_trainer(cfg, torch.device("cpu"), dataset.class_names)
    trainer.model.train()
    train_step(trainer, [next(iter(build_train_loader(cfg, dataset)))])
    trainer.iteration = 1
    BACKBONES["R50"] = original
    about = {
        "config": dump_config(cfg),
        "classes": class_list(dataset),
        "log_window": [],
        "metrics": {"threshold": 0.2},
    }
    return cfg, dataset.class_names, {"format": FORMAT, "version": VERSION, **trainer.state(), **about}


def fresh(trained):
    cfg, names, _ = trained
    return build_trainer(cfg, torch.device("cpu"), names)


@pytest.fixture(scope="module")
def data(trained) -> bytes:
    stream = io.BytesIO()
    torch.save(trained[2], stream)
    return stream.getvalue()


def detections(path) -> dict:
    with within(30):
        return retinanet.load(path, device="cpu")(PICTURE)


@pytest.fixture
def expected(place, data):
    (place / "whole.pth").write_bytes(data)
    return detections(place / "whole.pth")


def assert_loads_the_same_or_is_refused(path, expected, kind: str) -> None:
    try:
        found = detections(path)
    except UserError as error:
        assert str(path) in str(error) or "MODEL" in str(error), error
        count(kind, "refused")
    else:
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0)
        count(kind, "right")


@tried(25)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=3),
    cut=st.none() | st.floats(0, 1),
    tail=st.binary(max_size=9),
)
def test_flipped_and_cut_off_files_are_refused_or_nothing_is_lost(place, data, expected, edits, cut, tail):
    damaged = bytearray(data if cut is None else data[: int(cut * len(data))])
    for share, mask in edits:
        if damaged:
            damaged[int(share * len(damaged))] ^= mask
    (place / "damaged.pth").write_bytes(bytes(damaged) + tail)
    assert_loads_the_same_or_is_refused(place / "damaged.pth", expected, "checkpoint, bytes")


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 3, 2**70, 1.5, float("nan"), "", "x", "MODEL: {}", b"x", [], {}, [1], [{}], {"a": 1}, ()]),
    st.sampled_from([(0,), (3,), (2, 2), (64, 3, 3, 3)]).map(torch.zeros),
    st.sampled_from(
        [torch.full((64,), float("nan")), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.cfloat)]
    ),
)
ENTRIES = ["format", "version", "model", "iteration", "optimizer", "loss", "scaler", "ema", "random", "best", "config"]
ENTRIES += ["classes", "log_window", "metrics"]


@st.composite
def changed(draw, state: dict) -> dict:
    """Return a copy of `state` in which one value, up to four levels down, is another or is gone."""
    state = {key: copy.copy(value) for key, value in state.items()}
    node, key = state, draw(st.sampled_from(ENTRIES))
    for _ in range(draw(st.integers(0, 3))):
        below = node[key]
        if isinstance(below, dict | list) and len(below):
            node[key] = below = copy.copy(below)
            node, key = below, draw(st.sampled_from(range(len(below)) if isinstance(below, list) else list(below)))
    if draw(st.booleans()) and isinstance(node, dict):
        del node[key]
    else:
        node[key] = draw(ODD)
    return state


@tried(25)
@given(state=st.data())
def test_other_contents_are_refused_or_do_not_matter_to_a_detector(place, trained, expected, state):
    torch.save(state.draw(changed(trained[2])), place / "changed.pth")
    try:
        detections(place / "changed.pth")
    except UserError as error:
        assert str(error)
        count("checkpoint, contents, load", "refused")
    else:
        count("checkpoint, contents, load", "right")


@tried(25)
@given(state=st.data())
def test_other_contents_are_refused_by_a_resume_or_give_a_run_that_trains(place, trained, state):
    state = state.draw(changed(trained[2]))
    torch.save(state, place / "checkpoint_0000001.pth")
    trainer = fresh(trained)
    try:
        with within(30):
            resume(trainer, Checkpointer(place), trained[0])
            train_step(trainer, [next(iter(build_train_loader(trained[0], CocoDataset(place, place / "x.json"))))])
    except UserError as error:
        assert str(place) in str(error)
        count("checkpoint, contents, resume", "refused")
    else:
        assert trainer.iteration == state["iteration"]
        count("checkpoint, contents, resume", "right")


RATES = [None, "x", True, [0.1], torch.zeros(3), torch.zeros((), dtype=torch.int64)]


@pytest.mark.parametrize("rate", ["gone", *RATES], ids=str)
def test_an_optimizer_without_a_learning_rate_is_refused_by_a_resume(place, trained, rate):
    """What PyTorch loads without a word, to fail in the first step."""
    state = copy.deepcopy(trained[2])
    group = state["optimizer"]["param_groups"][0]
    group["lr"] = rate
    if isinstance(rate, str) and rate == "gone":
        del group["lr"]
    torch.save(state, place / "checkpoint_0000001.pth")
    with pytest.raises(UserError, match=r"checkpoint_0000001.pth: .*learning rate of a group"):
        resume(fresh(trained), Checkpointer(place), trained[0])


def test_a_learning_rate_in_a_tensor_is_resumed(place, trained):
    """A run that replays CUDA graphs keeps it so."""
    state = copy.deepcopy(trained[2])
    for group in state["optimizer"]["param_groups"]:
        group["lr"] = torch.tensor(group["lr"])
    torch.save(state, place / "checkpoint_0000001.pth")
    trainer = fresh(trained)
    resume(trainer, Checkpointer(place), trained[0])
    assert trainer.iteration == 1
