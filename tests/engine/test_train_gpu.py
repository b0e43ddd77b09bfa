"""The training step on a GPU: the numbers of the CPU, without waiting for the device."""

import copy

import pytest
import torch
from model_cases import small_cfg

from retinanet.engine.optim import build_optimizer, set_lr
from retinanet.engine.run import set_seed
from retinanet.engine.train import Trainer, train_step
from retinanet.modeling.build import build_loss, build_model, build_postprocess
from retinanet.structures import Batch, pad_targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NORMS = ["AffineChannel", "FrozenBN", "BN", "GN", "MABN", "BCN"]


def new_trainer(norm: str, amp: str = "off") -> Trainer:
    torch.manual_seed(0)
    cfg = small_cfg(
        *("MODEL.PIXEL_STD", [58.0, 58.0, 58.0], "MODEL.NORM_OPTIONS.BCN.GROUPS", 8, "NORMS", (norm, norm, norm)),
        *("SOLVER.CHANNELS_LAST", repr(str(amp != "off"))),
    )
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    set_lr(optimizer, 0.01)
    return Trainer(model, model, build_loss(cfg), optimizer, amp=amp)


def on_gpu(trainer: Trainer) -> Trainer:
    """The same trainer, its model and loss moved; the optimizer follows its parameters."""
    trainer.model.cuda()
    trainer.loss.cuda()
    for state in trainer.optimizer.state.values():
        state.update({name: value.cuda() for name, value in state.items() if isinstance(value, torch.Tensor)})
    return trainer


def new_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator)
    corners = torch.rand(2, 3, 2, generator=generator) * 60
    targets = [{"boxes": torch.cat([c, c + 30], 1), "labels": torch.arange(3)} for c in corners]
    sizes = torch.tensor([[96, 128]] * 2)
    return Batch(images, sizes, sizes, torch.ones(2, 2), *pad_targets(targets), [0, 1])


@pytest.mark.parametrize("norm", NORMS)
def test_two_steps_equal_those_of_the_cpu(norm, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cpu, gpu = new_trainer(norm), on_gpu(new_trainer(norm))
    for _ in range(2):
        expected, found = train_step(cpu, [new_batch()]), train_step(gpu, [new_batch().to("cuda")])
        torch.testing.assert_close({k: v.cpu() for k, v in found.items()}, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_does_not_wait_for_the_device(norm, amp):  # under fp16 torch's GradScaler itself waits
    trainer, batch = on_gpu(new_trainer(norm, amp)), new_batch().to("cuda")
    for _ in range(2):  # anchors and cuDNN's choices are made here
        train_step(trainer, [batch])
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = train_step(trainer, [batch])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(values["loss"])


def test_detections_equal_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = new_trainer("GN").model.eval()
    torch.nn.init.normal_(model.head.cls_pred.weight, std=0.3)
    postprocess = build_postprocess(small_cfg())
    found = []
    for device in ("cpu", "cuda"):
        here, batch = copy.deepcopy(model).to(device), new_batch().to(device)
        with torch.no_grad():
            found.append(postprocess(here(here.normalize(batch.images, batch.image_sizes)), batch))
    for one, other in zip(*found, strict=True):
        assert len(one["scores"]) > 0
        torch.testing.assert_close(other["scores"].cpu(), one["scores"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_deterministic_run_repeated_gives_the_same_bits(norm, amp):
    was = torch.are_deterministic_algorithms_enabled()
    states = []
    try:
        for _ in range(2):
            set_seed(0, deterministic=True)
            trainer = on_gpu(new_trainer(norm, amp))
            for _ in range(4):
                train_step(trainer, [new_batch().to("cuda")])
            states.append(copy.deepcopy(trainer.model.state_dict()))
    finally:
        torch.use_deterministic_algorithms(was)
        torch.backends.cudnn.benchmark = False
    torch.testing.assert_close(*states, rtol=0, atol=0)
