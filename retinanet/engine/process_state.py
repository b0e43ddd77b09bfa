"""What differs between the processes of a job: running statistics, windows of norms, random generators.

Every process sees other images, so its norms hold other statistics. "model" and "ema" of a checkpoint hold the average,
for whoever uses the weights; "processes" holds what each process had of its own, for a resume that equals a run that
was not interrupted.
"""

import contextlib
import logging

import torch
from torch import Tensor, nn

from retinanet.layers.norm import sync_statistics
from retinanet.utils import distributed

_log = logging.getLogger(__name__)


def random_state() -> dict[str, Tensor]:
    """Return the state of PyTorch's generators of this process; nothing else in a training run draws from a state."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Continue the generators from what `random_state()` returned; a CUDA state is of no use without CUDA."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def averaged_statistics(models: list[nn.Module]):
    """Inside, the running statistics of `models` are their averages over the processes.

    Afterwards each process has its own again, to the bit: evaluating and saving never change the training.
    """
    if distributed.world_size() == 1:
        yield
        return
    own = [{name: buffer.clone() for name, buffer in model.named_buffers()} for model in models]
    for model in models:
        sync_statistics(model, distributed.all_reduce_mean)
    try:
        yield
    finally:
        with torch.no_grad():
            for model, values in zip(models, own, strict=True):
                for name, buffer in model.named_buffers():
                    if name in values:  # anchors may have been cached meanwhile
                        buffer.copy_(values[name])


def own_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies on the CPU of the entries of the state dict that are no parameters."""
    learned = {name for name, _ in model.named_parameters()}
    return {name: value.to("cpu", copy=True) for name, value in model.state_dict().items() if name not in learned}


def gather_processes(own: dict) -> list[dict]:
    """Return what each process passed as `own`, in rank order, in the first process; empty elsewhere or alone."""
    return distributed.gather_to_main(own) if distributed.world_size() > 1 else []


def without_repeats(processes: list[dict], state: dict) -> list[dict]:
    """Return `processes` without the buffers that are the same, to the bit, in all of them and in `state`."""

    def repeated(key: str, name: str) -> bool:
        return all(torch.equal(part[key][name], state[key][name].cpu()) for part in processes)

    return [
        {**part, **{key: {k: v for k, v in part[key].items() if not repeated(key, k)} for key in ("model", "ema")}}
        for part in processes
    ]


def of_this_process(state: dict) -> dict:
    """Return the checkpoint `state` with the entries that this process had when it was saved.

    Another number of processes cannot have those: all of them then start from the averages, and the log says so.
    """
    saved, count = state.get("processes", []), distributed.world_size()
    if max(len(saved), 1) != count:
        _log.info(
            "resume: saved by %d process%s, resumed by %d: running statistics go on from their average, windows of "
            "MABN from those of the first process; results may differ from those of a run that was not interrupted",
            max(len(saved), 1), "es" if len(saved) > 1 else "", count,
        )  # fmt: skip
    if len(saved) != count:
        return state
    own = saved[distributed.rank()]
    merged = {key: {**state[key], **own[key]} for key in ("model", "ema")}
    return {**state, **merged, "random": own["random"]}
