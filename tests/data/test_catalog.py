"""The catalog: names to data sets, relative paths, and messages for all that can be wrong with it."""

import json

import cv2
import numpy as np
import pytest
import yaml

from retinanet.config.defaults import get_cfg
from retinanet.data.catalog import build_dataset, find_catalog, load_catalog, open_dataset
from retinanet.errors import UserError


def data_set(folder, name, num_images=2, categories=("a", "b"), first_id=1) -> dict:
    """Write a data set of white images of 6 x 4 pixels with one box each; returns its catalog entry."""
    (folder / name).mkdir()
    for i in range(num_images):
        cv2.imwrite(str(folder / name / f"{i}.png"), np.full((4, 6, 3), 255, np.uint8))
    content = {
        "images": [{"id": first_id + i, "file_name": f"{i}.png", "width": 6, "height": 4} for i in range(num_images)],
        "categories": [{"id": k, "name": category} for k, category in enumerate(categories)],
        "annotations": [
            {"image_id": first_id + i, "category_id": i % len(categories), "bbox": [i, 0, 2, 3]}
            for i in range(num_images)
        ],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))
    return {"images": name, "annotations": f"{name}.json"}


def catalog(folder, content) -> str:
    path = folder / "catalog.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_paths_are_relative_to_the_catalog_and_not_to_the_working_directory(tmp_path, monkeypatch):
    path = catalog(tmp_path, {"mine": data_set(tmp_path, "train")})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    dataset = open_dataset(path, "mine")
    assert dataset.name == "mine" and len(dataset) == 2 and dataset.file(0).is_absolute()


def test_shipped_catalog_is_found_from_any_directory_and_names_coco(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = load_catalog("datasets/catalog.yaml")
    assert {"coco_2017_train", "coco_2017_val", "synthetic_train", "synthetic_val"} <= set(entries)
    folder = find_catalog("datasets/catalog.yaml").parent
    assert entries["coco_2017_train"]["images"] == folder / "coco" / "train2017"
    assert entries["coco_2017_train"]["annotations"] == folder / "coco" / "annotations" / "instances_train2017.json"
    assert entries["coco_2017_train"]["max_degenerate"] == 2 and entries["coco_2017_val"]["max_degenerate"] == 0


def test_catalog_of_the_working_directory_comes_first(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    catalog(tmp_path / "datasets", {"mine": {"images": "a", "annotations": "b"}})
    monkeypatch.chdir(tmp_path)
    assert list(load_catalog("datasets/catalog.yaml")) == ["mine"]


def test_max_degenerate_of_the_entry_reaches_the_data_set(tmp_path):
    entry = data_set(tmp_path, "train")
    content = json.loads((tmp_path / "train.json").read_text())
    content["annotations"][0]["bbox"] = [0, 0, 2, 0]
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="1 degenerate boxes"):
        open_dataset(catalog(tmp_path, {"mine": entry}), "mine")
    dataset = open_dataset(catalog(tmp_path, {"mine": entry | {"max_degenerate": 1}}), "mine")
    assert dataset.box_counts.tolist() == [0, 1]


def test_config_names_the_catalog_and_the_box_convention(tmp_path):
    cfg = get_cfg()
    cfg.DATASETS.CATALOG = catalog(tmp_path, {"mine": data_set(tmp_path, "train")})
    assert build_dataset(cfg, "mine").target(0)["boxes"].tolist() == [[0, 0, 2, 3]]
    cfg.MODEL.BOX.CONVENTION = "detectron"
    assert build_dataset(cfg, ("mine",)).target(0)["boxes"].tolist() == [[0, 0, 1, 2]]


def test_unknown_name_gets_the_nearest_one(tmp_path):
    path = catalog(tmp_path, {"coco_2017_train": {"images": "a", "annotations": "b"}})
    with pytest.raises(UserError, match="'coco_2017_tarin' is not one of .* did you mean 'coco_2017_train'"):
        open_dataset(path, "coco_2017_tarin")
    with pytest.raises(UserError, match="no data set is named"):
        open_dataset(path, ())


def test_missing_data_says_what_is_missing_and_what_to_do(tmp_path):
    path = catalog(tmp_path, {"mine": {"images": "none/images", "annotations": "none/train.json"}})
    with pytest.raises(UserError) as caught:
        open_dataset(path, "mine")
    for part in ("'mine'", "none/images", "none/train.json", "catalog.yaml", "make demo", "datasets/README.md"):
        assert part in str(caught.value)
    entry = data_set(tmp_path, "train")
    with pytest.raises(UserError, match=r"the annotation file .*nothing\.json not found") as caught:
        open_dataset(catalog(tmp_path, {"mine": entry | {"annotations": "nothing.json"}}), "mine")
    assert "image folder" not in str(caught.value)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("a: [", "not valid YAML"),
        ("", "a catalog is a mapping"),
        ("- a", "a catalog is a mapping"),
        ("mine: 3", "data set 'mine' is 3"),
        ({"mine": {"images": "a"}}, "needs a path as 'annotations' and has None"),
        ({"mine": {"images": 3, "annotations": "b"}}, "needs a path as 'images' and has 3"),
        ({"mine": {"image": "a", "annotations": "b"}}, "has the key 'image', which is not one of .*mean 'images'"),
        ({"mine": {"images": "a", "annotations": "b", "max_degenerate": -1}}, "max_degenerate -1"),
        ({"mine": {"images": "a", "annotations": "b", "max_degenerate": True}}, "max_degenerate True"),
    ],
)
def test_malformed_catalogs_are_explained(tmp_path, content, expected):
    with pytest.raises(UserError, match=expected) as caught:
        load_catalog(catalog(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_missing_catalog_is_named():
    with pytest.raises(UserError, match=r"DATASETS\.CATALOG: the file no/such\.yaml does not exist"):
        load_catalog("no/such.yaml")


def test_several_data_sets_read_as_one(tmp_path):
    entries = {
        "one": data_set(tmp_path, "one", num_images=3),
        "two": data_set(tmp_path, "two", num_images=2, first_id=50),
    }
    path = catalog(tmp_path, entries)
    both = open_dataset(path, ("one", "two"))
    parts = [open_dataset(path, name) for name in entries]
    assert len(both) == 5 and both.image_ids.tolist() == [1, 2, 3, 50, 51] and both.name == "one+two"
    assert both.box_counts.tolist() == [1] * 5 and both.box_labels.tolist() == [0, 1, 0, 0, 1]
    assert both.sizes.tolist() == [[4, 6]] * 5 and both.num_classes == 2
    for i, (part, row) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        assert both.file(i) == parts[part].file(row) and both.image_size(i) == (4, 6)
        assert both.target(i)["boxes"].tolist() == parts[part].target(row)["boxes"].tolist()
        image, target = both.read(i)
        assert image.shape == (4, 6, 3) and target["labels"].tolist() == parts[part].target(row)["labels"].tolist()


def test_data_sets_with_other_categories_are_refused(tmp_path):
    entries = {"one": data_set(tmp_path, "one"), "two": data_set(tmp_path, "two", categories=("a", "c"))}
    with pytest.raises(UserError, match=r"'one' and 'two' cannot be trained on together.*\(1, 'b'\)"):
        open_dataset(catalog(tmp_path, entries), ["one", "two"])
