"""What this CPU, and the C library under PyTorch, are good at: memory that is kept, bfloat16, the memory format.

Nothing here changes a number that the network computes, except for the rounding of sums in another order.
"""

import ctypes
import os
import platform
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_NEVER = -1
# Who sets one of these has decided about the allocator, or replaces it.
_OWN_CHOICE = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> str:
    """Let glibc keep freed memory for the next tensor instead of returning it to the system; return what was done.

    Large tensors are otherwise mapped and unmapped one by one, and every page of them faults each time it is touched
    first. Peak memory hardly changes, but memory once used stays with the process. Call it before large tensors are
    made; it holds for this process and those that it forks. Does nothing, and says so, without glibc and where the
    environment has already decided (`MALLOC_...`, `GLIBC_TUNABLES`, `LD_PRELOAD`).
    """
    decided = [name for name in _OWN_CHOICE if os.environ.get(name)]
    if decided:
        return f"allocator: as {', '.join(decided)} of the environment says"
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return "allocator: as it is, not glibc's"
    mallopt = ctypes.CDLL(None).mallopt
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER)
    return "allocator: glibc keeps freed memory (mallopt M_MMAP_MAX 0, M_TRIM_THRESHOLD off)" if done else (
        "allocator: glibc refused to keep freed memory"
    )  # fmt: skip


def has_bf16() -> bool:
    """Return whether bfloat16 products run in hardware: AVX512_BF16 or AMX, and not switched off by the environment.

    Without it oneDNN emulates them, at a quarter of the speed of float32.
    """
    allowed = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    limited = limit in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
    return allowed and not limited and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prefers_channels_last() -> bool:
    """Return whether NHWC is the faster memory format on this CPU, for training and detection.

    It is with AVX2 and AVX-512 (`docs/performance.md`); other CPUs were not measured.
    """
    return torch.backends.cpu.get_cpu_capability().startswith(("AVX2", "AVX512"))
