"""What is said of a machine, read from made-up `proc` and `sys` folders."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import optfuse.environment
from optfuse.environment import (
    GpuActivity,
    activity,
    available_threads,
    environment,
    package_version,
)
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


# --- The commit


@pytest.fixture
def no_ci(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variables of a CI job, and a current folder that no repository is around."""
    for variable in ("GITHUB_SHA", "CI_COMMIT_SHA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)


def commit_of(root: Path) -> tuple[str | None, str | None]:
    found = environment(threads=1, root=root)
    return found["commit"], found["commit_time"]


def repository(folder: Path) -> str:
    """A repository with one commit of a known time; the commit."""
    who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    when = {"GIT_COMMITTER_DATE": "2026-03-04T05:06:07+00:00", "GIT_CONFIG_GLOBAL": os.devnull}
    for arguments in (["init"], [*who, "commit", "--allow-empty", "--message=first"]):
        subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**os.environ, **when},
            check=True,
            capture_output=True,
        )
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    )
    return answer.stdout.strip()


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@needs_git
def test_the_commit_of_the_current_folder_is_named(tmp_path: Path, no_ci: None) -> None:
    commit = repository(tmp_path)
    assert commit_of(tmp_path) == (commit, "2026-03-04T05:06:07+00:00")


@needs_git
@pytest.mark.parametrize("variable", ["GITHUB_SHA", "CI_COMMIT_SHA"])
def test_the_commit_that_a_ci_job_names_comes_first(
    tmp_path: Path, no_ci: None, monkeypatch, variable: str
) -> None:
    commit = repository(tmp_path)
    monkeypatch.setenv(variable, "0123456789abcdef0123456789abcdef01234567")
    # Git does not know that one, as in a job that checked nothing out.
    assert commit_of(tmp_path) == ("0123456789abcdef0123456789abcdef01234567", None)
    monkeypatch.setenv(variable, commit)
    assert commit_of(tmp_path) == (commit, "2026-03-04T05:06:07+00:00")
    monkeypatch.setenv(variable, "--output=somewhere")
    assert commit_of(tmp_path) == (commit, "2026-03-04T05:06:07+00:00")


@needs_git
def test_there_is_no_commit_outside_a_repository(tmp_path: Path, no_ci: None) -> None:
    assert commit_of(tmp_path) == (None, None)


def test_without_git_or_an_answer_from_it_there_is_no_commit(
    tmp_path: Path, no_ci: None, monkeypatch
) -> None:
    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert commit_of(tmp_path) == (None, None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert commit_of(tmp_path) == (None, None)


# --- Activity

STAT = "proc/{}/stat"


def busy_machine() -> dict[str, str]:
    """Four logical cores, in ticks; a child of this process and a grandchild, and a stranger."""
    own = os.getpid()
    frequency = "sys/devices/system/cpu/cpu{}/cpufreq/{}"
    throttle = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
    return {
        "proc/stat": "cpu  9 9 9 9 9 9 9 9 9 9\n"
        + "".join(f"cpu{core} 1000 100 300 5000 50 20 30 40 7 7\n" for core in range(4))
        + "intr 1 2 3\n",
        STAT.format(10**7): f"{10**7} (a worker) S {own} 1 1 0 -1 0 0 0 0 0 100 20 3 4 20 0\n",
        STAT.format(10**7 + 1): f"{10**7 + 1} (its (own) child) R {10**7} 1 1 0 -1 0 0 0 0 0 "
        "1000 0 0 0 20 0\n",
        STAT.format(10**7 + 2): f"{10**7 + 2} (stranger) R 1 1 1 0 -1 0 0 0 0 0 9999 9999 0 0 20\n",
        "proc/uptime/stat": "no process\n",
        "sys/fs/cgroup/cpu.stat": "usage_usec 12\nnr_throttled 3\nthrottled_usec 2500000\n",
        **{frequency.format(core, "scaling_cur_freq"): f"{1000 + core}000\n" for core in range(4)},
        **{frequency.format(core, "cpuinfo_max_freq"): "3000000\n" for core in range(4)},
        **{throttle.format(core, what): "2\n" for core in range(4) for what in ("core", "package")},
    }


def test_what_a_machine_does_is_read(tmp_path: Path, may_run_on, monkeypatch) -> None:
    may_run_on({1, 2}, of=4)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 1.0, 0.5))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    monkeypatch.setattr(os, "times", lambda: (3.0, 2.0, 1.0, 0.5, 99.0))
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = activity(machine(tmp_path, busy_machine()))
    # Of the two cores it may run on, at 100 ticks a second; nice is user, interrupts are system,
    # waiting is idle.
    assert found.user_seconds == 2 * 11.0
    assert found.system_seconds == 2 * 3.5
    assert found.idle_seconds == 2 * 50.5
    assert found.stolen_seconds == 2 * 0.4
    # This process and the children it waited for, 6.5 s; a child that runs, 1.27 s with its own
    # dead children; and a grandchild, 10 s.
    assert found.own_seconds == 6.5 + 1.27 + 10
    assert found.quota_seconds == 2.5
    assert (found.cores, found.taken_seconds) == (2, 7.0)
    assert found.load_average == [1.5, 1.0, 0.5]
    assert (found.clocks_mhz, found.top_clocks_mhz) == ((1001.0, 1002.0), (3000.0, 3000.0))
    assert found.throttle_events == 16
    assert found.gpu is None
    assert json.loads(json.dumps(asdict(found)))["cores"] == 2


