"""The part of compare_norms.py that measures how noisy the statistics of a batch norm are."""

from pathlib import Path

import _cli
import torch

from retinanet.config.check import check_config
from retinanet.config.load import load_config
from retinanet.data.loader import build_train_loader
from retinanet.engine.batch_noise import STATISTICS, batch_statistics, noise
from retinanet.engine.run import build_datasets, build_trainer, choose_device, resolve_num_classes, set_seed
from retinanet.engine.study_plots import write_noise
from retinanet.errors import UserError
from retinanet.utils.files import write_atomically


def measure(args, opts: list[str], sizes: list[int]) -> None:
    """Write noise.csv and noise.png to `args.output`, and print the table.

    opts: `KEY VALUE` pairs of a run with BN; when that run of the study is finished its weights are taken, else those
    that it would start from. sizes: images in a batch.
    """
    cfg, weights = settings(args, opts, sizes[0])
    device = choose_device(cfg.DEVICE)
    train_set, _ = build_datasets(cfg)
    found = {}
    for size in sizes:
        cfg, _ = settings(args, opts, size)
        cfg = resolve_num_classes(cfg, train_set)
        set_seed(cfg.SEED, cfg.DETERMINISTIC)
        trainer = build_trainer(cfg, device, train_set.class_names)
        trainer.model.train()
        loader = iter(build_train_loader(cfg, train_set))
        layer = layer_of(trainer.model.backbone, args.noise_layer)
        found[size] = batch_statistics(trainer, layer, loader, args.noise_batches)
    pooled = {name: torch.cat([of[name] for of in found.values()]) for name in STATISTICS}
    noises = {size: {name: noise(of[name], pooled[name]) for name in STATISTICS} for size, of in found.items()}
    lines = [f"{size},{name},{value:.6g}" for size, of in noises.items() for name, value in of.items()]
    text = "\n".join(["batch,statistic,noise", *lines]) + "\n"
    write_atomically(args.output / "noise.csv", lambda file: file.write(text.encode()))
    write_noise(args.output / "noise.png", found, noises, args.noise_layer)
    source = weights or "random weights"
    print(f"\nnoise of BN's statistics in {args.noise_layer}, {args.noise_batches} batches, {source}:")
    for size, of in noises.items():
        print(f"  batch {size}: " + ", ".join(f"{name} {value:.3f}" for name, value in of.items()))


def settings(args, opts: list[str], size: int):
    """Return the checked configuration for batches of `size`, and the file that its weights come from."""
    output = Path(opts[opts.index("OUTPUT_DIR") + 1])
    checkpoints = sorted(output.glob("checkpoint_*.pth"))
    more = ["SOLVER.IMS_PER_BATCH", str(size), "SOLVER.ACCUMULATE", "1"]
    if checkpoints:
        more += ["MODEL.WEIGHTS", str(checkpoints[-1])]
    cfg = load_config(args.config, [*opts, *more])
    check_config(cfg, True, _cli.NORMS, _cli.BACKBONES)
    return cfg, cfg.MODEL.WEIGHTS


def layer_of(backbone, name: str):
    """Return the norm of the convolution called `name`; `UserError` when there is none or it is frozen."""
    norm = getattr(dict(backbone.named_modules()).get(name), "norm", None)
    if norm is None:
        raise UserError(f"--noise-layer: the backbone has no convolution {name!r} with a norm; try res2.0.conv1")
    if not norm.training or not hasattr(norm, "running_mean"):
        raise UserError(
            f"--noise-layer: the norm of {name} is frozen, or no BN; set MODEL.BACKBONE.FREEZE_AT 0 and have BACKBONE "
            "in --part"
        )
    return norm
