"""What the tests of tools that take a trained model share: a checkpoint with random weights."""

from pathlib import Path

import torch

from retinanet.config.load import dump_config, load_config_text
from retinanet.engine.checkpoint import write_checkpoint
from retinanet.modeling.build import build_model

TINY = """
MODEL:
  NUM_CLASSES: 2
  BACKBONE: {NAME: R18, NORM: GN, FREEZE_AT: 0}
  FPN: {CHANNELS: 32}
  HEAD: {NUM_CONVS: 0, PRIOR_PROB: 0.3}
INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
TEST: {SCORE_THRESH: 0.0, MAX_DETS: 5, IMS_PER_BATCH: 2}
"""


def write_untrained(path: Path) -> Path:
    """Write a model of the classes cat (category 3) and dog (category 8), best at a score of 0.125; return `path`."""
    cfg = load_config_text(TINY, "test")
    torch.manual_seed(0)
    classes = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
    state = {"model": build_model(cfg).state_dict(), "iteration": 1, "config": dump_config(cfg), "classes": classes}
    write_checkpoint(path, state | {"metrics": {"threshold": 0.125}})
    return path
