"""Batches on their way to a GPU: the copy of the next one runs beside the step on the current one.

Copies go through a stream of their own, so they neither wait for the kernels of the step nor hold them up. The loader
gives pinned memory (`data/loader.py`), without which a copy would wait. A CPU has nothing to copy to.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from retinanet.structures import Batch


def prefetched(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield `batches` on `device`, in order; on a GPU each is on its way while the one before it is used.

    What `batches` raises is raised where its batch would come, after all earlier ones. On a CPU they pass as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def start(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):
            return batch.to(device)

    def finish(batch: Batch) -> Batch:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for value in (value for view in (batch, *batch.views) for value in vars(view).values()):
            if isinstance(value, Tensor):
                value.record_stream(current)  # its memory belongs to the other stream, which must not take it back yet
        return batch

    yield from one_ahead(batches, start, finish)


def one_ahead(
    batches: Iterable[Batch], start: Callable[[Batch], Batch], finish: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Yield `finish(start(batch))` for each of `batches`, with `start` called for the next before a batch is yielded.

    An exception of `batches` waits until all batches before it were yielded.
    """
    source = iter(batches)
    waiting, failure = _next(source, start)
    while waiting is not None:
        batch = finish(waiting)
        waiting, failure = _next(source, start)
        yield batch
    if failure is not None:
        raise failure


def _next(source: Iterator[Batch], start: Callable[[Batch], Batch]) -> tuple[Batch | None, Exception | None]:
    """Return the next batch, started, or (None, what went wrong); (None, None) at the end."""
    try:
        return start(next(source)), None
    except StopIteration:
        return None, None
    except Exception as error:  # raised in its turn, see `one_ahead`
        return None, error
