"""What the restricted unpickler can make: numbers, containers and numeric arrays, from the pickles of any NumPy.

An array is pickled as a call of `_reconstruct`, whose result gets its shape, dtype and bytes by a BUILD opcode; with
protocol 5 as one call of `_frombuffer`. NumPy 2 renamed `numpy.core` to `numpy._core`. Nothing here believes a shape:
an array exists only when the file holds exactly its bytes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_NUMERIC = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|[?bBhHiIlLqQefd])")


class PickleRefused(ValueError):
    """The pickle is damaged, or asks for something that no weight file needs; the message says which."""


@dataclass(frozen=True)
class Symbol:
    """A name in a pickle, `module.name`; nothing is imported for it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Array:
    """A numeric array: `value` is an `np.ndarray`, over the bytes of the file where it can; None before its BUILD."""

    def __init__(self, value: np.ndarray | None = None):
        self.value = value

    def build(self, state) -> None:
        require(isinstance(state, tuple) and len(state) in (4, 5), "an array with a broken state")
        shape, dtype, fortran, data = state[-4:]
        self.value = _array(data, dtype, shape, "F" if fortran is True or fortran == 1 else "C")


class Dtype:
    """The `numpy.dtype` of numbers that a pickle describes."""

    def __init__(self, code):
        is_numeric = isinstance(code, str) and _NUMERIC.fullmatch(code)
        require(is_numeric, f"an array of {code if isinstance(code, str) else 'something'!r}, not of numbers")
        self.value = np.dtype(code)

    def build(self, state) -> None:
        plain = isinstance(state, tuple) and len(state) >= 5 and state[1] in ("<", ">", "=", "|")
        require(plain and state[2:5] == (None, None, None), "a structured dtype")
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


def require(condition, found: str) -> None:
    if not condition:
        raise PickleRefused(found)


def _array(data, dtype, shape, order) -> np.ndarray:
    data = data.encode("latin1") if isinstance(data, str) else data
    data = bytearray(data) if isinstance(data, bytes) else data  # torch wants memory that it may write
    require(isinstance(dtype, Dtype) and isinstance(data, (bytearray, memoryview)), "an array without numbers")
    sizes_ok = isinstance(shape, tuple) and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    require(sizes_ok and len(shape) <= 8 and order in ("C", "F"), "an array with a broken shape")
    needed = math.prod(shape) * dtype.value.itemsize
    require(needed == len(data), f"an array of {needed} bytes with {len(data)} bytes of numbers")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _reconstruct(subtype, _shape, _code) -> Array:
    require(subtype == Symbol("numpy", "ndarray"), f"an array type {subtype}")
    return Array()  # empty whatever `_shape` says: BUILD brings the real one


def _from_buffer(data, dtype, shape, order) -> Array:
    return Array(_array(data, dtype, shape, order))


def _scalar(dtype, data) -> Array:
    return Array(_array(data, dtype, (), "C"))


def _encode(text, encoding) -> bytes:
    require(isinstance(text, str) and encoding in ("latin1", "latin-1"), "codecs.encode of something unusual")
    return text.encode("latin1")


def _bytes(data=b"") -> bytes:
    require(isinstance(data, (bytes, bytearray, memoryview)), "bytes of something unusual")
    return bytes(data)


def _dict(items=()) -> dict:
    pairs = isinstance(items, (list, tuple)) and all(isinstance(i, (list, tuple)) and len(i) == 2 for i in items)
    require(pairs, "an OrderedDict of something unusual")
    return {dict_key(key): value for key, value in items}


def make_set(items=()) -> set:
    require(isinstance(items, (list, tuple)), "a set of something unusual")
    return {dict_key(item) for item in items}


def dict_key(value):
    # Only atoms: the hash of a nested tuple takes time exponential in the length of the pickle.
    require(value is None or isinstance(value, (str, bytes, int, float)), "a dict key that is not a name or a number")
    return value


_CORES = ("numpy.core", "numpy._core")  # before and since NumPy 2
_BUILTINS = ("builtins", "__builtin__")  # Python 3 and 2
CONSTRUCTORS: dict[Symbol, Callable] = {
    **{Symbol(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in _CORES},
    **{Symbol(f"{core}.multiarray", "scalar"): _scalar for core in _CORES},
    **{Symbol(f"{core}.numeric", "_frombuffer"): _from_buffer for core in _CORES},
    **{Symbol(module, name): _bytes for module in _BUILTINS for name in ("bytes", "bytearray")},
    **{Symbol(module, name): make_set for module in _BUILTINS for name in ("set", "frozenset")},
    Symbol("numpy", "dtype"): lambda code, *_flags: Dtype(code),
    Symbol("_codecs", "encode"): _encode,
    Symbol("collections", "OrderedDict"): _dict,
}
ARGUMENTS_ONLY = {Symbol("numpy", "ndarray")}
