"""What a process has of the machine: the device that computes, cores and threads."""

import ctypes
import gc
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""
_OWN_BLOCKS, _KEPT = (2**30, 2**25), 2**31 - 1
"""Bytes from which a block is the system's alone, where 2.34 and older take the second at most; and those that lie free
before any are given back."""


def device(accelerator: str) -> "torch.device":
    """Where this process computes, one of several on a machine that has a GPU for each.

    Args:
        accelerator: auto for a GPU where there is one, or gpu, mps, cpu.
    """
    import torch

    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def has_bf16(device: "torch.device") -> bool:
    """Whether a device computes bf16 by itself: AVX-512 BF16 or AMX, or a GPU's units."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def processor() -> str:
    """The processor's model, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use: its affinity, or the quota of its container where that is less."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = OWN_CGROUPS.read_text(encoding="utf-8") if OWN_CGROUPS.exists() else ""
    return max(1, math.ceil(min(here, quota(told, root=CGROUPS))))


def quota(told: str, *, root: Path) -> float:
    """Processor time per time that control groups grant, the least of all levels; infinite for no limit.

    Args:
        told: lines of /proc/self/cgroup: "0::/PATH" for version 2, "N:cpu,cpuacct:/PATH" for version 1.
        root: where control groups are mounted.
    """
    found = math.inf
    for line in told.splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "cpu" not in names:
            continue
        base = root if not controllers else root / ("cpu" if (root / "cpu").exists() else controllers)
        for level in (path, *map(str, Path(path).parents)):
            found = min(found, _granted(base / level.lstrip("/")))
    return found


def threads(environment: Mapping[str, str], *, devices: int | str) -> int | None:
    """Threads that each of a node's processes should compute with; None where OMP_NUM_THREADS says it already.

    Args:
        devices: processes of this node, unless a launcher says otherwise; auto counts as one.
    """
    asked = environment.get("OMP_NUM_THREADS")
    # torchrun sets it to 1 where it is unset, and nothing tells that 1 from a user's.
    by_torchrun = asked == "1" and "TORCHELASTIC_RUN_ID" in environment
    if asked and not by_torchrun:
        return None
    ranks = int(environment.get("LOCAL_WORLD_SIZE", devices if isinstance(devices, int) else 1))
    return max(1, cores() // ranks)


def set_threads(*, devices: int | str) -> None:
    """Gives torch the threads of `threads`, for the rest of the process."""
    import torch

    count = threads(os.environ, devices=devices)
    if count is not None:
        torch.set_num_threads(count)


def settle(*, devices: int | str) -> None:
    """Threads and memory for what computes with nets in this process; arguments as of `threads`."""
    set_threads(devices=devices)
    keep_memory()


def keep_memory() -> bool:
    """Has the C library keep the memory that tensors free, for the rest of the process; whether it does.

    It gives large blocks back to the system else, and has each of their pages cleared anew in the next step: up to a
    third of a small net's time on a processor. Only glibc can be asked; a user's own settings of it stand.
    """
    asked = any(name.startswith("MALLOC_") for name in os.environ)
    if asked or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    large = any(library.mallopt(_MMAP_THRESHOLD, size) for size in _OWN_BLOCKS)
    return bool(library.mallopt(_TRIM_THRESHOLD, _KEPT)) and large


@contextmanager
def large_import() -> Iterator[None]:
    """For imports that make some hundred thousand objects, nearly all of which stay: garbage is not looked for in them.

    Looking through them again and again takes a fifth of their time; and later, once is a quarter of a second in the
    middle of an epoch.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _granted(group: Path) -> float:
    if (group / "cpu.max").exists():
        limit, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        return math.inf if limit == "max" else int(limit) / int(period)
    if (group / "cpu.cfs_quota_us").exists():
        limit, period = (
            (group / name).read_text(encoding="utf-8") for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
        return math.inf if int(limit) < 0 else int(limit) / int(period)
    return math.inf
