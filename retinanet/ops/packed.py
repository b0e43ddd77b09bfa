"""A constant weight of a convolution, reordered once into the blocks that oneDNN multiplies.

Otherwise every call on a CPU reorders it, which the small maps of a pyramid pay for: from 256 to 256 channels, 3 x 3,
that is two thirds of the time at 3 x 3 positions, a third at 10 x 10 and a thirtieth at 40 x 40. The numbers stay the
same to the bit.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

_MOST_SIZES = 4096  # of inputs, of which it is remembered whether the blocks suit them


class ConstantWeight:
    """A weight (out, in / groups, k, k) that nobody writes to and nobody wants a gradient of: as it is, and packed.

    Which blocks are the best depends on the size of the input, more for 1 x 1 kernels than for others, and blocks that
    are not the best cost ten times the call. So those of the first size are kept, and of another size it is found out
    once whether it wants the same.
    """

    def __init__(self, plain: Tensor, derive: Callable[[Tensor], Tensor] | None = None):
        """derive: gives the weight to be packed, where that is not `plain` itself."""
        self.plain = plain
        self._derive = derive or _itself
        self._derived: dict[Callable, ConstantWeight] = {}
        self._packed: Tensor | None = None
        self._suits: dict[tuple[int, ...], bool] = {}

    def packed_for(
        self, size: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int], groups: int
    ) -> Tensor:
        """Return the weight for `mkldnn::_convolution_pointwise` on an input of `size` (N, in, H, W), channels_last.

        The geometry is that of the convolution and must be the same in every call.
        """
        suits = self._suits.get(size)
        if suits is None:
            packed = torch.ops.mkldnn._reorder_convolution_weight(
                self._derive(self.plain), padding, stride, dilation, groups, list(size)
            )
            if self._packed is None:
                self._packed = packed
            if len(self._suits) >= _MOST_SIZES:
                self._suits.clear()
            suits = self._suits[size] = packed is self._packed or _bytes(packed) == _bytes(self._packed)
        return self._packed if suits else self._derive(self.plain)

    def derived(self, derive: Callable[[Tensor], Tensor]) -> "ConstantWeight":
        """Return the weight that `derive` makes of this one, packed; only the blocks of it are kept."""
        if derive not in self._derived:
            self._derived[derive] = ConstantWeight(self.plain, derive)
        return self._derived[derive]

    def __getstate__(self) -> dict:
        return {"plain": self.plain, "derive": self._derive}  # a copy packs for itself: what is packed cannot be copied

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _itself(weight: Tensor) -> Tensor:
    return weight


def _bytes(packed: Tensor) -> bytes:
    # PyTorch can serialize the description of the blocks, but in 2.11 not the same way twice
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed))
