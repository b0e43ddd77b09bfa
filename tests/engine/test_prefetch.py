"""Batches come in order, one copy ahead, and a failing loader is reported in its turn."""

from collections.abc import Iterator

import pytest
import torch

from retinanet.engine.prefetch import one_ahead, prefetched
from retinanet.errors import UserError
from retinanet.structures import Batch


def batch(number: int) -> Batch:
    pixels, size = torch.full((1, 3, 4, 4), number, dtype=torch.uint8), torch.tensor([[4, 4]])
    return Batch(pixels, size, size, torch.ones(1, 2), torch.zeros(1, 8, 4), torch.zeros(1, 8).long(), [number])


def numbered(count: int, events: list | None = None) -> Iterator[Batch]:
    for number in range(count):
        if events is not None:
            events.append(("read", number))
        yield batch(number)


def spied(events: list, name: str):
    def act(made: Batch) -> Batch:
        events.append((name, made.image_ids[0]))
        return made

    return act


def test_a_cpu_gets_the_batches_themselves_and_none_early():
    events, batches = [], [batch(0), batch(1)]
    assert all(found is own for found, own in zip(prefetched(batches, torch.device("cpu")), batches, strict=True))
    stream = prefetched(numbered(3, events), torch.device("cpu"))
    assert next(stream).image_ids == [0] and events == [("read", 0)]


def test_the_next_copy_starts_before_a_batch_is_handed_out():
    events = []
    for made in one_ahead(numbered(3, events), spied(events, "start"), spied(events, "finish")):
        spied(events, "use")(made)
    assert events == [
        ("read", 0), ("start", 0), ("finish", 0), ("read", 1), ("start", 1), ("use", 0),
        ("finish", 1), ("read", 2), ("start", 2), ("use", 1),
        ("finish", 2), ("use", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("good", [0, 1, 3])
def test_an_error_of_the_loader_comes_after_the_batches_before_it(good):
    def broken():
        yield from numbered(good)
        raise UserError("image 7 is broken")

    seen = []
    with pytest.raises(UserError, match="image 7"):
        for made in one_ahead(broken(), lambda b: b, lambda b: b):
            spied(seen, "use")(made)
    assert seen == [("use", number) for number in range(good)]


def test_nothing_comes_of_nothing():
    assert list(one_ahead([], lambda b: b, lambda b: b)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_every_value_while_it_is_busy():
    device = torch.device("cuda")
    busy = torch.randn(2048, 2048, device=device)
    sums = []
    for made in prefetched([batch(number).pin_memory() for number in range(50)], device):
        assert made.images.device.type == made.gt_boxes.device.type == "cuda"
        busy = busy @ busy / 2048
        sums.append(made.images.sum())
    assert torch.stack(sums).tolist() == [48 * number for number in range(50)]
