"""What is chosen by the CPU and its C library."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from retinanet.utils import cpu
from retinanet.utils.cpu import has_bf16, keep_freed_memory, prefers_channels_last

FAULTS = """
import resource, sys, torch
from retinanet.utils.cpu import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
for _ in range(12):
    torch.ones(8, 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(8, 2**20)  # 32 MiB: 8,192 pages of 4 KiB, fewer where the kernel gives huge ones
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is what is set")
def test_kept_memory_is_not_faulted_in_again():
    faults = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
        )
        *said, count = done.stdout.split("\n")[:-1]
        faults[how] = int(count)
        assert ("keeps freed memory" in "".join(said)) == (how == "keep")
    assert 100 < faults["leave"] and faults["keep"] < faults["leave"] / 10


def test_a_choice_of_the_environment_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda name: pytest.fail("the allocator was changed"))
    assert "MALLOC_TRIM_THRESHOLD_" in keep_freed_memory()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_OWN_CHOICE", ())
    monkeypatch.setattr(cpu.platform, "libc_ver", lambda: ("", ""))
    assert "not glibc" in keep_freed_memory()


@pytest.mark.parametrize(
    ("capability", "limit", "bf16", "expected"),
    [("AVX512", "", True, True), ("AVX512", "", False, False), ("AVX2", "", True, False),
     ("AVX512", "AVX2", True, False), ("AVX512", "AVX512_CORE_BF16", True, True)],
)  # fmt: skip
def test_bf16_needs_the_hardware_and_the_permission_to_use_it(monkeypatch, capability, limit, bf16, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert has_bf16() == expected


def test_channels_last_is_for_avx2_and_avx512(monkeypatch):
    for capability, expected in (("AVX512", True), ("AVX2", True), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda value=capability: value)
        assert prefers_channels_last() == expected
