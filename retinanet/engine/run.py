"""From a configuration to the objects of a run: process settings, data sets, trainer. Tools call these in order."""

import logging
import os
import random
from pathlib import Path

import numpy as np
import torch
import yaml

from retinanet.data.catalog import Concatenated, build_dataset
from retinanet.data.coco import CocoDataset
from retinanet.data.doctor import build_sources, errors, quick_check
from retinanet.engine.checkpoint import Checkpointer
from retinanet.engine.ema import model_ema
from retinanet.engine.graphs import GraphedStep
from retinanet.engine.machine import build_memory_format, pad_stem
from retinanet.engine.optim import build_optimizer, build_schedule
from retinanet.engine.train import Trainer
from retinanet.errors import UserError
from retinanet.layers.conv import fuse_epilogues
from retinanet.modeling.build import build_loss, build_model
from retinanet.modeling.retinanet import RetinaNet
from retinanet.utils import distributed
from retinanet.weights.load import build_weights

_log = logging.getLogger(__name__)
MAX_COMPILED_SHAPES = 64  # canvas shapes, times the counts of ground truth that `pad_targets` rounds to
_TOLD = (  # of a hundred keys those that people compare runs by
    *(f"MODEL.{key}" for key in ("WEIGHTS", "BACKBONE.NAME", "BACKBONE.NORM", "FPN.NORM", "HEAD.NORM", "LOSS.BOX")),
    *(f"SOLVER.{key}" for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "SCHEDULE", "WEIGHT_DECAY", "AMP")),
    *(f"SOLVER.{key}" for key in ("ACCUMULATE", "EMA_DECAY", "CLIP_GRAD_NORM")),
    *("DATASETS.TRAIN", "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN", "SEED"),
)


def choose_device(name: str) -> torch.device:
    """Return the device of this process for `DEVICE` auto, cuda or cpu; `UserError` when there is no CUDA device."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"DEVICE: {name!r}, but PyTorch finds no CUDA device; use DEVICE cpu, or install a CUDA build")
    return torch.device("cuda", distributed.local_rank())


def set_seed(seed: int, deterministic: bool) -> None:
    """Seed every generator of this process; `deterministic` also restricts PyTorch to deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:  # cuBLAS reads it when it starts, and PyTorch insists on it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports the compiler, seconds
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def build_datasets(cfg) -> tuple[CocoDataset | Concatenated, list[CocoDataset]]:
    """Return the training set (all of `DATASETS.TRAIN` as one) and the evaluation sets; their categories must agree.

    Raises `UserError` for a set that is missing or empty, for categories that differ between the sets, and for a
    `MODEL.NUM_CLASSES` that contradicts the training set: all of it before any long work.
    """
    train = build_dataset(cfg, cfg.DATASETS.TRAIN)
    tests = [build_dataset(cfg, name) for name in cfg.DATASETS.TEST]
    for test in tests:
        ours, theirs = ([f"{row['id']} {row['name']}" for row in class_list(each)] for each in (train, test))
        if ours != theirs:
            raise UserError(
                f"{test.name} has the categories {_short(theirs)}, {train.name} has {_short(ours)}; training and "
                "evaluation need the same ids and names"
            )
    return train, tests


def examine_data(cfg) -> list[str]:
    """Return what is doubtful about the annotations of the data sets, a line each, without opening images.

    Raises `UserError` for errors that would spoil training or evaluation; `tools/check_dataset.py` tells more. Files
    of training images may be missing up to `DATALOADER.MAX_BAD_IMAGES`; an evaluation needs all of its images.
    """
    train, tests = build_sources(cfg)
    lines = []
    for source in (*train, *tests):
        findings = quick_check(source)
        budget = cfg.DATALOADER.MAX_BAD_IMAGES if source in train else 0
        if wrong := [one for one in errors(findings) if one.kind != "missing-file" or one.count > budget]:
            shown = "; ".join(map(str, wrong[:3])) + ("; ..." if len(wrong) > 3 else "")
            raise UserError(
                f"{source.name}: {shown}. tools/check_dataset.py --annotations {source.annotations} --fix OUT.json "
                "writes a repaired copy"
            )
        lines += [f"{source.name}: {finding}" for finding in findings]
    return lines


