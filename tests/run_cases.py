"""What the tests of tools/train_net.py share: a small set, a small model, and the tool in this process."""

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

from retinanet.data.synthetic import write_dataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
TINY = [
    *("MODEL.FPN.CHANNELS", "16", "MODEL.HEAD.NUM_CONVS", "1", "MODEL.NORM_OPTIONS.GN.GROUPS", "4"),
    *("INPUT.MIN_SIZE_TRAIN", "64", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "4"),
    *("SOLVER.REFERENCE_BATCH", "0", "SOLVER.WARMUP_ITERS", "2", "SOLVER.LOG_PERIOD", "3", "TEST.EVAL_PERIOD", "0"),
]


def write_data(folder: Path, train: int = 12, val: int = 6) -> Path:
    """Write a catalog with a synthetic training set and an evaluation set; return its folder."""
    for split, count in (("train", train), ("val", val)):
        write_dataset(folder, split, count, size=(64, 80))
    (folder / "catalog.yaml").write_text(
        "synthetic_train: {images: train, annotations: annotations/train.json}\n"
        "synthetic_val: {images: val, annotations: annotations/val.json}\n"
    )
    return folder


def arguments(data: Path, output: Path, *extra: str) -> list[str]:
    return [
        *("--config", "configs/quickstart.yaml", *TINY),
        *("DATASETS.CATALOG", str(data / "catalog.yaml"), "OUTPUT_DIR", str(output), *extra),
    ]


def command(data: Path, output: Path, *extra: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools/train_net.py"), *arguments(data, output, *extra)]


class Ended(NamedTuple):
    status: int
    stdout: str
    stderr: str


def run_tool(name: str, argv: list[str], capfd) -> Ended:
    """Run tools/`name`.py in this process, from its command line to its exit status."""
    main = importlib.import_module(name).main
    status = 0
    try:
        importlib.import_module("_cli").run(lambda: main(argv))
    except SystemExit as end:
        status = end.code or 0
    return Ended(status, *capfd.readouterr())
