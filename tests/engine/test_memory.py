"""Bounded memory and nothing left open: many boxes, large images, and everything that opens files, again and again."""

import contextlib
import gc
import json
import os
import re
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from loader_cases import write_nine_images
from tiny_backbone import TINY, TinyBackbone

import retinanet
from retinanet.config import dump_config
from retinanet.config.load import load_config_text
from retinanet.data.coco import CocoDataset
from retinanet.data.loader import build_test_loader, build_train_loader
from retinanet.engine.checkpoint import Checkpointer
from retinanet.engine.evaluate import evaluate
from retinanet.engine.run import build_trainer, class_list, resolve_num_classes
from retinanet.engine.train import train_step
from retinanet.modeling.assign import assign
from retinanet.modeling.backbone import BACKBONES
from retinanet.modeling.build import build_postprocess

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return `run(*KEY VALUE)` -> (cfg, data set, trainer) of a tiny detector."""
    monkeypatch.setitem(BACKBONES, "R50", TinyBackbone)
    write_nine_images(tmp_path)
    dataset = CocoDataset(tmp_path, tmp_path / "x.json")

    def make(*opts):
        cfg = resolve_num_classes(load_config_text("", "test", [*TINY, *opts]), dataset)
        trainer = build_trainer(cfg, CPU, dataset.class_names)
        trainer.model.train()
        return cfg, dataset, trainer

    return make


def children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text().split()


def held() -> tuple[int, int, int]:
    """Return open files, threads and child processes of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(children())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc")
def test_loaders_steps_checkpoints_evaluations_and_detectors_leave_nothing_open(run, tmp_path):
    cfg, dataset, trainer = run("DATALOADER.NUM_WORKERS", "2")
    checkpointer = Checkpointer(tmp_path / "run", keep=1)
    about = {"config": dump_config(cfg), "classes": class_list(dataset)}

    def everything() -> None:
        batches = list(islice(iter(build_train_loader(cfg, dataset)), 2))  # left in the middle, as by Ctrl-C
        for batch in batches:
            train_step(trainer, [batch])
        trainer.iteration += 1
        path = checkpointer.save({**trainer.state(), **about})
        assert checkpointer.latest()[0] == path
        loader = build_test_loader(cfg, dataset)
        evaluate(trainer.model, loader, build_postprocess(cfg), CPU, dataset, tmp_path / "inference", "faster")
        retinanet.load(path, device="cpu")([str(tmp_path / "0.png"), str(tmp_path / "1.png")])

    children_of_others = held()[2]  # such as the server that other tests fork runs from
    everything()
    everything()
    before = held()
    for _ in range(2):
        everything()
    after = held()
    assert after[2] == before[2] == children_of_others
    assert after[0] <= before[0] and after[1] <= before[1], (before, after)


def test_steps_and_evaluations_keep_no_object(run, tmp_path):
    """A step that keeps one tensor, list or closure shows as 12 of them."""
    cfg, dataset, trainer = run()
    batches = iter(build_train_loader(cfg, dataset))

    def work() -> None:
        for batch in islice(batches, 3):
            train_step(trainer, [batch])
        loader = build_test_loader(cfg, dataset)
        evaluate(trainer.model, loader, build_postprocess(cfg), CPU, dataset, tmp_path / "inference", "faster")

    def objects() -> Counter:
        gc.collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    for _ in range(3):  # whatever is imported, compiled or kept for good is there afterwards
        work()
        before = objects()  # also again and again: counting fills caches of Python itself
    for _ in range(4):
        work()
    assert {name: count for name, count in (objects() - before).items() if count >= 12} == {}


def resident(key: str) -> float:
    """Return VmRSS (now) or VmHWM (the most so far) of this process in MiB."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@contextlib.contextmanager
def peak_below(limit: float):
    """Fail when the resident memory of this process is at any time `limit` MiB above what it is now."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    yield
    peak = resident("VmHWM") - before
    print(f"peak {peak:.0f} MiB")
    assert peak < limit


def boxes(count: int, generator: torch.Generator, room: int = 1200, side: int = 400) -> torch.Tensor:
    corners = torch.rand(count, 2, generator=generator) * room
    return torch.cat([corners, corners + 8 + torch.rand(count, 2, generator=generator) * side], dim=1)


@pytest.mark.parametrize("num_anchors", [20_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_assignment_of_1000_boxes_holds_a_small_part_of_the_overlaps(num_anchors):
    """All overlaps of 200,000 anchors in float32 are 763 MiB, of 20,000 they are 76; an IoU takes several of that."""
    generator = torch.Generator().manual_seed(0)
    anchors, gt = boxes(num_anchors, generator), boxes(1000, generator)[None]
    with peak_below(num_anchors * 1000 * 4 / 2**20 / 5 + 20):
        assign(anchors, gt, torch.zeros(1, 1000, dtype=torch.int64), 0.5, 0.4, "detectron2")


def test_assignment_in_pieces_equals_assignment_of_each_box_alone():
    """1,000 boxes of one image, against torchvision's matching on the whole matrix."""
    from torchvision.models.detection._utils import Matcher
    from torchvision.ops import box_iou

    generator = torch.Generator().manual_seed(0)
    anchors, gt = boxes(3000, generator, 300, 60), boxes(1000, generator, 300, 60)
    expected = Matcher(0.5, 0.4, allow_low_quality_matches=True)(box_iou(gt, anchors))
    found, _ = assign(anchors, gt[None], torch.zeros(1, 1000, dtype=torch.int64), 0.5, 0.4, "detectron2")
    assert torch.equal(found[0], expected)


def crowded(folder: Path, side: int) -> CocoDataset:
    """Write one image of `side` x `side` pixels with 1,000 boxes."""
    import cv2

    generator = np.random.default_rng(0)
    cv2.imwrite(str(folder / "big.png"), generator.integers(0, 256, (side, side, 3)).astype(np.uint8))
    corners, sides = generator.uniform(0, side - 70, (1000, 2)), generator.uniform(4, 60, (1000, 2))
    content = {
        "images": [{"id": 1, "file_name": "big.png", "width": side, "height": side}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": i % 3, "bbox": [*corners[i].tolist(), *sides[i].tolist()]}
            for i in range(1000)
        ],
        "categories": [{"id": k, "name": str(k)} for k in range(3)],
    }
    (folder / "big.json").write_text(json.dumps(content))
    return CocoDataset(folder, folder / "big.json")


@pytest.mark.parametrize(("side", "limit"), [(320, 200), pytest.param(3000, 1000, marks=pytest.mark.slow)])
def test_a_large_image_with_1000_boxes_trains_and_detects_in_bounded_memory(run, tmp_path, side, limit):
    """3008 x 3008 pixels have 1.7 million anchors; their logits, deltas and gradients are the memory."""
    sizes = [f"INPUT.{key}_SIZE_{split}" for key in ("MAX", "MIN") for split in ("TRAIN", "TEST")]
    cfg, _, trainer = run(*(word for key in sizes for word in (key, str(side))), "SOLVER.IMS_PER_BATCH", "1")
    dataset = crowded(tmp_path, side)
    with peak_below(limit):
        batch = next(iter(build_train_loader(cfg, dataset)))
        assert batch.images.shape[-1] >= side and int((batch.gt_labels >= 0).sum()) == 1000
        values = train_step(trainer, [batch])
        assert values["loss"].isfinite() and values["num_fg"] >= 100
        evaluate(trainer.model, build_test_loader(cfg, dataset), build_postprocess(cfg), CPU, dataset, tmp_path / "i")
