"""The colour matrix: torchvision's functions as the oracle, and what a turn of the hue must leave alone."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from retinanet.data.colour import Colour, draw_colour, recolour

LUMA = np.array([0.114, 0.587, 0.299])  # of BGR
SAME = Colour(1.0, 1.0, 1.0, 0.0)


@pytest.fixture
def image():
    """Random pixels (40, 30, 3) from 60 to 190, so that small changes reach neither 0 nor 255."""
    return np.random.default_rng(0).integers(60, 190, (40, 30, 3)).astype(np.uint8)


def torchvision_result(image, function, factor) -> np.ndarray:
    """In float, for with uint8 it rounds down, and the luma first."""
    planar = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float() / 255
    return function(planar, factor).permute(1, 2, 0).numpy()[..., ::-1] * 255


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.0, 1.2, 2.5])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_equals_torchvision_up_to_rounding(image, name, factor):
    expected = torchvision_result(image, getattr(functional, f"adjust_{name}"), factor)
    changed = recolour(image, SAME._replace(**{name: factor}))
    assert changed.dtype == np.uint8
    np.testing.assert_allclose(changed, expected, atol=0.8)  # OpenCV multiplies bytes in fixed point
    changed = recolour(image.astype(np.float32), SAME._replace(**{name: factor}))
    np.testing.assert_allclose(changed, expected, atol=0.05)  # its luma takes 0.2989 of red, not 0.299


def test_together_they_come_in_torchvisions_order(image):
    expected = image
    for name, factor in (("brightness", 1.2), ("contrast", 0.7), ("saturation", 1.3)):
        expected = torchvision_result(expected.copy(), getattr(functional, f"adjust_{name}"), factor)
    np.testing.assert_allclose(recolour(image, Colour(1.2, 0.7, 1.3, 0.0)), expected, atol=0.8)


def test_a_turn_of_the_hue_keeps_grey_and_luma(image):
    grey = image[..., :1].repeat(3, axis=2)
    assert np.abs(recolour(grey, SAME._replace(hue=0.2)).astype(int) - grey).max() <= 1
    soft = (image // 4 + 100).astype(np.float32)
    turned = recolour(soft, SAME._replace(hue=0.2))
    np.testing.assert_allclose(turned @ LUMA, soft @ LUMA, atol=0.01)
    assert np.abs(turned - soft).max() > 10
    np.testing.assert_allclose(recolour(turned, SAME._replace(hue=0.8)), soft, atol=0.01)  # a whole turn


def test_a_turn_goes_the_way_of_torchvision(image):
    """From red over yellow: the hue of HSV and the angle of YIQ differ, their direction does not."""
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 2] = 150
    blue, green, _ = recolour(red, SAME._replace(hue=0.08))[0, 0].tolist()
    expected = torchvision_result(red, functional.adjust_hue, 0.08)[0, 0].tolist()
    assert green > 25 > blue and expected[1] > 25 > expected[0]


def test_the_image_itself_is_left_alone_and_values_stay_in_range(image):
    before = image.copy()
    changed = recolour(image.astype(np.float32), Colour(3.0, 2.0, 2.0, 0.3))
    assert changed.min() >= 0 and changed.max() <= 255 and changed.dtype == np.float32
    np.testing.assert_array_equal(image, before)


def test_drawn_values_fill_their_ranges():
    generator = np.random.default_rng(1)
    drawn = np.array([draw_colour(generator, 0.4) for _ in range(2000)])
    np.testing.assert_allclose(drawn.min(0), [0.6, 0.6, 0.6, -0.1], atol=0.01)
    np.testing.assert_allclose(drawn.max(0), [1.4, 1.4, 1.4, 0.1], atol=0.01)
