"""Small native models and the state dicts of other projects, for the tests of this folder."""

import pickle
from pathlib import Path

import torch

from retinanet.config import get_cfg
from retinanet.modeling.build import build_model

SMALL = ("MODEL.NUM_CLASSES", 3, "MODEL.FPN.CHANNELS", 32, "MODEL.HEAD.NUM_CONVS", 1, "MODEL.BACKBONE.FREEZE_AT", 0)


def make_cfg(*opts):
    cfg = get_cfg()
    cfg.merge_from_list([*SMALL, *opts])
    return cfg


def make_model(*opts) -> torch.nn.Module:
    """Return a model of `SMALL` settings changed by KEY, VALUE, ...; its norms hold values that tell them apart."""
    torch.manual_seed(0)
    model = build_model(make_cfg(*opts)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if ".norm." in name and tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model


def backbone_only(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}


def write(path: Path, state: dict, **extra) -> str:
    """Write a state dict (with `extra` beside it, when given) as PyTorch does; returns the path as text."""
    torch.save({"model": state, **extra} if extra else state, path)
    return str(path)


def write_caffe2(path: Path, blobs: dict, protocol: int = 2) -> str:
    path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}, protocol))
    return str(path)
