"""The pyramid against torchvision's, with both inputs of P6, and where its norms sit."""

import pytest
import torch
from model_cases import conv_with
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision_names import to_native

from retinanet.modeling.fpn import FPN

IN_CHANNELS = {"c2": 4, "c3": 8, "c4": 12, "c5": 16}
CHANNELS = 32


def new_features(height: int = 7, width: int = 5) -> dict[str, torch.Tensor]:
    """Return features whose sizes are odd: c5 is (2, 16, height, width), each finer level twice that less one."""
    torch.manual_seed(0)
    features, size = {}, (height, width)
    for level in ("c5", "c4", "c3", "c2"):
        features[level] = torch.randn(2, IN_CHANNELS[level], *size)
        size = (2 * size[0] - 1, 2 * size[1] - 1)
    return features


@pytest.mark.parametrize("p6_from", ["C5", "P5"])
def test_pyramid_equals_torchvision(p6_from):
    features = new_features()
    fpn = FPN(IN_CHANNELS, CHANNELS, p6_from, conv=conv_with())
    p6_channels = 16 if p6_from == "C5" else CHANNELS
    oracle = FeaturePyramidNetwork([8, 12, 16], CHANNELS, LastLevelP6P7(p6_channels, CHANNELS))
    oracle.extra_blocks.use_P5 = p6_from == "P5"
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = {f"backbone.fpn.{name}": value for name, value in oracle.state_dict().items()}
    fpn.load_state_dict(to_native(state, "fpn."))
    expected = list(oracle({level: features[level] for level in ("c3", "c4", "c5")}).values())
    levels = fpn(features)
    torch.testing.assert_close(levels, expected, rtol=1e-5, atol=1e-4)
    assert [tuple(level.shape[2:]) for level in levels] == [(25, 17), (13, 9), (7, 5), (4, 3), (2, 2)]
    assert levels[3].min() < 0  # P6 without the ReLU that P7 starts from


def test_one_pixel_levels():
    features = {"c3": torch.ones(1, 8, 1, 1), "c4": torch.ones(1, 12, 1, 1), "c5": torch.ones(1, 16, 1, 1)}
    fpn = FPN(IN_CHANNELS, CHANNELS, "C5", conv=conv_with())
    assert [tuple(level.shape) for level in fpn(features)] == [(1, CHANNELS, 1, 1)] * 5


def test_top_down_path_adds_the_nearest_coarser_cell():
    """With lateral convs that copy their input and output convs that copy the sum, the numbers can be read off."""
    fpn = FPN({"c3": 1, "c4": 1, "c5": 1}, 1, "P5", conv=conv_with())
    with torch.no_grad():
        for conv in fpn.children():
            conv.weight.zero_()
            conv.weight[..., conv.weight.shape[2] // 2, conv.weight.shape[3] // 2] = 1
            conv.bias.zero_()
    c5, c4 = torch.tensor([[[[100.0, 200.0]]]]), torch.tensor([[[[10.0, 20.0, 30.0]]]])
    p3, p4, p5, p6, p7 = fpn({"c3": torch.arange(1.0, 6.0).view(1, 1, 1, 5), "c4": c4, "c5": c5})
    assert p5.flatten().tolist() == [100, 200]
    assert p4.flatten().tolist() == [110, 120, 230]  # 3 cells over 2: the first two lie in the first
    assert p3.flatten().tolist() == [111, 112, 123, 124, 235]
    assert p6.flatten().tolist() == [100] and p7.flatten().tolist() == [100]


def test_norm_goes_to_lateral_and_output_convs_alone():
    fpn = FPN(IN_CHANNELS, CHANNELS, "C5", conv=conv_with("GN", "FPN"))
    names = {f"{conv}{level}.{name}" for conv in ("lateral", "output") for level in (3, 4, 5)
             for name in ("weight", "norm.weight", "norm.bias")}  # fmt: skip
    assert set(fpn.state_dict()) == names | {"p6.weight", "p6.bias", "p7.weight", "p7.bias"}
    levels = fpn(new_features())
    for level in levels[:3]:  # each of the 32 groups is one channel: mean 0, variance 1 over its positions
        torch.testing.assert_close(level.mean((2, 3)), torch.zeros(2, CHANNELS), rtol=0, atol=1e-5)


def test_initial_weights_are_uniform_within_xavier_bounds():
    torch.manual_seed(0)
    fpn = FPN({"c3": 512, "c4": 1024, "c5": 2048}, 64, "C5", conv=conv_with())
    for name, conv in fpn.named_children():
        bound = (3 / conv.weight[0].numel()) ** 0.5
        assert 0.98 * bound < conv.weight.abs().max() <= bound, name
        assert abs(conv.weight.std().item() / (bound / 3**0.5) - 1) < 0.02, name
        assert not conv.bias.any()


def test_channels_last_and_autocast_go_through():
    fpn = FPN(IN_CHANNELS, CHANNELS, "C5", conv=conv_with("GN", "FPN")).to(memory_format=torch.channels_last)
    features = {k: v.contiguous(memory_format=torch.channels_last) for k, v in new_features().items()}
    with torch.autocast("cpu", torch.bfloat16):
        levels = fpn(features)
    for level in levels:
        assert level.dtype == torch.bfloat16 and level.is_contiguous(memory_format=torch.channels_last)
