"""What GPUs there are here."""

from __future__ import annotations

import ctypes
import sys


def gpu_count() -> int:
    """How many GPUs the NVIDIA driver shows, 0 without a driver. Needs no torch."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def device_target() -> str | None:
    """The compute capability of torch's current GPU as a target, e.g. `sm_89`, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def capability(target: str) -> int:
    """A compute capability as a number that later ones are greater than, e.g. 89 for `sm_89`.

    Raises:
        ValueError: it is none.
    """
    return int(target.removeprefix("sm_"))
