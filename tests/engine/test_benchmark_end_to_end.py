"""Training on image files: what is run, in which order, and what the shares of waiting are shares of."""

import time

import pytest
import torch
from loader_cases import config, take, write_nine_images

from retinanet.config.load import dump_config
from retinanet.data.catalog import build_dataset
from retinanet.data.loader import build_train_loader
from retinanet.engine.benchmark import Remote
from retinanet.engine.benchmark_end_to_end import at_hand, build_end_to_end, write_synthetic
from retinanet.engine.benchmark_tasks import Job
from retinanet.engine.train import train_step
from retinanet.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def cfg(tmp_path):
    write_nine_images(tmp_path)
    (tmp_path / "catalog.yaml").write_text("nine: {images: ., annotations: x.json}")
    small = {"MODEL__BACKBONE__NAME": "R18", "MODEL__FPN__CHANNELS": 32, "MODEL__HEAD__NUM_CONVS": 1}
    data = {"DATASETS__CATALOG": str(tmp_path / "catalog.yaml"), "DATASETS__TRAIN": ["nine"], "MODEL__NUM_CLASSES": 0}
    weights = {"MODEL__WEIGHTS": "", "MODEL__BACKBONE__NORM": "GN", "MODEL__BACKBONE__FREEZE_AT": 0}
    return config(**small, **data, **weights, SOLVER__ACCUMULATE=2, SOLVER__IMS_PER_BATCH=2)


def job_of(cfg):
    return Job("config", "end_to_end", dump_config(cfg), (0, 0), cfg.SOLVER.IMS_PER_BATCH)


def test_turn_trains_on_the_loader_and_then_again_on_the_same_batches(cfg):
    """`lead` steps go before the clock: from the loader at least those that its workers could have made beforehand."""
    task = build_end_to_end(cfg, job_of(cfg), CPU)
    trainer, steps = task.run.__self__.trainer, []
    trainer.step = lambda batches: steps.append([batch.image_ids for batch in batches]) or train_step(trainer, batches)
    times = task.turn(3, 1)
    assert [len(times[name]) for name in ("ms", "cpu_ms")] == [1, 1] and times["ms"][0] > 0
    wanted = [batch.image_ids for batch in take(build_train_loader(cfg, build_dataset(cfg, ["nine"])), 8)]
    fed = [ids for step in steps[:4] for ids in step]
    assert fed == wanted  # the lead and the turn, two micro-batches a step
    alone = [ids for step in steps[4:8] for ids in step]
    assert alone == [*wanted[2:], *wanted[2:4]]  # the turn's batches, one step of lead, in a circle
    task.turn(1, 0)
    assert [ids for step in steps[8:9] for ids in step] == [
        batch.image_ids for batch in take(build_train_loader(cfg, build_dataset(cfg, ["nine"])), 10)[8:]
    ]  # the next turn goes on where the last one ended


def test_waiting_for_a_slow_loader_is_told_as_a_share_of_the_time(cfg, monkeypatch):
    """A loader that sleeps as long as a step takes: half of the time is waiting, and half the rate is left."""
    task = build_end_to_end(cfg, job_of(cfg), CPU)
    loop = task.run.__self__
    loop.run()  # the first step makes anchors
    kept = loop.watch.kept[:2]
    monkeypatch.setattr(loop.trainer, "step", lambda batches: time.sleep(0.05) or {})

    def slow():
        while True:
            time.sleep(0.025)  # twice a step
            yield from kept[:1]

    loop.batches = slow()
    loop.turn(4, 1)
    facts = task.facts()
    assert facts["data_wait"] == pytest.approx(0.5, abs=0.15) and facts["of_steps"] == pytest.approx(0.5, abs=0.15)
    assert task.images == 4 and facts["steps_images_per_s"] == pytest.approx(4 / 0.05, rel=0.4)
    assert "device_gap" not in facts


def test_workers_run_beside_the_process_of_a_variant_and_end_with_it(cfg):
    cfg.DATALOADER.NUM_WORKERS = 1
    remote = Remote(job_of(cfg))
    try:
        assert remote.call("build")["device"] == "cpu"
        remote.call("warm_up", 1)
        assert remote.call("time", 1, 0)["ms"][0] > 0
        report = remote.call("report")
        assert report["images"] == 4 and 0 <= report["facts"]["data_wait"] < 1
    finally:
        remote.stop()
    assert remote.process.exitcode == 0  # by itself, so that it could end its workers


def test_generated_images_stand_in_for_a_missing_set_alone(cfg, tmp_path):
    assert at_hand(cfg.DATASETS.CATALOG, ["nine"]) and at_hand(cfg.DATASETS.CATALOG, ["of another catalog"])
    (tmp_path / "x.json").unlink()
    assert not at_hand(cfg.DATASETS.CATALOG, ["nine"])
    with pytest.raises(UserError, match="annotation file .*x.json not found"):
        build_end_to_end(cfg, job_of(cfg), CPU)
    cfg.merge_from_list(write_synthetic(tmp_path / "made", 2))
    dataset = build_dataset(cfg, cfg.DATASETS.TRAIN)
    assert len(dataset) == 2 and dataset.image_size(0) == (480, 640) and dataset.num_classes == 6
