"""Data path and scoring beside their peers: the same images, the same numbers, honest times."""

import json
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT

from retinanet.config.defaults import get_cfg
from retinanet.config.load import dump_config
from retinanet.engine import benchmark_data, benchmark_scoring
from retinanet.engine.benchmark import Settings
from retinanet.engine.benchmark_here import take_turns
from retinanet.engine.benchmark_tasks import Job
from retinanet.errors import UserError


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("benchmark", None)
    import benchmark as tool

    return tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven JPEGs, lying and upright, smooth so that ways of resizing agree."""
    path = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate([(90, 120), (120, 90), (80, 120)] * 2 + [(100, 100)]):
        small = generator.integers(0, 256, (6, 8, 3)).astype(np.uint8)
        image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(path / f"{number}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return path


def data_cfg():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.MODEL.CHANNEL_ORDER = 160, 267, "RGB"
    return cfg


def test_four_ways_give_the_same_pixels(folder):
    cfg, dataset, batches = data_cfg(), benchmark_data.FolderImages(folder), [[0, 2], [1]]
    made = [benchmark_data._BUILDERS[name](cfg, dataset, batches) for name in benchmark_data.VARIANTS]
    ours, floor, pil, floats = made
    batch = ours(0)
    assert batch.images.dtype == torch.uint8 and tuple(batch.images.shape) == (2, 3, 160, 256)
    for number, row in enumerate([0, 2]):
        height, width = batch.image_sizes[number].tolist()
        own = batch.images[number, :, :height, :width].float()
        other = pil(0)[number].flip(0).float()
        assert (own - other).abs().mean() < 1.5, row
        bare = torch.from_numpy(floor(0)[number, :height, :width].copy()).permute(2, 0, 1).flip(0)
        assert own.equal(bare.float()), row  # the floor leaves out nothing that changes a pixel
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        peer = (floats(0)[number] * std[:, None, None] + mean[:, None, None])[:, : height - 1, : width - 1] * 255
        assert (own[:, : height - 1, : width - 1] - peer).abs().mean() < 1.5, row


def test_data_report_compares_milliseconds_per_image(tool, folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--data", "--images", folder, "--batch", 2, "--steps", 3, "--rounds", 2, "--warm-up", 1, "--json", out]
    tool.main([*map(str, arguments), "INPUT.MIN_SIZE_TEST", "160", "INPUT.MAX_SIZE_TEST", "267", "DEVICE", "cpu"])
    written = json.loads(out.read_text())
    assert [row["variant"] for row in written["results"]] == ["ours", "floor", "pil", "float"]
    first = written["results"][0]
    assert first["ratio"] == 1 and first["images_per_s"] == pytest.approx(1000 / first["ms"])
    assert all(len(row["rounds_ms"]) == 2 and row["ms"] > 0 for row in written["results"])
    settings = written["settings"]
    assert (settings["short_side"], settings["batch"], written["machine"]["threads"]) == (160, 2, 1)
    captured = capsys.readouterr()
    assert "| float" in captured.out and "5 images, 0.01 megapixels on average" in captured.err


@pytest.mark.parametrize(("content", "message"), [(None, "holds no .jpg"), (b"no image", "x.jpg is not an image")])
def test_folders_without_images_are_named(tool, tmp_path, content, message):
    if content:
        (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(UserError, match=message):
        tool.main(["--data", "--images", str(tmp_path), "DEVICE", "cpu"])
    with pytest.raises(UserError, match="--images: the folder .*none does not exist"):
        tool.main(["--data", "--images", str(tmp_path / "none"), "DEVICE", "cpu"])


def test_scoring_report_has_equal_numbers(tool, tmp_path):
    out = tmp_path / "out.json"
    tool.main(
        ["--scoring", "--batch", "30", "--scores", "40", "--rounds", "1", "--warm-up", "0", "--json", str(out)]
        + ["DEVICE", "cpu"]
    )
    ours, faster, reference = json.loads(out.read_text())["results"]
    assert [row["variant"] for row in (ours, faster, reference)] == ["ours", "faster", "pycocotools"]
    assert ours["AP"] == reference["AP"] > 1 and ours["max_difference"] == 0 and faster["max_difference"] < 1e-9


def test_scoring_case_has_the_counts_of_coco(tmp_path):
    truth, found = (json.loads(path.read_text()) for path in benchmark_scoring.write_case(tmp_path, 100, 50, 8))
    assert len(truth["images"]) == 100 and len(truth["annotations"]) == 730 and len(found) == 5000
    assert {row["category_id"] for row in found} == set(range(1, 9))
    assert sum(row["iscrowd"] for row in truth["annotations"]) == 9
    again = benchmark_scoring.write_case(tmp_path, 100, 50, 8)
    assert json.loads(again[1].read_text()) == found


def test_variants_change_places_and_their_time_is_per_unit():
    order = []
    job = Job("a", "data", dump_config(get_cfg()), (1, 1), 1)
    work = [lambda piece, name=name: order.append((name, piece)) for name in "abc"]
    rows = take_turns([job] * 3, work, 2, 5, Settings(2, 1, 0), lambda line: None)
    assert [name for name, _ in order] == list("abcbcabcacab")
    assert len(rows) == 3 and all(0 <= row["cpu_ms"] < 1 for row in rows)  # the clock would see other processes
