"""`train_net.py --dry-run`: one step of everything in a temporary folder, then how much memory and time a run takes."""

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import _cli
import yaml

from retinanet.config.load import dump_config, load_config_text
from retinanet.config.recipe import batch_recipe
from retinanet.data.catalog import build_dataset, load_catalog
from retinanet.data.loader import build_test_loader, build_train_loader
from retinanet.engine.evaluate import build_amp, predict
from retinanet.engine.machine import tune_process
from retinanet.engine.run import build_datasets, build_trainer, choose_device, resolve_num_classes, set_seed
from retinanet.engine.trials import (
    HEADROOM,
    crowded_batch,
    fits_on_gpu,
    largest_canvas,
    largest_in_memory,
    largest_that_fits,
    measure_step,
)
from retinanet.errors import UserError
from retinanet.modeling.build import build_postprocess
from retinanet.utils import distributed, memory
from retinanet.utils.log import get_logger, start_logging

STEPS = 3  # the first is slower than the others: threads, caches and kernels start
IMAGES = 4  # of each evaluation set


def rehearse(args: argparse.Namespace, train) -> None:
    """Train, save, evaluate and resume in a temporary folder, by `train`, the `main` of train_net.py; then report."""
    if args.resume:
        raise UserError("--dry-run: starts a run of its own and does not go with --resume")
    if distributed.launched():
        raise UserError(
            "--dry-run: tries one process; start it without torchrun, with the share of one process as "
            "SOLVER.IMS_PER_BATCH"
        )
    cfg, _ = _cli.load(args)
    with tempfile.TemporaryDirectory(prefix="dry_run_") as name:
        folder = Path(name)
        short = shortened(cfg, folder)
        for step, more in ((STEPS, []), (STEPS + 1, ["--resume"])):
            path = folder / "config.yaml"
            path.write_text(dump_config(short))
            train(["--config", str(path), "SOLVER.MAX_ITER", str(step), *more])
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        start_logging()  # the console alone: the log of the rehearsal goes with its folder
        report(cfg, short, [line for line in lines if "images_per_s" in line])


def shortened(cfg, folder: Path):
    """Return `cfg` for a few steps in `folder`: at the rates of the real run, with evaluation sets cut short."""
    recipe, entries = batch_recipe(cfg), load_catalog(cfg.DATASETS.CATALOG)
    catalog = {}
    for name, entry in entries.items():
        path = entry["annotations"]
        if name in cfg.DATASETS.TEST and path.is_file():
            path = cut_short(build_dataset(cfg, name), folder / f"test_{name}.json")
        row = {"images": str(entry["images"].resolve()), "annotations": str(path.resolve())}
        catalog[name] = {**row, "max_degenerate": entry["max_degenerate"]}
        if name in cfg.DATASETS.TEST and name in cfg.DATASETS.TRAIN:
            catalog[name]["annotations"] = str(entry["annotations"].resolve())
    (folder / "catalog.yaml").write_text(yaml.safe_dump(catalog))
    short = cfg.clone()
    short.defrost()
    short.OUTPUT_DIR, short.DATASETS.CATALOG = str(folder / "run"), str(folder / "catalog.yaml")
    short.SOLVER.REFERENCE_BATCH, short.SOLVER.BASE_LR = 0, recipe.base_lr
    short.SOLVER.WARMUP_ITERS, short.SOLVER.STEPS = recipe.warmup_iters, ()
    short.SOLVER.LOG_PERIOD, short.TEST.EVAL_PERIOD = 1, 0
    short.freeze()
    return short


def cut_short(dataset, path: Path) -> Path:
    """Write the annotations of the first images of `dataset` to `path`."""
    content = json.loads(dataset.annotations_file.read_bytes())
    content["images"] = content["images"][:IMAGES]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] in kept]
    path.write_text(json.dumps(content))
    return path


def report(cfg, short, lines: list[dict]) -> None:
    """Log what the rehearsal and some trials of the largest step tell."""
    log, device = get_logger(), choose_device(cfg.DEVICE)
    set_seed(cfg.SEED, cfg.DETERMINISTIC)
    train_set, _ = build_datasets(cfg)
    cfg = resolve_num_classes(cfg, train_set)
    trainer = build_trainer(cfg, device, train_set.class_names, pretrained=False)
    log.info("dry run: data, training, saving, resuming and evaluating work")
    report_time(cfg, short, trainer, lines, device)
    report_memory(cfg, trainer, build_train_loader(cfg, train_set), device)
    log.info("dry run: done; OUTPUT_DIR %s was not touched", cfg.OUTPUT_DIR)


