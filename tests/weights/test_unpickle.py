"""The restricted unpickler: reads what NumPy writes in any protocol, runs nothing, believes no length."""

import collections
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from retinanet.weights.pickled_arrays import Array, PickleRefused, Symbol
from retinanet.weights.unpickle import Machine

FILES = Path(__file__).parent.parent / "files" / "weights"
# What Python 2 with NumPy 1.16 wrote into python2_*.pkl
BLOBS = {
    "conv1_w": (np.arange(24, dtype=np.float32) / 7 - np.float32(1.5)).reshape(2, 3, 2, 2),
    "conv1_w_momentum": np.zeros((2, 3, 2, 2), np.float32),
    "res_conv1_bn_s": np.array([0.5, -2.0], np.float32),
    "res_conv1_bn_b": np.array([[1.5, 2.5], [-3.5, 0.0]]),
    "counts": np.array([1, -2, 300]),
    "lr": np.float32(0.01),
    "bytes": np.arange(256, dtype=np.uint8),
    "empty": np.zeros((0, 4), np.float32),
}
ARRAYS = {
    "C order": np.arange(12, dtype=np.float32).reshape(3, 4),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">f4"),
    "one number": np.array(3, np.int64),
    "scalar": np.float16(2.5),
    "empty": np.zeros((0, 3)),
    "flags": np.array([True, False]),
    "a slice": np.arange(20.0).reshape(4, 5)[::2, 1:4],
}


def plain(value):
    """Return what the machine made, with arrays as arrays."""
    return value.value if isinstance(value, Array) else value


def assert_same_arrays(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(plain(found[name]), array, err_msg=name, strict=True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol_come_back(protocol):
    assert_same_arrays(Machine(pickle.dumps(ARRAYS, protocol)).load(), ARRAYS)


@pytest.mark.parametrize("name", ["protocol0", "protocol1", "protocol2", "ordered"])
def test_pickles_of_python_2_come_back(name):
    loaded = Machine((FILES / f"python2_{name}.pkl").read_bytes()).load()
    if name != "ordered":
        assert loaded.keys() == {"blobs", "cfg"}
        assert loaded["cfg"] == "MODEL: {}\n"
        loaded = loaded["blobs"]
    assert_same_arrays(loaded, BLOBS)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back(protocol):
    value = {
        "text": "ü" * 300, "long": "x" * 70000, "none": None, "yes": True, "no": False, "real": -1.5e300,
        "ints": [0, 1, -1, 255, 256, 65535, 65536, -(2**31), 2**31, 2**63, -(2**70), 10**60],
        "nested": {"a": ([], (), {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4))},
        1: collections.OrderedDict(b=1, a=2), "set": {1, 2}, "bytes": b"\x00\xff" * 3, "none left": b"",
    }  # fmt: skip
    value["again"] = value["nested"]
    loaded = Machine(pickle.dumps(value, protocol)).load()
    assert loaded == value
    assert loaded["again"] is loaded["nested"]


def test_python_2_numbers_keep_their_type():
    assert Machine(b"(I01\nI00\nI7\nL-12L\nF2.5\nt.").load() == (True, False, 7, -12, 2.5)


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "args"),
    [
        (os.system, ("touch {mark}",)),
        (eval, ("open('{mark}', 'w')",)),
        (exec, ("open('{mark}', 'w')",)),
        (open, ("{mark}", "w")),
        (getattr, (os, "system")),
        (np.load, ("{mark}",)),
        (np.fromfile, ("{mark}",)),
        (__import__, ("os",)),
    ],
)
def test_no_call_of_a_pickle_runs(function, args, protocol, tmp_path):
    mark = tmp_path / "ran"
    filled = tuple(arg.format(mark=mark) if isinstance(arg, str) else "os" for arg in args)
    data = pickle.dumps({"conv1_w": Hostile(function, filled)}, protocol)
    with pytest.raises(PickleRefused, match=r"the name \w+(\.\w+)*"):
        Machine(data).load()
    assert not mark.exists()


class WithState:
    def __setstate__(self, state):
        raise AssertionError("the state of a foreign class was set")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_instances_of_classes_are_refused(protocol):
    thing = WithState()
    thing.field = 1
    with pytest.raises(PickleRefused, match="the name"):
        Machine(pickle.dumps(thing, protocol)).load()


