"""Processes of one job: who am I, sum over all, gather from all. The only importer of `torch.distributed`.

`torchrun` starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE. Without it every function here is that of a
job of one process, so callers never ask which case they are in.
"""

import contextlib
import os
import re
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PEER_IS_GONE = re.compile(r"connection (was )?(closed|reset)|broken pipe|ncclRemoteError", re.IGNORECASE)


def start(device_type: str) -> None:
    """Join the job that `torchrun` describes: NCCL for "cuda", gloo for "cpu". Alone: nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    if device_type == "cuda":
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", **_store_of_this_start())


def _store_of_this_start() -> dict:
    """Return arguments of `init_process_group` that keep the addresses of earlier starts apart from those of this one.

    After a restart torchrun hands out the store that it had before, and its processes connect to the ports of dead ones
    (seen with torch 2.15; 2.11 has the same lines). The agents of several machines count their restarts differently, so
    there is no common name: they need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/training.md).
    """
    here = os.environ
    if here.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or here.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store = dist.TCPStore(here["MASTER_ADDR"], int(here["MASTER_PORT"]), is_master=False)
    own = dist.PrefixStore(f"start {here['TORCHELASTIC_RESTART_COUNT']}", store)
    return {"store": own, "rank": int(here["RANK"]), "world_size": int(here["WORLD_SIZE"])}


def reported(main):
    """Return `main`, which under `torchrun` also tells it the reason when it fails, for the summary of the job."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)


def peer_is_gone(error: Exception) -> bool:
    """Return whether `error` is what gloo or NCCL raises here because another process of the job has ended."""
    return dist.is_initialized() and isinstance(error, RuntimeError) and bool(_PEER_IS_GONE.search(str(error)))


def launched() -> bool:
    """Return whether this process was started as one of several, by `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def stop() -> None:
    """Leave the job, so that no process waits for this one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Return the rank on this machine, which is the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return how many processes of the job run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this process writes the files and the console."""
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all processes, in every process; `tensor` itself stays as it was."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over all processes, in every process."""
    return all_reduce_sum(tensor) / world_size()


def any_process(flag: bool, iteration: int, device: torch.device) -> bool:
    """Return whether `flag` is true in any process, the same answer in all of them.

    With several processes the question is asked every tenth `iteration` only, because the answer waits for the device.
    """
    if not dist.is_initialized():
        return flag
    if iteration % 10:
        return False
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)).item())


def gather_objects(value) -> list:
    """Return the list of every process's `value` in rank order, in every process; values are pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_main(value) -> list:
    """Return the list of every process's `value` in rank order in the first process, an empty one in the others."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []


def no_gradient_sync(net: nn.Module, active: bool):
    """Return a context in which backward leaves gradients of a data-parallel `net` unsummed, when `active`."""
    parallel = getattr(net, "_orig_mod", net)  # what `torch.compile` wrapped
    if active and isinstance(parallel, nn.parallel.DistributedDataParallel):
        return parallel.no_sync()
    return contextlib.nullcontext()


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` with gradients averaged over the processes; alone: `model` itself.

    Buffers are never broadcast: statistics belong to the process that saw the images, and are averaged by
    `layers/norm` before evaluation and saving.
    """
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():  # torch 2.15 renames `broadcast_buffers`; the new name is unknown to older ones
        warnings.simplefilter("ignore", FutureWarning)
        return _DataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


class _DataParallel(nn.parallel.DistributedDataParallel):
    """As torch's, which refuses every SyncBatchNorm on a CPU; ours (`layers/norm/batch_norm.py`) works there."""

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        if self.device_type != "cpu":
            super()._passing_sync_batchnorm_handle(module)
