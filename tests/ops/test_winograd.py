"""Convolutions with half of the multiplications, against direct ones in float64, and where they are taken."""

import copy

import pytest
import torch
import torch.nn.functional as F

from retinanet.ops import winograd
from retinanet.ops.conv import conv2d
from retinanet.ops.packed import ConstantWeight

NHWC = torch.channels_last
SHAPES = [  # images, in, out, height, width
    (2, 7, 5, 6, 9),
    (1, 16, 17, 5, 12),
    (2, 3, 4, 5, 1),
    (2, 4, 4, 1, 8),
    (3, 2, 3, 2, 6),
    (1, 64, 32, 16, 19),
]


def inputs(shape, dtype=torch.float32, grad=True):
    torch.manual_seed(0)
    num_images, channels, out, height, width = shape
    x = torch.randn(num_images, channels, height, width, dtype=dtype).to(memory_format=NHWC)
    weight = torch.randn(out, channels, 3, 3, dtype=dtype) / (3 * channels**0.5)
    return [part.requires_grad_(grad) for part in (x, weight, torch.randn(out, dtype=dtype))]


def output_and_gradients(convolve, x, weight, bias):
    parts = [part for part in (x, weight, bias) if part is not None and part.requires_grad]
    y = convolve(x, weight, bias)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, parts, grad.to(y.dtype))]


def direct(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_a_convolution(shape):
    given = inputs(shape, torch.float64)
    found, expected = (output_and_gradients(how, *given) for how in (winograd.conv2d, direct))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert found[0].is_contiguous(memory_format=NHWC)


@pytest.mark.parametrize("missing", ["x", "weight", "bias", "no bias"])
def test_gradients_that_nobody_wants_are_left_out(missing):
    x, weight, bias = inputs(SHAPES[0], torch.float64)
    given = {"x": x, "weight": weight, "bias": bias}
    if missing == "no bias":
        given["bias"] = None
    else:
        given[missing] = given[missing].detach()
    found, expected = (output_and_gradients(how, *given.values()) for how in (winograd.conv2d, direct))
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_rounding_is_that_of_a_direct_convolution():
    """Within 2.5 times in the output and its gradient for the input, 4 times in that for the weight, in the mean."""
    given = inputs((2, 256, 256, 20, 20))
    exact = output_and_gradients(direct, *(part.detach().double().requires_grad_() for part in given))
    found, usual = (output_and_gradients(how, *given) for how in (winograd.conv2d, direct))
    for one, other, value, most in zip(found, usual, exact, (2.5, 2.5, 4, 4), strict=True):
        error, usual_error = ((part.detach() - value.detach()).square().mean().sqrt() for part in (one, other))
        assert error <= most * usual_error


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("size", [(40, 40), (32, 35), (33, 40), (50, 25)])
def test_packed_weights_give_the_same_numbers_at_every_size(size):
    weight, bias = torch.randn(128, 128, 3, 3) / 34, torch.randn(128)
    constant = ConstantWeight(weight)
    for _ in range(2):
        for height, width in (size, (40, 40)):
            x = torch.randn(2, 128, height, width).to(memory_format=NHWC)
            for relu, residual in ((True, None), (False, torch.randn_like(x)), (True, torch.randn_like(x))):
                expected = direct(x, weight, bias) + (0 if residual is None else residual)
                found = conv2d(x, constant, bias, 1, 1, 1, 1, residual, relu)
                torch.testing.assert_close(found, expected.relu() if relu else expected, rtol=1e-4, atol=2e-5)
    x = torch.randn(1, 128, 40, 40).to(memory_format=NHWC)
    assert torch.equal(conv2d(x, constant, bias, padding=1), conv2d(x, copy.deepcopy(constant), bias, padding=1))


@pytest.fixture
def taken(monkeypatch):
    """The sizes of the inputs that came this way."""
    sizes, original = [], winograd.conv2d
    monkeypatch.setattr(winograd, "conv2d", lambda x, *rest: sizes.append(tuple(x.shape)) or original(x, *rest))
    return sizes


def large(channels=256, size=(40, 40), images=2, **options):
    return torch.randn(images, channels, *size).to(memory_format=options.pop("memory_format", NHWC), **options)


def test_training_takes_it_for_large_maps_only(taken):
    x, weight, bias = large(), (torch.randn(256, 256, 3, 3) / 48).requires_grad_(), torch.zeros(256)
    found, expected = (
        output_and_gradients(how, x, weight, bias)
        for how in (lambda *given: conv2d(*given, padding=1), direct)
    )
    assert taken == [x.shape]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    y = conv2d(x, weight, bias, padding=1, residual=x, relu=True)
    torch.testing.assert_close(y, (expected[0] + x).relu(), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert taken.pop() == x.shape and weight.grad.isfinite().all()
    left_alone = [
        conv2d(large(size=(20, 20)), weight, bias, padding=1),
        conv2d(large(images=1), weight, bias, padding=1),
        conv2d(large(memory_format=torch.contiguous_format), weight, bias, padding=1),
        conv2d(x, weight, bias, stride=2, padding=1),
        conv2d(x, weight, bias, padding=0),
        conv2d(x, weight, bias, padding=2, dilation=2),
        conv2d(large(512, images=1, size=(48, 48)), weight, bias, padding=1, groups=2),
        conv2d(large(dtype=torch.bfloat16), weight.bfloat16(), bias.bfloat16(), padding=1),
        conv2d(x, weight[..., :1, :1], bias),
        conv2d(x, weight.repeat(5, 1, 1, 1), None, padding=1),  # 1280 outputs
    ]
    with torch.autocast("cpu", torch.bfloat16):
        left_alone.append(conv2d(x, weight, bias, padding=1))
    with torch.no_grad():
        left_alone.append(conv2d(x, weight, bias, padding=1))  # not packed
    assert taken == [x.shape] and len(left_alone) == 12


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_detection_takes_it_by_the_size_of_one_image(taken):
    constant = ConstantWeight(torch.randn(128, 128, 3, 3))
    with torch.no_grad():
        for images in (1, 3):
            conv2d(large(128, images=images), constant, None, padding=1)
            conv2d(large(128, (25, 25), images), constant, None, padding=1)
            conv2d(large(128, (200, 5), images), constant, None, padding=1)  # two tiles for five columns
    assert taken == [(1, 128, 40, 40), (3, 128, 40, 40)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_an_image_gives_the_same_bits_beside_others(taken):
    constant, x = ConstantWeight(torch.randn(128, 128, 3, 3)), large(128, images=3)
    together = conv2d(x, constant, None, padding=1)
    for i in range(3):
        assert torch.equal(conv2d(x[i : i + 1], constant, None, padding=1), together[i : i + 1])
    assert len(taken) == 4
