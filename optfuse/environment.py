"""What the numbers were taken on: hardware, driver, versions, and what else was going on."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
}
"""Module -> the distributions that may hold it."""

GIT_SECONDS = 2.0
"""How long git may take to name a commit, e.g. on a network file system."""

NVIDIA_SMI_SECONDS = 5.0
"""How long nvidia-smi may take; it needs a second where the driver is not loaded yet."""

GPU_IDLE = 0x1
GPU_LIMITS = {
    0x04: "a power limit",
    0x08: "a hardware slowdown",
    0x20: "a thermal limit",
    0x40: "a thermal limit",
    0x80: "a power brake",
}
"""Bits of `clocks_throttle_reasons.active`, as NVML's reference lists them
(nvmlClocksThrottleReasons); those that are settings rather than limits are left out."""


def environment(threads: int, root: Path = ROOT) -> dict[str, Any]:
    """Everything about this machine that a reader of the numbers has to know.

    What cannot be found out here is None. All values can be written as JSON. `commit` is that of
    the current folder, or the one that a CI job says it builds; `commit_time` is when it was
    committed, ISO 8601.

    Args:
        threads: how many CPU threads every engine is given.
        root: where `proc` and `sys` lie; for tests.
    """
    commit, commit_time = _commit()
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
        "commit": commit,
        "commit_time": commit_time,
        "versions": {
            "optfuse": __version__,
            **{module: package_version(*names) for module, names in PACKAGES.items()},
        },
    }


@dataclass(frozen=True)
class GpuActivity:
    """What a GPU was doing at one moment.

    Attributes:
        clock_mhz, top_clock_mhz: of its multiprocessors, now and at most; None where it won't say.
        idle: nothing ran on it, so that its clock says nothing.
        held_by: what keeps its clock down, e.g. `a thermal limit`.
    """

    clock_mhz: float | None
    top_clock_mhz: float | None
    idle: bool
    held_by: tuple[str, ...]


@dataclass(frozen=True)
class Activity:
    """What a machine was doing at one moment; two of them tell what it did in between.

    Seconds are core-seconds since some fixed moment, of the logical cores that this process may
    run on. What could not be found out is None.

    Attributes:
        taken_seconds: when, on a clock that never goes back.
        cores: how many logical cores this process may run on.
        load_average: over 1, 5 and 15 minutes.
        user_seconds, system_seconds, idle_seconds: what the cores did, for whomever.
        stolen_seconds: what a hypervisor gave to others while this machine wanted to run.
        own_seconds: of user_seconds and system_seconds, what this process and its children used.
        quota_seconds: how long the control group's quota kept its threads from running.
        clocks_mhz, top_clocks_mhz: of each core, now and at most.
        throttle_events: how often a core or its package ran into a thermal limit.
        gpu: the first GPU that CUDA shows, None without one.
    """

    taken_seconds: float
    cores: int
    load_average: Sequence[float] | None
    user_seconds: float | None
    system_seconds: float | None
    idle_seconds: float | None
    stolen_seconds: float | None
    own_seconds: float
    quota_seconds: float | None
    clocks_mhz: tuple[float, ...] | None
    top_clocks_mhz: tuple[float, ...] | None
    throttle_events: int | None
    gpu: GpuActivity | None


def activity(root: Path = ROOT) -> Activity:
    """What this machine is doing now. To be taken right before and right after a measurement.

    Args:
        root: where `proc` and `sys` lie; for tests.
    """
    cores = sorted(_affinity())
    clocks_mhz = _clocks_mhz(cores, root)  # before anything that takes time lets them drop
    gpu = _gpu_activity()
    times = _core_seconds(cores, root)
    return Activity(
        taken_seconds=time.monotonic(),
        cores=len(cores),
        load_average=_load_average(),
        user_seconds=times.get("user"),
        system_seconds=times.get("system"),
        idle_seconds=times.get("idle"),
        stolen_seconds=times.get("stolen"),
        own_seconds=sum(os.times()[:4]) + _descendants_seconds(root),
        quota_seconds=_quota_seconds(root),
        clocks_mhz=clocks_mhz,
        top_clocks_mhz=_cpufreq_mhz(cores, "cpuinfo_max_freq", root),
        throttle_events=_throttle_events(root),
        gpu=gpu,
    )


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


def _core_seconds(cores: Sequence[int], root: Path) -> dict[str, float]:
    """What these cores did since they were started; empty where that can't be read."""
    lines = [line.split() for line in (_text(root / "proc/stat") or "").splitlines()]
    wanted = {f"cpu{core}" for core in cores}
    found = [[int(ticks) for ticks in line[1:9]] for line in lines if line and line[0] in wanted]
    if len(found) < len(wanted) or min(map(len, found)) < 8:
        return {}
    # man 5 proc_stat; time of guests is part of user and nice.
    user, nice, system, idle, waiting, irq, softirq, stolen = map(sum, zip(*found, strict=True))
    ticks = {
        "user": user + nice,
        "system": system + irq + softirq,
        "idle": idle + waiting,
        "stolen": stolen,
    }
    return {what: count / _ticks_per_second() for what, count in ticks.items()}


