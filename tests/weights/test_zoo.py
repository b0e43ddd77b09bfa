"""The public weights: names, addresses, configurations and the table in docs/weights.md agree."""

import re

import pytest
import torchvision
from conftest import ROOT
from weights.cases import R18, make_model

from retinanet.config import load_config
from retinanet.errors import UserError
from retinanet.weights.load import load_weights
from retinanet.weights.zoo import ZOO, resolve

DETECTORS = {name: entry for name, entry in ZOO.items() if entry.is_coco}


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_has_a_configuration_that_starts_from_it(name):
    cfg = load_config(ROOT / "configs" / ZOO[name].config)
    assert resolve(cfg.MODEL.WEIGHTS) == ZOO[name]
    assert cfg.MODEL.NUM_CLASSES == (91 if name.startswith("torchvision") else 80)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_starts_from_weights_that_are_known(path):
    weights = load_config(path).MODEL.WEIGHTS
    if "://" in weights:
        assert resolve(weights) in ZOO.values()


@pytest.mark.parametrize(
    ("builder", "weights"),
    [("retinanet_resnet50_fpn", "COCO_V1"), ("retinanet_resnet50_fpn_v2", "COCO_V1"), ("resnet50", "IMAGENET1K_V1"),
     ("resnet18", "IMAGENET1K_V1"), ("resnet34", "IMAGENET1K_V1"), ("resnet101", "IMAGENET1K_V1"),
     ("resnet152", "IMAGENET1K_V1"), ("resnext101_32x8d", "IMAGENET1K_V1"), ("resnext101_64x4d", "IMAGENET1K_V1"),
     ("resnet50_v2", "IMAGENET1K_V2")],
)  # fmt: skip
def test_torchvisions_addresses_and_ap_are_its_own(builder, weights):
    entry = ZOO[f"torchvision://{builder}"]
    name = builder if builder.startswith("retinanet") else builder.removesuffix("_v2")
    published = torchvision.models.get_model_weights(name)[weights]
    assert entry.url == published.url
    assert entry.ap == published.meta["_metrics"].get("COCO-val2017", {}).get("box_map", 0.0)


def test_addresses_of_detectron_carry_their_model_id():
    for name, entry in DETECTORS.items():
        if name.startswith("detectron://"):
            run = name.removeprefix("detectron://")
            assert re.search(
                rf"/detectron/3676\d{{4}}/12_2017_baselines/{re.escape(run)}\.yaml\.[\w.]+/output/", entry.url
            )


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("detectron://ImageNetPretrained/MSRA/R-50.pkl", ZOO["detectron://R-50"].url),
        ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", ZOO["detectron2://R-50"].url),
        ("https://example.org/w.pth#sha256=00000000", "https://example.org/w.pth#sha256=00000000"),
        (
            "timm://resnet50.a1_in1k",
            "https://huggingface.co/timm/resnet50.a1_in1k/resolve/main/model.safetensors",
        ),
    ],
)
def test_names_resolve_to_addresses(name, url):
    assert resolve(name).url == url


def test_coco_classes_are_known_whatever_the_spelling():
    alias = "detectron://retinanet_R-50-FPN_1x"
    path = ZOO[alias].url.removeprefix("https://dl.fbaipublicfiles.com/")
    for name in (alias, f"detectron://{path.removeprefix('detectron/')}", ZOO[alias].url, path.replace("%3A", ":")):
        name = name if "://" in name else f"detectron://{name.removeprefix('detectron/')}"
        assert resolve(name).is_coco


@pytest.mark.parametrize("name", ["detectron://R-5O", "ftp://host/w.pth", "timm://../x", "s3://bucket/w.pth"])
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match=r"no known name.*docs/weights\.md"):
        resolve(name)


def test_the_table_in_the_docs_lists_all_of_them():
    text = (ROOT / "docs" / "weights.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE))
    assert ZOO.keys() <= rows.keys()
    for name, entry in DETECTORS.items():
        cells = [cell.strip() for cell in rows[name].split("|")]
        assert str(entry.ap) in cells
        assert f"python tools/test_net.py --config configs/{entry.config}" in rows[name]


def test_a_missing_file_names_the_nearest_alias():
    with pytest.raises(UserError, match=r"there is no file 'detectron:/R-50'; did you mean 'detectron://R-50'"):
        load_weights(make_model(*R18), "detectron:/R-50")
