"""torchvision's parameter names in this project's, by hand, for tests that compare with its models."""

import re

from torch import Tensor

RULES = (
    (r"^backbone\.body\.", "backbone."),
    (r"^(?=conv1|bn1|layer)", "backbone."),  # a ResNet on its own
    (r"\blayer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\bbn(\d)\.", r"conv\1.norm."),
    (r"downsample\.0\.", "shortcut."),
    (r"downsample\.1\.", "shortcut.norm."),
    (r"^backbone\.fpn\.", "fpn."),
    (r"inner_blocks\.(\d)\.0\.", lambda match: f"lateral{int(match[1]) + 3}."),
    (r"layer_blocks\.(\d)\.0\.", lambda match: f"output{int(match[1]) + 3}."),
    (r"extra_blocks\.", ""),
    (r"classification_head\.conv\.(\d)\.0\.", r"cls_convs.\1."),
    (r"classification_head\.conv\.(\d)\.1\.", r"cls_convs.\1.norm."),
    (r"regression_head\.conv\.(\d)\.0\.", r"box_convs.\1."),
    (r"regression_head\.conv\.(\d)\.1\.", r"box_convs.\1.norm."),
    (r"classification_head\.cls_logits\.", "cls_pred."),
    (r"regression_head\.bbox_reg\.", "box_pred."),
)


def to_native(state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the state dict under this project's names, those that start with `prefix`, without it."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        if name.startswith(prefix):
            renamed[name.removeprefix(prefix)] = value
    return renamed
