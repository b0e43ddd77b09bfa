"""Time and memory of the real training step, of detection, or of one norm: variants side by side in one run."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import _cli

from retinanet.config.check import PARTS, check_config
from retinanet.config.load import dump_config, load_config, load_config_text
from retinanet.engine import benchmark_data, benchmark_scoring
from retinanet.engine.benchmark import Settings, machine, measure
from retinanet.engine.benchmark_end_to_end import END_TO_END, at_hand, write_synthetic
from retinanet.engine.benchmark_exported import FORMS
from retinanet.engine.benchmark_peer import PEERS
from retinanet.engine.benchmark_report import report
from retinanet.engine.benchmark_suite import SUITES, verdict
from retinanet.engine.benchmark_tasks import CONFIGURED, MEMORY_FORMATS, REFERENCE_NORM, Job
from retinanet.engine.coco_json import write_json
from retinanet.engine.run import choose_device
from retinanet.errors import UserError, pick

EXAMPLES = """  python tools/benchmark.py --config configs/retinanet_R50_bn_fpn.yaml --norms BN,MABN,BCN,GN
  python tools/benchmark.py --config configs/retinanet_R50_gn.yaml --norms GN,BN --part HEAD --size 800 1344
  python tools/benchmark.py --config configs/torchvision/retinanet_resnet50_fpn.yaml --norms config,torchvision --detect
  python tools/benchmark.py --config configs/retinanet_R50_gn_fpn.yaml --detect --exported pt2,onnx --batch 1
  python tools/benchmark.py --layer --norms BN,MABN,BCN --json layer.json
  python tools/benchmark.py --config configs/quickstart.yaml --end-to-end --synthetic 64
  python tools/benchmark.py --data --images datasets/coco/val2017 --batch 16 --steps 10
  python tools/benchmark.py --scoring --rounds 2
  python tools/benchmark.py --suite cpu --json cpu.json

