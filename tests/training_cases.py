"""Real runs of tools/train_net.py for the tests that kill them: a small data set, processes that start fast, equality.

The processes come from a fork server that has imported PyTorch once. They are processes of their own, so that SIGKILL
ends them as it ends a user's run; only the seconds of importing are saved. Their table of backbones has "Thin", whose
checkpoints are small.
"""

import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import run_cases
import torch
from run_cases import ROOT
from tiny_backbone import Thin

TOOLS = str(ROOT / "tools")
SMALLER = [
    *("MODEL.BACKBONE.NAME", "Thin", "MODEL.ALLOW_MISSING_WEIGHTS", "True", "MODEL.NORM_OPTIONS.BCN.GROUPS", "4"),
    *("MODEL.NORM_OPTIONS.MABN.SIMULATED_BATCH", "8", "MODEL.NORM_OPTIONS.MABN.WARMUP_ITERS", "2"),
    *("TEST.IMS_PER_BATCH", "2", "TEST.SCORE_THRESH", "0.005"),
]
CLOCK = ("images_per_s", "data_wait")  # what depends on the time in a line of metrics.jsonl
FOR_A_RESUME = ("model", "iteration", "optimizer", "loss", "scaler", "ema", "random", "processes", "evaluation_due",
                "best", "log_window", "log_lines")  # fmt: skip


def weights(folder: Path, iteration: int) -> dict:
    return torch.load(folder / f"checkpoint_{iteration:07d}.pth", weights_only=True)


def lines(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def assert_same_run(one: Path, other: Path, iteration: int) -> None:
    """Everything that a resume needs, the log, the metrics, the detections and the best weights agree to the bit."""
    first, second = weights(one, iteration), weights(other, iteration)
    found = [line for key in FOR_A_RESUME for line in differences(first[key], second[key], key)]
    assert not found, found[:9]
    assert lines(one) == lines(other)
    for name in ("metrics.json", "predictions.json"):
        files = [(folder / "inference/synthetic_val" / name).read_bytes() for folder in (one, other)]
        assert files[0] == files[1], name
    best = [torch.load(folder / "best.pth", weights_only=True) for folder in (one, other)]
    for key in ("model", "iteration", "metrics"):
        found = differences(best[0][key], best[1][key], f"best {key}")
        assert not found, found[:9]


def differences(one, other, name: str) -> list[str]:
    """The places at which two nested containers are not the same to the bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, (list, tuple)) and type(one) is type(other) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{name}[{i}]")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    return [] if type(one) is type(other) and one == other else [f"{name}: {one!r} {other!r}"]


def start(
    data: Path, output: Path, *extra: str, kill: str = "", processes: int = 1, overlap: bool = False
) -> list:
    """Start a run and return its processes; see `KILLERS` for `kill`, which ends the first of them.

    overlap: evaluations are scored in a process of their own, however few detections they have.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_cases_preload"])
    places = [str(ROOT), str(ROOT / "tests"), TOOLS]
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
    output.mkdir(parents=True, exist_ok=True)
    job = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started = []
    for rank in range(processes):
        environment = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        given = run_cases.arguments(data, output, *SMALLER, *extra)
        target = (given, environment, str(output / f"console{rank}.txt"), kill * (rank == 0), overlap)
        started.append(context.Process(target=_run_tool, args=target, daemon=False))
        started[-1].start()
    return started


def finish(processes: list, kill_after: float | None = None, timeout: float = 300) -> list[int]:
    """Wait until one process has failed or all have ended; end the others, as torchrun does. Return the statuses.

    kill_after: seconds after which the last process gets SIGKILL, wherever it is.
    """
    begin = time.monotonic()
    while any(process.exitcode is None for process in processes):
        if kill_after is not None and time.monotonic() - begin > kill_after:
            processes[-1].kill()
        failed = any(process.exitcode for process in processes)
        if failed and len(processes) > 1:
            time.sleep(1.0)
        if failed or time.monotonic() - begin > timeout:
            for process in processes:
                process.kill()
        for process in processes:
            process.join(0.02)
    return [process.exitcode for process in processes]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_tool(given: list[str], environment: dict, console: str, kill: str, overlap: bool) -> None:
    """The body of a started process: the tool with its streams in a file."""
    os.environ.update(environment)
    stream = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    multiprocessing.set_start_method(None, force=True)  # workers start as they do in a run of the tool
    sys.path.insert(0, TOOLS)
    import _cli
    import train_net

    from retinanet.engine import evaluate

    evaluate.OVERLAP_FROM = 0 if overlap else evaluate.OVERLAP_FROM
    _cli.BACKBONES["Thin"] = Thin
    if kill:
        name, _, count = kill.partition(":")
        KILLERS[name](int(count))
    _cli.run(lambda: train_net.main(given))


def _die(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def _wrap(owner, name: str, count: int, deadly) -> None:
    """Let call number `count` of `owner.name` go to `deadly(original, *arguments)` instead."""
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        return deadly(original, *args, **kwargs) if len(calls) == count else original(*args, **kwargs)

    setattr(owner, name, wrapped)


def _copy_of(module) -> SimpleNamespace:
    return SimpleNamespace(**vars(module))


def _in_checkpoint(count: int) -> None:
    """Half of checkpoint number `count` is on the disk."""
    from retinanet.engine import checkpoint

    def deadly(original, state, file):
        whole = io.BytesIO()
        original(state, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        _die()

    checkpoint.torch = _copy_of(torch)  # gathering tensors from other processes calls `torch.save` as well
    _wrap(checkpoint.torch, "save", count, deadly)


def _after_rename(count: int) -> None:
    """File number `count` (configuration, metrics, checkpoint, pointer, ...) has just got its name."""
    from retinanet.utils import files

    files.os = _copy_of(os)
    _wrap(files.os, "replace", count, lambda original, *args: (original(*args), _die()))


def _in_line(count: int) -> None:
    """Half of line number `count` of metrics.jsonl is written."""
    from retinanet.utils.log import MetricsWriter

    def deadly(_original, writer, iteration, _values):
        writer._file.write(b'{"iteration": %d, "lo' % iteration)
        _die()

    _wrap(MetricsWriter, "write", count, deadly)


def _in_evaluation(count: int, number: int = signal.SIGKILL) -> None:
    """Batch number `count` of the evaluations is being detected."""
    from retinanet.engine import evaluate

    def deadly(original, *args, **kwargs):
        _die(number)
        return original(*args, **kwargs)

    _wrap(evaluate, "detect", count, deadly)


def _in_step(count: int, number: int = signal.SIGKILL) -> None:
    """Step number `count` is about to be computed."""
    from retinanet.engine import train

    def deadly(original, *args, **kwargs):
        _die(number)
        return original(*args, **kwargs)

    _wrap(train, "set_lr", count, deadly)


def _while_scoring(count: int, number: int = signal.SIGKILL) -> None:
    """Scoring process number `count` has started, and the step after the next one is about to be computed."""
    from retinanet.engine.scoring import Scoring

    def deadly(original, *args):
        _in_step(2, number)
        return original(*args)

    _wrap(Scoring, "__init__", count, deadly)


KILLERS = {
    "checkpoint": _in_checkpoint,
    "rename": _after_rename,
    "line": _in_line,
    "evaluation": _in_evaluation,
    "step": _in_step,
    "scoring": _while_scoring,
    "stop in scoring": lambda count: _while_scoring(count, signal.SIGTERM),
    "stop in evaluation": lambda count: _in_evaluation(count, signal.SIGTERM),
    "stop in step": lambda count: _in_step(count, signal.SIGTERM),
}
