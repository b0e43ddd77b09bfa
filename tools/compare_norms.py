"""Train one recipe with several norms, batch sizes and seeds, and compare what they reach and what they cost."""

import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import _cli
import _noise
import torch
from benchmark import COCO_CLASSES

from retinanet.config.check import PARTS, check_config
from retinanet.config.load import dump_config, load_config
from retinanet.engine import study
from retinanet.engine.benchmark import Settings, measure
from retinanet.engine.benchmark_peer import PEERS, build_peer
from retinanet.engine.benchmark_tasks import Job
from retinanet.engine.coco_json import read_json, write_json
from retinanet.engine.study import Run
from retinanet.engine.study_plots import write_plots
from retinanet.errors import UserError, pick
from retinanet.utils.files import write_atomically

EXAMPLES = """  python tools/compare_norms.py --config configs/quickstart.yaml --norms GN,BN,MABN,BCN \\
      --batches 2,8 --seeds 0,1,2 --output output/study
  python tools/compare_norms.py --config configs/retinanet_R50_affine_fpn.yaml --norms none,GN --part FPN \\
      --output output/gn_in_fpn DATASETS.TRAIN my_train DATASETS.TEST my_val

Every run is a tools/train_net.py of its own in OUTPUT/runs. The batch recipe rescales rate and schedule, so all batch
sizes see the same number of images. Interrupted, the same command goes on where it was; seeds, norms or batch sizes may
be added later. torchvision_bn among the norms (torchvision: frozen) trains torchvision's RetinaNet on the same batches;
it has 256 channels and 4 convs in each tower. OUTPUT gets results.csv (every run), table.md (means +- spread over
seeds) and plots; --noise 2,32 adds noise.csv and noise.png."""
NONE, LATENCY = "none", "latency.json"
POLL = 0.2  # seconds between looks at the memory of a run
INTERRUPTED = (130, 143, -2, -15)  # by SIGINT or SIGTERM, after saving or at once


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    flag = made.add_argument
    flag("--norms", metavar="A,B,...", required=True, help=f"norms to compare; {NONE}: no norm")
    flag("--part", metavar="A,B", default=",".join(PARTS), help="where the norm is changed (%(default)s)")
    flag("--batches", metavar="N,...", help="images per step (default: that of the configuration)")
    flag("--seeds", metavar="N,...", default="0", help="(default: %(default)s)")
    flag("--output", metavar="DIR", type=Path, required=True, help="folder of the study")
    flag("--noise", metavar="N,...", default="", help="also measure how noisy BN's statistics are at these batch sizes")
    flag("--noise-layer", metavar="NAME", default="res2.0.conv1", help="of the backbone (%(default)s)")
    flag("--noise-batches", metavar="N", type=int, default=40, help="batches of each size (%(default)s)")
    flag(
        "--latency-rounds",
        metavar="N",
        type=int,
        default=3,
        help="turns of detecting with each norm; 0: do not time it",
    )
    args = _cli.parse(made, argv)
    runs = planned(args)
    configs = {run: configuration(args, run) for run in runs}  # every mistake shows before the first run
    rows, failed = [], []
    for number, run in enumerate(runs, start=1):
        print(f"[{number} of {len(runs)}] {run.name}: ", end="", flush=True)
        row = one_run(args, run, configs[run])
        rows += [row] if row else []
        failed += [] if row else [run.name]
    if not rows:
        raise UserError(f"not one of {len(runs)} runs succeeded; their messages are above")
    report(args.output, rows, {})  # whatever happens to the rest
    if args.latency_rounds:
        report(args.output, rows, latency(args, configs))
    if args.noise:
        _noise.measure(args, options(args, Run("BN", runs[0].batch, runs[0].seed)), whole_numbers(args, "noise"))
    if failed:
        print(f"failed, and in no table: {', '.join(failed)}; the same command tries them again", file=sys.stderr)
        sys.exit(1)


def planned(args) -> list[Run]:
    """Return the runs, seeds innermost; `UserError` for names and numbers that cannot be meant."""
    norms, known = args.norms.split(","), {**_cli.NORMS, **dict.fromkeys(PEERS, True), NONE: True}
    for name in norms:
        pick(known, name, "--norms")
    batches, seeds = (whole_numbers(args, name) for name in ("batches", "seeds"))
    for part in args.part.split(","):
        pick(dict.fromkeys(PARTS), part, "--part")
    if not batches:
        batches = [load_config(args.config, args.opts).SOLVER.IMS_PER_BATCH] if args.config else [1]
    triples = list(product(norms, batches, seeds))
    if len(set(triples)) < len(triples):
        raise UserError("--norms, --batches, --seeds: a value occurs twice; every run has to be another one")
    return [Run("" if norm == NONE else norm, batch, seed) for norm, batch, seed in triples]


def whole_numbers(args, name: str) -> list[int]:
    text = getattr(args, name)
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise UserError(f"--{name}: {text!r} is not a list of whole numbers, such as 2,16") from None


def options(args, run: Run) -> list[str]:
    """Return the `KEY VALUE` pairs of a run."""
    parts = [] if run.norm in PEERS else args.part.split(",")
    norms = [text for part in parts for text in (f"MODEL.{part}.NORM", run.norm or "''")]
    own = ["SOLVER.IMS_PER_BATCH", str(run.batch), "SEED", str(run.seed), "OUTPUT_DIR", str(folder_of(args, run))]
    return [*args.opts, *norms, *own]


