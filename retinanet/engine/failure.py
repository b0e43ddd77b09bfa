"""A step that is not finite: it is noticed on the device, it ends the run, and what it computed on is kept.

Values are read on the host every `LOG_PERIOD` iterations alone. Until then `StepGuard` keeps the model as it was before
the first step that failed: no later step changes the weights, and the running statistics of that moment are put aside.
The images are not kept: the data order is a function of the seed, so the loader reads the same batch once more.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.structures import Batch
from retinanet.utils import distributed
from retinanet.utils.files import write_atomically

FORMAT, VERSION = "retinanet failed batch", 1
# A loss scale starts at 65536 and is halved by each overflow. Below 1 it makes gradients smaller than they are, so
# they overflow float16 without any scaling: that is no longer a search for the best scale.
LEAST_LOSS_SCALE = 1.0


class NonFiniteError(UserError):
    """A loss or a gradient was not a number; the message names the images, every value and what to try.

    iteration: number of the step, counted from 1. lr: its learning rate. values: what `train_step` returned.
    """

    def __init__(self, message: str, iteration: int = 0, lr: float = 0.0, values: dict[str, float] | None = None):
        super().__init__(message)
        self.iteration, self.lr, self.values = iteration, lr, dict(values or {})


class StepGuard:
    """Keeps model and loss as they were before the first step that is not finite, without waiting for the device.

    failed: () bool on the device of the model: a step was not finite, so this and all later ones change no weight.
    """

    def __init__(self, model: nn.Module, loss: nn.Module):
        self._model = model
        self.failed = torch.zeros((), dtype=torch.bool)
        self._buffers = [
            (prefix, f"{path}.{name}" if path else name, module, name)
            for prefix, root in (("model", model), ("loss", loss))
            for path, module in root.named_modules()
            for name in module._buffers
            if module._buffers[name] is not None and name not in module._non_persistent_buffers_set
        ]
        self._kept: dict[torch.dtype, Tensor] = {}

    @torch.no_grad()
    def begin(self) -> None:
        """Put the statistics of this moment aside, unless a step has failed: then those of that step stay."""
        self.failed = self.failed.to(next(self._model.parameters()).device)
        for dtype, tensors in self._by_dtype().items():
            now = torch.cat([tensor.flatten() for tensor in tensors])
            kept = self._kept.get(dtype)
            if kept is None:
                self._kept[dtype] = now
            else:  # in place: a CUDA graph of the step knows the address alone
                kept.copy_(torch.where(self.failed, kept, now))

    def factor(self, loss: Tensor) -> Tensor:
        """Return () 1, or NaN when `loss` is not finite or a step has failed: a loss scaler then skips the step."""
        broken = self.failed | ~torch.isfinite(loss.detach())
        return torch.where(broken, torch.nan, torch.ones_like(loss.detach()))

    def note(self, loss: Tensor, grad_norm: Tensor, loss_scale: Tensor | None) -> None:
        """Remember whether the step failed. With a loss scale gradients may overflow, until it falls below the least.

        The tensors are 0-d and the same on every process.
        """
        wrong = ~torch.isfinite(loss if loss_scale is not None else loss + grad_norm)
        self.failed |= wrong if loss_scale is None else wrong | (loss_scale < LEAST_LOSS_SCALE)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a step changes here."""
        return [self.failed, *self._kept.values()]

    def clear(self) -> None:
        """Forget a failure: the next step counts again."""
        self.failed.zero_()

    def buffers(self) -> dict[str, dict[str, Tensor]]:
        """Return {"model": name -> buffer, "loss": ...} as they were before the step that failed, on the CPU."""
        found: dict[str, dict[str, Tensor]] = {"model": {}, "loss": {}}
        flat = {dtype: iter(self._split(dtype, tensors)) for dtype, tensors in self._by_dtype().items()}
        for prefix, full_name, module, name in self._buffers:
            found[prefix][full_name] = next(flat[module._buffers[name].dtype])
        return found

    def _by_dtype(self) -> dict[torch.dtype, list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for _, _, module, name in self._buffers:
            tensor = module._buffers[name]
            groups.setdefault(tensor.dtype, []).append(tensor)
        return groups

    def _split(self, dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
        parts = self._kept[dtype].cpu().split([tensor.numel() for tensor in tensors])
        return [part.reshape(tensor.shape).clone() for part, tensor in zip(parts, tensors, strict=True)]


@dataclass(frozen=True)
class FailedStep:
    """How a step that failed is kept.

    read: number of a step, from 0 -> its micro-batches, by rank. files: image ids -> their paths. describe: "config"
    and "classes". command: path of the saved file -> the command that replays it.
    """

    read: Callable[[int], list[list[Batch]]]
    files: Callable[[list[int]], list[str]]
    folder: Path
    describe: dict
    command: Callable[[Path], str]


@contextlib.contextmanager
def kept_failures(model: nn.Module, loss: nn.Module, guard: StepGuard, keep: FailedStep):
    """Save what a `NonFiniteError` inside the block is about, and say so in its message.

    All processes of a job raise it in the same step; the first one writes, and the others wait for it.
    """
    try:
        yield
    except NonFiniteError as error:
        buffers = distributed.gather_objects(guard.buffers())  # each rank has its own statistics
        note = _keep(error, model, loss, buffers, keep) if distributed.is_main() else ""
        note = distributed.gather_objects(note)[0]  # nobody leaves before the file is written
        raise NonFiniteError(f"{error}{note}", error.iteration, error.lr, error.values) from None


def _keep(error: NonFiniteError, model: nn.Module, loss: nn.Module, buffers: list[dict], keep: FailedStep) -> str:
    """Write the file; return what the message says about it."""
    path = keep.folder / f"failed_batch_{error.iteration:07d}.pth"
    try:
        ranks = keep.read(error.iteration - 1)
        ids = [i for batches in ranks for batch in batches for i in batch.image_ids]
        state = {
            "format": FORMAT,
            "version": VERSION,
            "iteration": error.iteration,
            "lr": error.lr,
            "values": error.values,
            "files": dict(zip(ids, keep.files(ids), strict=True)),
            "model": {**model.state_dict(), **buffers[0]["model"]},
            "loss": {**loss.state_dict(), **buffers[0]["loss"]},
            "ranks": [
                {"batches": [vars(batch) for batch in batches], "buffers": own["model"]}
                for batches, own in zip(ranks, buffers, strict=True)
            ],
            **keep.describe,
        }
        write_atomically(path, lambda file: torch.save(state, file))
    except (UserError, OSError) as problem:
        return f". Its batch could not be saved: {problem}"
    everyone = f" The image ids of all {len(ranks)} processes: {ids}." if len(ranks) > 1 else ""
    return f".{everyone} Its batch is saved; this command tells what is first not finite in it:\n  {keep.command(path)}"


def read_failed_batch(path: str | Path) -> dict:
    """Return the content of a file that `kept_failures` wrote; `UserError` for any other."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; a run that met a value that is not finite writes one")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        found = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a saved batch, or damaged ({found})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
        raise UserError(f"{path}: not a batch that a failed run saved; those are called failed_batch_*.pth")
    return state
