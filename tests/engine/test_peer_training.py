"""torchvision's RetinaNet on our data path: what it is given, and that it learns."""

import json

import torch

from retinanet.config.load import load_config_text
from retinanet.data.synthetic import write_dataset
from retinanet.engine.peer_training import build_peer_run, images, originals, targets
from retinanet.structures import PAD_LABEL, Batch


def one_batch() -> Batch:
    return Batch(
        images=torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5),
        image_sizes=torch.tensor([[4, 5], [2, 3]]),
        original_sizes=torch.tensor([[8, 5], [2, 3]]),
        scales=torch.tensor([[1.0, 0.5], [1.0, 1.0]]),
        gt_boxes=torch.tensor([[[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]] * 2),
        gt_labels=torch.tensor([[1, PAD_LABEL]] * 2),
        image_ids=[7, 9],
    )


def test_images_are_cut_to_their_size_as_rgb_in_0_to_1():
    batch = one_batch()
    first, second = images(batch, bgr=True)
    assert first.shape == (3, 4, 5) and second.shape == (3, 2, 3)
    torch.testing.assert_close(first[0], batch.images[0, 2] / 255)  # BGR: red is the last plane
    torch.testing.assert_close(images(batch, bgr=False)[0][0], batch.images[0, 0] / 255)


def test_targets_leave_out_padding_rows():
    assert [len(target["boxes"]) for target in targets(one_batch())] == [1, 1]


def test_boxes_return_to_the_pixels_of_the_original_image():
    found = [{"boxes": torch.tensor([[1.0, 1.0, 4.0, 4.0]]), "scores": torch.ones(1), "labels": torch.zeros(1)}] * 2
    first, second = originals(found, one_batch())
    assert first["boxes"].tolist() == [[1.0, 2.0, 4.0, 8.0]] and second["boxes"].tolist() == [[1.0, 1.0, 4.0, 4.0]]


def test_a_run_learns_and_leaves_the_files_of_a_run(tmp_path):
    for split, count in (("train", 8), ("val", 4)):
        write_dataset(tmp_path, split, count, size=(64, 64))
    (tmp_path / "catalog.yaml").write_text(
        "a: {images: train, annotations: annotations/train.json}\nb: {images: val, annotations: annotations/val.json}\n"
    )
    cfg = load_config_text(
        f"DATASETS: {{CATALOG: '{tmp_path}/catalog.yaml', TRAIN: [a], TEST: [b]}}\n"
        "MODEL: {BACKBONE: {NAME: R18, FREEZE_AT: 0}}\nDEVICE: cpu\nDATALOADER: {NUM_WORKERS: 0}\n"
        "INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}\n"
        "SOLVER: {IMS_PER_BATCH: 4, REFERENCE_BATCH: 0, MAX_ITER: 6, BASE_LR: 0.01, WARMUP_ITERS: 1, LOG_PERIOD: 2}\n",
        "test",
    )
    metrics = build_peer_run(cfg, tmp_path / "run", torch.device("cpu"))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6, 6]
    assert lines[2]["loss"] < lines[0]["loss"] and lines[0]["images_per_s"] > 0
    assert lines[3]["AP"] == metrics["AP"] == json.loads((tmp_path / "run/inference/b/metrics.json").read_text())["AP"]