def resolve_num_classes(cfg, dataset: CocoDataset):
    """Return `cfg` with `MODEL.NUM_CLASSES` counted in `dataset` where it is 0; `UserError` when they disagree."""
    found = dataset.num_classes
    if cfg.MODEL.NUM_CLASSES == found:
        return cfg
    if cfg.MODEL.NUM_CLASSES:
        raise UserError(
            f"MODEL.NUM_CLASSES: is {cfg.MODEL.NUM_CLASSES}, but {dataset.name} has {found} categories "
            f"({_short(dataset.class_names)}); set it to {found}, or to 0 to take it from the data"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.NUM_CLASSES = found
    cfg.freeze()
    return cfg


def _short(values) -> str:
    shown = ", ".join(map(str, list(values)[:8]))
    return shown + (f", ... ({len(values)} in all)" if len(values) > 8 else "")


def class_list(dataset: CocoDataset) -> list[dict]:
    """Return the "classes" of a checkpoint: {"id", "name"} in the order of the labels."""
    ids = [int(i) for i in dataset.category_ids]
    return [{"id": i, "name": name} for i, name in zip(ids, dataset.class_names, strict=True)]


def hyperparameters(cfg) -> dict[str, str | int | float]:
    """Return the keys that runs are told apart by, in TensorBoard's table of runs; lists and flags become texts."""
    values = {}
    for key in _TOLD:
        value = cfg
        for name in key.split("."):
            value = value[name]
        values[key] = value if type(value) in (int, float) else str(value)
    return values


def build_trainer(cfg, device: torch.device, class_names: list[str], pretrained: bool = True) -> Trainer:
    """Return model, loss and optimizer on `device`, with `MODEL.WEIGHTS` loaded unless `pretrained` is False."""
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS and pretrained:
        build_weights(cfg, model, class_names)
    model.set_memory_format(build_memory_format(cfg, device))
    pad_stem(model, device, cfg.SOLVER.AMP)
    model.to(device)
    if cfg.SOLVER.FUSE_CONVS:
        fuse_epilogues(model)
    # of its own, not in place: evaluation has other shapes and runs the module as it is
    net = compiled(model) if cfg.SOLVER.COMPILE else model
    net = distributed.data_parallel(net, device)
    trainer = Trainer(
        model=model,
        net=net,
        loss=build_loss(cfg).to(device),
        optimizer=build_optimizer(cfg, model),
        amp=cfg.SOLVER.AMP,
        clip_grad_norm=cfg.SOLVER.CLIP_GRAD_NORM,
        scaler=torch.amp.GradScaler(device.type) if cfg.SOLVER.AMP == "fp16" else None,
        ema=model_ema(model, cfg.SOLVER.EMA_DECAY) if cfg.SOLVER.EMA_DECAY else None,
    )
    if cfg.SOLVER.COMPILE:
        trainer.loss.compile(fullgraph=True, dynamic=False)
    if cfg.SOLVER.CUDA_GRAPHS:
        trainer.step = build_graphed_step(cfg, trainer, device)
    return trainer


def compiled(model: RetinaNet) -> torch.nn.Module:
    """Return `model` compiled for one fixed input shape after another, as many as a run with canvas shapes has."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)
    return torch.compile(model, fullgraph=True, dynamic=False)


def build_graphed_step(cfg, trainer: Trainer, device: torch.device) -> GraphedStep | None:
    """Return the training step as CUDA graphs, None (and the log says why) where a run cannot have them."""
    reasons = {
        "the run is on a CPU": device.type != "cuda",
        "several processes reduce gradients": distributed.world_size() > 1,
        "SOLVER.AMP fp16 reads its loss scale": trainer.scaler is not None,
        "SOLVER.EMA_DECAY counts its steps on the host": trainer.ema is not None,
    }
    against = [reason for reason, holds in reasons.items() if holds]
    if against:
        _log.warning("SOLVER.CUDA_GRAPHS: steps run without, because %s", " and ".join(against))
        return None
    return GraphedStep(trainer, cfg.SOLVER.CUDA_GRAPHS)


def resume(trainer: Trainer, checkpointer: Checkpointer, cfg) -> dict | None:
    """Load the newest whole checkpoint into `trainer` and return it; None when the folder has none.

    Keys that differ from the checkpoint's configuration are logged; a difference under MODEL (other than the starting
    weights) raises `UserError`, because the stored state would not fit the network that it describes. So does a
    schedule that ends before the checkpoint.
    """
    found = checkpointer.latest()
    _check_shared(checkpointer.folder, found)
    if found is None:
        return None
    path, state = found
    changed = config_changes(stored_config(path, state), yaml.safe_load(cfg.dump()))
    for key, (old, new) in changed.items():
        if key.startswith("MODEL.") and key not in ("MODEL.WEIGHTS", "MODEL.ALLOW_MISSING_WEIGHTS"):
            raise UserError(
                f"{path}: was trained with {key} {old!r}, the configuration says {new!r}; use the same model, or start "
                "a new run in another OUTPUT_DIR with MODEL.WEIGHTS set to this file"
            )
        _log.info("resume: %s changes from %r to %r", key, old, new)
    _check_length(path, state["iteration"], build_schedule(cfg).max_iter)
    try:
        trainer.load_state(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path}: what it holds does not fit this run ({found}); resume with the release that wrote it, or start a "
            "new run in another OUTPUT_DIR with MODEL.WEIGHTS set to this file"
        ) from error
    _log.info("resumed from %s at iteration %d", path, trainer.iteration)
    return state


def _check_length(path: Path, done: int, wanted: int) -> None:
    """Raise `UserError` when a checkpoint is past the end of the run; one at the end is that of a finished run."""
    if done > wanted:
        raise UserError(
            f"SOLVER.MAX_ITER: this run ends at iteration {wanted} (after the batch recipe), but {path} is of "
            f"iteration {done} already; set it to {done} or more, or start a new run in another OUTPUT_DIR"
        )


def stored_config(path: Path, state: dict) -> dict:
    """Return the configuration in a checkpoint as nested dicts, whichever release wrote it."""
    try:
        stored = yaml.safe_load(state["config"])
    except yaml.YAMLError:
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"{path}: damaged, its 'config' is not YAML with keys; use an older one")
    return stored


def _check_shared(folder: Path, found: tuple[Path, dict] | None) -> None:
    """Raise `UserError` in every process when they do not all go on from the same checkpoint."""
    names = distributed.gather_objects(found and found[0].name)
    if len(set(names)) > 1:
        shown = ", ".join(f"process {rank}: {name or 'none'}" for rank, name in enumerate(names))
        raise UserError(
            f"OUTPUT_DIR: the processes do not find the same newest checkpoint in {folder} ({shown}); it has to be a "
            "folder that all machines share"
        )


def config_changes(old: dict, new: dict, prefix: str = "") -> dict[str, tuple]:
    """Return key -> (old value, new value) for every leaf in which two nested configurations differ."""
    changes = {}
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) or isinstance(after, dict):
            changes.update(config_changes(before or {}, after or {}, f"{prefix}{name}."))
        elif before != after:
            changes[prefix + name] = (before, after)
    return changes


def output_folder(cfg) -> Path:
    """Return `OUTPUT_DIR`, made when missing; `UserError` when it cannot be, or cannot be written to."""
    folder = Path(cfg.OUTPUT_DIR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR: {folder} cannot be made ({error.strerror}); choose another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"OUTPUT_DIR: no permission to write to {folder}; choose another folder")
    return folder