def test_state_cannot_be_set_on_what_a_name_stands_for():
    with pytest.raises(PickleRefused, match="a state for a Symbol"):
        Machine(b"cnumpy\ndtype\n}X\x04\x00\x00\x00nameX\x01\x00\x00\x00xsb.").load()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**62), "bytes at byte"),  # BINBYTES8
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**40), "bytes at byte"),  # BINUNICODE8
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40), "bytes at byte"),  # BYTEARRAY8
        (b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1), "a number of"),  # LONG4
        (b"\x80\x02\x8b" + struct.pack("<i", -5), "a number of"),
        (b"T" + struct.pack("<i", -5), "bytes at byte"),  # BINSTRING
        (b"X" + struct.pack("<I", 2**32 - 1), "bytes at byte"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**62), "a frame of"),
        (b"I" + b"9" * 5000 + b"\n.", "a line without an end"),
        (b"\x80\x09.", "pickle protocol 9"),
        (b"(lp0\n", "bytes at byte"),  # ends before STOP
        (b"0.", "damaged"),
        (b"h\x05.", "damaged"),  # a memo that was never written
        (b"]K\x01K\x02s.", "damaged"),  # an item for a list
        (b"N}b.", "a state for a NoneType"),
        (b"Pid\n.", "outside the pickle"),
        (b"K\x01Q.", "outside the pickle"),
        (b"\x82\x01.", "the opcode"),  # EXT1
        (b"(cos\nsystem\no.", "the name os.system"),
        (b"(S'x'\nios\nsystem\n.", "the opcode b'i'"),
        (b"(.", "a mark where a value belongs"),
        (b"}(K\x01(tK\x02u.", "damaged"),
        (b"}(K\x01u.", "a key without a value"),
        (b"}((tK\x01u.", "dict key"),  # a tuple as a key
    ],
)
def test_damaged_and_boastful_pickles_are_refused(data, found, peak_below):
    with peak_below(2**20), pytest.raises(PickleRefused, match=found):
        Machine(data).load()


def test_a_memo_at_a_huge_place_costs_nothing(peak_below):
    with peak_below(2**16):
        assert Machine(b"\x80\x02]r\xff\xff\xff\xffj\xff\xff\xff\xff.").load() == []


def boast(shape: tuple) -> bytes:
    """Return the pickle of three numbers that claims `shape` for them."""
    honest = pickle.dumps(np.zeros(3, np.float32), 2)
    assert honest.count(b"K\x03\x85") == 1
    return honest.replace(b"K\x03\x85", pickle.dumps(shape, 2)[2:-1])


@pytest.mark.parametrize("shape", [(2**40,), (4,), (1,), (-3,), (2**32, 2**32), (3.0,), (1,) * 9])
def test_arrays_that_claim_another_size_than_their_bytes_are_refused(shape):
    with pytest.raises(PickleRefused, match="an array (of|with)"):
        Machine(boast(shape)).load()


@pytest.mark.parametrize("array", [np.array([{}]), np.array(["a"]), np.zeros(2, [("a", "f4")]), np.zeros(1, "M8[s]")])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_arrays_of_anything_but_numbers_are_refused(array, protocol):
    with pytest.raises(PickleRefused, match="not of numbers|structured"):
        Machine(pickle.dumps(array, protocol)).load()


def test_matrices_and_other_array_types_are_refused():
    with pytest.raises(PickleRefused, match="the name numpy"):
        Machine(pickle.dumps(np.ma.array([1.0]))).load()


def test_a_deep_nest_is_read_without_recursion():
    loaded = Machine(b"\x80\x02" + b"]" * 50000 + b"a" * 49999 + b".").load()
    depth = 0
    while loaded:
        loaded, depth = loaded[0], depth + 1
    assert depth == 49999


def test_nested_keys_cannot_make_hashing_explode():
    doubled = b"K\x01" + b"2\x86" * 60  # ((((1, 1), (1, 1)), ...: its hash would take 2^60 steps
    with pytest.raises(PickleRefused, match="dict key"):
        Machine(b"}" + doubled + b"K\x01s.").load()


def test_names_become_symbols_without_import():
    class Reader(Machine):
        def find(self, symbol):
            return symbol

    assert Reader(b"cno.such.module\nthing\n.").load() == Symbol("no.such.module", "thing")
