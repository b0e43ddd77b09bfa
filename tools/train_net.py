"""Train a RetinaNet from a configuration, evaluate it, and leave everything in OUTPUT_DIR."""

import signal
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import _cli
import _dry_run
import _replay

from retinanet.config.check import check_device, check_world_size
from retinanet.config.load import dump_config
from retinanet.config.recipe import batch_recipe
from retinanet.data.loader import build_train_loader
from retinanet.data.reread import files_of, read_step
from retinanet.data.waiting import usable_cores, waiting_advice
from retinanet.data.workers import explained
from retinanet.engine.checkpoint import Checkpointer
from retinanet.engine.evaluate import build_evaluation
from retinanet.engine.failure import FailedStep, kept_failures
from retinanet.engine.machine import build_device_warnings, tune_process
from retinanet.engine.optim import build_schedule
from retinanet.engine.prefetch import prefetched
from retinanet.engine.progress import Progress
from retinanet.engine.provenance import command_line, provenance
from retinanet.engine.run import (
    build_datasets,
    build_trainer,
    choose_device,
    class_list,
    examine_data,
    hyperparameters,
    output_folder,
    resolve_num_classes,
    resume,
    set_seed,
)
from retinanet.engine.signals import stop_request
from retinanet.engine.train import Periods, train
from retinanet.errors import UserError
from retinanet.utils import distributed
from retinanet.utils.files import write_atomically
from retinanet.utils.log import MetricsWriter, get_logger, start_logging

EXAMPLES = """  python tools/train_net.py --config configs/quickstart.yaml
  python tools/train_net.py --config configs/quickstart.yaml --dry-run
  python tools/train_net.py --config configs/retinanet_R50_gn_fpn.yaml SOLVER.IMS_PER_BATCH 2 OUTPUT_DIR output/gn
  python tools/train_net.py --config configs/retinanet_R50_gn_fpn.yaml OUTPUT_DIR output/gn --resume
  torchrun --nproc-per-node 8 tools/train_net.py --config configs/retinanet_R50_gn_fpn.yaml"""


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of OUTPUT_DIR")
    made.add_argument("--replay", metavar="FILE", help="repeat the step that a failed_batch_*.pth was saved of")
    made.add_argument("--dry-run", action="store_true", help="try a step of everything, memory and time; write nothing")
    args = _cli.parse(made, argv)
    if args.dry_run:
        sys.exit(_dry_run.rehearse(args, main))
    if args.replay:
        sys.exit(_replay.repeat(args))
    cfg, warnings = _cli.load(args)
    device = choose_device(cfg.DEVICE)
    distributed.start(device.type)
    tuned = tune_process(device)
    check_device(cfg, device.type)
    warnings += check_world_size(cfg, distributed.world_size())
    checkpointer = open_run(cfg, args.resume)
    folder = checkpointer.folder
    start_logging(folder if distributed.is_main() else None, console=distributed.is_main())
    train_set, test_sets = build_datasets(cfg)
    cfg = resolve_num_classes(cfg, train_set)
    warnings += examine_data(cfg) if distributed.is_main() and not args.resume else []

    log = get_logger()
    text, recipe = dump_config(cfg), batch_recipe(cfg)
    log.debug("configuration:\n%s", text)
    for line in [*warnings, *build_device_warnings(cfg, device), *recipe.reasons, *tuned]:
        log.info("%s", line)
    set_seed(cfg.SEED, cfg.DETERMINISTIC)
    trainer = build_trainer(cfg, device, train_set.class_names, pretrained=not checkpointer.existing())
    state = resume(trainer, checkpointer, cfg) or {}
    writer = open_metrics(cfg, folder, trainer.iteration, state.get("log_lines"))
    schedule, scaled = build_schedule(cfg), trainer.scaler is not None
    first, ranks = trainer.iteration * cfg.SOLVER.ACCUMULATE, (distributed.rank(), distributed.world_size())
    loader = build_train_loader(cfg, train_set, first, *ranks)
    advise = partial(waiting_advice, loader, cores=usable_cores(distributed.local_world_size()))
    progress = Progress(writer, schedule.max_iter, device, trainer.iteration, state.get("log_window"), scaled, advise)
    describe = {"config": text, "classes": class_list(train_set), "provenance": provenance(command_line(argv))}
    keep = FailedStep(partial(read_step, loader), partial(files_of, loader), folder, describe, _replay.command)
    failures = kept_failures(trainer.model, trainer.loss, trainer.guard, keep)
    with closing(progress), stop_request() as request, failures, explained(loader):  # the bar ends before a message
        finished = train(
            trainer,
            prefetched(iter(loader), device),
            schedule,
            Periods(cfg.SOLVER.LOG_PERIOD, recipe.eval_period, recipe.checkpoint_period),
            cfg.SOLVER.ACCUMULATE,
            device,
            progress,
            checkpointer,
            build_evaluation(cfg, test_sets, device, folder, writer, stop=lambda: bool(request)),
            describe,
            stop=lambda: bool(request),
        )
    distributed.stop()
    if not finished:
        log.info("%s: saved at iteration %d; --resume goes on from there", request.name, trainer.iteration)
        sys.exit(128 + signal.Signals[request.name])
    log.info("finished: everything is in %s", folder)


def open_run(cfg, resuming: bool) -> Checkpointer:
    """Return the checkpoints of `OUTPUT_DIR`; `UserError` when there are some and nobody asked to go on from them."""
    checkpointer = Checkpointer(output_folder(cfg), cfg.SOLVER.CHECKPOINT_KEEP)
    if checkpointer.existing() and not resuming:
        raise UserError(
            f"OUTPUT_DIR: {checkpointer.folder} holds a run already; add --resume to go on, or choose another folder"
        )
    if distributed.is_main():
        checkpointer.remove_partial()
    return checkpointer


def open_metrics(cfg, folder: Path, iteration: int, lines: int | None) -> MetricsWriter | None:
    """Write config.yaml and return what writes the numbers of the run, from `iteration` on; None but in one process."""
    if not distributed.is_main():
        return None
    write_atomically(folder / "config.yaml", lambda file: file.write(dump_config(cfg).encode()))
    writer = MetricsWriter(folder, iteration, lines)
    writer.hyperparameters(hyperparameters(cfg), ["AP", "AP50", "loss"])
    return writer


if __name__ == "__main__":
    _cli.run(main)
