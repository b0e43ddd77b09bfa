"""The shared head against torchvision's, and the order of its outputs."""

from functools import partial

import pytest
import torch
from model_cases import conv_with
from torch import nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision_names import to_native

from retinanet.layers.conv import CentralizedConv2d
from retinanet.modeling.head import Head

CHANNELS, ANCHORS, CLASSES = 64, 3, 5


def new_head(norm: str = "", num_convs: int = 2, prior_prob: float = 0.01) -> Head:
    torch.manual_seed(0)
    return Head(CHANNELS, ANCHORS, CLASSES, num_convs, prior_prob, conv=conv_with(norm, "HEAD"))


def new_features(batch: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, CHANNELS, *size) for size in ((9, 7), (5, 4), (3, 2), (2, 1), (1, 1))]


@pytest.mark.parametrize("norm", ["", "GN"])
def test_head_equals_torchvision(norm):
    head = new_head(norm, num_convs=4)
    norm_layer = partial(nn.GroupNorm, 32) if norm else None
    oracle = RetinaNetHead(CHANNELS, ANCHORS, CLASSES, norm_layer=norm_layer)
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = {f"head.{name}": value for name, value in oracle.state_dict().items()}
    head.load_state_dict(to_native(state, "head."))
    features = new_features()
    logits, deltas = head(features)
    expected = oracle(features)
    torch.testing.assert_close(torch.cat(logits, 1), expected["cls_logits"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(deltas, 1), expected["bbox_regression"], rtol=1e-4, atol=1e-5)


def test_outputs_run_over_rows_then_columns_then_anchors():
    head = new_head(num_convs=0)
    with torch.no_grad():
        for conv in (head.cls_pred, head.box_pred):
            conv.weight.zero_()
            conv.weight[:, 0, 1, 1] = 1  # adds the first channel of the input, which holds the position
            conv.bias.copy_(torch.arange(len(conv.bias)) / 100)
    position = torch.tensor([[10.0, 11.0, 12.0], [20.0, 21.0, 22.0]])
    features = torch.zeros(1, CHANNELS, 2, 3)
    features[0, 0] = position
    logits, deltas = head([features])
    for row in range(2):
        for column in range(3):
            for anchor in range(ANCHORS):
                index = (row * 3 + column) * ANCHORS + anchor
                for values, output in ((CLASSES, logits[0]), (4, deltas[0])):
                    expected = position[row, column] + (anchor * values + torch.arange(values)) / 100
                    torch.testing.assert_close(output[0, index], expected)


def test_initial_scores_are_the_prior():
    logits, deltas = new_head(prior_prob=0.2)(new_features())
    assert [level.shape for level in logits] == [(2, cells * ANCHORS, CLASSES) for cells in (63, 20, 6, 2, 1)]
    assert [level.shape for level in deltas] == [(2, cells * ANCHORS, 4) for cells in (63, 20, 6, 2, 1)]
    for level in logits:
        torch.testing.assert_close(level.sigmoid(), torch.full_like(level, 0.2), rtol=0.05, atol=0)


def test_initial_weights_are_normal_with_deviation_001():
    for name, parameter in new_head(norm="GN").named_parameters():
        if parameter.dim() == 4:
            assert abs(parameter.std().item() / 0.01 - 1) < 0.05, name
    assert not new_head().box_pred.bias.any()


@pytest.mark.parametrize("norm", ["AffineChannel", "GN"])
def test_norm_without_statistics_is_shared_by_the_levels(norm):
    names = [name for name in new_head(norm).state_dict() if "norm" in name]
    assert all(".levels." not in name for name in names) and names


def test_norm_with_statistics_keeps_one_set_per_level():
    head = new_head("BN").train()
    features = [feature + level for level, feature in enumerate(new_features())]
    head(features)
    for conv in (head.cls_convs[0], head.box_convs[0]):
        for norm, x in zip(conv.norm.levels, features, strict=True):
            mean = nn.functional.conv2d(x, conv.weight, padding=1).mean((0, 2, 3))
            torch.testing.assert_close(norm.running_mean, 0.1 * mean, rtol=1e-4, atol=1e-5)


def test_weights_are_prepared_once_for_all_levels(monkeypatch):
    calls = []
    prepare = CentralizedConv2d.effective_weight
    monkeypatch.setattr(CentralizedConv2d, "effective_weight", lambda conv: calls.append(conv) or prepare(conv))
    head = new_head("MABN")
    head(new_features())
    assert len(calls) == len(set(calls)) == 4  # two towers of two convs


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
def test_channels_last_logits_are_views_of_the_conv_output(norm):
    head = new_head(norm).to(memory_format=torch.channels_last).eval()
    features = [x.contiguous(memory_format=torch.channels_last) for x in new_features()]
    outputs = []
    head.cls_pred.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits, _ = head(features)
    assert [level.data_ptr() for level in logits] == [output.data_ptr() for output in outputs]
    torch.testing.assert_close(logits, head([x.contiguous() for x in features])[0], rtol=1e-4, atol=1e-5)


def test_empty_batch_has_empty_outputs():
    logits, deltas = new_head("GN")(new_features(batch=0))
    assert logits[0].shape == (0, 63 * ANCHORS, CLASSES) and deltas[4].shape == (0, ANCHORS, 4)