def test_without_a_driver_that_sets_them_the_clocks_are_as_the_kernel_saw_them(
    tmp_path: Path, may_run_on
) -> None:
    may_run_on({1}, of=2)
    cpuinfo = "processor\t: 0\ncpu MHz\t\t: 1200.5\n\nprocessor\t: 1\ncpu MHz\t\t: 2596.122\n"
    found = activity(machine(tmp_path, {"proc/cpuinfo": cpuinfo}))
    assert (found.clocks_mhz, found.top_clocks_mhz) == ((2596.122,), None)


def test_what_a_machine_does_not_tell_is_none(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not on this system")

    monkeypatch.setattr(os, "getloadavg", refuse)
    monkeypatch.setattr(os, "sysconf", refuse)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = asdict(activity(tmp_path))
    known = {"taken_seconds", "cores", "own_seconds"}
    assert {name for name, value in found.items() if value is not None} == known


@pytest.mark.parametrize(
    "files",
    [
        {"proc/stat": "cpu0 1 2 3\n"},
        {"proc/stat": "cpu7 1 2 3 4 5 6 7 8 9 10\n"},
        {"sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "<unknown>\n"},
        {"sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "?\n"},
        {"proc/12/stat": "12 (short) S\n"},
    ],
    ids=["an old kernel", "another core", "no clock", "no count", "a process that just ended"],
)
def test_a_file_that_cannot_be_made_sense_of_is_left_out(
    tmp_path: Path, may_run_on, monkeypatch, files: Mapping[str, str]
) -> None:
    may_run_on({0}, of=1)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = activity(machine(tmp_path, files))
    assert found.user_seconds is found.clocks_mhz is found.throttle_events is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc")
def test_the_work_of_children_is_our_own() -> None:
    program = (
        "import sys, time\nwhile time.process_time() < 0.3: pass\n"
        "print('done', flush=True); sys.stdin.read()"
    )
    before = activity()
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "done\n"
        meanwhile = activity()  # it still runs
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    after = activity()  # it was waited for
    # 0.3 s, but for two ticks of 10 ms that the kernel may not have counted yet.
    assert meanwhile.own_seconds - before.own_seconds >= 0.28
    assert after.own_seconds - before.own_seconds >= 0.28
    assert after.taken_seconds > before.taken_seconds


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1980, 1980, 0x0000000000000000\n", GpuActivity(1980.0, 1980.0, False, ())),
        ("345, 1980, 0x0000000000000001\n", GpuActivity(345.0, 1980.0, True, ())),
        ("1200, 1980, 0x0000000000000068\n",
         GpuActivity(1200.0, 1980.0, False, ("a hardware slowdown", "a thermal limit"))),
        ("1500, 1980, 0x0000000000000006\n",
         GpuActivity(1500.0, 1980.0, False, ("a power limit",))),
        ("[N/A], [N/A], [Not Supported]\n", GpuActivity(None, None, False, ())),
        ("No devices were found\n", None),
    ],
)  # fmt: skip
def test_a_gpu_says_what_holds_its_clock_down(
    tmp_path: Path, monkeypatch, answer: str, expected: GpuActivity | None
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        asked.append(command)
        return SimpleNamespace(stdout=answer)

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert activity(tmp_path).gpu == expected
    assert asked[0][:2] == ["/usr/bin/nvidia-smi", "--id=2"]


@pytest.mark.parametrize("visible", ["", "-1", "MIG-1234", "--help"])
def test_a_gpu_that_cuda_does_not_show_is_not_asked(
    tmp_path: Path, monkeypatch, visible: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert activity(tmp_path).gpu is None


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        subprocess.CalledProcessError(9, "nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 5),
    ],
)
def test_a_gpu_whose_driver_fails_is_none(tmp_path: Path, monkeypatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert activity(tmp_path).gpu is None


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
        "openvino",
        "tensorrt",
        "tensorrt_rtx",
    ]


def test_a_package_that_is_not_installed_has_no_version(monkeypatch) -> None:
    assert package_version("no-such-package-anywhere") is None
    assert package_version("no-such-package-anywhere", "torch") == torch.__version__
    monkeypatch.setitem(optfuse.environment.PACKAGES, "tensorrt", ("no-such-package-anywhere",))
    assert environment(threads=1)["versions"]["tensorrt"] is None


def test_asking_for_threads_versions_and_activity_does_not_import_torch() -> None:
    program = (
        "import sys; from optfuse import environment as e;"
        "e.available_threads(), e.package_version('torch'), e.activity();"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"
