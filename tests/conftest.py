"""What every test may use: the folder with the reference data that is too large to track, and nothing else."""

import gc
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# imports make half a million objects that stay; a collection for every 700 new ones walks through them again and again
gc.set_threshold(100_000, 20, 20)


def shared_path(relative: str) -> Path:
    """Return a path inside the reference data; skips the test when the data is not on this machine."""
    base = Path(os.environ.get("RETINANET_SHARED", ROOT.parent / "shared"))
    path = base / relative
    if not path.exists():
        pytest.skip(f"reference data {relative!r} is not here (set RETINANET_SHARED to the folder that holds it)")
    return path


@pytest.fixture
def shared():
    """The function `shared_path`, as a fixture: `shared("goldens/caffe2")` is a folder, or the test is skipped."""
    return shared_path
