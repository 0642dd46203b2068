"""What the numbers were taken on: hardware, driver, versions, and what else was going on."""

from __future__ import annotations

import math
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from optfuse.version import __version__

ROOT = Path("/")

PACKAGES = {
    "torch": ("torch",),
    "numpy": ("numpy",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
}
"""Module -> the distributions that may hold it."""


def environment(threads: int, root: Path = ROOT) -> dict[str, Any]:
    """Everything about this machine that a reader of the numbers has to know.

    What cannot be found out here is None. All values can be written as JSON.

    Args:
        threads: how many CPU threads every engine is given.
        root: where `proc` and `sys` lie; for tests.
    """
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu_model": _cpu_model(root),
        "logical_cores": os.cpu_count(),
        "physical_cores": _physical_cores(range(os.cpu_count() or 0), root),
        "available_cores": len(_affinity()),
        "threads": threads,
        "memory_bytes": _memory_bytes(),
        "frequency_governor": _text(
            root / "sys/devices/system/cpu" / f"cpu{min(_affinity())}" / "cpufreq/scaling_governor"
        ),
        "load_average": _load_average(),
        "gpu": _gpu(root),
        "versions": {
            "optfuse": __version__,
            **{module: package_version(*names) for module, names in PACKAGES.items()},
        },
    }


def available_threads(root: Path = ROOT) -> int:
    """How many threads an engine should use here: one a physical core this process may run on.

    A second thread on the same core brings a network's arithmetic nothing and makes latency
    uneven. Where the topology can't be read, every core in the affinity mask counts. A container's
    CPU quota (cgroup v2) is an upper limit: more threads than it allows would be stopped in the
    middle of a run.

    Args:
        root: where `sys` lies; for tests.
    """
    cores = _affinity()
    threads = _physical_cores(cores, root) or len(cores)
    quota = _cpu_quota(root)
    return max(1, threads if quota is None else min(threads, math.ceil(quota)))


def package_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, or None."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _affinity() -> set[int]:
    """The logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical_cores(logical_cores: range | set[int], root: Path) -> int | None:
    """How many different cores stand behind these logical ones: hardware threads of one core name
    the same siblings."""
    siblings = {
        _text(root / "sys/devices/system/cpu" / f"cpu{core}" / "topology/thread_siblings_list")
        for core in logical_cores
    }
    return None if None in siblings or not siblings else len(siblings)


def _cpu_quota(root: Path) -> float | None:
    """Cores' worth of time this control group gets, None where there is no limit."""
    quota, _, period = (_text(root / "sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _cpu_model(root: Path) -> str | None:
    found = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo") or "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _load_average() -> list[float] | None:
    """Over 1, 5 and 15 minutes."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _gpu(root: Path) -> dict[str, Any] | None:
    """The first CUDA device, where torch sees one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "driver": _driver(root),
        "compute_capability": f"sm_{properties.major}{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _driver(root: Path) -> str | None:
    """The NVIDIA kernel driver's version, which torch does not tell."""
    text = _text(root / "proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
