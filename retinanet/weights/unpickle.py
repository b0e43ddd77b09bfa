"""Reads a pickle of any protocol (0 to 5, Python 2 included) without being able to run anything from it.

`pickle.Unpickler` calls what the file names and allocates what it announces. `Machine` is an interpreter of the same
opcodes (Python's `pickletools` documents them) that can only make numbers, strings, dicts, lists, tuples, sets and
arrays: names become `Symbol`s, and the few that real weight files need have an entry in `CONSTRUCTORS`. Every length
is compared with what is left of the file before anything of that size is made.
"""

import mmap
import struct

from retinanet.weights.pickled_arrays import (
    ARGUMENTS_ONLY,
    CONSTRUCTORS,
    Array,
    Dtype,
    PickleRefused,
    Symbol,
    dict_key,
    make_set,
    require,
)

_MARK = object()
_LONGEST_NUMBER = 256  # bytes or digits; the pickles of torch write one of 10 bytes, nobody a longer one
_LONGEST_NAME = 65536  # bytes; longer strings of Python 2 stay bytes, they hold the numbers of arrays


class Machine:
    """Interprets one pickle after another in `data`; subclasses decide what names, calls and references become."""

    def __init__(self, data: bytes | mmap.mmap, position: int = 0):
        self.data = memoryview(data)
        self.position = position

    def find(self, symbol: Symbol):
        require(symbol in CONSTRUCTORS or symbol in ARGUMENTS_ONLY, f"the name {symbol}")
        return symbol

    def call(self, symbol, args):
        require(isinstance(symbol, Symbol) and symbol in CONSTRUCTORS, "a call of something that is no name")
        require(isinstance(args, tuple), f"a broken call of {symbol}")
        try:
            return CONSTRUCTORS[symbol](*args)
        except (TypeError, UnicodeError) as error:
            raise PickleRefused(f"a broken call of {symbol} ({error})") from error

    def build(self, target, state) -> None:
        require(isinstance(target, (Array, Dtype)), f"a state for a {type(target).__name__}")
        target.build(state)

    def persistent(self, _reference):
        raise PickleRefused("a reference to data outside the pickle")

    def load(self):
        """Interpret the pickle at `position`, move behind it and return its value; raises `PickleRefused`."""
        self.stack, self.memo = [], {}
        try:
            while True:
                code = self.take(1)[0]
                if code == ord("."):
                    return self.pop()
                run = _OPCODES.get(code)
                require(run is not None, f"the opcode {bytes([code])!r} at byte {self.position - 1}")
                run(self)
        except (IndexError, KeyError, ValueError, struct.error) as error:
            if isinstance(error, PickleRefused):
                raise
            raise PickleRefused(f"a damaged pickle (near byte {self.position}: {error!r})") from error

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes; the one place where a length that the file announces is believed."""
        left = len(self.data) - self.position
        require(0 <= count <= left, f"{count} bytes at byte {self.position}, where {left} are left")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self, longest: int | None = None) -> bytes:
        """Return the bytes up to the next newline and move behind it; `longest` bounds their number."""
        limit = len(self.data) if longest is None else min(len(self.data), self.position + longest + 1)
        end = self.data.obj.find(b"\n", self.position, limit)  # bytes and mmap can search, a memoryview cannot
        require(end >= 0, f"a line without an end at byte {self.position}")
        text = bytes(self.take(end - self.position))
        self.position += 1
        return text

    def push(self, value) -> None:
        self.stack.append(value)

    def pop(self):
        value = self.stack.pop()
        require(value is not _MARK, "a damaged pickle (a mark where a value belongs)")
        return value

    def pop_to_mark(self) -> list:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            require(start >= 0, "a damaged pickle (no mark)")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def top(self, kind: type):
        value = self.stack[-1]
        require(isinstance(value, kind), f"a damaged pickle (items for a {type(value).__name__})")
        return value


def _old_string(data: memoryview | bytes) -> str | bytes | memoryview:
    """A `str` of Python 2: a name when it is short, the numbers of an array when it is long."""
    return str(data, "latin1") if len(data) <= _LONGEST_NAME else data


def _integer_line(machine: Machine):
    text = machine.line(_LONGEST_NUMBER).rstrip(b"L")
    return {b"00": False, b"01": True}[text] if text in (b"00", b"01") else int(text)


def _quoted_line(machine: Machine):
    text = machine.line()
    require(len(text) >= 2 and text[:1] == text[-1:] and text[:1] in b"'\"", "a string without quotes")
    return _old_string(text[1:-1].decode("unicode_escape").encode("latin1"))


def _text(machine: Machine, layout: str) -> str:
    return str(machine.take(machine.number(layout)), "utf-8", "surrogatepass")


def _long(machine: Machine, layout: str) -> int:
    length = machine.number(layout)
    require(0 <= length <= _LONGEST_NUMBER, f"a number of {length} bytes")
    return int.from_bytes(machine.take(length), "little", signed=True)


def _name_lines(machine: Machine) -> Symbol:
    return Symbol(*(machine.line(_LONGEST_NAME).decode("utf-8") for _ in range(2)))


def _name_from_stack(machine: Machine) -> Symbol:
    name, module = machine.pop(), machine.pop()
    require(isinstance(name, str) and isinstance(module, str), "a name that is not text")
    return Symbol(module, name)


def _call(machine: Machine) -> None:
    args, function = machine.pop(), machine.pop()
    machine.push(machine.call(function, args))


def _build(machine: Machine) -> None:
    state = machine.pop()
    machine.build(machine.stack[-1], state)


def _tuple(machine: Machine, count: int) -> None:
    machine.push(tuple([machine.pop() for _ in range(count)][::-1]))


def _set_items(machine: Machine, items: list) -> None:
    require(len(items) % 2 == 0, "a damaged pickle (a key without a value)")
    machine.top(dict).update(zip(map(dict_key, items[::2]), items[1::2], strict=True))


def _pairs(items: list) -> dict:
    require(len(items) % 2 == 0, "a damaged pickle (a key without a value)")
    return dict(zip(map(dict_key, items[::2]), items[1::2], strict=True))


def _protocol(machine: Machine) -> None:
    version = machine.number("<B")
    require(version <= 5, f"pickle protocol {version}")


def _frame(machine: Machine) -> None:
    length = machine.number("<Q")
    require(length <= len(machine.data) - machine.position, f"a frame of {length} bytes")


def _remember(machine: Machine, place: int) -> None:
    machine.memo[place] = machine.stack[-1]  # a dict: a place of two thousand million costs nothing


_PUSHES = {  # opcode: what it pushes
    b"N": lambda m: None,
    b"\x88": lambda m: True,
    b"\x89": lambda m: False,
    b"(": lambda m: _MARK,
    b"]": lambda m: [],
    b"}": lambda m: {},
    b")": lambda m: (),
    b"\x8f": lambda m: set(),
    b"I": _integer_line,
    b"L": _integer_line,
    b"K": lambda m: m.number("<B"),
    b"M": lambda m: m.number("<H"),
    b"J": lambda m: m.number("<i"),
    b"\x8a": lambda m: _long(m, "<B"),
    b"\x8b": lambda m: _long(m, "<i"),
    b"F": lambda m: float(m.line(_LONGEST_NUMBER)),
    b"G": lambda m: m.number(">d"),
    b"S": _quoted_line,
    b"T": lambda m: _old_string(m.take(m.number("<i"))),
    b"U": lambda m: _old_string(m.take(m.number("<B"))),
    b"V": lambda m: str(m.line(), "raw-unicode-escape"),
    b"X": lambda m: _text(m, "<I"),
    b"\x8c": lambda m: _text(m, "<B"),
    b"\x8d": lambda m: _text(m, "<Q"),
    b"B": lambda m: m.take(m.number("<I")),
    b"C": lambda m: bytes(m.take(m.number("<B"))),
    b"\x8e": lambda m: m.take(m.number("<Q")),
    b"\x96": lambda m: m.take(m.number("<Q")),
    b"c": lambda m: m.find(_name_lines(m)),
    b"\x93": lambda m: m.find(_name_from_stack(m)),
    b"P": lambda m: m.persistent(str(m.line(_LONGEST_NAME), "latin1")),
    b"Q": lambda m: m.persistent(m.pop()),
    b"2": lambda m: m.stack[-1],
    b"h": lambda m: m.memo[m.number("<B")],
    b"j": lambda m: m.memo[m.number("<I")],
    b"g": lambda m: m.memo[_integer_line(m)],
    b"t": lambda m: tuple(m.pop_to_mark()),
    b"l": lambda m: m.pop_to_mark(),
    b"d": lambda m: _pairs(m.pop_to_mark()),
    b"\x91": lambda m: make_set(m.pop_to_mark()),
}
_ACTS = {  # opcode: what it does
    b"\x80": _protocol,
    b"\x95": _frame,
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.pop_to_mark(),
    b"\x85": lambda m: _tuple(m, 1),
    b"\x86": lambda m: _tuple(m, 2),
    b"\x87": lambda m: _tuple(m, 3),
    b"a": lambda m: (lambda item: m.top(list).append(item))(m.pop()),
    b"e": lambda m: (lambda items: m.top(list).extend(items))(m.pop_to_mark()),
    b"s": lambda m: (lambda value: _set_items(m, [m.pop(), value]))(m.pop()),
    b"u": lambda m: _set_items(m, m.pop_to_mark()),
    b"\x90": lambda m: (lambda items: m.top(set).update(map(dict_key, items)))(m.pop_to_mark()),
    b"R": _call,
    b"\x81": _call,
    b"b": _build,
    b"q": lambda m: _remember(m, m.number("<B")),
    b"r": lambda m: _remember(m, m.number("<I")),
    b"p": lambda m: _remember(m, _integer_line(m)),
    b"\x94": lambda m: _remember(m, len(m.memo)),
}
_OPCODES = {
    **{code[0]: (lambda m, make=make: m.push(make(m))) for code, make in _PUSHES.items()},
    **{code[0]: act for code, act in _ACTS.items()},
}
