"""3 x 3 convolutions with half of the multiplications: Winograd's minimal filtering F(4, 3) along the rows of a map.

Six neighbours x of a row give four outputs of a filter w of three taps: y = A [(G w) * (B x)] (Winograd 1980; Lavin and
Gray, arXiv 1509.09308). Here the product in brackets is a sum over channels and the three rows of the filter, that is
one convolution with a 3 x 1 kernel in six groups, which oneDNN computes at its full rate; B, G and A are additions.
Along one axis only, because the second would save less than its additions cost once maps have left the cache.

The six points where the polynomials are evaluated are 0, +-3/4, +-3/2 and infinity: with these the root mean square
error is 1.4 to 1.7 times that of a direct convolution (256 channels; 2.5 times with the usual 0, +-1, +-2, infinity).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from retinanet.ops.packed import ConstantWeight

_NEAR, _FAR = 0.75, 1.5  # the points beside 0 and infinity, with both signs
_NEAR2, _FAR2 = _NEAR**2, _FAR**2
_POINTS = 6
_TILE = 4  # outputs of a row that one product gives
_GEOMETRY = ([1, 1], [1, 0], [1, 1], _POINTS)  # stride, padding, dilation and groups of the products
# From which number of channels (of the fewer) and of positions on it is the faster way. In detection the positions are
# those of one image, so that its results do not depend on the images beside it.
_MIN_CHANNELS, _MIN_IMAGE = 128, 1000
_MIN_CHANNELS_TRAINED, _MIN_BATCH_TRAINED = 256, 2048
_MAX_CHANNELS = 1024  # the products of more, as for logits of many classes, would take too much memory
_MAX_WASTE = 0.15  # of a row that ends within a tile


def suits(
    x: Tensor, weight: Tensor | ConstantWeight, stride: int, padding: int, dilation: int, groups: int
) -> bool:
    """Return whether `conv2d` here computes this convolution, and is faster: 3 x 3 on large float32 maps on a CPU.

    Without gradients only packed weights make it faster.
    """
    plain, packed = _unpack(weight)
    num_images, in_channels, height, width = x.shape
    channels, positions = min(in_channels, len(plain)), height * width
    if torch.is_grad_enabled() and (x.requires_grad or plain.requires_grad):
        large = channels >= _MIN_CHANNELS_TRAINED and num_images * positions >= _MIN_BATCH_TRAINED
    else:
        large = packed and channels >= _MIN_CHANNELS and positions >= _MIN_IMAGE
    return (
        large
        and x.device.type == "cpu"
        and x.dtype == plain.dtype == torch.float32
        and plain.shape[2:] == (3, 3)
        and max(in_channels, len(plain)) <= _MAX_CHANNELS
        and stride == padding == dilation == groups == 1
        and -width % _TILE <= _MAX_WASTE * width
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def conv2d(x: Tensor, weight: Tensor | ConstantWeight, bias: Tensor | None) -> Tensor:
    """Return conv(x, weight) + bias, (N, out, H, W) in channels_last, with its gradients, for what `suits`.

    weight: (out, in, 3, 3), or one that is kept packed for oneDNN. bias: (out,) or None.
    """
    plain, _ = _unpack(weight)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, plain, bias)):
        return _Differentiable.apply(x, plain, bias)
    return _forward(x, weight, bias)


def _unpack(weight: Tensor | ConstantWeight) -> tuple[Tensor, bool]:
    packed = isinstance(weight, ConstantWeight)
    return weight.plain if packed else weight, packed


def _forward(x: Tensor, weight: Tensor | ConstantWeight, bias: Tensor | None) -> Tensor:
    plain, packed = _unpack(weight)
    num_images, _, height, width = x.shape
    shape = num_images, len(plain), height, width + -width % _TILE
    result = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    bias = None if bias is None else _split_bias(bias)
    if packed:  # one image after the other is as fast, and needs the memory of one
        split = weight.derived(_split_weight)
        for image, part in zip(x.split(1), result.split(1), strict=True):
            _gather(_packed_products(_spread(image), split, bias), part)
    else:
        _gather(F.conv2d(_spread(x), _split_weight(plain), bias, *_GEOMETRY), result)
    return _cut(result, width)


def _packed_products(terms: Tensor, split: ConstantWeight, bias: Tensor | None) -> Tensor:
    stride, padding, dilation, groups = _GEOMETRY
    weight = split.packed_for(tuple(terms.shape), *_GEOMETRY)
    call = torch.ops.mkldnn._convolution_pointwise
    return call(terms, weight, bias, padding, stride, dilation, groups, "none", [], "")


class _Differentiable(torch.autograd.Function):
    """Saves what a direct convolution saves, its input and weight: B x and G w are made again."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        if for_x or for_weight:
            grad_products, terms = _gather_backward(grad), _spread(x)
        if for_weight:
            grad_weight = _split_weight_backward(_products_with_rows(grad_products, terms))
        if for_x:
            split = _split_weight(weight)
            stride, padding, dilation, groups = _GEOMETRY
            grad_terms, _, _ = torch.ops.aten.convolution_backward(
                grad_products, terms, split, None, stride, padding, dilation, False, [0, 0], groups,
                [True, False, False],
            )  # fmt: skip
            grad_x = _spread_backward(grad_terms, x.shape[3])
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if for_bias else None


