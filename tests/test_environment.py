"""What is said of a machine, read from made-up `proc` and `sys` folders."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import optfuse.environment
from optfuse.environment import available_threads, environment, package_version
from optfuse.version import __version__

TOPOLOGY = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def machine(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def four_threads_on_two_cores() -> dict[str, str]:
    return {TOPOLOGY.format(core): f"{core % 2},{core % 2 + 2}\n" for core in range(4)}


@pytest.fixture
def may_run_on(monkeypatch: pytest.MonkeyPatch):
    """Sets the logical cores this process may run on, of as many as there are."""

    def choose(cores: set[int], of: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: of)

    return choose


# --- Threads


@pytest.mark.parametrize(
    ("cores", "expected"),
    [({0, 1, 2, 3}, 2), ({0, 2}, 1), ({0, 1}, 2), ({3}, 1)],
    ids=["all", "both threads of one core", "one thread of each core", "one thread"],
)
def test_one_thread_for_each_physical_core_in_the_affinity_mask(
    tmp_path: Path, may_run_on, cores: set[int], expected: int
) -> None:
    may_run_on(cores, of=4)
    assert available_threads(machine(tmp_path, four_threads_on_two_cores())) == expected


def test_without_a_topology_every_core_in_the_mask_counts(tmp_path: Path, may_run_on) -> None:
    may_run_on({0, 1, 5}, of=8)
    assert available_threads(tmp_path) == 3


def test_without_an_affinity_mask_every_core_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_threads(tmp_path) == 6


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("200000 100000", 2), ("150000 100000", 2), ("20000 100000", 1), ("max 100000", 8), ("", 8)],
)
def test_a_containers_quota_is_an_upper_limit(
    tmp_path: Path, may_run_on, quota: str, expected: int
) -> None:
    may_run_on(set(range(8)), of=8)
    assert available_threads(machine(tmp_path, {"sys/fs/cgroup/cpu.max": quota})) == expected


# --- The environment


def test_a_machine_is_described(tmp_path: Path, may_run_on, monkeypatch) -> None:
    may_run_on({1, 2, 3}, of=4)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.234, 0.5, 0.25))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    root = machine(
        tmp_path,
        {
            **four_threads_on_two_cores(),
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Example CPU @ 2.1GHz\nmodel\t\t: 7\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave\n",
        },
    )
    found = environment(threads=3, root=root)
    assert found["cpu_model"] == "Example CPU @ 2.1GHz"
    assert (found["logical_cores"], found["physical_cores"]) == (4, 2)
    assert (found["available_cores"], found["threads"]) == (3, 3)
    assert found["frequency_governor"] == "powersave"
    assert found["load_average"] == [1.23, 0.5, 0.25]
    assert found["python"] == platform.python_version()
    assert found["platform"] == platform.platform()
    assert found["gpu"] is None
    assert json.loads(json.dumps(found)) == found


def test_what_cannot_be_found_out_is_none(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not on this system")

    monkeypatch.setattr(os, "getloadavg", refuse)
    monkeypatch.setattr(os, "sysconf", refuse)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "")
    found = environment(threads=1, root=tmp_path)
    for key in (
        "cpu_model",
        "physical_cores",
        "memory_bytes",
        "frequency_governor",
        "load_average",
    ):
        assert found[key] is None, key


def test_without_cpuinfo_the_platform_names_the_processor(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert environment(threads=1, root=tmp_path)["cpu_model"] == "arm"


def test_this_machine_is_described_too() -> None:
    found = environment(threads=2)
    assert found["memory_bytes"] > 2**28
    assert 1 <= found["available_cores"] <= found["logical_cores"]
    assert available_threads() >= 1


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39\n",
            "535.54.03",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n",
            "580.65.06",
        ),
        ("something else", None),
    ],
)
def test_a_gpu_is_described_with_its_driver(
    tmp_path: Path, monkeypatch, text: str, driver: str | None
) -> None:
    properties = SimpleNamespace(name="Example GPU", major=8, minor=9, total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    root = machine(tmp_path, {"proc/driver/nvidia/version": text})
    assert environment(threads=1, root=root)["gpu"] == {
        "name": "Example GPU",
        "driver": driver,
        "compute_capability": "sm_89",
        "memory_bytes": 24 * 2**30,
    }


# --- Versions


def test_versions_are_those_of_the_installed_packages() -> None:
    versions = environment(threads=1)["versions"]
    assert versions["optfuse"] == __version__
    assert versions["torch"] == torch.__version__
    assert list(versions) == [
        "optfuse",
        "torch",
        "numpy",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "tensorrt",
        "tensorrt_rtx",
    ]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch) -> None:
    assert package_version("no-such-package-anywhere") is None
    assert package_version("no-such-package-anywhere", "torch") == torch.__version__
    monkeypatch.setitem(optfuse.environment.PACKAGES, "tensorrt", ("no-such-package-anywhere",))
    assert environment(threads=1)["versions"]["tensorrt"] is None


def test_asking_for_threads_and_versions_does_not_import_torch() -> None:
    program = (
        "import sys; from optfuse import environment as e;"
        "e.available_threads(), e.package_version('torch');"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"