--norms takes names of norms, set in --part; config, the configuration as it is; torchvision and torchvision_bn, its
RetinaNet with frozen and with trained BN. Ratios refer to the first; a name given twice shows the noise. Weights are
random, nothing is downloaded. OMP_NUM_THREADS sets the threads."""
COCO_CLASSES = 80
# task -> the default of --size, of --steps on a CPU and on a GPU, of --batch and of --scores
DEFAULTS = {
    "train": ((320, 320), 5, 20, 2, 2000),
    "detect": ((320, 320), 5, 20, 2, 2000),
    END_TO_END: ((0, 0), 5, 20, 2, 0),
    "layer": ((128, 128), 50, 200, 2, 2000),
    "data": ((0, 0), 10, 10, 16, 0),
    "scoring": ((0, 0), 1, 1, 5000, 100),  # COCO val2017 with all detections that its metrics look at
}
# tasks on one core, in this process: what measures them, and the variants
HERE = {
    "data": (benchmark_data.measure_data, benchmark_data.VARIANTS),
    "scoring": (benchmark_scoring.measure_scoring, benchmark_scoring.VARIANTS),
}
WARM_UP = {"cpu": 2, "cuda": 10}


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--norms", metavar="A,B,...", help="what to compare (default: config, with --layer all norms)")
    made.add_argument("--part", metavar="A,B", default="BACKBONE,FPN", help=f"where: {', '.join(PARTS)} (%(default)s)")
    task = made.add_mutually_exclusive_group()
    task.add_argument("--detect", action="store_true", help="time detection, plain and with norms folded")
    made.add_argument("--exported", metavar="A,B", help=f"with --detect: also these forms, {', '.join(FORMS)}")
    task.add_argument("--layer", action="store_true", help="time one norm alone beside torch.nn.BatchNorm2d")
    task.add_argument("--data", action="store_true", help="time reading and resizing images on one core, beside peers")
    task.add_argument(
        "--scoring", action="store_true", help="time COCO scoring of made-up detections beside pycocotools"
    )
    task.add_argument("--end-to-end", action="store_true", help="time training on DATASETS.TRAIN, beside steps alone")
    made.add_argument(
        "--synthetic", type=int, metavar="N", help="with --end-to-end: N generated images where that set is not there"
    )
    made.add_argument("--images", metavar="FOLDER", default="", help="with --data (default: the set of DATASETS.TRAIN)")
    made.add_argument("--rounds", type=int, metavar="N", default=3, help="turns of every variant (%(default)s)")
    made.add_argument("--steps", type=int, metavar="N", help="timed runs in a turn (5 on a CPU, 20 on a GPU)")
    made.add_argument("--warm-up", type=int, metavar="N", help="runs before the first turn (2 on a CPU, 10 on a GPU)")
    made.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="of the images (320 320), of the map (128 128)"
    )
    made.add_argument(
        "--batch", type=int, metavar="N", help="images of a micro-batch (2), a batch (16), a data set (5000)"
    )
    made.add_argument("--boxes", type=int, metavar="N", default=7, help="boxes in an image (%(default)s)")
    made.add_argument("--channels", type=int, metavar="C", default=64, help="with --layer (%(default)s)")
    made.add_argument(
        "--scores", type=int, metavar="N", help="scores above the threshold (2000), detections of an image (100)"
    )
    made.add_argument("--json", metavar="FILE", help="write everything measured")
    made.add_argument("--profile", metavar="FOLDER", help="also write a trace of each variant and print its kernels")
    made.add_argument("--suite", choices=sorted(SUITES), help="the measurements of docs/performance.md, one by one")
    args = _cli.parse(made, argv)
    words = list(map(str, sys.argv[1:] if argv is None else argv))
    if not args.suite:
        found = measured(args, " ".join(["python tools/benchmark.py", *words]))
        print(report(found))
    else:
        found = {"command": " ".join(["python tools/benchmark.py", *words]), "cases": []}
        for case in SUITES[args.suite]:
            one = measured(
                _cli.parse(made, [*overrides(words, args.suite), *case.arguments]),
                " ".join(["python tools/benchmark.py", *case.arguments]),
            )
            print(f"{report(one)}\n\n{verdict(case, one['results'])}\n", flush=True)
            found["cases"].append({"title": case.title, **one})
    if args.json:
        write_json(Path(args.json), found)
        print(f"\nwritten to {args.json}")


def overrides(words: list[str], suite: str) -> list[str]:
    """Return the command line without `--suite`, to stand before the arguments of a case, which have the last word."""
    place = words.index("--suite") if "--suite" in words else words.index(f"--suite={suite}")
    return words[:place] + words[place + (1 if "=" in words[place] else 2) :]


def measured(args: argparse.Namespace, command: str) -> dict:
    """Return command, machine, settings and results of what the command line asks for."""
    task = next((name for name in ("layer", "detect", END_TO_END, *HERE) if getattr(args, name)), "train")
    before, rows = machine(), []
    with training_set(args, task):
        groups, settings = plan(args, task)
        for jobs in groups:
            run = HERE[task][0] if task in HERE else measure
            rows += run(jobs, settings, progress=lambda line: print(line, file=sys.stderr, flush=True))
    return {
        "command": command,
        "machine": before | rows[0]["host"] | {"load_after": machine()["load"]},
        "settings": settings_of(groups[0][0], settings),
        "results": rows,
    }


@contextmanager
def training_set(args: argparse.Namespace, task: str) -> Iterator[None]:
    """Let generated images stand in, inside the block, for a training set that is not there and may be replaced."""
    if args.synthetic and task != END_TO_END:
        raise UserError("--synthetic: goes with --end-to-end")
    datasets = configuration(args, []).DATASETS if args.synthetic else None
    if datasets is None or at_hand(datasets.CATALOG, datasets.TRAIN):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        args.opts = [*args.opts, *write_synthetic(Path(folder), args.synthetic)]
        yield


def plan(args: argparse.Namespace, task: str) -> tuple[list[list[Job]], Settings]:
    """Return the jobs of each task, and how often they run; `UserError` for whatever can be known to be wrong."""
    size, *steps, batch, scores = DEFAULTS[task]
    args.batch = batch if args.batch is None else args.batch
    args.scores = scores if args.scores is None else args.scores
    check_numbers(args)
    if args.exported and task != "detect":
        raise UserError("--exported: goes with --detect")
    cfg = configuration(args, [])
    device = "cpu" if task in HERE else choose_device(cfg.DEVICE).type
    settings = Settings(
        args.rounds,
        args.steps or steps[device == "cuda"],
        WARM_UP[device] if args.warm_up is None else args.warm_up,
        args.profile or "",
    )
    job = Job("", task, "", tuple(args.size or size), args.batch, args.boxes, args.channels, args.scores)
    if task in HERE:
        job = replace(job, config=dump_config(cfg), source=args.images)
        return [[replace(job, variant=name) for name in HERE[task][1]]], settings
    names = args.norms.split(",") if args.norms else [CONFIGURED] if task != "layer" else list(_cli.NORMS)
    if task == "layer":
        names = [pick(_cli.NORMS, name, "--norms") and name for name in names]
        jobs = [replace(job, variant=name, config=dump_config(cfg)) for name in (REFERENCE_NORM, *names)]
        return [[replace(job, task=each) for job in jobs] for each in MEMORY_FORMATS], settings
    if task == END_TO_END and set(names) & set(PEERS):
        raise UserError("--end-to-end: has no torchvision; --norms takes norms and config there")
    jobs = [replace(job, variant=name, config=dump_config(of_variant(args, name))) for name in names]
    if device == "cpu":
        jobs = [each for job in jobs for each in with_allocator(job)]
    if task == "detect":
        pairs = [(job, folded) for job in jobs for folded in (False, True)]
        made = [replace(job, folded=folded) for job, folded in pairs if not (folded and job.variant in PEERS)]
        jobs = made + [replace(job, exported=form) for job in jobs if job.variant not in PEERS for form in forms(args)]
    return [jobs], settings


def forms(args: argparse.Namespace) -> list[str]:
    """Return the forms of `--exported`."""
    return [pick(dict.fromkeys(FORMS, form), form, "--exported") for form in (args.exported or "").split(",") if form]


def with_allocator(job: Job) -> list[Job]:
    """Return the job; for a peer, as its users have it and with the allocator setting that our tools make."""
    if job.variant not in PEERS:
        return [job]
    return [replace(job, allocator=False), replace(job, label=" + allocator")]


def check_numbers(args: argparse.Namespace) -> None:
    least = {"rounds": 1, "steps": 1, "warm_up": 0, "size": 1, "batch": 1, "boxes": 0, "channels": 1, "scores": 0}
    least["synthetic"] = 1
    for name, smallest in least.items():
        value = getattr(args, name)
        if value is not None and min(value if name == "size" else [value]) < smallest:
            raise UserError(f"--{name.replace('_', '-')}: {value} has to be at least {smallest}")
    if args.images and not Path(args.images).is_dir():
        raise UserError(f"--images: the folder {args.images} does not exist")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json: {args.json} is a folder; name a file")


def of_variant(args: argparse.Namespace, name: str):
    """Return the configuration of one of `--norms`."""
    pick(dict.fromkeys((*_cli.NORMS, CONFIGURED, *PEERS)), name, "--norms")
    if name in (CONFIGURED, *PEERS):
        return configuration(args, [])
    parts = [pick({part: part for part in PARTS}, part, "--part") for part in args.part.split(",")]
    return configuration(args, [text for part in parts for text in (f"MODEL.{part}.NORM", name)])


def configuration(args: argparse.Namespace, more: list[str]):
    """Return the checked configuration with the keys `more` and `--batch`; COCO's classes where the data decides."""
    opts = [*args.opts, "SOLVER.IMS_PER_BATCH", str(args.batch), *more]
    if (args.layer or args.data or args.scoring) and not args.config:
        cfg = load_config_text("", "", opts)
    elif args.config:
        cfg = load_config(args.config, opts)
    else:
        raise UserError("--config FILE is missing; the files in configs/ are ready to use")
    check_config(cfg, False, _cli.NORMS, _cli.BACKBONES)
    if cfg.MODEL.NUM_CLASSES == 0 and not args.end_to_end:
        cfg.defrost()
        cfg.MODEL.NUM_CLASSES = COCO_CLASSES
        cfg.freeze()
    return cfg


