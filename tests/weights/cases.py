"""Small native models and the state dicts of other projects, for the tests of this folder."""

import pickle
from pathlib import Path

import torch

from retinanet.config import dump_config, get_cfg
from retinanet.modeling.build import build_model
from retinanet.weights.report import Report

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


AFFINE = ("MODEL.BACKBONE.NORM", "AffineChannel")
BN, FROZEN, GN = (("MODEL.BACKBONE.NORM", norm) for norm in ("BN", "FrozenBN", "GN"))
R18, R50 = (("MODEL.BACKBONE.NAME", name) for name in ("R18", "R50"))


def checkpoint(path, model, cfg, classes=("a", "b", "c"), **more) -> str:
    listed = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    state = {"format": "retinanet", "version": 1, "iteration": 7, "config": dump_config(cfg), "classes": listed}
    return write(path, model.state_dict(), **state, **more)


def assert_complete(report: Report, model: torch.nn.Module, names_in_file: set[str]) -> None:
    """Every tensor of the model is in one list of the report, every one of the file in another."""
    ours = [report.matched, report.converted, report.reshaped, report.initialised, report.reinitialised, report.missing]
    assert sorted(sum(ours, [])) == sorted(model.state_dict())
    theirs = report.used + report.unused + report.unexpected
    assert sorted(theirs) == sorted(names_in_file)


def image() -> torch.Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))


def outputs(model: torch.nn.Module, pixels: torch.Tensor | None = None) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model.eval()(image() if pixels is None else pixels)
    return [*out["logits"], *out["deltas"]]


def assert_same_function(one, other, pixels=None, **tolerance) -> None:
    for found, expected in zip(outputs(one, pixels), outputs(other), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)
