"""The whole model against torchvision's two RetinaNets, and its normalization of images."""

import copy

import pytest
import torch
import torchvision
from model_cases import randomize, small_cfg
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection.image_list import ImageList
from torchvision_names import to_native

from retinanet.config import get_cfg
from retinanet.modeling.build import build_model

MEAN, STD = [100.0, 110.0, 120.0], [1.0, 2.0, 4.0]
CHANNELS_LAST = torch.channels_last


def small_model(*opts):
    torch.manual_seed(0)
    return build_model(small_cfg("MODEL.PIXEL_MEAN", MEAN, "MODEL.PIXEL_STD", STD, *opts))


def torchvision_cfg(version: str):
    """Return the architecture of torchvision's v1 or v2: published parameters are 34,014,999 and 38,198,935."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.NUM_CLASSES", 91, "MODEL.ANCHORS.CONVENTION", "torchvision"])
    cfg.merge_from_list(["MODEL.BACKBONE.STRIDE_IN_1X1", False, "MODEL.BACKBONE.FREEZE_AT", 0])
    cfg.merge_from_list(["MODEL.BACKBONE.NORM", "BN" if version == "v2" else "FrozenBN"])
    cfg.merge_from_list(["MODEL.FPN.P6_FROM", "C5" if version == "v2" else "P5"])
    cfg.merge_from_list(["MODEL.HEAD.NORM", "GN" if version == "v2" else ""])
    return cfg


@pytest.mark.parametrize("version, published", [("v1", 34_014_999), ("v2", 38_198_935)])
def test_parameters_are_as_many_as_published(version, published):
    with torch.device("meta"):
        model = build_model(torchvision_cfg(version))
    assert sum(parameter.numel() for parameter in model.parameters()) == published


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_outputs_equal_torchvision(version):
    build = getattr(torchvision.models.detection, f"retinanet_resnet50_fpn{'_v2' if version == 'v2' else ''}")
    torch.manual_seed(0)
    oracle = randomize(build(weights=None, weights_backbone=None, num_classes=91)).eval()
    with torch.device("meta"):
        model = build_model(torchvision_cfg(version)).eval()
    state = to_native(oracle.state_dict())
    if version == "v1":  # FrozenBN has no counter
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    model.load_state_dict(state, assign=True)
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        features = list(oracle.backbone(images).values())
        expected = oracle.head(features)
        anchors = oracle.anchor_generator(ImageList(images, [(96, 128)] * 2), features)[0]
        outputs = model(images)
    torch.testing.assert_close(torch.cat(outputs["logits"], 1), expected["cls_logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(outputs["deltas"], 1), expected["bbox_regression"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(outputs["anchors"]), anchors, rtol=0, atol=1e-3)


def test_outputs_are_the_same_in_training_and_evaluation():
    model = small_model("MODEL.HEAD.NORM", "GN")
    images = torch.randn(2, 3, 64, 96)
    train, evaluation = model.train()(images), model.eval()(images)
    assert list(train) == ["logits", "deltas", "anchors"]
    torch.testing.assert_close(train, evaluation)
    assert all(level.shape[1] == len(anchors) for level, anchors in zip(train["logits"], train["anchors"], strict=True))


def test_settings_are_not_weights():
    state = small_model().state_dict()
    assert not [name for name in state if "pixel" in name or "anchor" in name]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("given", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("wanted", [torch.contiguous_format, CHANNELS_LAST])
def test_normalized_images_are_zero_exactly_in_the_padding(dtype, given, wanted):
    model = small_model("SOLVER.CHANNELS_LAST", repr(str(wanted == CHANNELS_LAST)))
    images = torch.randint(0, 256, (3, 3, 8, 6), dtype=torch.uint8).to(dtype).contiguous(memory_format=given)
    sizes = torch.tensor([[8, 6], [5, 6], [1, 2]])
    normalized = model.normalize(images, sizes)
    expected = torch.zeros(3, 3, 8, 6)
    for n, (height, width) in enumerate(sizes.tolist()):
        for c in range(3):
            expected[n, c, :height, :width] = (images[n, c, :height, :width].float() - MEAN[c]) / STD[c]
    torch.testing.assert_close(normalized, expected, rtol=1e-6, atol=1e-6)
    assert normalized.dtype == torch.float32 and normalized.is_contiguous(memory_format=wanted)


def test_non_contiguous_images_are_normalized():
    model = small_model()
    wide = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    sizes = torch.tensor([[8, 6], [3, 4]])
    sliced = wide[..., ::2]
    torch.testing.assert_close(model.normalize(sliced, sizes), model.normalize(sliced.contiguous(), sizes))


class NoSync(TorchDispatchMode):
    """Fails at operations that make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["AffineChannel", "FrozenBN", "BN", "GN", "MABN", "BCN"])
def test_a_training_forward_never_waits_for_the_device(norm):
    model = small_model("NORMS", [norm] * 3)
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    sizes = torch.tensor([[128, 128], [100, 90]])
    with NoSync():
        outputs = model.train()(model.normalize(images, sizes))
        sum(level.sum() for level in (*outputs["logits"], *outputs["deltas"])).backward()


def test_heads_get_channels_last_features_when_the_images_are():
    model = small_model("NORMS", ["GN"] * 3)
    model = model.to(memory_format=CHANNELS_LAST)
    inputs = []
    for conv in (*model.head.cls_convs, *model.head.box_convs, model.head.cls_pred, model.head.box_pred):
        conv.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=CHANNELS_LAST)
    outputs = model(images)
    assert inputs and all(x.is_contiguous(memory_format=CHANNELS_LAST) for x in inputs)
    expected = copy.deepcopy(model).to(memory_format=torch.contiguous_format)(images.contiguous())
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["AffineChannel", "GN"])
def test_bfloat16_autocast_stays_near_float32(norm):
    model = small_model("MODEL.BACKBONE.NORM", norm, "MODEL.HEAD.NORM", norm).eval()
    images = torch.randn(1, 3, 256, 256)  # several cells at P7: GN over a single value is zero
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
    expected = model(images)
    for level, exact in zip(outputs["deltas"], expected["deltas"], strict=True):
        assert level.dtype == torch.bfloat16
        assert (level.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_model_compiles_without_graph_breaks():
    model = small_model("NORMS", ["FrozenBN", "GN", "BN"])
    images = torch.randn(2, 3, 128, 128)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(images), model(images)
    torch.testing.assert_close(outputs["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs["anchors"], expected["anchors"])


def test_model_exports_and_the_program_gives_its_outputs():
    model = small_model("MODEL.BACKBONE.NORM", "BN", "MODEL.HEAD.NORM", "GN").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        program = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