def settings_of(job: Job, settings: Settings) -> dict:
    """Return what the figures depend on and a reader cannot see in them."""
    cfg = load_config_text(job.config, "")
    if job.task in HERE:
        sides = {"short_side": cfg.INPUT.MIN_SIZE_TEST, "long_side": cfg.INPUT.MAX_SIZE_TEST, "batch": job.batch}
        kind = {"data": sides, "scoring": {"images": job.batch, "detections_per_image": job.scores}}
        return kind[job.task] | {"rounds": settings.rounds, "steps": settings.steps}
    shape = {"size": list(job.size), "batch": job.batch}
    if job.task == END_TO_END:
        sides = {"short_sides": list(cfg.INPUT.MIN_SIZE_TRAIN), "long_side": cfg.INPUT.MAX_SIZE_TRAIN}
        loading = {"workers": cfg.DATALOADER.NUM_WORKERS, "shape_buckets": cfg.DATALOADER.SHAPE_BUCKETS}
        shape = {"data": ", ".join(cfg.DATASETS.TRAIN), **sides, "batch": job.batch, **loading}
    if job.task in MEMORY_FORMATS:
        shape["channels"] = job.channels
    else:
        keys = ("AMP", "CHANNELS_LAST", "COMPILE", "CUDA_GRAPHS", "FUSE_CONVS", "ACCUMULATE")
        solver = {key.lower(): cfg.SOLVER[key] for key in keys}
        if job.task != END_TO_END:
            shape |= {"boxes": job.boxes, "num_classes": cfg.MODEL.NUM_CLASSES}
        shape |= {"backbone": cfg.MODEL.BACKBONE.NAME, "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT, **solver}
    if job.task == "detect":
        shape["scores"] = job.scores
    return shape | {"rounds": settings.rounds, "steps": settings.steps, "warm_up": settings.warm_up}


if __name__ == "__main__":
    _cli.run(main)
