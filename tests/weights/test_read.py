"""Files of weights are recognised by content, and everything else is refused with a word on what it is."""

import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_profile import count, tried
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from retinanet.errors import UserError
from retinanet.weights.read import read_weights

FILES = Path(__file__).parent.parent / "files" / "weights"


def small_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "bn1.running_var": torch.rand(4, generator=generator),
        "bn1.num_batches_tracked": torch.tensor(7),
        "half": torch.randn(5, generator=generator).half(),
    }


def write_torch_zip(path):
    torch.save({"model": small_state(), "iteration": 5}, path)


def write_torch_stream(path):
    torch.save({"state_dict": small_state(), "epoch": 5}, path, _use_new_zipfile_serialization=False)


def write_safetensors(path):
    save_file(small_state(), path, metadata={"format": "pt"})


def write_pickle(path):
    arrays = {name: tensor.numpy() for name, tensor in small_state().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}, 4))


WRITERS = {"zip": write_torch_zip, "stream": write_torch_stream, "safe": write_safetensors, "pickle": write_pickle}


@pytest.mark.parametrize("ending", [".pth", ".pkl", ".safetensors", ""])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_container_is_recognised_whatever_its_name(kind, ending, tmp_path):
    path = tmp_path / f"weights{ending}"
    WRITERS[kind](path)
    contents = read_weights(path)
    assert contents.tensors.keys() == small_state().keys()
    for name, tensor in small_state().items():
        torch.testing.assert_close(contents.tensors[name], tensor, rtol=0, atol=0)


def test_what_stands_beside_the_tensors_is_kept(tmp_path):
    for kind, beside in (("zip", {"iteration": 5}), ("stream", {"epoch": 5}), ("pickle", {"__author__": "somebody"})):
        WRITERS[kind](tmp_path / kind)
        assert read_weights(tmp_path / kind).extra == beside


def test_a_flat_state_dict_with_other_entries_is_read(tmp_path):
    torch.save({**small_state(), "epoch": 3}, tmp_path / "flat.pth")
    contents = read_weights(tmp_path / "flat.pth")
    assert (contents.tensors.keys(), contents.extra) == (small_state().keys(), {"epoch": 3})


def test_parameters_count_as_tensors(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.ones(2))}, tmp_path / "parameter.pth")
    assert not read_weights(tmp_path / "parameter.pth").tensors["a"].requires_grad


def test_big_endian_and_sliced_arrays_become_native_tensors(tmp_path):
    arrays = {"big": np.arange(3, dtype=">f4"), "slice": np.arange(12.0).reshape(3, 4)[:, ::2]}
    (tmp_path / "arrays").write_bytes(pickle.dumps(arrays))
    tensors = read_weights(tmp_path / "arrays").tensors
    assert tensors["big"].tolist() == [0.0, 1.0, 2.0]
    assert tensors["slice"].tolist() == [[0.0, 2.0], [4.0, 6.0], [8.0, 10.0]]


