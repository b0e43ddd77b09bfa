"""Anchors of three conventions: by hand, against stored anchors of the originals and torchvision's generator."""

import pytest
import torch
from detection_cases import reference
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionGenerator
from torchvision.models.detection.image_list import ImageList

from retinanet.errors import UserError
from retinanet.modeling.anchors import CELL_ANCHORS, AnchorGenerator


def generator(convention, scale=4.0, octaves=3, ratios=(0.5, 1.0, 2.0), **options):
    return AnchorGenerator(scale, octaves, ratios, convention, **options)


@pytest.mark.parametrize(
    ("convention", "square"),
    [("detectron", [-12, -12, 19, 19]), ("detectron2", [-16, -16, 16, 16]), ("torchvision", [-16, -16, 16, 16])],
)
def test_first_square_of_the_finest_level_is_32_pixels(convention, square):
    anchors = generator(convention, octaves=1, ratios=[1.0])((64, 64))
    assert anchors[0][0].tolist() == square
    assert anchors[0][1].tolist() == [square[0] + 8, square[1], square[2] + 8, square[3]]  # next column
    assert anchors[0][8].tolist() == [square[0], square[1] + 8, square[2], square[3] + 8]  # next row


def test_detectron_rounds_at_the_stride_and_scales_afterwards():
    generator_ = generator("detectron", octaves=1, ratios=[2.0])
    sizes = [(cell[0, 2:] - cell[0, :2] + 1).tolist() for cell in generator_.cells[:2]]
    assert sizes == [[24, 48], [44, 88]]  # round(8 / sqrt 2) = 6, round(16 / sqrt 2) = 11


def test_detectron2_rounds_nothing():
    wide = generator("detectron2", octaves=1, ratios=[0.5])((8, 8))[0][0]
    torch.testing.assert_close(wide, torch.tensor([-22.627417, -11.3137085, 22.627417, 11.3137085]))


def test_torchvision_rounds_corners_and_truncates_sizes():
    cell = generator("torchvision", octaves=3, ratios=[1.0]).cells[1]
    assert (cell[:, 2] - cell[:, 0]).tolist() == [64, 80, 100]  # int(101.59) = 101, its half 50.5 rounds to 50


def test_torchvision_shortens_the_stride_of_a_level_that_was_rounded_up():
    anchors = generator("torchvision", octaves=1, ratios=[1.0])((128, 160))[3]  # 2 x 3 cells of stride 64
    assert [anchor[0] + 128 for anchor in anchors.tolist()[:3]] == [0, 160 // 3, 2 * (160 // 3)]


@pytest.mark.parametrize("convention", CELL_ANCHORS)
def test_ratios_keep_the_order_that_they_are_given_in(convention):
    anchors = generator(convention, octaves=1, ratios=[1.0, 2.0, 0.5])((8, 8))[0]
    width, height = (anchors[:, 2:] - anchors[:, :2]).unbind(1)
    assert torch.equal(height / width > 1.2, torch.tensor([False, True, False]))
    assert torch.equal(height / width < 0.8, torch.tensor([False, False, True]))


@pytest.mark.parametrize(("convention", "size_step"), [("detectron", 2), ("detectron2", 2), ("torchvision", 1)])
def test_order_of_sizes_and_ratios_in_a_cell(convention, size_step):
    anchors = generator(convention, octaves=2, ratios=[0.5, 2.0])((8, 8))[0]
    area = (anchors[:, 2:] - anchors[:, :2]).prod(1)
    assert area[size_step] > 1.5 * area[0]  # the second size of the first ratio


@pytest.mark.parametrize("convention", CELL_ANCHORS)
def test_levels_round_their_size_up(convention):
    anchors = generator(convention)((129, 1))
    assert [len(level) for level in anchors] == [9 * rows for rows in (17, 9, 5, 3, 2)]
    assert all(level.dtype == torch.float32 for level in anchors)


def test_cells_of_caffe2_detectron():
    arrays = reference("caffe2/boxes")
    cells = generator("detectron", ratios=(1, 2, 0.5)).cells
    for level, cell in enumerate(cells, start=3):
        assert torch.equal(cell, arrays[f"cell_anchors_fpn{level}"])


@pytest.mark.parametrize(("project", "size"), [("detectron2", (128, 160)), ("torchvision", (192, 224))])
def test_anchors_of_detectron2_and_torchvision(project, size):
    arrays = reference(f"{project}/anchors")
    for level, anchors in enumerate(generator(project)(size), start=3):
        first, last = arrays[f"anchors/p{level}/first"], arrays[f"anchors/p{level}/last"]
        assert torch.equal(anchors[: len(first)], first)
        assert torch.equal(anchors[-len(last) :], last)


@pytest.mark.parametrize("size", [(128, 160), (800, 1216), (97, 33), (1, 1)])
def test_torchvision_anchors_equal_its_generator(size):
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    features = [torch.zeros(1, 1, -(-size[0] // stride), -(-size[1] // stride)) for stride in (8, 16, 32, 64, 128)]
    images = ImageList(torch.zeros(1, 3, *size), [size])
    (expected,) = TorchvisionGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)(images, features)
    assert torch.equal(torch.cat(generator("torchvision")(size)), expected)


def test_sizes_and_cells_are_as_many_as_asked_for():
    anchors = generator("detectron2", scale=2.0, octaves=2, ratios=[1.0], strides=(4, 16))
    assert anchors.num_anchors == 2
    first, second = anchors((16, 32))
    assert first.shape == (4 * 8 * 2, 4) and second.shape == (1 * 2 * 2, 4)
    torch.testing.assert_close(second[:2, 2], torch.tensor([16.0, 16 * 2**0.5]))


def test_anchors_are_made_once_for_a_size():
    anchors = generator("detectron2")
    assert anchors((64, 64), "cpu")[0] is anchors((64, 64), torch.device("cpu"))[0]
    assert len(anchors((64, 96), "cpu")[0]) != len(anchors((64, 64), "cpu")[0])
    assert anchors((64, 64), "meta")[0].device.type == "meta"


def test_only_the_last_sizes_are_kept():
    anchors = generator("detectron2")
    for width in range(1, 101):
        anchors((8, width))
    assert len(anchors._cache) == AnchorGenerator._MAX_CACHED


def test_anchors_of_inference_mode_do_not_reach_training():
    anchors = generator("detectron2")
    with torch.inference_mode():
        anchors((32, 32))
    deltas = torch.zeros(len(anchors((32, 32))[0]), 4, requires_grad=True)
    (deltas * anchors((32, 32))[0]).sum().backward()
    assert torch.equal(deltas.grad, anchors((32, 32))[0])


def test_compiling_does_not_fill_the_cache():
    anchors = generator("detectron2")
    compiled = torch.compile(lambda x: [level + x for level in anchors((64, 64), x.device)], backend="eager")
    result = compiled(torch.zeros(()))
    assert torch.equal(result[0], generator("detectron2")((64, 64))[0])
    assert not anchors._cache


def test_unknown_convention_names_the_nearest():
    with pytest.raises(UserError, match="MODEL.ANCHORS.CONVENTION: 'detectron3' .*did you mean 'detectron"):
        generator("detectron3")
