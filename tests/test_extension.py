"""Adding a norm is one file and one line of a table, adding a backbone likewise: here both, by the tables alone.

It fails when extending starts to need a third place. The README's example is tried as it stands there.
"""

import re
from pathlib import Path

import pytest
import torch
from model_cases import small_cfg
from tiny_backbone import Thin
from torch import Tensor, nn

from retinanet.config import check_config
from retinanet.layers import norm as norm_package
from retinanet.layers.norm import make_norm
from retinanet.modeling import backbone as backbone_package
from retinanet.modeling.build import build_loss, build_model


class MeanNorm(nn.Module):
    """y = x - running_mean + bias: the simplest norm with statistics."""

    has_statistics = True
    folds_in_training = False
    conv_kind = "plain"

    def __init__(self, channels: int, update_rate: float = 0.1):
        super().__init__()
        self.update_rate = update_rate
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.running_mean
        if self.training:
            mean = x.mean((0, 2, 3), dtype=torch.float32)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.update_rate)
        return x + (self.bias - mean).to(x.dtype).view(1, -1, 1, 1)

    def folded(self) -> tuple[Tensor | None, Tensor | None, nn.Module | None]:
        if self.training:
            return None, None, self
        return torch.ones_like(self.bias), self.bias - self.running_mean, None


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setitem(norm_package.NORMS, "MeanNorm", MeanNorm)
    monkeypatch.setitem(backbone_package.BACKBONES, "Plain", Thin)


def train(cfg, steps: int = 2) -> list[float]:
    torch.manual_seed(0)
    model, loss = build_model(cfg).train(), build_loss(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = model.normalize(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), torch.tensor([[64, 64]] * 2))
    gt_boxes, gt_labels = torch.tensor([[[4.0, 4.0, 40.0, 40.0]]] * 2), torch.tensor([[1], [2]])
    totals = []
    for _ in range(steps):
        total = sum(loss(model(images), gt_boxes, gt_labels).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    return totals


@pytest.mark.parametrize(
    "backbone, norm", [("Plain", "MeanNorm"), ("R18", "MeanNorm"), ("Plain", "GN"), ("Plain", "BCN")]
)
def test_new_names_train_by_the_tables_alone(tables, backbone, norm):
    groups = [item for name in ("GN", "BCN") for item in (f"MODEL.NORM_OPTIONS.{name}.GROUPS", 4)]
    cfg = small_cfg("MODEL.BACKBONE.NAME", backbone, "NORMS", [norm] * 3, "MODEL.BACKBONE.FREEZE_AT", 0, *groups)
    first, second = train(cfg)
    assert second < first


def test_norm_of_the_readme_trains(monkeypatch):
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    code = re.search(r"^## Add a norm$.*?^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    defined: dict = {}
    exec(code, defined)
    name = re.search(r'Then `"(\w+)": \1` in `NORMS`', text)[1]
    monkeypatch.setitem(norm_package.NORMS, name, defined[name])
    first, second = train(small_cfg("NORMS", [name] * 3))
    assert second < first
    assert len(code.splitlines()) <= 32


def test_configuration_check_knows_what_the_tables_hold(tables):
    cfg = small_cfg("MODEL.BACKBONE.NAME", "Plain", "NORMS", ["MeanNorm"] * 3)
    check_config(cfg, norms=norm_package.NORMS, backbones=backbone_package.BACKBONES)


def test_new_norm_folds_and_keeps_statistics_per_level(tables):
    model = build_model(small_cfg("NORMS", ["MeanNorm"] * 3))
    assert [name for name, _ in model.head.cls_convs[0].norm.named_buffers()] == [
        f"levels.{level}.running_mean" for level in range(5)
    ]
    conv = model.fpn.output3
    x = torch.randn(2, 32, 5, 5)
    conv.train()(x)
    folded, unfolded = conv.eval()(x), conv.norm(nn.functional.conv2d(x, conv.weight, padding=1))
    torch.testing.assert_close(folded, unfolded, rtol=1e-5, atol=1e-5)


def test_names_outside_the_tables_are_unknown():
    with pytest.raises(ValueError, match="'MeanNorm' is not one of"):
        make_norm("MeanNorm", 8)
