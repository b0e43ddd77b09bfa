"""Imported once by the fork server of `training_cases`, so that its processes start with everything loaded."""

import gc
import sys
from pathlib import Path

gc.disable()  # what is imported stays
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import torch._dynamo  # noqa: E402, F401  by the first optimizer
import train_net  # noqa: E402, F401
from torch.utils.tensorboard import SummaryWriter  # noqa: E402, F401

gc.freeze()
gc.enable()
