"""The backbones by name. A new depth is one entry in its family's file, a new family one file and one line here.

A backbone is made as `BACKBONES[name](conv=..., stride_in_1x1=..., freeze_at=...)`, where `conv` makes a convolution
with its norm (see `resnet.py`). It maps images (N, 3, H, W) to {"c3": ..., "c4": ..., "c5": ...} (more is allowed) at
strides 8, 16 and 32, and `out_channels` holds the channels of each.
"""

from retinanet.modeling.backbone.resnet import RESNETS

BACKBONES = {**RESNETS}