def _descendants_seconds(root: Path) -> float:
    """Core-seconds of the processes that this one started and that still run, with theirs."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for path in (root / "proc").glob("[0-9]*/stat"):
        # man 5 proc_pid_stat; a name may hold spaces and brackets.
        fields = (_text(path) or "").rpartition(")")[2].split()
        if len(fields) > 14:
            pid = int(path.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            ticks[pid] = sum(int(field) for field in fields[11:15])
    total, waiting = 0, list(children.get(os.getpid(), ()))
    while waiting:
        pid = waiting.pop()
        total += ticks[pid]
        waiting += children.get(pid, ())
    return total / _ticks_per_second()


def _ticks_per_second() -> int:
    try:
        return os.sysconf("SC_CLK_TCK")
    except (AttributeError, ValueError, OSError):
        return 100


def _quota_seconds(root: Path) -> float | None:
    text = _text(root / "sys/fs/cgroup/cpu.stat") or ""
    found = re.search(r"^throttled_usec (\d+)$", text, re.MULTILINE)
    return int(found[1]) / 1e6 if found else None


def _clocks_mhz(cores: Sequence[int], root: Path) -> tuple[float, ...] | None:
    """The current clock of each core, from the driver that sets it or else as the kernel saw it."""
    known = _cpufreq_mhz(cores, "scaling_cur_freq", root)
    if known is not None:
        return known
    pairs = re.findall(
        r"^processor\s*:\s*(\d+)$.*?^cpu MHz\s*:\s*([\d.]+)$",
        _text(root / "proc/cpuinfo") or "",
        re.MULTILINE | re.DOTALL,
    )
    seen = {int(core): float(mhz) for core, mhz in pairs}
    return tuple(seen[core] for core in cores) if set(cores) <= set(seen) else None


def _cpufreq_mhz(cores: Sequence[int], name: str, root: Path) -> tuple[float, ...] | None:
    folder = root / "sys/devices/system/cpu"
    texts = [_text(folder / f"cpu{core}" / "cpufreq" / name) or "" for core in cores]
    return tuple(int(khz) / 1000 for khz in texts) if all(map(str.isdigit, texts)) else None


def _throttle_events(root: Path) -> int | None:
    folder = root / "sys/devices/system/cpu"
    counts = [_text(path) or "" for path in folder.glob("cpu*/thermal_throttle/*_throttle_count")]
    return sum(map(int, counts)) if counts and all(map(str.isdigit, counts)) else None


def _gpu_activity() -> GpuActivity | None:
    """The first GPU that CUDA shows, as nvidia-smi sees it."""
    program = shutil.which("nvidia-smi")
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if program is None or not re.fullmatch(r"\d+|GPU-[\w-]+", gpu):
        return None
    fields = "clocks.sm,clocks.max.sm,clocks_throttle_reasons.active"
    answer = _output(
        [program, f"--id={gpu}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        NVIDIA_SMI_SECONDS,
    )
    found = re.fullmatch(
        r"(\d+|\[.*?\]), (\d+|\[.*?\]), (?:0x([0-9a-fA-F]+)|\[.*?\])", answer or ""
    )
    if found is None:
        return None
    clock, top = (float(mhz) if mhz.isdigit() else None for mhz in found.group(1, 2))
    reasons = int(found[3] or "0", 16)
    held_by = dict.fromkeys(words for bit, words in GPU_LIMITS.items() if reasons & bit)
    return GpuActivity(clock, top, bool(reasons & GPU_IDLE), tuple(held_by))


def _commit() -> tuple[str | None, str | None]:
    """The commit that is measured, and when it was committed."""
    named = os.environ.get("GITHUB_SHA") or os.environ.get("CI_COMMIT_SHA") or ""
    named = named if re.fullmatch(r"[0-9a-fA-F]{7,64}", named) else ""
    git = shutil.which("git")
    answer = git and _output(
        [git, "show", "--no-patch", "--no-show-signature", "--format=%H %cI", named or "HEAD"],
        GIT_SECONDS,
    )
    commit, _, committed = (answer or "").partition(" ")
    return named or commit or None, committed or None


def _output(command: Sequence[str], seconds: float) -> str | None:
    """What a command prints, None where it fails or takes too long."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


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