def configuration(args, run: Run):
    """Return the checked configuration of a run."""
    if not args.config:
        raise UserError("--config FILE is missing; the files in configs/ are ready to use")
    cfg = load_config(args.config, options(args, run))
    check_config(cfg, True, _cli.NORMS, _cli.BACKBONES)
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST: is empty, so there would be nothing to compare; name a data set")
    if run.norm in PEERS:
        with torch.device("meta"):
            build_peer(with_classes(cfg), Job(run.norm, "train", "", (64, 64), run.batch))
    return cfg


def with_classes(cfg):
    """Return a copy of `cfg` with COCO's number of classes where it is still to be counted in the data."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.NUM_CLASSES = cfg.MODEL.NUM_CLASSES or COCO_CLASSES
    cfg.freeze()
    return cfg


def folder_of(args, run: Run) -> Path:
    return args.output.expanduser().resolve() / "runs" / run.name


def one_run(args, run: Run, cfg) -> dict | None:
    """Return the results of a run, trained now or before; None when it failed, as a run that diverges does."""
    folder, text = folder_of(args, run), dump_config(cfg)
    row = study.finished(folder, text)
    if row is not None:
        print("finished before")
        return row
    started = any(folder.glob("checkpoint_*.pth"))
    print("goes on" if started else "starts", flush=True)
    tool, more = ("_peer.py", ["--variant", run.norm]) if run.norm in PEERS else ("train_net.py", [])
    command = [sys.executable, str(_cli.ROOT / "tools" / tool), "--config", str(args.config), *options(args, run)]
    status, usage = watch([*command, *more, *(["--resume"] if started else [])], folder)
    if status in INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        print(f"{run.name} ended with status {status}; see {folder}", file=sys.stderr)
        return None
    return study.finish(folder, run, text, cfg.DATASETS.TEST[0], usage)


def watch(command: list[str], folder: Path) -> tuple[int, dict]:
    """Run `command` with its output in `folder`/console.txt; return its status, seconds and largest resident set."""
    folder.mkdir(parents=True, exist_ok=True)
    start, peak = time.perf_counter(), None
    with open(folder / "console.txt", "a") as console, subprocess.Popen(command, stdout=console) as process:
        try:
            while process.poll() is None:
                peak = resident_peak(process.pid) or peak
                time.sleep(POLL)
        except KeyboardInterrupt:  # the child got the signal too and saves now
            process.wait()
            raise
        finally:
            usage = add_usage(folder, time.perf_counter() - start, peak)
    return process.returncode, usage


def resident_peak(pid: int) -> float | None:
    """Return the largest resident set of a process so far in MiB; None where the system does not tell.

    `wait4` would tell as well, but what it says includes this process up to the moment in which it became the other.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:")), None)


def add_usage(folder: Path, seconds: float, peak: float | None) -> dict:
    """Return the time of all processes of a run so far, and the largest resident set of them; kept in `folder`."""
    path = folder / "usage.json"
    before = read_json(path, "usage") if path.exists() else {"seconds": 0.0, "resident_mib": None}
    peaks = [value for value in (before["resident_mib"], peak) if value is not None]
    usage = {"seconds": before["seconds"] + seconds, "resident_mib": max(peaks, default=None)}
    write_json(path, usage)
    return usage


def latency(args, configs: dict) -> dict[str, dict]:
    """Return norm -> milliseconds to detect on one image, plain and folded; measured in turns, and only once."""
    path = args.output / LATENCY
    of_norm = {run.norm: cfg for run, cfg in reversed(configs.items()) if run.norm not in PEERS}
    known = read_json(path, "latencies") if path.exists() else {}
    if set(known) >= set(of_norm):
        return known
    jobs = []
    for norm, cfg in of_norm.items():
        cfg = with_classes(cfg)
        step = cfg.INPUT.SIZE_DIVISIBILITY
        size = tuple(-(-side // step) * step for side in (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST))
        job = Job(norm or NONE, "detect", dump_config(cfg), size, 1, scores=500)
        jobs += [job, Job(norm or NONE, "detect", dump_config(cfg), size, 1, scores=500, folded=True)]
    rows = measure(jobs, Settings(args.latency_rounds, 5, 2), lambda line: print(line, file=sys.stderr, flush=True))
    pairs = zip(of_norm, rows[::2], rows[1::2], strict=True)
    found = {norm: {"plain_ms": plain["ms"], "folded_ms": folded["ms"]} for norm, plain, folded in pairs}
    write_json(path, found)
    return found


def report(folder: Path, rows: list[dict], latencies: dict) -> None:
    """Write the tables and plots, and print the table and their names."""
    table = study.groups(rows, latencies)
    text = study.as_markdown(table)
    command = " ".join(["python tools/compare_norms.py", *sys.argv[1:]])
    write_atomically(folder / "results.csv", lambda file: file.write(study.as_csv(rows).encode()))
    write_atomically(folder / "table.md", lambda file: file.write(f"```\n{command}\n```\n\n{text}\n".encode()))
    plots = write_plots(folder, rows, table)
    print(f"\n{text}\n\nwritten to {folder}: results.csv, table.md, {', '.join(path.name for path in plots)}")


if __name__ == "__main__":
    _cli.run(main)