def _split_weight(weight: Tensor) -> Tensor:
    """Return G w of `weight` (out, in, 3, 3) as that of the six groups (6 * out, in, 3, 1), in channels_last."""
    left, middle, right = weight.permute(0, 2, 3, 1).unbind(2)
    split = weight.new_empty(_POINTS, *left.shape)  # (6, out, 3, in)
    torch.mul(left, 1 / (_NEAR2 * _FAR2), out=split[0])
    split[1] = right
    for plus, minus, point, scale in _weight_rows():
        even, odd = torch.add(left, right, alpha=point**2).mul_(scale), middle * (point * scale)
        torch.add(even, odd, out=split[plus])
        torch.sub(even, odd, out=split[minus])
    return split.flatten(0, 1).unsqueeze(2).permute(0, 3, 1, 2)


def _split_weight_backward(grad: Tensor) -> Tensor:
    """Return the gradient of `weight` (out, in, 3, 3), in channels_last, given that of G w as (6, out, 3, in)."""
    left, middle, right = grad[0] / (_NEAR2 * _FAR2), torch.zeros_like(grad[0]), grad[1].clone()
    for plus, minus, point, scale in _weight_rows():
        even, odd = grad[plus] + grad[minus], grad[plus] - grad[minus]
        left.add_(even, alpha=scale)
        middle.add_(odd, alpha=point * scale)
        right.add_(even, alpha=point**2 * scale)
    return torch.stack([left, middle, right], dim=2).permute(0, 3, 1, 2)


def _split_bias(bias: Tensor) -> Tensor:
    """Return what has to be added to the six products (6 * out,) so that each output gets `bias` (out,)."""
    shares = bias.new_zeros(_POINTS, 1)
    for plus, minus, point, scale in _weight_rows():
        other = _NEAR + _FAR - point
        shares[plus], shares[minus] = (
            (1 + sign * point) * (1 - other**2) * point * sign * scale for sign in (1, -1)
        )
    return (shares * bias).flatten()


def _weight_rows():
    """Yield the rows of +p and of -p in G, p, and 1 / product of the distances of p to the other points."""
    for plus, point, other in ((2, _NEAR, _FAR), (3, _FAR, _NEAR)):
        yield plus, plus + 2, point, 1 / (2 * point**2 * (point**2 - other**2))


