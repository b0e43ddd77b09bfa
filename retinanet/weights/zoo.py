"""Public weights by short names: where they are, what they are said to reach, and which configuration runs them.

Sources: Detectron `MODEL_ZOO.md` and `projects/GN/README.md`, detectron2 `MODEL_ZOO.md` and `model_zoo/model_zoo.py`,
torchvision `models/resnet.py` and `models/detection/retinanet.py`, the READMEs of megvii-model/MABN and of
joe-siyuan-qiao's Batch-Channel-Normalization (`imagenet/`) and pytorch-classification. AP is box AP on COCO val2017 as
published there; it was not measured here.
"""

import re
from dataclasses import dataclass

from retinanet.errors import UserError, nearest

_DETECTRON = "https://dl.fbaipublicfiles.com/detectron/"
_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
_JHU = "https://cs.jhu.edu/~syqiao/"
_PYTORCH = "https://download.pytorch.org/models/"
_TRAINED_ON = "output/train/coco_2014_train%3Acoco_2014_valminusminival/retinanet/model_final.pkl"
_BASES = {"detectron://": _DETECTRON, "detectron2://": _DETECTRON2}


@dataclass(frozen=True)
class Entry:
    """One public file. config: the file under configs/ that runs it. ap: as published, 0 for ImageNet models.

    by_hand: the page where a person must fetch it, for files that have no address of their own.
    """

    url: str
    config: str = ""
    ap: float = 0.0
    by_hand: str = ""

    @property
    def is_coco(self) -> bool:
        return self.ap > 0


def _detectron(run: str, config: str, ap: float) -> Entry:
    return Entry(f"{_DETECTRON}{run.replace('/', '/12_2017_baselines/', 1)}/{_TRAINED_ON}", f"caffe2/{config}", ap)


def _detectron2(run: str, config: str, ap: float) -> Entry:
    return Entry(f"{_DETECTRON2}COCO-Detection/{run}", f"detectron2/{config}", ap)


