"""The classification step and accuracy: by hand, against torch, and for every norm that trains."""

import pytest
import torch
from torch.nn import functional as F

from retinanet.config.defaults import get_cfg
from retinanet.data.image_folder import LabelledImages
from retinanet.engine.classify import accuracy, build_classification_trainer, classification_step
from retinanet.engine.optim import set_lr
from retinanet.modeling.build import build_classifier

CPU = torch.device("cpu")


def small_cfg(norm: str = "GN"):
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.PIXEL_STD = 3, [58.0, 58.0, 58.0]
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.NORM, cfg.MODEL.BACKBONE.FREEZE_AT = "R18", norm, 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 4, 0.01
    return cfg


def batch(seed: int, count: int = 4) -> LabelledImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(count) % 3, list(range(count)))


@pytest.mark.parametrize("norm", ["BN", "GN", "MABN", "BCN"])
def test_steps_on_one_batch_lower_its_loss(norm):
    torch.manual_seed(0)
    trainer = build_classification_trainer(small_cfg(norm), CPU, small=False)
    set_lr(trainer.optimizer, 0.01)
    losses = [classification_step(trainer, [batch(0)])["loss"].item() for _ in range(4)]
    assert losses[-1] < losses[0] and all(torch.isfinite(torch.tensor(losses)))


def test_step_is_the_gradient_step_of_cross_entropy():
    torch.manual_seed(0)
    trainer = build_classification_trainer(small_cfg(), CPU, small=False)
    made = batch(1)
    expected = F.cross_entropy(trainer.model(made.images), made.labels)
    before = trainer.model.fc.weight.detach().clone()
    (gradient,) = torch.autograd.grad(expected, trainer.model.fc.weight)
    set_lr(trainer.optimizer, 0.5)
    values = classification_step(trainer, [made])
    torch.testing.assert_close(values["loss"], expected.detach())
    decay = next(g["weight_decay"] for g in trainer.optimizer.param_groups if g["name"] == "weights")
    torch.testing.assert_close(trainer.model.fc.weight.detach(), before - 0.5 * (gradient + decay * before))
    right = (trainer.model(made.images).argmax(1) == made.labels).float().mean()
    assert 0 <= values["top1"] <= 100 and right >= 0


def test_accuracy_by_hand():
    class Fixed(torch.nn.Module):
        def forward(self, images):  # the classes in falling order: 6, 5, 4, 3, 2, 1, 0
            return torch.arange(7.0).repeat(len(images), 1)

    made = LabelledImages(torch.zeros(5, 3, 8, 8), torch.tensor([6, 5, 2, 1, 6]), [])
    found = accuracy(Fixed().train(), [made], CPU)
    assert found == {"top1": pytest.approx(40), "top5": pytest.approx(80), "images": 5}


def test_accuracy_leaves_modes_and_statistics_as_they_were():
    torch.manual_seed(0)
    model = build_classifier(small_cfg("BN"), small_stem=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert accuracy(model, [batch(2)], CPU)["top5"] == 100  # three classes
    assert model.training and model.backbone.conv1.norm.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_small_stem_keeps_the_size_and_the_weights():
    torch.manual_seed(0)
    full = build_classifier(small_cfg(), small_stem=False)
    small = build_classifier(small_cfg(), small_stem=True)
    small.load_state_dict(full.state_dict())
    shapes = {name: tuple(value.shape[2:]) for name, value in small.backbone(torch.zeros(1, 3, 32, 32)).items()}
    assert shapes == {"c2": (32, 32), "c3": (16, 16), "c4": (8, 8), "c5": (4, 4)}
    assert full.backbone(torch.zeros(1, 3, 32, 32))["c5"].shape[2:] == (1, 1)
