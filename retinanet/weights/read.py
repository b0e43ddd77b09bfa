"""Opens a file of weights and says what is in it, whatever its name ends in.

Four containers: PyTorch's zip archive, PyTorch's older stream of pickles, safetensors, and a pickle of NumPy arrays
(Detectron, detectron2). Nothing in a file can run, and nothing is allocated that the file does not hold: pickles of
arrays go through `Machine`; PyTorch's files are looked through by `_Inspector` first and then opened with
`torch.load(weights_only=True)`.
"""

import mmap
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from retinanet.errors import UserError
from retinanet.weights.pickled_arrays import Array, PickleRefused, Symbol, require
from retinanet.weights.unpickle import Machine

_TORCH_STREAM = 0x1950A86A20F9469CFC6C  # the first pickle of files that torch wrote before 1.6
_PICKLE_STARTS = b"\x80(}]c"  # protocols 2 to 5; dict, list or OrderedDict in protocols 0 and 1
_STATE_KEYS = ("model", "state_dict", "blobs", "model_state", "model_state_dict", "state_dict_ema")
_ITEM_BYTES = {"Double": 8, "Long": 8, "ComplexDouble": 16, "ComplexFloat": 8, "Float": 4, "Int": 4, "Half": 2}
_ITEM_BYTES |= {"BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "Untyped": 1}
_TAKE_A_SIZE = {"builtins.bytearray", "__builtin__.bytearray", "builtins.bytes", "__builtin__.bytes"}


@dataclass
class Contents:
    """What a file holds.

    tensors: name in the file -> tensor on the CPU, in the dtype of the file.
    extra: what stands beside the state dict, such as "config", "__author__" or "format".
    """

    tensors: dict[str, Tensor]
    extra: dict = field(default_factory=dict)


def read_weights(path: str | Path) -> Contents:
    """Return the tensors of a file of any known kind; raises `UserError` that says what was found instead."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file of weights")
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise UserError(f"{path}: the file is empty; fetch it again")
            # Private pages, so that arrays may lie over them; they live as long as an array does.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return _read(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check MODEL.WEIGHTS") from error
    except PickleRefused as refused:
        raise UserError(
            f"{path}: refused, it holds {refused}. Weights are numeric arrays in plain containers: fetch the file "
            "again, or save its state dict alone with the program that wrote it"
        ) from refused


def _read(path: Path, data: mmap.mmap) -> Contents:
    head = data[:64]
    if head[:4] == b"PK\x03\x04":
        return _contents(path, _torch_zip(path, data))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= len(data) - 8:
        return _safetensors(path)
    if head[0] not in _PICKLE_STARTS:
        raise UserError(f"{path}: no file of weights, it begins with {head[:16]!r}{_resembles(head)}")
    machine = Machine(data)
    loaded = machine.load()
    if type(loaded) is int and loaded == _TORCH_STREAM:
        return _contents(path, _torch_stream(path, data, machine.position))
    require(machine.position == len(data), f"{len(data) - machine.position} bytes behind the end of its pickle")
    return _contents(path, loaded)


def _resembles(head: bytes) -> str:
    if head.lstrip()[:1] == b"<":
        return ", like a web page: the download went wrong"
    if head[:2] == b"\x1f\x8b":
        return ", like gzip: unpack it first"
    return ", a Git LFS pointer: fetch the file itself" if head.startswith(b"version https://git-lfs") else ""


def _contents(path: Path, loaded) -> Contents:
    """Find the state dict in what was loaded: the dict itself, or the one under a usual key."""
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    state, extra = loaded, {}
    for key in _STATE_KEYS:
        if isinstance(loaded.get(key), dict):
            state = loaded[key]
            extra = {name: value for name, value in loaded.items() if name != key}
            break
    tensors = {}
    for name, value in state.items():
        name = name.decode("latin1") if isinstance(name, bytes) else name  # keys of Python 2, saved again by 3
        if isinstance(value, (Tensor, Array)) and isinstance(name, str):
            tensors[name] = _tensor(path, name, value)
        elif state is loaded:
            extra[name] = value
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name, only {', '.join(map(repr, list(loaded)[:5])) or 'nothing'}")
    return Contents(tensors, extra)


def _tensor(path: Path, name: str, value: Tensor | Array) -> Tensor:
    if isinstance(value, Array):
        require(value.value is not None, f"{name!r}, an array without numbers")
        return torch.from_numpy(value.value.astype(value.value.dtype.newbyteorder("="), copy=False))
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_complex()
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path}: {name!r} is no plain tensor ({value.layout}, {tuple(value.shape)}); refused")
    return value.detach()


def _safetensors(path: Path) -> Contents:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            extra = dict(file.metadata() or {})
    except (SafetensorError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: damaged safetensors ({error}); fetch it again") from error
    return Contents(_contents(path, tensors).tensors, extra)


class _Inspector(Machine):
    """Goes through a pickle of PyTorch before PyTorch does: nothing may claim more memory than the file holds.

    storage_bytes: for an archive, bytes by storage key; for a stream, None, and all storages together must fit `data`.
    """

    def __init__(self, data, position: int = 0, storage_bytes: dict[str, int] | None = None):
        super().__init__(data, position)
        self.storage_bytes, self.claimed = storage_bytes, {}

    def find(self, symbol: Symbol) -> Symbol:
        return symbol  # torch.load knows which names it allows

    def call(self, symbol, args):
        if isinstance(symbol, Symbol) and str(symbol) in _TAKE_A_SIZE:
            require(isinstance(args, tuple) and not any(type(arg) is int for arg in args), f"{symbol} of a size")
        return Array()

    def build(self, target, state) -> None:
        pass

    def top(self, kind: type):
        return self.stack[-1] if isinstance(self.stack[-1], kind) else kind()  # items of what `call` did not make

    def persistent(self, reference):
        parts = isinstance(reference, tuple) and len(reference) >= 5 and reference[0] == "storage"
        require(parts and isinstance(reference[1], Symbol), "a reference that is no storage")
        kind, key, count = reference[1].name.removesuffix("Storage"), reference[2], reference[4]
        require(kind in _ITEM_BYTES and isinstance(key, str) and type(count) is int, f"a storage of {kind}")
        claimed = count * _ITEM_BYTES[kind]
        if self.storage_bytes is None:
            self.claimed[key] = claimed
            held, claimed = len(self.data), sum(self.claimed.values())
        else:
            held = self.storage_bytes.get(key, -1)
        require(0 <= claimed <= held, f"a storage that claims {claimed} bytes where the file has {max(held, 0)}")
        return Array()


def _torch_zip(path: Path, data: mmap.mmap):
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            plain = all(member.compress_type == zipfile.ZIP_STORED for member in members.values())
            if not plain or sum(member.file_size for member in members.values()) > len(data):
                raise UserError(f"{path}: a compressed archive, which torch.save does not write; refused")
            pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in members):
                shown = ", ".join(list(members)[:4])
                raise UserError(f"{path}: an archive, but not of weights (it holds {shown}, ...)")
            damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path}: damaged, the checksum of {damaged} is wrong; fetch it again")
            folder = pickles[0].removesuffix("data.pkl") + "data/"
            sizes = {name.removeprefix(folder): m.file_size for name, m in members.items() if name.startswith(folder)}
            _Inspector(archive.read(pickles[0]), storage_bytes=sizes).load()
    except (UserError, PickleRefused):
        raise
    except Exception as error:  # zipfile raises six kinds for damaged archives
        raise UserError(f"{path}: a damaged archive ({error}); fetch it again") from error
    return _torch_load(path)


def _torch_stream(path: Path, data: mmap.mmap, position: int):
    inspector = _Inspector(data, position)
    for _ in range(4):  # protocol, system, the object itself, keys of the storages
        inspector.load()
    return _torch_load(path)


def _torch_load(path: Path):
    try:
        with open(path, "rb") as file:  # a path's ending would decide how torch reads it
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        if unknown:
            raise PickleRefused(f"the name {unknown[1]}") from error
        raise UserError(f"{path}: damaged, torch.load says: {str(error).splitlines()[0]}") from error
