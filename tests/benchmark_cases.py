"""Jobs of a small model, for the tests of `engine/benchmark*.py`."""

import torch

from retinanet.config.load import dump_config, load_config_text
from retinanet.engine.benchmark_tasks import Job

CPU = torch.device("cpu")
TINY = """
MODEL:
  NUM_CLASSES: 3
  BACKBONE: {NAME: R18, NORM: BN, FREEZE_AT: 0}
  FPN: {CHANNELS: 32}
  HEAD: {NUM_CONVS: 1}
SOLVER: {ACCUMULATE: 2}
DEVICE: cpu
"""
PEER = "{MODEL: {NUM_CLASSES: 3, BACKBONE: {NAME: R18, FREEZE_AT: 2}}, DEVICE: cpu, TEST: {MAX_DETS: 7}}"


def job_of(text: str, **changes) -> tuple:
    cfg = load_config_text(text, "test")
    values = {"variant": "config", "task": "train", "size": (64, 96), "batch": 2, "boxes": 3, "scores": 20}
    return cfg, Job(config=dump_config(cfg), **{**values, **changes})
