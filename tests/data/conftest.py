"""The data set of nine small images that the tests of the loaders share."""

import pytest
from loader_cases import write_nine_images

from retinanet.data.coco import CocoDataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    write_nine_images(path)
    return path


@pytest.fixture
def dataset(folder):
    return CocoDataset(folder, folder / "x.json")
