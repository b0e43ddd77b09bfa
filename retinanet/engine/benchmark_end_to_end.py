"""Training on image files: the loop of `tools/train_net.py` with its loader, beside its steps alone.

A turn first runs `engine/train.py` on what the loader gives: files, workers, collation, copies, steps. Then it runs the
same loop on the batches that were just used, which lie on the device by now. What the second is faster by is what the
data path costs.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from retinanet.data.catalog import build_dataset, load_catalog
from retinanet.data.loader import build_train_loader
from retinanet.data.synthetic import write_dataset
from retinanet.data.workers import BatchLoader, explained
from retinanet.engine.benchmark_tasks import RATE, Job, Task
from retinanet.engine.optim import Schedule
from retinanet.engine.prefetch import prefetched
from retinanet.engine.run import build_trainer, resolve_num_classes
from retinanet.engine.train import Periods, Trainer, train
from retinanet.structures import Batch

END_TO_END = "end_to_end"
SYNTHETIC_SIZE = (480, 640)  # (height, width), as most images of COCO
_NEVER, _FOR_EVER = Periods(0, 0, 0), 2**31


class Watch:
    """Stands for `Progress` in `train`: takes down how long the loop waits, its batches, and the gaps on a GPU.

    waited: seconds inside `next(loader)`. kept: the micro-batches, on the device. marks: events around each step.
    """

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.restart()

    def restart(self) -> None:
        self.waited, self.kept, self.marks = 0.0, [], []

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start
        self._mark()

    def add(self, iteration: int, lr: float, batches: list[Batch], values: dict) -> None:
        self.kept += batches
        self._mark()

    def _mark(self) -> None:
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()

    def gap_ms(self) -> float:
        """Return the milliseconds from the end of each step to the start of the next, in the queue of the GPU."""
        return sum(end.elapsed_time(start) for end, start in zip(self.marks[1:-1:2], self.marks[2::2], strict=True))


class EndToEnd:
    """The loop, fed by `loader`, which it goes through once; turns follow each other where the last one ended."""

    def __init__(self, trainer: Trainer, loader: BatchLoader, accumulate: int, device: torch.device):
        self.trainer, self.loader, self.accumulate, self.device = trainer, loader, accumulate, device
        self.batches = prefetched(iter(loader), device)
        self.watch = Watch(device.type == "cuda")
        waiting = loader.num_workers * (loader.prefetch_factor or 0) + 1  # made before a turn, so free of charge
        self.queue = -(-waiting // accumulate)
        self.fed: list[dict[str, float]] = []  # one of `_timed` for each turn
        self.alone: list[dict[str, float]] = []

    def run(self, batches: Iterator[Batch] | None = None, steps: int = 1) -> None:
        """Run `train` until `steps` are taken and its loader ends, before anything but steps is due."""
        source = self.batches if batches is None else batches
        few = itertools.islice(source, steps * self.accumulate)
        steady = Schedule(RATE, _FOR_EVER)
        with contextlib.suppress(StopIteration), explained(self.loader):
            train(self.trainer, few, steady, _NEVER, self.accumulate, self.device, self.watch, None, None, {})

    def turn(self, steps: int, lead: int) -> dict[str, list[float]]:
        """Return ms and cpu_ms of the mean step, each in a list; `lead` steps and those of waiting batches go before.

        The mean: a loader gives its batches in bursts, so the median step may not have waited when others did.
        """
        self.fed.append(self._timed(self.batches, steps, max(lead, self.queue)))
        self.alone.append(self._timed(itertools.cycle(self.watch.kept), steps, lead))
        self.watch.restart()
        return {"ms": [self.fed[-1]["ms"]], "cpu_ms": [self.fed[-1]["cpu_ms"]]}

    def _timed(self, batches: Iterator[Batch], steps: int, lead: int) -> dict[str, float]:
        self.run(batches, lead)
        self._synchronize()
        self.watch.restart()
        starts = time.perf_counter(), time.process_time()
        self.run(batches, steps)
        self._synchronize()
        wall, cpu = time.perf_counter() - starts[0], time.process_time() - starts[1]
        found = {"ms": 1000 * wall / steps, "cpu_ms": 1000 * cpu / steps, "wait": self.watch.waited / wall}
        return {**found, "gap": self.watch.gap_ms() / (1000 * wall)} if self.watch.cuda else found

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def facts(self, images: int) -> dict:
        """Return the medians over the turns: shares of waiting, and the rate of the steps alone with our share of it.

        data_wait: of the time, inside `next(loader)`. device_gap: of the time, no step was on the GPU. of_steps: the
        rate end to end over that of the steps alone on the same batches.
        """
        shares = [alone["ms"] / fed["ms"] for fed, alone in zip(self.fed, self.alone, strict=True)]
        found = {
            "data_wait": statistics.median(turn["wait"] for turn in self.fed),
            "steps_images_per_s": 1000 * images / statistics.median(turn["ms"] for turn in self.alone),
            "of_steps": statistics.median(shares),
        }
        gaps = {"device_gap": statistics.median(turn["gap"] for turn in self.fed)} if self.watch.cuda else {}
        return {**found, **gaps}


def build_end_to_end(cfg, job: Job, device: torch.device) -> Task:
    """Return the training loop on `DATASETS.TRAIN`, from random weights, at a rate of nearly zero."""
    dataset = build_dataset(cfg, cfg.DATASETS.TRAIN)
    cfg = resolve_num_classes(cfg, dataset)
    trainer = build_trainer(cfg, device, dataset.class_names, pretrained=False)
    loop = EndToEnd(trainer, build_train_loader(cfg, dataset), cfg.SOLVER.ACCUMULATE, device)
    images = job.batch * cfg.SOLVER.ACCUMULATE
    return Task(loop.run, images, lambda: loop.facts(images), loop.turn)


def at_hand(catalog: str, names: list[str]) -> bool:
    """Return whether the data sets of these names are where the catalog says, whatever names it lacks."""
    entries = load_catalog(catalog)
    known = [entries[name] for name in names if name in entries]
    return all(entry["images"].is_dir() and entry["annotations"].is_file() for entry in known)


def write_synthetic(folder: Path, count: int) -> list[str]:
    """Write `count` generated images with their catalog to `folder`; return the keys and values that train on them."""
    annotations = write_dataset(folder, "train", count, SYNTHETIC_SIZE)
    name = f"{count}_generated_images"
    entry = {"images": str(folder / "train"), "annotations": str(annotations)}
    (folder / "catalog.yaml").write_text(yaml.safe_dump({name: entry}))
    return ["DATASETS.CATALOG", str(folder / "catalog.yaml"), "DATASETS.TRAIN", f"['{name}']", "MODEL.NUM_CLASSES", "0"]