ZOO = {
    "detectron://retinanet_R-50-FPN_1x": _detectron(
        "36768636/retinanet_R-50-FPN_1x.yaml.08_29_48.t4zc9clc", "retinanet_R50_FPN.yaml", 35.7
    ),
    "detectron://retinanet_R-50-FPN_2x": _detectron(
        "36768677/retinanet_R-50-FPN_2x.yaml.08_30_38.sgZIQZQ5", "retinanet_R50_FPN_2x.yaml", 35.7
    ),
    "detectron://retinanet_R-101-FPN_1x": _detectron(
        "36768744/retinanet_R-101-FPN_1x.yaml.08_31_38.5poQe1ZB", "retinanet_R101_FPN.yaml", 37.7
    ),
    "detectron://retinanet_R-101-FPN_2x": _detectron(
        "36768840/retinanet_R-101-FPN_2x.yaml.08_33_29.grtM0RTf", "retinanet_R101_FPN_2x.yaml", 37.8
    ),
    "detectron://retinanet_X-101-64x4d-FPN_1x": _detectron(
        "36768875/retinanet_X-101-64x4d-FPN_1x.yaml.08_34_37.FSXgMpzP", "retinanet_X101_64x4d_FPN.yaml", 39.8
    ),
    "detectron://retinanet_X-101-64x4d-FPN_2x": _detectron(
        "36768907/retinanet_X-101-64x4d-FPN_2x.yaml.08_35_40.pF3nzPpu", "retinanet_X101_64x4d_FPN_2x.yaml", 39.2
    ),
    "detectron://retinanet_X-101-32x8d-FPN_1x": _detectron(
        "36769563/retinanet_X-101-32x8d-FPN_1x.yaml.08_42_05.06JTK6vJ", "retinanet_X101_32x8d_FPN.yaml", 39.5
    ),
    "detectron://retinanet_X-101-32x8d-FPN_2x": _detectron(
        "36769641/retinanet_X-101-32x8d-FPN_2x.yaml.08_42_55.sUPnwXI5", "retinanet_X101_32x8d_FPN_2x.yaml", 38.6
    ),
    "detectron2://retinanet_R_50_FPN_1x": _detectron2(
        "retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl", "retinanet_R50_FPN_1x.yaml", 37.4
    ),
    "detectron2://retinanet_R_50_FPN_3x": _detectron2(
        "retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl", "retinanet_R50_FPN_3x.yaml", 38.7
    ),
    "detectron2://retinanet_R_101_FPN_3x": _detectron2(
        "retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl", "retinanet_R101_FPN_3x.yaml", 40.4
    ),
    "torchvision://retinanet_resnet50_fpn": Entry(
        f"{_PYTORCH}retinanet_resnet50_fpn_coco-eeacb38b.pth", "torchvision/retinanet_resnet50_fpn.yaml", 36.4
    ),
    "torchvision://retinanet_resnet50_fpn_v2": Entry(
        f"{_PYTORCH}retinanet_resnet50_fpn_v2_coco-5905b1c5.pth", "torchvision/retinanet_resnet50_fpn_v2.yaml", 41.5
    ),
    "torchvision://resnet18": Entry(f"{_PYTORCH}resnet18-f37072fd.pth"),
    "torchvision://resnet34": Entry(f"{_PYTORCH}resnet34-b627a593.pth"),
    "torchvision://resnet50": Entry(f"{_PYTORCH}resnet50-0676ba61.pth"),
    "torchvision://resnet50_v2": Entry(f"{_PYTORCH}resnet50-11ad3fa6.pth"),
    "torchvision://resnet101": Entry(f"{_PYTORCH}resnet101-63fe2227.pth"),
    "torchvision://resnet152": Entry(f"{_PYTORCH}resnet152-394f9c45.pth"),
    "torchvision://resnext101_32x8d": Entry(f"{_PYTORCH}resnext101_32x8d-8ba56ff5.pth"),
    "torchvision://resnext101_64x4d": Entry(f"{_PYTORCH}resnext101_64x4d-173b62eb.pth"),
    "detectron://R-50": Entry(f"{_DETECTRON}ImageNetPretrained/MSRA/R-50.pkl"),
    "detectron://R-101": Entry(f"{_DETECTRON}ImageNetPretrained/MSRA/R-101.pkl"),
    "detectron://R-50-GN": Entry(f"{_DETECTRON}ImageNetPretrained/47261647/R-50-GN.pkl"),
    "detectron://R-101-GN": Entry(f"{_DETECTRON}ImageNetPretrained/47592356/R-101-GN.pkl"),
    "detectron://X-101-64x4d": Entry(f"{_DETECTRON}ImageNetPretrained/FBResNeXt/X-101-64x4d.pkl"),
    "detectron://X-101-32x8d": Entry(f"{_DETECTRON}ImageNetPretrained/20171220/X-101-32x8d.pkl"),
    "detectron2://R-50": Entry(f"{_DETECTRON2}ImageNetPretrained/MSRA/R-50.pkl"),
    "detectron2://R-101": Entry(f"{_DETECTRON2}ImageNetPretrained/MSRA/R-101.pkl"),
    "bcn://rn50_bcn_ws.pth": Entry(f"{_JHU}BatchChannelNormalization/rn50_bcn_ws.pth"),
    "bcn://rn101_bcn_ws.pth": Entry(f"{_JHU}BatchChannelNormalization/rn101_bcn_ws.pth"),
    "ws://R-50-GN-WS.pth.tar": Entry(f"{_JHU}WeightStandardization/R-50-GN-WS.pth.tar"),
    "ws://R-101-GN-WS.pth.tar": Entry(f"{_JHU}WeightStandardization/R-101-GN-WS.pth.tar"),
    "mabn://R50-wc.pth": Entry(
        "mabn://R50-wc.pth", by_hand="https://www.dropbox.com/sh/fbsi6935vmatbi9/AAA2jv0EBcSgySTgZnNZ3lmPa?dl=0"
    ),
}


def resolve(name: str) -> Entry:
    """Return the entry of an alias, of a path below `detectron://` or `detectron2://`, of `timm://MODEL`, or of a URL.

    Raises `UserError` for a scheme or an alias that nobody knows.
    """
    if name in ZOO:
        return ZOO[name]
    scheme, _, rest = name.partition("://")
    base = _BASES.get(f"{scheme}://")
    if base and rest.endswith((".pkl", ".pth")):
        url = base + rest.replace(":", "%3A")
        return next((entry for entry in ZOO.values() if entry.url == url), Entry(url))
    if scheme == "timm" and re.fullmatch(r"[\w.-]+", rest):
        return Entry(f"https://huggingface.co/timm/{rest}/resolve/main/model.safetensors")
    if scheme in ("http", "https"):
        return next((entry for entry in ZOO.values() if entry.url == name.partition("#")[0]), Entry(name))
    raise UserError(f"MODEL.WEIGHTS: {name!r} is no known name{nearest(name, ZOO)}; docs/weights.md lists them all")