def _spread(x: Tensor) -> Tensor:
    """Return B x of `x` (N, C, H, W): (N, 6 * C, H, T), T = W / 4 rounded up, in channels_last."""
    num_images, channels, height, width = x.shape
    tiles = -(-width // _TILE)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, _TILE * tiles + 1 - width))
    strides = (*padded.stride()[:2], _TILE * channels, 1)
    x01, x12, x23, x34, x45 = (  # two neighbouring columns of each tile, (N, H, T, 2 * C)
        padded.as_strided((num_images, height, tiles, 2 * channels), strides, column * channels)
        for column in range(_POINTS - 1)
    )
    terms = x.new_empty(num_images, height, tiles, _POINTS * channels)
    ends = terms[..., : 2 * channels]
    inner = torch.sub(x23, x01, alpha=_NEAR2)
    torch.sub(torch.sub(x45, x23, alpha=_NEAR2, out=ends), inner, alpha=_FAR2, out=ends)
    _, _, plus_near, plus_far, minus_near, minus_far = terms.chunk(_POINTS, dim=3)
    for plus, minus, point, other2 in ((plus_near, minus_near, _NEAR, _FAR2), (plus_far, minus_far, _FAR, _NEAR2)):
        odd, even = torch.sub(x34, x12, alpha=other2, out=inner).chunk(2, dim=3)
        torch.add(even, odd, alpha=point, out=plus)
        torch.sub(even, odd, alpha=point, out=minus)
    return terms.permute(0, 3, 1, 2)


def _spread_backward(grad: Tensor, width: int) -> Tensor:
    """Return the gradient of x (N, C, H, width), given that of B x; writes to `grad`."""
    zero, infinite, near_odd, far_odd, near, far = _even_and_odd(grad)
    num_images, height, tiles, channels = zero.shape
    result = grad.new_empty(num_images, height, _TILE * tiles, channels).permute(0, 3, 1, 2)
    x1, x2, x3, x4 = _columns(result)  # x0 and x5 belong to the tiles beside
    torch.add(near, far, alpha=_NEAR2 / _FAR2, out=x2).mul_(-_FAR2).sub_(zero, alpha=_NEAR2 + _FAR2)
    torch.add(near, far, out=x4).add_(zero)
    x4[:, :, :-1].add_(zero[:, :, 1:], alpha=_NEAR2 * _FAR2)
    torch.add(near_odd, far_odd, alpha=_FAR / _NEAR, out=x3).mul_(_NEAR).sub_(infinite, alpha=_NEAR2 + _FAR2)
    torch.add(near_odd, far_odd, alpha=_NEAR / _FAR, out=x1).mul_(-_NEAR * _FAR2).add_(infinite, alpha=_NEAR2 * _FAR2)
    x1[:, :, 1:].add_(infinite[:, :, :-1])
    return _cut(result, width)


def _gather(products: Tensor, result: Tensor) -> None:
    """Write A m of `products` m (N, 6 * C, H, T) to `result` (N, C, H, 4 * T) in channels_last; writes to m as well."""
    zero, infinite, near_odd, far_odd, near, far = _even_and_odd(products)
    y0, y1, y2, y3 = _columns(result)
    torch.add(near, far, out=y0).add_(zero)
    torch.add(near_odd, far_odd, alpha=_FAR / _NEAR, out=y1).mul_(_NEAR)
    torch.add(near, far, alpha=_FAR2 / _NEAR2, out=y2).mul_(_NEAR2)
    torch.add(infinite, near_odd, alpha=_NEAR**3, out=y3).add_(far_odd, alpha=_FAR**3)


def _even_and_odd(parts: Tensor) -> list[Tensor]:
    """Return the two first of the six parts (N, 6 * C, H, T), the differences of the points' pairs, and their sums.

    Each is (N, H, T, C). Writes to `parts`.
    """
    ends, plus, minus = parts.permute(0, 2, 3, 1).chunk(3, dim=3)
    sums = plus + minus
    return [part for pair in (ends, plus.sub_(minus), sums) for part in pair.chunk(2, dim=3)]


def _gather_backward(grad: Tensor) -> Tensor:
    """Return the gradient of the products (N, 6 * C, H, T), in channels_last, given that of A m (N, C, H, W)."""
    num_images, channels, height, width = grad.shape
    tiles = -(-width // _TILE)
    padded = grad.permute(0, 2, 3, 1)
    if width % _TILE:
        padded = F.pad(padded, (0, 0, 0, _TILE * tiles - width))
    y0, y1, y2, y3 = (padded[:, :, i::_TILE] for i in range(_TILE))
    result = grad.new_empty(num_images, height, tiles, _POINTS * channels)
    zero, infinite, plus_near, plus_far, minus_near, minus_far = result.chunk(_POINTS, dim=3)
    for plus, minus, point in ((plus_near, minus_near, _NEAR), (plus_far, minus_far, _FAR)):
        even, odd = torch.add(y0, y2, alpha=point**2), torch.add(y1, y3, alpha=point**2)
        torch.add(even, odd, alpha=point, out=plus)
        torch.sub(even, odd, alpha=point, out=minus)
    zero.copy_(y0)
    infinite.copy_(y3)
    return result.permute(0, 3, 1, 2)


def _products_with_rows(grad: Tensor, terms: Tensor) -> Tensor:
    """Return the gradient of G w, (6, out, 3, in), from those of the products, and the terms B x.

    Per image, point and row of the filter it is one product of matrices over all positions.
    """
    num_images, height, tiles = len(grad), grad.shape[2], grad.shape[3]
    grad, terms = (
        part.permute(0, 2, 3, 1).reshape(num_images, height * tiles, _POINTS, -1).transpose(1, 2)
        for part in (grad, terms)
    )
    sums = grad.new_empty(3, _POINTS, grad.shape[3], terms.shape[3])
    everything, but_first, but_last = slice(None), slice(tiles, None), slice(0, -tiles)  # rows of the map
    for row, (left, right) in enumerate(((but_first, but_last), (everything, everything), (but_last, but_first))):
        for image in range(num_images):
            factors = grad[image, :, left].transpose(1, 2), terms[image, :, right]
            torch.baddbmm(sums[row], *factors, beta=float(image > 0), out=sums[row])
    return sums.permute(1, 2, 0, 3)


def _columns(x: Tensor) -> list[Tensor]:
    """Return the four columns of all tiles of `x` (N, C, H, 4 * T), each (N, H, T, C)."""
    return [x.permute(0, 2, 3, 1)[:, :, i::_TILE] for i in range(_TILE)]


def _cut(x: Tensor, width: int) -> Tensor:
    return x if x.shape[3] == width else x[..., :width].contiguous(memory_format=torch.channels_last)
