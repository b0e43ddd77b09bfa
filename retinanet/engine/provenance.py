"""Where a checkpoint comes from: the command, the versions of what ran, the state of the source; and how to show it."""

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision

_ROOT = Path(__file__).resolve().parents[2]
_GIT_TIMEOUT = 10.0  # seconds; a repository on a slow network folder must not hold up a run


def provenance(argv: list[str]) -> dict:
    """Return what every checkpoint stores beside the configuration, as plain strings and booleans.

    "command": `argv` for a shell; "versions": name -> version; "git": {"commit", "dirty"} of this project's source
    (dirty: tracked files differ from the commit), absent where the source is not under git.
    """
    found = {"command": shlex.join(argv), "versions": versions()}
    if git := git_state(_ROOT):
        found["git"] = git
    return found


def versions() -> dict[str, str]:
    """Return the versions of Python, of this project and of the libraries that decide about numbers."""
    return {
        "python": platform.python_version(),
        "retinanet": _project_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "cv2": cv2.__version__,
        "numpy": np.__version__,
        **({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        "platform": platform.platform(),
    }


def _project_version() -> str:
    """Return the version in pyproject.toml beside the source, for an installed copy that of the package; "unknown" for
    a copy of the folder alone."""
    try:
        lines = (_ROOT / "pyproject.toml").read_text().splitlines()
        return next(line.split('"')[1] for line in lines if line.startswith("version = "))
    except (OSError, StopIteration):
        pass
    try:
        return importlib.metadata.version("retinanet")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def git_state(folder: Path) -> dict | None:
    """Return {"commit", "dirty"} of the repository whose top is `folder`; None without git or without a repository."""
    try:
        top, commit = _git(folder, "rev-parse", "--show-toplevel", "HEAD").split("\n")
        if Path(top).resolve() != folder:  # a copy without history that lies inside another repository
            return None
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT).stdout.strip()


def describe_checkpoint(state: dict) -> str:
    """Return lines about the content of a checkpoint: progress, metrics, classes, where it comes from."""
    lines = [("iteration", f"{state['iteration']}")]
    if best := state.get("best"):
        lines.append(("best so far", f"AP {best['AP']:.2f} at iteration {best['iteration']}"))
    if metrics := state.get("metrics"):
        shown = ("AP", "AP50", "AP75", "AR100")
        lines.append(("metrics", "  ".join(f"{k} {metrics[k]:.2f}" for k in shown if metrics.get(k) is not None)))
    names = [str(entry["name"]) for entry in state["classes"]]
    lines.append(("classes", f"{len(names)}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"))
    count = sum(value.numel() for value in state["model"].values())
    lines.append(("model", f"{count:,} numbers in {len(state['model'])} tensors"))
    stored = [key for key in ("optimizer", "ema", "scaler", "processes") if state.get(key)]
    lines.append(("for a resume", ", ".join(stored) if "optimizer" in state else "nothing: it holds weights alone"))
    if processes := state.get("processes"):
        lines.append(("processes", f"{len(processes)}"))
    source = state.get("provenance")
    lines += _source_lines(source) if source else [("command", "not stored")]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def _source_lines(source: dict) -> list[tuple[str, str]]:
    git = source.get("git")
    state = f"{git['commit']}{', with changes that were not committed' if git['dirty'] else ''}" if git else "none"
    return [
        ("command", source["command"]),
        ("git", state),
        ("versions", ", ".join(f"{name} {version}" for name, version in source["versions"].items())),
    ]


def command_line(argv: list[str] | None = None) -> list[str]:
    """Return the command of this process as the user gave it, with the arguments `argv` where a caller passed some."""
    return [Path(sys.executable).name, sys.argv[0], *(sys.argv[1:] if argv is None else argv)]
