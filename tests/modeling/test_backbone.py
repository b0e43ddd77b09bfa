"""Every backbone against torchvision's, and what freezing means."""

import pytest
import torch
import torchvision
from model_cases import conv_with, randomize
from torch import nn
from torchvision_names import to_native

from retinanet.modeling.backbone import BACKBONES

TORCHVISION = {
    "R18": "resnet18",
    "R34": "resnet34",
    "R50": "resnet50",
    "R101": "resnet101",
    "R152": "resnet152",
    "X101_32x8d": "resnext101_32x8d",
    "X101_64x4d": "resnext101_64x4d",
}
# Published parameters of the classifiers (torchvision's model table), less the final layer (C5 + 1) * 1000
PUBLISHED = {
    "R18": 11_689_512 - 513_000,
    "R34": 21_797_672 - 513_000,
    "R50": 25_557_032 - 2_049_000,
    "R101": 44_549_160 - 2_049_000,
    "R152": 60_192_808 - 2_049_000,
    "X101_32x8d": 88_791_336 - 2_049_000,
    "X101_64x4d": 83_455_272 - 2_049_000,
}
STAGES = ("conv1", "res2", "res3", "res4", "res5")


def new_backbone(name: str = "R18", norm: str = "BN", stride_in_1x1: bool = False, freeze_at: int = 0) -> nn.Module:
    return BACKBONES[name](conv=conv_with(norm), stride_in_1x1=stride_in_1x1, freeze_at=freeze_at)


def features_of(oracle: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    x = oracle.maxpool(oracle.relu(oracle.bn1(oracle.conv1(images))))
    features = {}
    for stage in range(1, 5):
        x = features[f"c{stage + 1}"] = getattr(oracle, f"layer{stage}")(x)
    return features


@pytest.mark.parametrize("name, stride_in_1x1", [("R18", False), ("R50", False), ("R50", True), ("X101_32x8d", False)])
def test_features_equal_torchvision(name, stride_in_1x1):
    torch.manual_seed(0)
    oracle = randomize(torchvision.models.get_model(TORCHVISION[name])).eval()
    if stride_in_1x1:  # Detectron's place for it; the weights are the same
        for module in oracle.modules():
            if isinstance(module, torchvision.models.resnet.Bottleneck):
                module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)
    backbone = new_backbone(name, stride_in_1x1=stride_in_1x1).eval()
    backbone.load_state_dict(to_native({k: v for k, v in oracle.state_dict().items() if "fc" not in k}, "backbone."))
    images = torch.randn(1, 3, 61, 45)  # odd at every level
    with torch.no_grad():
        expected, features = features_of(oracle, images), backbone(images)
    for level, feature in features.items():
        scale = expected[level].abs().max().item()
        torch.testing.assert_close(feature, expected[level], rtol=1e-4, atol=1e-5 * scale)
        assert feature.shape[1] == backbone.out_channels[level]


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_has_the_published_size_and_shapes(name):
    with torch.device("meta"):
        backbone = new_backbone(name)
        features = backbone(torch.empty(2, 3, 64, 96))
    assert sum(parameter.numel() for parameter in backbone.parameters()) == PUBLISHED[name]
    shapes = {level: tuple(feature.shape[2:]) for level, feature in features.items()}
    assert shapes == {"c2": (16, 24), "c3": (8, 12), "c4": (4, 6), "c5": (2, 3)}
    widest = 512 if name in ("R18", "R34") else 2048
    assert backbone.out_channels == {"c2": widest // 8, "c3": widest // 4, "c4": widest // 2, "c5": widest}


def test_names_are_those_of_the_checkpoints():
    with torch.device("meta"):
        deep, basic = new_backbone("R50", "AffineChannel"), new_backbone("R18", "")
    block = {f"res3.0.{conv}.{name}" for conv in ("conv1", "conv2", "conv3", "shortcut") for name in
             ("weight", "norm.weight", "norm.bias")}  # fmt: skip
    assert {name for name in deep.state_dict() if name.startswith("res3.0.")} == block
    assert {name for name in basic.state_dict() if name.startswith(("conv1", "res2.0", "res3.0"))} == {
        f"{conv}.{name}"
        for conv in ("conv1", "res2.0.conv1", "res2.0.conv2", "res3.0.conv1", "res3.0.conv2", "res3.0.shortcut")
        for name in ("weight", "bias")
    }


@pytest.mark.parametrize("freeze_at", range(6))
def test_frozen_stages_get_no_gradient_and_their_statistics_do_not_move(freeze_at):
    backbone = new_backbone(freeze_at=freeze_at).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    features = backbone(torch.randn(2, 3, 64, 64))
    if freeze_at < 5:
        sum(feature.sum() for feature in features.values()).backward()
    for index, stage in enumerate(STAGES):
        frozen = index < freeze_at
        for name, parameter in backbone.get_submodule(stage).named_parameters():
            assert (parameter.grad is None) == frozen, (stage, name)
        for name, buffer in backbone.get_submodule(stage).named_buffers():
            assert torch.equal(buffer, before[f"{stage}.{name}"]) == frozen, (stage, name)
    grads = [features[level].requires_grad for level in ("c2", "c3", "c4", "c5")]
    assert grads == [index >= freeze_at for index in range(1, 5)]


def test_frozen_stages_stay_frozen_through_train_and_eval():
    backbone = new_backbone(freeze_at=2)
    for mode in (True, False, True):
        backbone.train(mode)
        assert not backbone.conv1.training and not backbone.res2[1].conv2.norm.training
        assert backbone.res3[0].conv1.norm.training == mode


def test_frozen_stages_leave_nothing_for_backward():
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        features = new_backbone(freeze_at=2).train()(torch.randn(2, 3, 64, 64))
    largest = max(tensor.numel() for tensor in saved if not isinstance(tensor, nn.Parameter))
    assert largest == features["c2"].numel()  # the input of res3; the stem's output is four times as large


def test_gradient_reaches_the_stem_of_a_trained_backbone():
    backbone = new_backbone("R50", "GN").train()
    backbone(torch.randn(1, 3, 64, 64))["c5"].square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())


@pytest.mark.parametrize("norm", ["AffineChannel", "BN", "GN"])
def test_channels_last_and_autocast_go_through(norm):
    backbone = new_backbone(norm=norm).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        features = backbone(images)
    for feature in features.values():
        assert feature.dtype == torch.bfloat16
        assert feature.is_contiguous(memory_format=torch.channels_last)
