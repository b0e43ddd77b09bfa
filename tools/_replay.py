"""`train_net.py --replay`: the command that a failed run prints, and what it does."""

import argparse
import shlex
from pathlib import Path

import _cli

from retinanet.config.check import check_device
from retinanet.config.load import load_config_text
from retinanet.engine.failure import read_failed_batch
from retinanet.engine.replay import replay
from retinanet.engine.run import build_trainer, choose_device


def command(path: Path) -> str:
    """Return what a user types to repeat the step that was saved as `path`."""
    script, path = _cli.ROOT / "tools" / "train_net.py", path.resolve()
    script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    return shlex.join(["python", str(script), "--config", str(path.with_name("config.yaml")), "--replay", str(path)])


def repeat(args: argparse.Namespace) -> int:
    """Print what is not finite in the step that `--replay` names; return the exit status, 1 when something is."""
    failed = read_failed_batch(args.replay)
    cfg = _cli.load(args)[0] if args.config else load_config_text(failed["config"], args.replay, args.opts)
    device = choose_device(cfg.DEVICE)
    check_device(cfg, device.type)
    trainer = build_trainer(cfg, device, [entry["name"] for entry in failed["classes"]], pretrained=False)
    shown = ", ".join(f"{name} {value:g}" for name, value in failed["values"].items())
    print(f"iteration {failed['iteration']}, lr {failed['lr']:g}, as the run saw it: {shown}")
    found = replay(trainer, failed, device)
    print("\n".join(found.lines))
    print("reproduced: the step is not finite" if found.reproduced else "not reproduced: here every value is finite")
    return 1 if found.reproduced else 0
