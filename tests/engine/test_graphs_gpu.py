"""CUDA graphs and fused convolutions on a GPU: the numbers of the eager step."""

import pytest
import torch
from step_cases import new_batch, new_trainer, state

from retinanet.engine.graphs import GraphedStep
from retinanet.engine.optim import set_lr
from retinanet.engine.train import train_step
from retinanet.layers.conv import fuse_epilogues

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(*opts, **kwargs):
    trainer = new_trainer(*opts, **kwargs)
    trainer.model.cuda()
    trainer.loss.cuda()
    for momentum in trainer.optimizer.state.values():
        momentum.update({name: value.cuda() for name, value in momentum.items() if isinstance(value, torch.Tensor)})
    return trainer


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("norms", [(name,) * 3 for name in ("FrozenBN", "BN", "GN", "MABN", "BCN")], ids="-".join)
def test_a_hundred_graphed_steps_equal_eager_ones(norms, amp, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    eager, graphed = (on_gpu("NORMS", norms, amp=amp) for _ in range(2))
    step = GraphedStep(graphed, most=2)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if amp == "off" else {"rtol": 0.05, "atol": 0.02}
    for index in range(100):
        batch = new_batch(2 + (index == 50), seed=index % 7).to("cuda")
        for trainer in (eager, graphed):
            set_lr(trainer.optimizer, 0.01 / (1 + index))
        expected, found = train_step(eager, [batch]), step([batch])
        torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(state(graphed), state(eager), **tolerance)


def test_a_graphed_step_does_not_wait_for_the_device():
    step, batch = GraphedStep(on_gpu(amp="bf16"), most=1), new_batch(2).to("cuda")
    step([batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = step([batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(values["loss"])


def test_fused_convolutions_train_as_their_parts_do():
    plain, fused = (on_gpu("NORMS", ("FrozenBN", "", ""), amp="bf16") for _ in range(2))
    for trainer in (plain, fused):
        trainer.model.set_memory_format(torch.channels_last)
    fuse_epilogues(fused.model)
    for index in range(20):
        batch = new_batch(2, seed=index).to("cuda")
        expected, found = train_step(plain, [batch]), train_step(fused, [batch])
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=0.05, atol=0.02)
