"""Resize and flip: numbers by hand, a slow bilinear loop, Detectron's stored result, PIL and torchvision's own code."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retinanet.data.transforms import (
    FLOAT_MODES,
    RESIZE_MODES,
    draw_augmentation,
    flip_boxes,
    flip_image,
    resize_geometry,
    resize_into,
    scale_boxes,
)
from retinanet.errors import UserError

FILES = Path(__file__).resolve().parent.parent / "files"
MEAN = np.array([102.9801, 115.9465, 122.7717], np.float32)


def picture(height, width, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def resize(image, short_side, max_size, mode):
    geometry = resize_geometry(image.shape[:2], short_side, max_size, mode)
    out = np.full((*geometry.size, 3), 77, np.float32 if mode in FLOAT_MODES else np.uint8)
    resize_into(image, out, geometry.scales, mode)
    return out, geometry


def slow_bilinear(image, size, scales) -> np.ndarray:
    """Pixel by pixel in float64: sample at (x + 1/2) / scale - 1/2, edges repeated."""
    height, width = image.shape[:2]
    out = np.zeros((*size, 3))
    for y in range(size[0]):
        for x in range(size[1]):
            v = np.clip((y + 0.5) / scales[1] - 0.5, 0, height - 1)
            u = np.clip((x + 0.5) / scales[0] - 0.5, 0, width - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[y0, x0] * (1 - (u - x0)) + image[y0, x1] * (u - x0)
            bottom = image[y1, x0] * (1 - (u - x0)) + image[y1, x1] * (u - x0)
            out[y, x] = top * (1 - (v - y0)) + bottom * (v - y0)
    return out


@pytest.mark.parametrize("mode, tolerance", [("cv2", 1.0), ("cv2_float", 1e-3), ("torchvision", 1e-3)])
@pytest.mark.parametrize("size, short_side", [((9, 14), 23), ((14, 9), 5), ((1, 1), 4), ((1, 6), 3)])
def test_bilinear_modes_agree_with_a_slow_loop(mode, tolerance, size, short_side):
    image = picture(*size)
    out, geometry = resize(image, short_side, 1000, mode)
    expected = slow_bilinear(image.astype(np.float64), geometry.size, geometry.scales)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case, max_size", [("a", 1333), ("b", 80)])
def test_cv2_float_reproduces_detectrons_blob(case, max_size):
    golden = np.load(FILES / "caffe2_preprocess.npz")
    out, geometry = resize(golden["image"], 64, max_size, "cv2_float")
    assert geometry.scales == (golden[f"scale_{case}"], golden[f"scale_{case}"])
    stored = golden[f"resized_{case}"]  # mean subtracted before the resize; every 4th pixel in case b
    step = 4 if case == "b" else 1
    np.testing.assert_allclose((out - MEAN)[::step, ::step], stored, rtol=0, atol=3e-5)


def test_cap_of_detectron_compares_the_rounded_long_side():
    assert resize_geometry((800, 1000), 800, 1333, "cv2").size == (800, 1000)
    assert resize_geometry((480, 640), 800, 1333, "cv2").size == (800, 1067)
    assert resize_geometry((375, 625), 800, 1333, "cv2").size == (800, 1333)  # 1333.33 rounds to 1333: not capped
    assert resize_geometry((375, 626), 800, 1333, "cv2").size == (799, 1333)
    assert resize_geometry((626, 375), 800, 1333, "cv2").size == (1333, 799)
    assert resize_geometry((1, 4000), 800, 1333, "cv2").size == (1, 1333)  # never 0 pixels


def test_size_rules_of_the_modes_differ_in_the_last_pixel():
    def sizes(*image_short_max):
        return [resize_geometry(*image_short_max, mode).size for mode in ("cv2", "cv2_float", "pil", "torchvision")]

    assert sizes((480, 642), 800, 1333) == [(800, 1070)] * 4
    assert sizes((480, 641), 801, 1333) == [(801, 1070), (801, 1070), (801, 1070), (801, 1069)]  # 1069.67
    assert sizes((10, 25), 5, 100) == [(5, 12), (5, 12), (5, 13), (5, 12)]  # 12.5: to even, to even, up, down
    assert sizes((375, 500), 802, 1333)[3] == (801, 1069)  # 375 * (802 / 375) is just below 802 in float64


def test_one_scale_of_cv2_float_and_scales_per_axis_of_the_others():
    assert resize_geometry((480, 641), 800, 1333, "cv2_float").scales == (800 / 480, 800 / 480)
    assert resize_geometry((480, 641), 800, 1333, "cv2").scales == (1068 / 641, 800 / 480)


@pytest.mark.parametrize("size", [(128, 160), (100, 141), (141, 100), (375, 500), (60, 200)])
@pytest.mark.parametrize("short_side, max_size", [(192, 216), (128, 10000), (802, 1333)])
def test_torchvision_mode_is_the_transform_of_torchvisions_detectors(size, short_side, max_size):
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    image = picture(*size)
    boxes = torch.tensor([[1.0, 2.0, 30.0, 33.5], [0.0, 0.0, size[1], size[0]]])
    theirs = GeneralizedRCNNTransform(short_side, max_size, mean, std, size_divisible=1).eval()
    pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
    batch, (target,) = theirs([pixels], [{"boxes": boxes, "labels": torch.tensor([1, 1])}])
    out, geometry = resize(image, short_side, max_size, "torchvision")
    assert geometry.size == batch.image_sizes[0]
    ours = ((torch.from_numpy(out) / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
    torch.testing.assert_close(ours, batch.tensors[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(scale_boxes(boxes, geometry.scales), target["boxes"], rtol=1e-6, atol=0)


def test_torchvisions_golden_image_becomes_172_by_216():
    assert resize_geometry((128, 160), 192, 216, "torchvision").size == (172, 216)


@pytest.mark.parametrize("size, short_side", [((40, 61), 17), ((61, 40), 90), ((5, 5), 5)])
def test_pil_mode_is_pillows_antialiased_bilinear(size, short_side):
    from PIL import Image

    image = picture(*size)
    out, geometry = resize(image, short_side, 1000, "pil")
    expected = Image.fromarray(image).resize(geometry.size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(out, np.asarray(expected))


def test_pil_sizes_are_those_of_detectron2():
    # by hand: 800 / 500 * 333 = 532.8; the cap acts on the unrounded side and both round half up
    assert resize_geometry((333, 500), 800, 1333, "pil").size == (800, 1201)
    assert resize_geometry((427, 640), 800, 1333, "pil").size == (800, 1199)
    assert resize_geometry((375, 625), 800, 1333, "pil").size == (800, 1333)
    assert resize_geometry((300, 640), 800, 1333, "pil").size == (625, 1333)
    assert resize_geometry((10, 25), 5, 100, "pil").size == (5, 13)  # 12.5 up
    assert resize_geometry((10, 25), 5, 100, "cv2").size == (5, 12)  # 12.5 to even


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_result_goes_into_the_corner_of_a_larger_array(mode):
    image = picture(20, 30)[:, ::2]  # not contiguous
    geometry = resize_geometry(image.shape[:2], 24, 100, mode)
    canvas = np.full((40, 50, 3), 5, np.float32 if mode in FLOAT_MODES else np.uint8)
    resize_into(image, canvas[: geometry.size[0], : geometry.size[1]], geometry.scales, mode)
    alone, _ = resize(np.ascontiguousarray(image), 24, 100, mode)
    np.testing.assert_array_equal(canvas[: geometry.size[0], : geometry.size[1]], alone)
    assert (canvas[geometry.size[0] :] == 5).all() and (canvas[:, geometry.size[1] :] == 5).all()


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    short_side=st.integers(1, 200),
    extra=st.integers(0, 200),
    mode=st.sampled_from(RESIZE_MODES),
)
def test_any_image_resizes_within_its_cap(size, short_side, extra, mode):
    out, geometry = resize(np.full((*size, 3), 200, np.uint8), short_side, short_side + extra, mode)
    assert max(geometry.size) <= short_side + extra and min(geometry.size) >= 1
    assert min(geometry.size) <= short_side
    np.testing.assert_allclose(out, 200, atol=1e-3)


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_box_of_the_whole_image_stays_that(mode):
    geometry = resize_geometry((37, 53), 64, 1333, mode)
    box = scale_boxes(torch.tensor([[0.0, 0.0, 53.0, 37.0]]), geometry.scales)
    expected = torch.tensor([[0.0, 0.0, geometry.size[1], geometry.size[0]]])
    torch.testing.assert_close(box, expected, rtol=0, atol=0.5 if mode == "cv2_float" else 1e-4)


def test_unknown_mode_lists_the_modes():
    with pytest.raises(UserError, match="INPUT.RESIZE: 'PIL' is not one of .* did you mean 'pil'"):
        resize_geometry((3, 3), 3, 3, "PIL")


def test_flipped_box_holds_the_flipped_pixels():
    image = np.zeros((6, 9, 3), np.uint8)
    image[1:4, 2:4] = 255
    (box,) = flip_boxes(torch.tensor([[2.0, 1.0, 4.0, 4.0]]), 9).tolist()
    assert box == [5, 1, 7, 4]
    ys, xs = np.nonzero(flip_image(image)[..., 0])
    assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box
    (box,) = flip_boxes(torch.tensor([[2.0, 1.0, 3.0, 3.0]]), 9, plus_one=True).tolist()  # last pixel, not edge
    assert box == [5, 1, 6, 3] and [xs.min(), ys.min(), xs.max(), ys.max()] == box


@pytest.mark.parametrize("plus_one", [False, True])
def test_two_flips_change_nothing(plus_one):
    boxes = torch.tensor([[0.0, 0.0, 5.25, 3.0], [2.0, 1.0, 8.0, 4.0]])
    torch.testing.assert_close(flip_boxes(flip_boxes(boxes, 9, plus_one), 9, plus_one), boxes, rtol=0, atol=0)
    assert flip_boxes(torch.zeros(0, 4), 9, plus_one).shape == (0, 4)
    image = picture(5, 8)
    np.testing.assert_array_equal(flip_image(flip_image(image)), image)
    np.testing.assert_array_equal(flip_image(image), image[:, ::-1])


def test_augmentation_is_drawn_from_the_generator_alone():
    draws = [draw_augmentation(np.random.default_rng([1, i]), (640, 672, 800), 0.5) for i in range(600)]
    again = [draw_augmentation(np.random.default_rng([1, i]), (640, 672, 800), 0.5) for i in range(600)]
    assert draws == again
    assert {draw.short_side for draw in draws} == {640, 672, 800}
    assert 0.4 < np.mean([draw.flip for draw in draws]) < 0.6
    assert not any(draw_augmentation(np.random.default_rng(i), (8,), 0.0).flip for i in range(50))
    assert all(draw_augmentation(np.random.default_rng(i), (8,), 1.0).flip for i in range(50))


def test_resize_keeps_one_thread_and_many_the_same():
    image, before = picture(300, 400), cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        alone, _ = resize(image, 500, 1000, "cv2")
        cv2.setNumThreads(4)
        many, _ = resize(image, 500, 1000, "cv2")
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(alone, many)
