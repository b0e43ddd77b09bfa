"""Backbones of a few convolutions, for tests that build hundreds of models or save many checkpoints."""

from torch import Tensor, nn

LAYERS = (((3, 64), 8), ((64, 64), 2), ((64, 64), 2))  # channels in and out, stride


class TinyBackbone(nn.Module):
    """Takes the place of any entry of `BACKBONES`; whatever the configuration freezes, it is not this."""

    def __init__(self, conv, stride_in_1x1: bool, freeze_at: int):
        super().__init__()
        self.out_channels = {"c3": 64, "c4": 64, "c5": 64}
        self.convs = nn.ModuleList(conv(*channels, 3, stride=stride) for channels, stride in LAYERS)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c3 = self.convs[0](images).relu()
        c4 = self.convs[1](c3).relu()
        return {"c3": c3, "c4": c4, "c5": self.convs[2](c4).relu()}


class Thin(nn.Module):
    """A chain of strided convs with norms."""

    def __init__(self, conv, stride_in_1x1: bool, freeze_at: int):
        super().__init__()
        self.out_channels = {"c3": 16, "c4": 24, "c5": 32}
        self.stem = nn.Sequential(conv(3, 8, 3, stride=2), nn.ReLU(), conv(8, 16, 3, stride=2), nn.ReLU())
        self.conv3, self.conv4, self.conv5 = (conv(i, o, 3, stride=2) for i, o in ((16, 16), (16, 24), (24, 32)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c3 = self.conv3(self.stem(images)).relu()
        c4 = self.conv4(c3).relu()
        return {"c3": c3, "c4": c4, "c5": self.conv5(c4).relu()}


# KEY VALUE pairs of a configuration that trains on it in milliseconds
TINY = [
    *("MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.BACKBONE.NORM", "GN", "MODEL.FPN.CHANNELS", "16"),
    *("MODEL.NORM_OPTIONS.GN.GROUPS", "4", "MODEL.NORM_OPTIONS.BCN.GROUPS", "4", "MODEL.HEAD.NUM_CONVS", "1"),
    *("INPUT.MIN_SIZE_TRAIN", "32", "INPUT.MAX_SIZE_TRAIN", "48", "INPUT.MIN_SIZE_TEST", "32"),
    *("INPUT.MAX_SIZE_TEST", "48", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_BATCH", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "DEVICE", "cpu"),
]