def report_time(cfg, short, trainer, lines: list[dict], device) -> None:
    """Log how long the whole schedule takes, from the steps after the first and the images of the evaluation."""
    recipe, images = batch_recipe(cfg), cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE
    each = sum(images / line["images_per_s"] for line in lines[1:STEPS]) / (STEPS - 1)
    rounds = (recipe.max_iter // recipe.eval_period if recipe.eval_period else 0) + (
        0 if recipe.eval_period and recipe.max_iter % recipe.eval_period == 0 else 1
    )
    evaluation, seen = 0.0, 0
    for name in cfg.DATASETS.TEST:
        loader = build_test_loader(short, build_dataset(short, name))
        start = time.perf_counter()
        category_ids = tuple(loader.dataset.dataset.category_ids)
        predict(trainer.model, loader, build_postprocess(cfg), device, category_ids, build_amp(cfg, device))
        whole = len(build_dataset(cfg, name))
        evaluation += (time.perf_counter() - start) * whole / len(loader.dataset.dataset)
        seen += whole
    total = recipe.max_iter * each + rounds * evaluation
    get_logger().info(
        "dry run: %.3g s per iteration of %d images; %d iterations and %d evaluations of %d images (%s each) take %s",
        each, images, recipe.max_iter, rounds if seen else 0, seen, duration(evaluation), duration(total),
    )  # fmt: skip


def report_memory(cfg, trainer, loader, device) -> None:
    """Log the memory of the largest step that the data can ask for, and the largest batch that fits."""
    images, log = cfg.SOLVER.IMS_PER_BATCH, get_logger()
    canvas, boxes = largest_canvas(loader), int(max(loader.dataset.dataset.box_counts))
    budget = HEADROOM * (memory.available(device) + (memory.in_use(device) if device.type == "cuda" else 0))
    log.info(
        "dry run: the largest step has %d images of %d x %d pixels with %d boxes each", images, *canvas, boxes
    )  # fmt: skip
    if device.type == "cuda":
        make = partial(crowded_batch, canvas=canvas, boxes=boxes, num_classes=cfg.MODEL.NUM_CLASSES)
        fits = fits_on_gpu(trainer, make, cfg.SOLVER.ACCUMULATE, device)
        fitting = largest_that_fits(fits)
        taken = f"{memory.gib(memory.peak(device))} in the last step tried"
    else:
        peaks = {count: peak_of_step(cfg, count, canvas, boxes) for count in sorted({1 if images > 1 else 2, images})}
        fitting = largest_in_memory(peaks, int(budget))
        taken = ", ".join(f"{memory.gib(peak)} with {count}" for count, peak in peaks.items())
    log.info(
        "dry run: the largest batch that fits is SOLVER.IMS_PER_BATCH %d (a step took %s; %s may be used)",
        fitting, taken, memory.gib(budget),
    )  # fmt: skip
    if fitting < images:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH: {images} images of the largest shape do not fit, {fitting} do; lower it and raise "
            "SOLVER.ACCUMULATE, or lower INPUT.MAX_SIZE_TRAIN"
        )


def peak_of_step(cfg, images: int, canvas: tuple[int, int], boxes: int) -> float:
    """Return the peak memory in bytes of a process that takes one step on the CPU; infinite when it does not survive.

    A process of its own: this one keeps what it has freed, and would not outlive the system's out-of-memory killer.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(step_alone, dump_config(cfg), images, canvas, boxes).result()
        except (BrokenProcessPool, MemoryError, RuntimeError) as error:
            if not isinstance(error, BrokenProcessPool) and not memory.is_out_of_memory(error):
                raise
            return float("inf")


def step_alone(text: str, images: int, canvas: tuple[int, int], boxes: int) -> int:
    """Take one step of that shape and return the peak memory of this process in bytes."""
    cfg = load_config_text(text, "the configuration")
    device = choose_device("cpu")
    tune_process(device)
    trainer = build_trainer(cfg, device, [], pretrained=False)
    batch = crowded_batch(images, canvas, boxes, cfg.MODEL.NUM_CLASSES)
    return measure_step(trainer, batch, cfg.SOLVER.ACCUMULATE, device)[1]


def duration(seconds: float) -> str:
    """Return a time span as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + (f"{hours} h " if days or hours else "") + f"{minutes} min"
