"""Our own checkpoints: one file that is either whole or not there, and that says everything a resume needs.

A checkpoint is a dict that `torch.load(weights_only=True)` opens: "format" and "version", "model" (state dict),
"iteration" (finished optimizer steps), "config" (YAML text), "classes" (list of {"id", "name"} in label order), and,
for a resume, "optimizer", "loss", "scaler", "ema", "random", "log_window" and "best". It is written beside its final
name and renamed, so a killed process leaves the older files untouched. PyTorch's archive holds a CRC-32 of every
record; `read_checkpoint` verifies all of them before it trusts a file.
"""

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from retinanet.errors import UserError
from retinanet.utils.files import write_atomically

FORMAT, VERSION = "retinanet", 1
POINTER = "last_checkpoint"
_ALWAYS = ("version", "model", "iteration", "config", "classes")
_log = logging.getLogger(__name__)


def write_checkpoint(path: Path, state: dict) -> None:
    """Write `state` with the marks of our format to `path`, atomically."""
    marked = {"format": FORMAT, "version": VERSION, **state}
    write_atomically(path, lambda file: torch.save(marked, file))


def read_checkpoint(path: str | Path) -> dict:
    """Return the dict of a checkpoint of ours, its tensors on the CPU.

    Raises `UserError` when the file is missing, damaged (cut off, or a record whose checksum is wrong) or of another
    format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint; check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise UserError(f"{path}: the checkpoint is damaged (checksum of {damaged}); use an older one")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    except Exception as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a checkpoint, or damaged ({found}); use an older one") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project; tools/convert_weights.py reads other formats")
    missing = [key for key in _ALWAYS if key not in state]
    if missing or not isinstance(state["version"], int):
        raise UserError(f"{path}: an incomplete checkpoint, it lacks {', '.join(missing) or 'a version number'}")
    if state["version"] > VERSION:
        raise UserError(f"{path}: written by a newer release (version {state['version']}, known: {VERSION}); update")
    for name, (kind, holds) in _CONTENTS.items():
        if name in state and not holds(state[name]):
            raise UserError(f"{path}: damaged, its {name!r} is not {kind}; use an older one")
    return state


def _is_count(value) -> bool:
    return type(value) is int and value >= 0


def _are_tensors(value) -> bool:
    names = isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return names and all(isinstance(one, Tensor) and not one.is_complex() for one in value.values())


def _are_classes(value) -> bool:
    entries = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
    return entries and all(type(one.get("id")) is int and isinstance(one.get("name"), str) for one in value)


def _are_metrics(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get("threshold"), int | float | None)


def _is_dict(value) -> bool:
    return isinstance(value, dict)


# entry -> what it is, its test: a file that another program wrote or changed must not end in the middle of a resume
_CONTENTS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "iteration": ("a count", _is_count),
    "config": ("a text", lambda value: isinstance(value, str)),
    "classes": ('a list of {"id", "name"}', _are_classes),
    "metrics": ("a dict of metrics", _are_metrics),
    **dict.fromkeys(("model", "loss", "ema"), ("a dict of tensors", _are_tensors)),
    **dict.fromkeys(("optimizer", "scaler", "random", "best"), ("a dict", _is_dict)),
}


class Checkpointer:
    """The checkpoints of one run in `folder`: names, the pointer to the newest, and how many are kept.

    `keep` is the number of newest `checkpoint_*.pth` files that stay; 0 keeps all. `best.pth` always stays.
    """

    def __init__(self, folder: Path, keep: int = 0):
        self.folder = Path(folder)
        self.keep = keep

    def save(self, state: dict) -> Path:
        """Write `state` as `checkpoint_{iteration:07d}.pth`, point `last_checkpoint` to it, remove old ones."""
        path = self.folder / f"checkpoint_{state['iteration']:07d}.pth"
        write_checkpoint(path, state)
        write_atomically(self.folder / POINTER, lambda file: file.write(f"{path.name}\n".encode()))
        if self.keep:
            older = [other for other in self.existing() if other.name < path.name]  # later ones are damaged
            for old in older[self.keep - 1 :]:
                old.unlink(missing_ok=True)
        return path

    def save_best(self, state: dict) -> Path:
        """Write `state` as `best.pth`."""
        write_checkpoint(self.folder / "best.pth", state)
        return self.folder / "best.pth"

    def remove_partial(self) -> None:
        """Remove what killed processes left unfinished; only while no other process writes to the folder."""
        for left in self.folder.rglob(".*.partial"):
            left.unlink(missing_ok=True)

    def existing(self) -> list[Path]:
        """Return the checkpoints of the folder, newest first."""
        return sorted(self.folder.glob("checkpoint_*.pth"), reverse=True)

    def latest(self) -> tuple[Path, dict] | None:
        """Return path and content of the newest checkpoint that is whole, or None where there is none at all.

        Damaged files are named in the log and passed over. Raises `UserError` when every checkpoint is damaged.
        """
        candidates = self.existing()
        for path in candidates:
            try:
                return path, read_checkpoint(path)
            except UserError as error:
                _log.warning("passed over: %s", error)
        if candidates:
            raise UserError(f"{self.folder}: all {len(candidates)} checkpoints are damaged; start anew elsewhere")
        return None
