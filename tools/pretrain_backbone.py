"""Train a backbone to classify a folder of images (train/CLASS/*, val/CLASS/*), as the start of a detector."""

import signal
import sys
from contextlib import closing

import _cli
from train_net import open_run

from retinanet.config.check import check_device, check_world_size
from retinanet.config.load import dump_config
from retinanet.config.recipe import batch_recipe
from retinanet.data.image_folder import build_folder_train_loader, open_folders
from retinanet.data.workers import explained
from retinanet.engine.classify import SCORE, build_accuracy, build_classification_trainer, classification_step
from retinanet.engine.machine import build_device_warnings, tune_process
from retinanet.engine.optim import build_schedule
from retinanet.engine.prefetch import prefetched
from retinanet.engine.progress import Progress
from retinanet.engine.run import choose_device, resume, set_seed
from retinanet.engine.signals import stop_request
from retinanet.engine.train import Periods, train
from retinanet.errors import UserError
from retinanet.utils import distributed
from retinanet.utils.files import write_atomically
from retinanet.utils.log import MetricsWriter, get_logger, start_logging

EXAMPLES = """  python tools/make_synthetic.py --classification --output datasets/shapes
  python tools/pretrain_backbone.py --config configs/pretrain/small_R18.yaml --data datasets/shapes --stem small
  python tools/pretrain_backbone.py --config configs/pretrain/imagenet_R50.yaml --data datasets/imagenet \\
      MODEL.BACKBONE.NORM MABN SOLVER.IMS_PER_BATCH 32 SOLVER.ACCUMULATE 8 SOLVER.AMP bf16
  torchrun --nproc-per-node 8 tools/pretrain_backbone.py --config configs/pretrain/imagenet_R50.yaml --data DIR --resume

Keys: MODEL.BACKBONE, MODEL.PIXEL_*, INPUT.MIN_SIZE_TRAIN and MIN_SIZE_TEST (side of the crop), INPUT.FLIP_PROB,
DATALOADER.NUM_WORKERS, SOLVER, TEST.EVAL_PERIOD and TEST.IMS_PER_BATCH. A detector starts from the result with
MODEL.WEIGHTS OUTPUT_DIR/best.pth."""


def main(argv: list[str] | None = None) -> None:
    made = _cli.parser(__doc__, EXAMPLES)
    made.add_argument("--data", metavar="DIR", required=True, help="folder with train/CLASS/* and val/CLASS/*")
    made.add_argument("--stem", choices=("full", "small"), default="full", help="small: for images of about 32 pixels")
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of OUTPUT_DIR")
    args = _cli.parse(made, argv)
    cfg, _ = _cli.load(args, training=False)
    small = args.stem == "small"
    device = choose_device(cfg.DEVICE)
    distributed.start(device.type)
    tuned = tune_process(device)
    check_device(cfg, device.type)
    warnings = check_world_size(cfg, distributed.world_size())
    folders = train_folder, val_folder = open_folders(args.data)
    cfg = with_classes(cfg, len(train_folder.classes))
    checkpointer = open_run(cfg, args.resume)

    folder, main_process = checkpointer.folder, distributed.is_main()
    start_logging(folder if main_process else None, console=main_process)
    log, text, recipe = get_logger(), dump_config(cfg), batch_recipe(cfg)
    log.debug("configuration:\n%s", text)
    for line in [*warnings, *build_device_warnings(cfg, device), *recipe.reasons, *tuned, facts(cfg, folders)]:
        log.info("%s", line)
    set_seed(cfg.SEED, cfg.DETERMINISTIC)
    trainer = build_classification_trainer(cfg, device, small)
    state = resume(trainer, checkpointer, cfg) or {}
    check_stem(state, args.stem)
    writer = MetricsWriter(folder, trainer.iteration, state.get("log_lines")) if main_process else None
    if main_process:
        write_atomically(folder / "config.yaml", lambda file: file.write(text.encode()))
    schedule, scaled = build_schedule(cfg), trainer.scaler is not None
    progress = Progress(writer, schedule.max_iter, device, trainer.iteration, state.get("log_window"), scaled)
    start, ranks = trainer.iteration * cfg.SOLVER.ACCUMULATE, (distributed.rank(), distributed.world_size())
    loader = build_folder_train_loader(cfg, train_folder, small, start, *ranks)
    classes = [{"id": label, "name": name} for label, name in enumerate(train_folder.classes)]
    with closing(progress), stop_request() as request, explained(loader):
        finished = train(
            trainer,
            prefetched(iter(loader), device),
            schedule,
            Periods(cfg.SOLVER.LOG_PERIOD, recipe.eval_period, recipe.checkpoint_period),
            cfg.SOLVER.ACCUMULATE,
            device,
            progress,
            checkpointer,
            announced(build_accuracy(cfg, val_folder, small, device)),
            {"config": text, "classes": classes, "stem": args.stem},
            stop=lambda: bool(request),
            step=classification_step,
        )
    distributed.stop()
    if not finished:
        log.info("%s: saved at iteration %d; --resume goes on from there", request.name, trainer.iteration)
        sys.exit(128 + signal.Signals[request.name])
    log.info("finished: top-1 %.2f %% at best; a detector starts from it with MODEL.WEIGHTS %s/best.pth",
             trainer.best.get(SCORE, 0.0), folder)  # fmt: skip


def with_classes(cfg, found: int):
    """Return `cfg` with `MODEL.NUM_CLASSES` counted in the folder, and without weights to start from."""
    if cfg.MODEL.WEIGHTS:
        raise UserError(
            f"MODEL.WEIGHTS: {cfg.MODEL.WEIGHTS!r} has no effect here, where weights come from; leave it empty"
        )
    if cfg.MODEL.BACKBONE.FREEZE_AT:
        raise UserError("MODEL.BACKBONE.FREEZE_AT: frozen stages would stay random; set it to 0")
    if cfg.MODEL.BACKBONE.NORM in ("AffineChannel", "FrozenBN"):
        raise UserError(f"MODEL.BACKBONE.NORM: {cfg.MODEL.BACKBONE.NORM} normalizes nothing; train BN, GN, MABN or BCN")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.NUM_CLASSES = found
    cfg.freeze()
    return cfg


def check_stem(state: dict, stem: str) -> None:
    if state.get("stem", stem) != stem:
        raise UserError(f"--stem: the run was started with {state['stem']}; go on with that, or start anew elsewhere")


def facts(cfg, folders: tuple) -> str:
    """Return the sizes of the data and the length of the training as a line for people."""
    train_folder, val_folder = folders
    images = batch_recipe(cfg).max_iter * cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE
    return (
        f"{len(train_folder)} images to train on, {len(val_folder)} to validate, {len(train_folder.classes)} classes, "
        f"{images / len(train_folder):.1f} epochs"
    )


def announced(evaluate):
    """Return `evaluate` with its result in the log."""

    def run(model, iteration: int) -> dict:
        metrics = evaluate(model, iteration)
        get_logger().info(
            "iteration %d: top-1 %.2f %%, top-5 %.2f %% of %d images",
            iteration, metrics["top1"], metrics["top5"], metrics["images"],
        )  # fmt: skip
        return metrics

    return run


if __name__ == "__main__":
    _cli.run(main)
