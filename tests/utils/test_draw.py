"""Pixels: where boxes and labels land, and that they can be read."""

import numpy as np
import pytest

from retinanet.utils.draw import class_colour, draw_detections, text_colour, tile

GREY = 90


def plain(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def of_colour(image: np.ndarray, label: int) -> np.ndarray:
    return (image == class_colour(label)).all(-1)


def test_box_covers_the_pixels_that_its_coordinates_name():
    """[10, 20) x [30, 60) in a picture whose lines are one pixel wide; the label needs rows above the box."""
    drawn = draw_detections(plain(100, 100), [[10, 30, 20, 60]], [0], names=[""])
    edge = of_colour(drawn, 0)
    edge[:30] = False  # the label
    rows, columns = np.nonzero(edge)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 59, 10, 19)
    assert not edge[31:59, 11:19].any()


def test_input_is_not_changed_and_may_be_a_view():
    image = plain(50, 60)[:, ::-1]
    before = image.copy()
    drawn = draw_detections(image, [[5, 5, 40, 40]], [1], [0.5], ["cat", "dog"])
    np.testing.assert_array_equal(image, before)
    assert drawn.shape == image.shape and (drawn != image).any()


def test_nothing_to_draw_gives_an_equal_copy():
    image = plain(1, 1)
    drawn = draw_detections(image, np.zeros((0, 4)), [])
    np.testing.assert_array_equal(drawn, image)
    assert drawn is not image


@pytest.mark.parametrize("box", [[-50, -50, 30, 30], [70, 80, 500, 500], [-9, -9, 900, 900], [99.6, 40, 140, 60]])
def test_labels_of_boxes_at_the_border_stay_inside(box):
    """The label's background has as many pixels as the same label in the middle of the picture."""
    middle = draw_detections(plain(100, 100), [[40, 40, 41, 41]], [3], names=list("abcd"))
    drawn = draw_detections(plain(100, 100), [box], [3], names=list("abcd"))
    assert of_colour(drawn, 3).sum() >= of_colour(middle, 3).sum() - 4


@pytest.mark.parametrize("box", [[-20, 5, -5, 20], [100, 5, 120, 20], [5, 130, 20, 150]])
def test_boxes_outside_are_not_drawn(box):
    np.testing.assert_array_equal(draw_detections(plain(100, 100), [box], [0]), plain(100, 100))


def test_colours_can_tell_something_else_than_the_class():
    red, green = (0, 0, 255), (0, 255, 0)
    drawn = draw_detections(
        plain(60, 60), [[5, 5, 20, 20], [30, 30, 50, 50]], [1, 1], names=["", ""], colours=[red, green]
    )
    assert drawn[12, 5].tolist() == list(red) and drawn[40, 30].tolist() == list(green)
    assert not of_colour(drawn, 1).any()


def test_higher_score_lies_on_top():
    box = [20, 60, 80, 90]
    drawn = draw_detections(plain(100, 100), [box, box], [0, 1], [0.9, 0.2], ["", ""])
    assert of_colour(drawn, 0)[89, 50] and not of_colour(drawn, 1)[89, 50]


def test_labels_of_boxes_in_one_place_do_not_hide_each_other():
    names = ["aaaa", "bbbb", "cccc"]
    box = [60, 60, 140, 140]
    drawn = draw_detections(plain(200, 200), [box] * 3, [0, 1, 2], [0.9, 0.8, 0.7], names)
    alone = [of_colour(draw_detections(plain(200, 200), [box], [i], [0.5], names), i).sum() for i in range(3)]
    outline = 4 * 80
    for label in range(3):
        assert of_colour(drawn, label).sum() > 0.8 * (alone[label] - outline)


@pytest.mark.parametrize("side", [400, 4000])
def test_text_takes_the_same_share_of_small_and_large_pictures(side):
    middle = side / 2
    drawn = draw_detections(plain(side, side), [[middle, middle, middle + 2, middle + 2]], [0], names=["person"])
    rows = np.nonzero(of_colour(drawn, 0).any(1))[0]
    assert 0.03 < (rows.max() - rows.min()) / side < 0.06


def test_long_text_is_cut_to_the_width():
    drawn = draw_detections(plain(40, 60), [[5, 25, 50, 38]], [0], names=["a very long name of a class"])
    assert drawn.shape == (40, 60, 3) and of_colour(drawn, 0)[:, :58].any()


def test_tiny_pictures_are_enlarged_by_whole_pixels():
    image = np.arange(30 * 50 * 3, dtype=np.uint32).reshape(30, 50, 3).astype(np.uint8)
    drawn = draw_detections(image, [[10, 20, 20, 25]], [0], names=[""], min_side=100)
    assert drawn.shape == (120, 200, 3)
    np.testing.assert_array_equal(drawn[108::4, 120::4], image[27:, 30:])
    assert of_colour(drawn, 0)[80:100, 40].all() and not of_colour(drawn, 0)[100, 40:80].any()


def test_colours_are_stable_distinct_and_readable():
    colours = [class_colour(label) for label in range(80)]
    assert len(set(colours)) == 80 and colours == [class_colour(label) for label in range(80)]
    assert min(np.abs(np.subtract(a, b)).sum() for a, b in zip(colours, colours[1:], strict=False)) > 120
    assert text_colour((255, 255, 255)) == text_colour((0, 255, 255)) == (0, 0, 0)
    assert text_colour((0, 0, 0)) == text_colour((255, 0, 0)) == (255, 255, 255)


def test_sheet_places_pictures_row_by_row_and_keeps_their_shape():
    pictures = [np.full((50, 100, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = tile(pictures, columns=2, cell=(100, 100), gap=4)
    assert sheet.shape == (212, 212, 3)
    centres = [sheet[54, 54, 0], sheet[54, 158, 0], sheet[158, 54, 0]]
    assert centres == [10, 20, 30]
    assert (sheet == 10).all(-1).sum() == 50 * 100 and sheet[158, 158, 0] == 40


def test_sheet_of_one_pixel_and_with_captions():
    assert tile([plain(1, 1)], cell=(20, 30), gap=0).shape == (20, 30, 3)
    captioned = tile([plain(100, 100)], cell=(100, 100), gap=0, captions=["left"])
    strip = captioned.shape[0] - 100
    assert 10 < strip < 30 and (captioned[strip:] == GREY).all(), "a caption hides nothing of its picture"
    assert captioned[:strip].max() > 200, "and is written above it"
