"""Sums and moments of both memory formats against float64 arithmetic, eager kernels and plain math alike."""

import pytest
import torch

from retinanet.layers.norm import reduce

FORMATS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(2, 3, 5, 4), (1, 4, 1, 1), (3, 1, 2, 2), (2, 6, 1, 7), (1, 2, 200, 170)]  # the last: more than one block


@pytest.fixture(params=["kernels", "math"], autouse=True)
def path(request, monkeypatch):
    if request.param == "math":
        monkeypatch.setattr(reduce, "_has_kernels", lambda x: False)


def inputs(shape, memory_format, mean: float = 1.0):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) + mean).contiguous(memory_format=memory_format)
    g, shift = torch.randn(shape, generator=generator), torch.randn(shape[:2], generator=generator)
    return x, g, shift


def close(value, expected, tolerance: float = 2e-6):
    scale = float(expected.abs().max())
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_equal_those_in_float64(shape, memory_format):
    x, g, shift = inputs(shape, memory_format)
    wide_x, wide_g, moved = x.double(), g.double(), x.double() - shift.double()[:, :, None, None]
    for value, terms, axes in (
        (reduce.channel_squares(x), wide_x.square(), (0, 2, 3)),
        (reduce.channel_sums(g, x)[0], wide_g, (0, 2, 3)),
        (reduce.channel_sums(g, x)[1], wide_g * wide_x, (0, 2, 3)),
        (reduce.image_sums(g, x, shift)[0], wide_g, (2, 3)),
        (reduce.image_sums(g, x, shift)[1], wide_g * moved, (2, 3)),
    ):
        difference = (value.double() - terms.sum(axes)).abs()
        assert (difference <= 5e-6 * terms.abs().sum(axes)).all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_equal_those_in_float64_with_a_large_mean_too(shape, mean, memory_format):
    x, _, _ = inputs(shape, memory_format, mean)
    value, var = reduce.image_moments(x)
    close(value, x.double().mean((2, 3)), 5e-6)
    torch.testing.assert_close(var.double(), x.double().var((2, 3), correction=0), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_affine_maps_keep_the_memory_format_and_are_no_views(shape, memory_format):
    x, _, shift = inputs(shape, memory_format)
    by_image = reduce.image_affine(x, 2 * shift, shift)
    close(by_image, (x * 2 * shift[:, :, None, None] + shift[:, :, None, None]).double())
    by_channel = reduce.channel_affine(x, 2 * shift[0], shift[0])
    close(by_channel, (x * 2 * shift[0, :, None, None] + shift[0, :, None, None]).double())
    for y in (by_image, by_channel):
        assert y.is_contiguous(memory_format=memory_format) and not y._is_view()


def test_wide_makes_other_strides_contiguous_and_keeps_float64():
    x = torch.zeros(2, 3, 4, 5).transpose(2, 3)
    assert reduce.wide(x).is_contiguous() and reduce.wide(x.double()).dtype == torch.float64
    assert reduce.wide(x.half()).dtype == torch.float32
