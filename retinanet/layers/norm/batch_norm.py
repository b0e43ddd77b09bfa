"""Batch normalization (arXiv 1502.03167): frozen, per process, and synchronized over processes."""

import torch
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.layers.norm.affine_channel import scale_and_shift


class FrozenBN(nn.Module):
    """Batch norm with everything fixed: y = (x - running_mean) / sqrt(running_var + eps) * weight + bias.

    All four are (C,) buffers: no optimizer sees them and `.train()` cannot thaw them.
    eps: inside the root. detectron2 and torchvision use 1e-5, maskrcnn-benchmark and torchvision's published RetinaNet
    v1 none at all, and the difference shows in detections.
    """

    has_statistics = False
    folds_in_training = True
    conv_kind = "plain"

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), fill))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift, _ = self.folded()
        return scale_and_shift(x, scale, shift)

    def folded(self) -> tuple[Tensor, Tensor, None]:
        return *_affine_of(self), None

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class BN(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, with its rate under a name that says what it is.

    update_rate: weight of the new batch in the running statistics, torch's `momentum`; `running_var` is unbiased.
    Training mode updates the statistics, unless the input is empty, and raises `UserError` for an input with one value
    per channel, which is its own mean.
    """

    has_statistics = True
    folds_in_training = False
    conv_kind = "plain"

    def __init__(self, channels: int, eps: float = 1e-5, update_rate: float = 0.1):
        super().__init__(channels, eps=eps, momentum=update_rate)

    def forward(self, x: Tensor) -> Tensor:
        _check_several_values(self, x)
        return super().forward(x)

    def folded(self) -> tuple[Tensor | None, Tensor | None, nn.Module | None]:
        return (None, None, self) if self.training else (*_affine_of(self), None)


class SyncBN(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`: BN over the batch of all processes; in one process the same as BN, on any device.

    torch synchronizes accelerators only; several processes on CPUs take sums over processes here, for the same result.
    """

    has_statistics = True
    folds_in_training = False
    conv_kind = "plain"
    options_of = "BN"

    def __init__(self, channels: int, eps: float = 1e-5, update_rate: float = 0.1):
        super().__init__(channels, eps=eps, momentum=update_rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and _num_processes() == 1:
            _check_several_values(self, x)
            # Not `nn.SyncBatchNorm.forward`: a process group of one is enough for it to refuse CPU tensors.
            return nn.modules.batchnorm._BatchNorm.forward(self, x)
        return self._forward_cpu(x) if self.training and x.device.type == "cpu" else super().forward(x)

    def _forward_cpu(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = _SumOverProcesses.apply(wide.new_tensor(x.numel() / x.shape[1]))
        mean = _SumOverProcesses.apply(wide.sum(dim=(0, 2, 3))) / count
        centred = wide - mean.view(1, -1, 1, 1)
        var = _SumOverProcesses.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)  # unbiased, as in BN
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale_and_shift(centred, scale, self.bias).to(x.dtype)

    def folded(self) -> tuple[Tensor | None, Tensor | None, nn.Module | None]:
        return (None, None, self) if self.training else (*_affine_of(self), None)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, grad)  # every process's loss depends on the sum


def _affine_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale = weight / sqrt(running_var + eps) and shift = bias - running_mean * scale, (C,) each."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _check_several_values(norm: nn.Module, x: Tensor) -> None:
    if norm.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise UserError(
            f"{type(norm).__name__}: an input of shape {tuple(x.shape)} has one value per channel and so no variance; "
            "use larger images, more images per batch, or a norm without batch statistics (GN, FrozenBN)"
        )


def _num_processes() -> int:
    connected = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if connected else 1
