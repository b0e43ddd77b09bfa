"""Images with a fourth channel of zeros, for CUDA's kernels: the same numbers from the same weights."""

import copy

import pytest
import torch
from model_cases import randomize, small_cfg

from retinanet.deploy.fold import fold
from retinanet.modeling.build import build_model

SIZES = torch.tensor([[64, 96], [50, 70]])


def pair(*opts):
    """Return a model, its copy that takes four channels, and two images, the second with padding."""
    model = randomize(build_model(small_cfg(*opts)))
    padded = copy.deepcopy(model)
    padded.backbone.pad_images(4)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return model, padded, images


def test_normalization_adds_zeros_and_changes_nothing_else():
    model, padded, images = pair("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "MODEL.PIXEL_STD", [4.0, 5.0, 6.0])
    for given in (images, images.float(), images.to(memory_format=torch.channels_last)):
        three, four = model.normalize(given, SIZES), padded.normalize(given, SIZES)
        assert four.shape == (2, 4, 64, 96) and four[:, :3].equal(three) and not four[:, 3].any()


@pytest.mark.parametrize(
    ("norm", "freeze_at"), [("AffineChannel", 0), ("AffineChannel", 2), ("BN", 0), ("GN", 0), ("MABN", 0), ("BCN", 0)]
)
def test_outputs_gradients_and_weights_are_those_of_three_channels(norm, freeze_at):
    """Convolutions with the weight as it is, folded, centralized, standardized, and kept because it is frozen."""
    model, padded, images = pair("MODEL.BACKBONE.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    for _ in range(2):  # a frozen weight is prepared in the first and taken as it is in the second
        outputs = [each(each.normalize(images, SIZES))["logits"] for each in (model, padded)]
        for ours, theirs in zip(*outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for logits in outputs:
        sum(level.square().sum() for level in logits).backward()
    gradients = [each.backbone.conv1.weight.grad for each in (model, padded)]
    assert (gradients[0] is None) == (gradients[1] is None) == (freeze_at > 0)
    if freeze_at == 0:
        scale = gradients[0].abs().max()
        torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, rtol=1e-3, atol=1e-4)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (model, padded)]
    assert shapes[0] == shapes[1] and shapes[1]["backbone.conv1.weight"] == (64, 3, 7, 7)


def test_frozen_weight_follows_a_change_of_the_channels():
    model, _, images = pair("MODEL.BACKBONE.NORM", "AffineChannel", "MODEL.BACKBONE.FREEZE_AT", 2)
    before = model(model.normalize(images, SIZES))["logits"][0]
    for channels in (4, 3):
        model.backbone.pad_images(channels)
        after = model(model.normalize(images, SIZES))["logits"][0]
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_folded_model_takes_three_channels_again():
    model, padded, images = pair("MODEL.BACKBONE.NORM", "AffineChannel")
    folded, _ = fold(padded)
    assert folded.backbone.in_channels == 3
    wanted = model.eval()(model.normalize(images, SIZES))["logits"][0]
    found = folded(folded.normalize(images, SIZES))["logits"][0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
