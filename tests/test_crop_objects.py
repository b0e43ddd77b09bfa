"""docs/crop_objects.py: the objects of a COCO set, cut out by class, as tools/pretrain_backbone.py reads them."""

import json
import subprocess
import sys

import cv2
import numpy as np
from conftest import ROOT

from retinanet.data.image_folder import open_folders


def test_objects_are_cut_by_class_and_squares_without_objects_are_background(tmp_path):
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number in range(10):  # a red object of 40 x 60 pixels at (100, 50) in each image, a small one and a crowd
        picture = np.zeros((200, 300, 3), np.uint8)
        picture[50:110, 100:140] = (0, 0, 255)
        cv2.imwrite(str(tmp_path / f"images/{number}.png"), picture)
        images.append({"id": number, "file_name": f"{number}.png", "width": 300, "height": 200})
        for box, crowd in (([100, 50, 40, 60], 0), ([200, 150, 5, 5], 0), ([200, 0, 90, 90], 1)):
            numbers = {"id": len(annotations) + 1, "image_id": number, "iscrowd": crowd, "area": box[2] * box[3]}
            annotations.append({**numbers, "category_id": 7, "bbox": box})
    categories = [{"id": 7, "name": "red thing"}]
    (tmp_path / "a.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    options = ["--least", "5", "--most", "8", "--side", "48", "--output", str(tmp_path / "cuts")]
    command = [sys.executable, str(ROOT / "docs/crop_objects.py"), *options, f"{tmp_path}/images,{tmp_path}/a.json"]
    assert "red thing: 8" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    train, val = open_folders(tmp_path / "cuts")
    assert train.classes == ["background", "red thing"] and len(train) == 12 and len(val) == 4
    cut = cv2.imread(str(tmp_path / "cuts/train/red thing/00001.png"))
    assert cut.shape == (48, 32, 3)  # of 72 x 48 with the margins of 6 and 4 pixels
    assert abs((cut[..., 2] > 127).mean() - 40 * 60 / (72 * 48)) < 0.03
    for path in (tmp_path / "cuts").glob("*/background/*.png"):
        assert not cv2.imread(str(path)).any()
