"""Statistics of a batch norm: against autograd and a slow loop, and the noise of small batches."""

import pytest
import torch
from model_cases import small_cfg

from retinanet.engine.batch_noise import STATISTICS, _statistics, batch_statistics, noise
from retinanet.engine.optim import build_optimizer
from retinanet.engine.train import Trainer
from retinanet.layers.norm import make_norm
from retinanet.modeling.build import build_loss, build_model
from retinanet.structures import Batch, pad_targets


def test_statistics_are_those_that_batch_norm_uses():
    """dL/dx of BN is weight / sigma * (dy - mean(dy) - y mean(y dy)): put g and Psi in and get autograd's."""
    generator = torch.Generator().manual_seed(0)
    norm = make_norm("BN", 3).double().train()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = (3 * torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64) + 1).requires_grad_()
    gradient = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    norm(x).backward(gradient)
    mean, variance, g, psi = _statistics(norm, 2, x.detach(), gradient)
    values = x.detach().permute(1, 0, 2, 3).reshape(3, -1)
    torch.testing.assert_close(mean, torch.stack([row.sum() / 40 for row in values]))
    torch.testing.assert_close(variance, torch.stack([((row - row.sum() / 40) ** 2).sum() / 40 for row in values]))
    sigma = torch.sqrt(variance + norm.eps).view(-1, 1, 1)
    y = (x.detach() - mean.view(-1, 1, 1)) / sigma
    dy = gradient * norm.weight.detach().view(-1, 1, 1)
    expected = (dy - g.view(-1, 1, 1) / 40 - y * psi.view(-1, 1, 1) / 40) / sigma  # g and Psi come times N*H*W
    torch.testing.assert_close(x.grad, expected)


def test_noise_by_hand():
    still = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    assert noise(still, still) == 0  # a dead channel does not count
    two = torch.tensor([[1.0], [3.0]], dtype=torch.float64)  # std sqrt(2), rms sqrt(5)
    assert noise(two, two) == pytest.approx((2 / 5) ** 0.5)
    assert noise(two, torch.cat([two, torch.zeros(2, 1)])) == pytest.approx((2 / 2.5) ** 0.5)


def trainer() -> Trainer:
    torch.manual_seed(0)
    cfg = small_cfg("NORMS", ("BN", "BN", ""), "MODEL.PIXEL_STD", [58.0, 58.0, 58.0])
    model = build_model(cfg)
    return Trainer(model, model, build_loss(cfg), build_optimizer(cfg, model))


def batches(images: int):
    generator = torch.Generator().manual_seed(images)
    while True:
        scale = torch.rand(images, 1, 1, 1, generator=generator)
        pixels = (scale * torch.randint(0, 256, (images, 3, 64, 64), generator=generator)).to(torch.uint8)
        corners = torch.rand(images, 2, 2, generator=generator) * 30
        targets = [{"boxes": torch.cat([c, c + 25], 1), "labels": torch.arange(2)} for c in corners]
        sizes = torch.tensor([[64, 64]] * images)
        yield Batch(pixels, sizes, sizes, torch.ones(images, 2), *pad_targets(targets), list(range(images)))


def test_small_batches_are_noisier_and_nothing_learns():
    made = trainer()
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    norm = made.model.backbone.res3[0].conv1.norm
    small, large = (batch_statistics(made, norm, batches(images), 6) for images in (2, 16))
    assert set(small) == set(STATISTICS) and small["mean"].shape == (6, norm.num_features)
    for name in ("mean", "variance"):
        pooled = torch.cat([small[name], large[name]])
        assert noise(small[name], pooled) > 1.5 * noise(large[name], pooled)
    torch.testing.assert_close(made.model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in made.model.parameters()) and not norm._forward_hooks
