"""A convolution that owns its norm, and the reparametrizations of its weight.

`Conv2d` is where a norm and a convolution meet. What a norm can fold into the convolution (`norm.folded()`) is
folded there on every forward, so a frozen norm costs no pass over the activations, in training either:
`scale * conv(x, W) + shift = conv(x, scale * W) + shift` exactly, zero padding included, and `scale * W` is
differentiable. Names come out as `conv.weight`, `conv.bias` and `conv.norm.*`.

A conv kind overrides `effective_weight` and nothing else; it is a pure function of the stored weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.errors import UserError
from retinanet.ops.conv import conv2d
from retinanet.ops.packed import ConstantWeight

Prepared = tuple[Tensor | ConstantWeight, Tensor | None, nn.Module | None]  # weight, bias, remaining norm


class Conv2d(nn.Module):
    """2-d convolution followed by an optional norm.

    weight: (out, in / groups, kernel, kernel), He normal over the fan out (arXiv 1502.01852; Detectron's MSRA fill).
    bias: (out,), zero. `bias=None` gives a conv a bias exactly when it has no norm, whose shift would repeat it.
    norm: a module as `retinanet.layers.norm` describes it, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        has_bias = norm is None if bias is None else bias
        self.bias = nn.Parameter(torch.zeros(out_channels)) if has_bias else None
        self.norm = norm
        self._frozen: tuple[list, Prepared] | None = None
        self.zero_inputs = 0  # channels of zeros that x has behind the weight's; see `ResNet.pad_images`
        self.fused = False  # on CUDA, one cuDNN call for convolution, bias, addition and ReLU; see `fuse_epilogues`
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    @property
    def takes_level(self) -> bool:
        """Whether `forward` needs the level of its input, for a norm that keeps statistics per level."""
        return getattr(self.norm, "takes_level", False)

    def effective_weight(self) -> Tensor:
        """Return the weight (out, in / groups, kernel, kernel) that convolves, before any norm is folded in."""
        return self.weight

    def prepare(self) -> Prepared:
        """Return weight, bias and remaining norm of the convolution that `forward` runs now.

        What is left of the norm runs on the output; None when it is folded whole. A norm folds where its statistics
        cannot move: always when it `folds_in_training`, otherwise in evaluation mode, which frozen stages are in.
        A conv that runs several times in one forward (the shared head) is prepared once and given the result.
        Everything is computed in the dtype of the weight and cast once to the dtype of autocast.

        A frozen conv, in evaluation mode and without gradient, keeps the result until one of its tensors is written to
        (not through `.data`, which hides that); on a CPU its weight is a `ConstantWeight`.
        """
        if not self._is_frozen():
            return self._prepare()
        tensors = [*self.parameters(), *self.buffers()]
        versions = ((tensor.data_ptr(), tensor._version) for tensor in tensors)
        key = [_autocast_dtype(self.weight.device.type), self.zero_inputs, *versions]
        if self._frozen is None or self._frozen[0] != key:
            weight, bias, rest = self._prepare()
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return weight, bias, rest  # its memory belongs to the graph
            self._frozen = key, (ConstantWeight(weight) if weight.device.type == "cpu" else weight, bias, rest)
        return self._frozen[1]

    def _is_frozen(self) -> bool:
        weight = self.weight
        return (
            not self.training
            and not any(parameter.requires_grad for parameter in self.parameters())
            and type(weight) is nn.Parameter
            and not weight.is_inference()
            and not torch.compiler.is_compiling()
        )

    def _prepare(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        weight, bias, rest = self.effective_weight(), self.bias, self.norm
        if rest is not None and (rest.folds_in_training or not rest.training):
            scale, shift, rest = rest.folded()
            if scale is not None:
                weight = scale.view(-1, 1, 1, 1) * weight
                bias = shift if bias is None else torch.addcmul(shift, scale, bias)
        if self.zero_inputs:
            weight = F.pad(weight, (0, 0, 0, 0, 0, self.zero_inputs))
        dtype = _autocast_dtype(weight.device.type)
        return (weight if dtype is None else weight.to(dtype)), bias, rest

    def forward(
        self,
        x: Tensor,
        level: int | None = None,
        prepared: Prepared | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """Return the normalized convolution of x (N, in, H, W) as (N, out, H', W'), in the memory format of x.

        level: position of x among the levels, for a norm that keeps statistics per level; None for every other.
        prepared: what `prepare` returned in this same step, to do that work once for several inputs.
        residual: (N, out, H', W'), added after the norm. relu: whether a ReLU ends it; `ops/conv.py` puts both into
        the convolution where that is one call.
        """
        weight, bias, rest = self.prepare() if prepared is None else prepared
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        if rest is None:
            return conv2d(x, weight, bias, *geometry, residual, relu, self.fused)
        x = conv2d(x, weight, bias, *geometry)
        x = rest(x) if level is None else rest(x, level)
        if residual is not None:
            x = x.add_(residual)
        return F.relu_(x) if relu else x

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels * self.groups}, {out_channels}, kernel_size={kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class CentralizedConv2d(Conv2d):
    """Convolution whose weight has mean zero over (in, kernel, kernel) of every output (MABN, arXiv 2001.06838)."""

    def effective_weight(self) -> Tensor:
        """Return W - mean(W), the mean of each output filter; the gradient flows through the mean."""
        # a sum and a division: on a CPU, with its backward, torch's mean takes 1.2 to 1.7 times as long
        return self.weight - self.weight.sum(dim=(1, 2, 3), keepdim=True) / self.weight[0].numel()


class StandardizedConv2d(Conv2d):
    """Convolution whose weight has mean zero and variance one over (in, kernel, kernel) (arXiv 1903.10520).

    eps_in: "var" adds 1e-5 to the variance, inside the root (joe-siyuan-qiao/Batch-Channel-Normalization), "std" to the
    deviation (joe-siyuan-qiao/pytorch-classification, WeightStandardization, and BCN's DeepLab code). Small weights
    come out otherwise under the other, so weights trained with one do not evaluate exactly with the other.
    """

    def __init__(self, *args, eps_in: str = "var", **kwargs):
        super().__init__(*args, **kwargs)
        if eps_in not in ("var", "std"):
            raise UserError(f"StandardizedConv2d: eps_in is {eps_in!r}; it must be 'var' or 'std'")
        self.eps_in = eps_in

    def effective_weight(self) -> Tensor:
        """Return (W - mean) / sqrt(var + 1e-5) or (W - mean) / (sqrt(var) + 1e-5), var unbiased, per output filter."""
        in_place = self.weight.is_contiguous()  # else channels_last, whose filters are rows of memory as well
        stored = self.weight if in_place else self.weight.permute(0, 2, 3, 1)
        filters = stored.flatten(1)
        weight = (_standardized_in_var if self.eps_in == "var" else _standardized_in_std)(filters).view(stored.shape)
        return weight if in_place else weight.permute(0, 3, 1, 2)


def _standardized_in_var(filters: Tensor) -> Tensor:
    """Return (W - mean) / sqrt(var + 1e-5) of the rows of `filters` (out, values), var unbiased.

    Layer norm, whose variance is biased, computes the same with eps and result rescaled: on a CPU in a quarter of the
    time of `var_mean` and its backward, which for R50 would be 0.3 s of a step.
    """
    values = filters.shape[1]
    unbiased = (values - 1) / values
    return F.layer_norm(filters, (values,), eps=1e-5 * unbiased) * unbiased**0.5


def _standardized_in_std(filters: Tensor) -> Tensor:
    """Return (W - mean) / (sqrt(var) + 1e-5) of the rows of `filters` (out, values), var unbiased."""
    centred = filters - filters.mean(dim=1, keepdim=True)
    std = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (filters.shape[1] - 1) ** 0.5
    return centred / (std + 1e-5)


def fuse_epilogues(model: nn.Module) -> None:
    """Let every `Conv2d` of `model` run with what follows it in one cuDNN call where there is one (`ops/conv.py`)."""
    for module in model.modules():
        if isinstance(module, Conv2d):
            module.fused = True


def kept_by_frozen(model: nn.Module) -> list:
    """Return what the frozen convolutions of `model` have prepared and keep, for a CUDA graph that reads it."""
    return [module._frozen for module in model.modules() if isinstance(module, Conv2d) and module._frozen is not None]


CONVS = {"plain": Conv2d, "standardized": StandardizedConv2d, "centralized": CentralizedConv2d}


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return the dtype that autocast runs convolutions in on this kind of device, None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # "meta" has no autocast: it raises
        return None
    return torch.get_autocast_dtype(device_type)