@pytest.mark.parametrize("protocol", [3, 4, 5])  # Python 3 writes bytes as text in the older ones
def test_arrays_lie_over_the_file_without_a_copy(protocol, tmp_path, peak_below):
    (tmp_path / "large").write_bytes(pickle.dumps({"large": np.zeros(2**22, np.float32)}, protocol))
    with peak_below(2**20):
        assert read_weights(tmp_path / "large").tensors["large"].shape == (2**22,)


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_no_call_in_a_pytorch_file_runs(is_zip, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "hostile.pth"
    torch.save({"model": Hostile(mark)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=r"refused, it holds the name \w+\.system"):
        read_weights(path)
    assert not mark.exists()


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.linear\.Linear.*save its state dict alone"):
        read_weights(tmp_path / "module.pth")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>", "like a web page: the download went wrong"),
        (b"\x1f\x8b\x08\x00", "like gzip: unpack it first"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n", "it begins with b'\\\\x89PNG"),
        (b"\x80\x04K\x01.", "holds a int, not tensors by name"),
        (b"\x80\x04]K\x01a.", "holds a list"),
        (b"\x80\x04}.", "holds no tensors by name, only nothing"),
        (b"\x80\x04}K\x01K\x02s.", "holds no tensors by name, only 1"),
        (b"\x80\x04}.trailing", "8 bytes behind the end"),
        (b"PK\x03\x04 no archive", "a damaged archive"),
        (struct.pack("<Q", 12) + b"{ no json   ", "damaged safetensors"),
        (struct.pack("<Q", 2**60) + b"{}", "no file of weights"),
    ],
)
def test_files_that_are_no_weights_are_refused_with_what_they_are(data, found, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=found):
        read_weights(tmp_path / "file")


def test_a_missing_file_and_a_folder_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(kind, share, tmp_path):
    path = tmp_path / "cut"
    WRITERS[kind](path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError):
        read_weights(path)


def test_an_archive_with_a_flipped_bit_in_a_tensor_is_refused(tmp_path):
    path = tmp_path / "flipped.pth"
    write_torch_zip(path)
    data = bytearray(path.read_bytes())
    values = small_state()["conv1.weight"].numpy().tobytes()
    place = data.find(values)
    assert place > 0
    data[place + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        read_weights(path)


def rewrite_zip(path: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    out = path.with_name("rewritten.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out


def test_a_storage_that_claims_more_than_its_record_is_refused(tmp_path):
    torch.save({"a": torch.arange(10.0)}, tmp_path / "honest.pth")

    def claim(name, data):
        larger = b"J\x00\x00\x00\x40"  # 2^30 elements in place of 10
        return data.replace(b"K\nt", larger + b"t").replace(b"K\n\x85", larger + b"\x85") if "pkl" in name else data

    with pytest.raises(UserError, match="a storage that claims 4294967296 bytes where the file has 40"):
        read_weights(rewrite_zip(tmp_path / "honest.pth", claim))


def test_a_stream_whose_storages_exceed_the_file_is_refused(tmp_path):
    torch.save({"a": torch.arange(10.0)}, tmp_path / "stream", _use_new_zipfile_serialization=False)
    data = (tmp_path / "stream").read_bytes()
    assert data.count(b"K\nNt") == 1
    (tmp_path / "stream").write_bytes(data.replace(b"K\nNt", b"J\x00\x00\x00\x40Nt"))
    with pytest.raises(UserError, match="claims 4294967296 bytes"):
        read_weights(tmp_path / "stream")


def test_an_archive_bomb_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"a": torch.zeros(2**20)}, tmp_path / "zeros.pth")
    bomb = rewrite_zip(tmp_path / "zeros.pth", lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 2**16
    with pytest.raises(UserError, match="a compressed archive"):
        read_weights(bomb)


def test_tensors_that_repeat_one_number_without_holding_it_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "expanded.pth")
    with pytest.raises(UserError, match="'a' is no plain tensor"):
        read_weights(tmp_path / "expanded.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_sparse_tensors_are_refused(tmp_path):
    torch.save({"a": torch.eye(3).to_sparse()}, tmp_path / "sparse.pth")
    with pytest.raises(UserError, match="'a' is no plain tensor"):
        read_weights(tmp_path / "sparse.pth")


def test_byte_arrays_of_a_size_are_refused(tmp_path):
    class Large:
        def __reduce__(self):
            return bytearray, (2**40,)

    torch.save({"a": torch.zeros(1), "b": Large()}, tmp_path / "large.pth")
    with pytest.raises(UserError, match="bytearray of a size"):
        read_weights(tmp_path / "large.pth")


@pytest.mark.parametrize("kind", ["npz", "script"])
def test_archives_of_another_kind_are_refused(kind, tmp_path):
    path = tmp_path / "archive.npz"
    if kind == "npz":
        np.savez(path, a=np.zeros(3))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("x/data.pkl", "x/constants.pkl", "x/code/f.py"):
                archive.writestr(name, b"\x80\x02}.")
    with pytest.raises(UserError, match="an archive, but not of weights"):
        read_weights(path)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    for kind, write in WRITERS.items():
        write(folder / kind)
    whole = {kind: (folder / kind).read_bytes() for kind in WRITERS}
    return whole | {path.stem: path.read_bytes() for path in FILES.glob("python2_*.pkl")}


@tried(400)
@given(data=st.data())
def test_mutated_files_are_read_or_refused_and_nothing_else(data, originals, tmp_path, peak_below):
    kind = data.draw(st.sampled_from(sorted(originals)))
    mutated = bytearray(originals[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(mutated) - 1))
        action = data.draw(st.sampled_from(["set", "cut", "insert", "copy"]))
        if action == "set":
            mutated[place] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del mutated[place : place + data.draw(st.integers(1, 40))]
        elif action == "insert":
            mutated[place:place] = data.draw(st.binary(min_size=1, max_size=12))
        else:
            mutated[place:place] = mutated[place : place + data.draw(st.integers(1, 40))]
        if not mutated:
            return
    path = tmp_path / "mutated"
    path.write_bytes(mutated)
    with peak_below(8 * 2**20):
        try:
            for tensor in read_weights(path).tensors.values():
                assert tensor.numel() * tensor.element_size() <= len(mutated)
            count("weights, bytes", "right")
        except UserError as error:
            assert str(path) in str(error)
            count("weights, bytes", "refused")


@tried(300)
@given(start=st.sampled_from([b"\x80\x02", b"\x80\x04", b"(", b"}", b"]", b"c", b"PK\x03\x04", b""]), rest=st.binary())
def test_random_bytes_are_refused(start, rest, tmp_path):
    (tmp_path / "random").write_bytes(start + rest)
    with pytest.raises(UserError):
        read_weights(tmp_path / "random")


def test_safetensors_that_reach_beyond_the_file_are_refused(tmp_path):
    data = save({"a": torch.zeros(4)})
    assert data.count(b"[4]") == 1
    (tmp_path / "beyond").write_bytes(data.replace(b"[4]", b"[9]"))
    with pytest.raises(UserError, match="damaged safetensors"):
        read_weights(tmp_path / "beyond")
