"""Out of memory, in the words of a configuration: what the step held, how much there was, which keys to lower."""

import contextlib

import torch

from retinanet.structures import Batch
from retinanet.utils import distributed
from retinanet.utils.memory import OutOfMemory, available, gib, is_out_of_memory, peak


@contextlib.contextmanager
def explained_step(batches: list[Batch], iteration: int, amp: str, device: torch.device):
    """Turn running out of memory inside the block, the step of `iteration` on `batches`, into an `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"iteration {iteration}: out of memory on {device} ({_asked_for(error)}). {_memory(device)}. The step has "
            f"{'; '.join(map(describe, batches))}. Lower {'; or '.join(_remedies(batches, amp))}. "
            "--dry-run finds the largest batch that fits before a run; --resume goes on from the last checkpoint"
        ) from None


@contextlib.contextmanager
def explained_evaluation(device: torch.device):
    """Turn running out of memory inside the block, an evaluation, into an `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"the evaluation ran out of memory on {device} ({_asked_for(error)}). {_memory(device)}. Lower "
            "TEST.IMS_PER_BATCH, INPUT.MAX_SIZE_TEST or TEST.PRE_NMS_TOPK; --resume goes on from the last checkpoint"
        ) from None


def describe(batch: Batch) -> str:
    """Return the shape of a batch in words, with its most crowded image."""
    count, _, height, width = batch.images.shape
    if not isinstance(batch, Batch):  # of classification, without boxes
        return f"{count} images of {height} x {width} pixels"
    boxes = (batch.gt_labels >= 0).sum(1).tolist()
    crowded = max(range(count), key=boxes.__getitem__)
    return (
        f"{count} images of {height} x {width} pixels, up to {boxes[crowded]} boxes (image id "
        f"{batch.image_ids[crowded]}), image ids {batch.image_ids}"
    )


def _remedies(batches: list[Batch], amp: str) -> list[str]:
    """Return what makes a step smaller, the least harmful first."""
    images, ways = len(batches[0]) * distributed.world_size(), []
    if len(batches[0]) > 1:
        half = len(batches[0]) // 2
        fewer, times = half * distributed.world_size(), -(-len(batches) * len(batches[0]) // half)
        ways.append(
            f"SOLVER.IMS_PER_BATCH from {images} to {fewer} with SOLVER.ACCUMULATE {times} (the same images per step)"
        )
    if amp == "off":
        ways.append("the precision to SOLVER.AMP bf16")
    height, width = batches[0].images.shape[-2:]
    ways.append(f"INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN (the batch is {min(height, width)} x {max(height, width)})")
    return [*ways, "what is trained, with MODEL.BACKBONE.FREEZE_AT 2 or more"]


def _memory(device: torch.device) -> str:
    where = "by tensors of this process" if device.type == "cuda" else "by this process"
    return f"The most that was taken {where} is {gib(peak(device))}, free are {gib(available(device))}"


def _asked_for(error: BaseException) -> str:
    """Return the sentence of the allocator that says how much it could not give."""
    for line in str(error).splitlines():
        if is_out_of_memory(RuntimeError(line)):
            start = max(line.lower().find(word) for word in ("tried to allocate", "failed to allocate", "you tried"))
            return line[max(start, 0) :].split(". ")[0].strip()[:160]
    return type(error).__name__
