"""The zoo: its table, its resuming, and the snapshot that a refactor of the passes leaves as it is.

`make zoo` runs every network; here are the small ones, and what its figures promise.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.kept import ROOT
from benchmarks.zoo import results, table
from benchmarks.zoo.figures import figures_of
from benchmarks.zoo.networks import GROUPS, draw_weights
from benchmarks.zoo.refusals import LIFTED_BY, generalised, what_would_lift
from benchmarks.zoo.run import NETWORKS, row_of, why_wrong
from benchmarks.zoo.workers import Job, Worker, run_all
from optfuse.capture import capture
from optfuse.optimize import optimize, select
from optfuse.passes import ORDER
from optfuse.stages import Drift, LoadedModel
from tests.harness import captured, optimized, scramble

SNAPSHOT: dict[str, dict[str, Any]] = json.loads((ROOT / "docs" / "zoo.json").read_text("utf-8"))

each_in_snapshot = pytest.mark.parametrize("name", SNAPSHOT)

SMALL = (
    "alexnet",
    "lraspp_mobilenet_v3_large",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
)
"""Quick, and each of another kind; the demonstration networks are in tests/test_networks.py."""


# The snapshot -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_small_network_comes_to_what_the_snapshot_says(name: str) -> None:
    network = NETWORKS[name]
    shape = torch.randn(network.shape, generator=torch.Generator().manual_seed(1))
    before = capture(LoadedModel(name, network.build(), (shape,)))
    after = optimize(before, select("all"))
    figures = figures_of(before, after)
    assert figures == {key: SNAPSHOT[name][key] for key in figures}


def test_the_snapshot_has_every_network() -> None:
    assert list(SNAPSHOT) == list(NETWORKS)


@each_in_snapshot
def test_no_batch_norm_is_left_behind_a_convolution(name: str) -> None:
    assert SNAPSHOT[name]["outcome"] in ("right", "left out")
    assert SNAPSHOT[name].get("behind_convolutions", 0) == 0


@each_in_snapshot
def test_what_the_passes_took_away_is_what_is_missing(name: str) -> None:
    row = SNAPSHOT[name]
    if row["outcome"] == "left out":
        pytest.skip(row["why"])
    before, after = row["operators"]
    assert before - after == sum(taken for _, taken in row["passes"].values())
    for number, total in enumerate(row["operators"]):
        assert sum(counts[number] for counts in row["kinds"].values()) == total


def test_every_refusal_says_what_would_lift_it() -> None:
    unknown = [
        f"{each.name}: {each.reason}"
        for each in table.refusals(SNAPSHOT)
        if what_would_lift(each.name, each.reason) is None
    ]
    assert unknown == []
    assert LIFTED_BY.keys() <= set(ORDER)


# A network ----------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A batch norm that can be folded, and one that cannot: a pooling stands in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        pooled: torch.Tensor = self.other(nn.functional.max_pool2d(x, 2))
        return pooled.relu()


def test_what_is_told_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        name, shape = "tiny", (1, 3, 8, 8)

        @staticmethod
        def build() -> nn.Module:
            return scramble(Tiny())

    monkeypatch.setattr("benchmarks.zoo.run.examples", lambda _: (torch.randn(1, 3, 8, 8),))
    row = row_of(Network())  # type: ignore[arg-type]
    assert row["outcome"] == "right"
    assert row["operators"] == [5, 4]
    assert row["batch_norms"] == [2, 1]
    assert row["behind_convolutions"] == 0
    assert row["passes"] == {"fold_conv_bn": [1, 1]}
    assert all(moved < 1e-5 for moved in row["drift"])
    assert json.loads(json.dumps(row)) == row


def test_a_batch_norm_left_behind_a_convolution_is_counted() -> None:
    before = captured(scramble(Tiny()), torch.randn(1, 3, 8, 8))
    left = figures_of(before, optimized(before, "eliminate_identity"))
    assert left["batch_norms"] == [2, 2]
    assert left["behind_convolutions"] == 1


@pytest.mark.parametrize(
    ("baseline", "ours", "nonfinite", "why"),
    [
        (1e-6, 9e-5, 0, None),
        (1e-6, 2e-4, 0, "its outputs are 2.0e-04 from float64, and 1.0e-04 is the limit"),
        (1e-3, 9e-3, 0, None),
        (1e-3, 2e-2, 0, "its outputs are 2.0e-02 from float64, and 1.0e-02 is the limit"),
        (1e-6, float("nan"), 0, "its outputs are nan from float64, and 1.0e-04 is the limit"),
        (1e-6, 1e-6, 3, "3 outputs are not finite"),
    ],
)
def test_what_is_wrong(baseline: float, ours: float, nonfinite: int, why: str | None) -> None:
    def drift(relative_l2: float, bad: int = 0) -> Drift:
        return Drift("onnxruntime", "optimized", "r", relative_l2, 0.0, 1.0, None, bad, None)

    assert why_wrong(drift(baseline), drift(ours, nonfinite)) == why


def test_no_weight_hides_a_mistake() -> None:
    class Scaled(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.layer_scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))

    module = Scaled()
    draw_weights(module, torch.randn(2, 3, 8, 8) * 100)
    for norm in (module.norm, module.other):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            assert values.unique().numel() == 4
    assert module.layer_scale.abs().max() > 0.01
    assert not module.training
    # The statistics are those of its input, so that what it gives has the usual scale.
    assert 0.1 < module(torch.randn(2, 3, 8, 8) * 100).std() < 10


# Reasons ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (
            "its stride is not that of conv2d_86 (trunk.block1.block1-0.proj.0) on the same tensor",
            "its stride is not that of … on the same tensor",
        ),
        ("the result of relu (act) has 13 users", "the result of … has … users"),
        ("the result of relu_3 has 2 users", "the result of … has … users"),
        (
            "conv2d (a), conv2d_1 (b.0) and add_2 in one would take 1,234 multiply-adds",
            "… in one would take … multiply-adds",
        ),
        (
            "its kernel is 3x3, not 1x1 (the option any_kernel would combine it with 2 more)",
            "its kernel is 3x3, not 1x1 (the option any_kernel would combine it with … more)",
        ),
        ("in float64 it gives another shape", "in float64 it gives another shape"),
        (
            "the constant would take 5.5 MiB in the model and replace 12 bytes.",
            "the constant would take … in the model and replace ….",
        ),
    ],
)
def test_a_reason_without_what_belongs_to_one_place(reason: str, expected: str) -> None:
    assert generalised(reason) == expected


# The documents ------------------------------------------------------------------------------------


def made_row(**changed: Any) -> dict[str, Any]:
    return {
        "group": "classification",
        "family": "resnet",
        "input": "1x3x8x8",
        "outcome": "right",
        "why": None,
        "operators": [30, 11],
        "onnx_operators": [20, 18],
        "batch_norms": [10, 1],
        "behind_convolutions": 0,
        "kinds": {"conv2d": [10, 10], "relu": [20, 1]},
        "passes": {"fold_conv_bn": [9, 9], "merge_branches": [1, -2], "elide_concat": [3, 12]},
        "refused": {"fold_conv_bn": {"the result of … has … users": 2}},
        "drift": [1e-6, 5e-7],
        "seconds": {"capture": 20.0, "export": 10.5},
        "cpu_seconds": 90.0,
        "peak_bytes": 1000,
        **changed,
    }


ROWS: dict[str, dict[str, Any]] = {
    "a18": made_row(),
    "a34": made_row(passes={}, operators=[7, 7], refused={}, drift=[0.0, 0.0]),
    "lone": made_row(family="lone"),
    "single": made_row(family="single"),
    "large": {
        "group": "video",
        "family": "x",
        "input": "1",
        "outcome": "left out",
        "why": "no memory",
    },
    "bad": {
        "group": "video",
        "family": "y",
        "input": "1",
        "outcome": "crashed",
        "why": "SIGSEGV: a|b",
    },
}


def test_the_page() -> None:
    page = table.page(ROWS, table.Setting({"torch": "2.13"}, "AMD EPYC"))
    assert (
        "| networks | right | wrong | crashed | left out | batch norms | left |"
        " of them behind a convolution |\n"
        "| -------: | ----: | ----: | ------: | -------: | ----------: | ---: |"
        " ---------------------------: |\n"
        "|        6 |     4 |     0 |       1 |        1 |          40 |    4 |"
        "                            0 |\n"
    ) in page
    assert "This took 6 minutes of one core of AMD EPYC, with torch 2.13." in page
    assert "- **bad** crashed: SIGSEGV: a\\|b\n" in page
    assert "- **large** left out: no memory\n" in page
    assert (
        "## Classification: resnet\n\n"
        "| network | operators | conv bn | branches | concat | batch norms |    onnx | drift |"
        " refused |\n"
        "| ------- | --------: | ------: | -------: | -----: | ----------: | ------: | ----: |"
        " ------: |\n"
        "| a18     |   30 → 11 |       9 |       +2 |     12 |      10 → 1 | 20 → 18 | 0.50x |"
        "       2 |\n"
        "| a34     |         7 |         |          |        |      10 → 1 | 20 → 18 | exact |"
        "         |\n"
    ) in page
    assert "## Classification: others\n" in page
    assert "## Video\n" in page
    assert "Segmentation" not in page.partition("## ")[2]
    assert page.index("| lone ") < page.index("| single ") < page.index("| large ")


def test_the_refusals_of_all_networks_together() -> None:
    page = table.page(ROWS, table.Setting({}, ""))
    line = next(line for line in page.splitlines() if line.startswith("| fold_conv_bn |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:4] == ["fold_conv_bn", "the result of … has … users", "6", "3"]
    assert cells[4].startswith("nothing that pays")
    assert table.refusals(ROWS) == [
        table.Refused("fold_conv_bn", "the result of … has … users", 6, 3)
    ]


def test_the_document_has_a_line_a_network_and_nothing_of_the_machine() -> None:
    text = table.document(ROWS)
    assert list(json.loads(text)) == list(ROWS)
    assert len(text.splitlines()) == len(ROWS) + 2
    assert json.loads(text)["a18"].keys() == set(table.COUNTED)
    slower = {"a18": made_row(seconds={}, cpu_seconds=1.0, peak_bytes=1, drift=[1.0, 1.0])}
    assert table.document(slower).splitlines()[1] == text.splitlines()[1].rstrip(",")


def test_the_lines_of_the_terminal() -> None:
    assert table.progress("a18", ROWS["a18"]) == (
        "a18: 30 -> 11 operators, drift 0.50x, 2 refused, 30 s"
    )
    assert table.progress("a34", ROWS["a34"]) == "a34: 7 -> 7 operators, drift exact, 30 s"
    assert table.progress("bad", ROWS["bad"]) == "bad: crashed: SIGSEGV: a|b"
    assert table.progress("a", made_row(outcome="wrong", why="moved")).endswith(", WRONG: moved")
    assert table.summary(ROWS) == (
        "6 networks: 4 right, 0 wrong, 1 crashed, 1 left out; "
        "0 batch norms behind convolutions left"
    )


def test_every_pass_has_a_column_and_every_group_a_heading() -> None:
    assert tuple(table.SHORT) == ORDER
    assert {network.group for network in NETWORKS.values()} == set(GROUPS)


# Resuming -----------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "zoo" / "results.jsonl"
    assert results.known("now", file) == {}
    results.keep("a", {"outcome": "right", "operators": [1, 1]}, "now", file)
    results.keep("b", {"outcome": "right"}, "before", file)
    results.keep("c", {"outcome": "crashed"}, "now", file)
    results.keep("a", {"outcome": "right", "operators": [2, 1]}, "now", file)
    with file.open("a") as lines:
        lines.write('{"name": "d", "made_')  # the run was ended here
    results.keep("e", {"outcome": "wrong"}, "now", file)
    assert results.known("now", file) == {
        "a": {"outcome": "right", "operators": [2, 1]},
        "e": {"outcome": "wrong"},
    }


def test_another_source_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "optfuse" / "cli").mkdir(parents=True)
    (tmp_path / "benchmarks" / "zoo").mkdir(parents=True)
    for name in results.MAKING:
        (tmp_path / "benchmarks" / "zoo" / f"{name}.py").write_text(name)

    def after_writing(path: str, text: str) -> str:
        (tmp_path / path).write_text(text)
        return results.fingerprint(tmp_path)

    first = after_writing("optfuse/graph.py", "1")
    assert results.fingerprint(tmp_path) == first
    assert after_writing("benchmarks/zoo/table.py", "1") == first
    assert after_writing("optfuse/cli/check.py", "1") == first
    second = after_writing("optfuse/graph.py", "2")
    assert second != first
    assert after_writing("benchmarks/zoo/networks.py", "2") not in (first, second)


# The command --------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command with its files in a folder, and with workers that only say what they ran."""
    module = importlib.import_module("benchmarks.zoo.__main__")
    file = tmp_path / "results.jsonl"

    def run_all(jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        for job in jobs:
            yield job, made_row(outcome="wrong" if job.name == "vgg11" else "right", why="moved")

    monkeypatch.setattr(module, "run_all", run_all)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    monkeypatch.setattr(module, "MARKDOWN", tmp_path / "zoo.md")
    monkeypatch.setattr(module, "DOCUMENT", tmp_path / "zoo.json")
    monkeypatch.setattr(module.results, "known", partial(results.known, file=file))
    monkeypatch.setattr(module.results, "keep", partial(results.keep, file=file))
    return tmp_path


def test_the_command_goes_on_and_writes_once_all_are_known(
    command: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("benchmarks.zoo.__main__").main
    assert main(["--only", "resnet1*"]) == 0
    assert capsys.readouterr().out == (
        "[1/3] resnet101: 30 -> 11 operators, drift 0.50x, 2 refused, 30 s\n"
        "[2/3] resnet152: 30 -> 11 operators, drift 0.50x, 2 refused, 30 s\n"
        "[3/3] resnet18: 30 -> 11 operators, drift 0.50x, 2 refused, 30 s\n"
        "3 networks: 3 right, 0 wrong, 0 crashed, 0 left out; "
        "0 batch norms behind convolutions left; 4 minutes of processor time\n"
    )
    assert not (command / "zoo.md").exists()
    assert main([]) == 1  # vgg11 came out wrong
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"3 of {len(NETWORKS)} are known from an earlier run"
    assert lines[1].startswith(f"[  4/{len(NETWORKS)}] ")
    assert list(json.loads((command / "zoo.json").read_text("utf-8"))) == list(NETWORKS)
    assert "- **vgg11** wrong: moved" in (command / "zoo.md").read_text("utf-8")
    assert main(["--only", "resnet18", "--fresh"]) == 0
    assert capsys.readouterr().out.startswith("[1/1] resnet18")


def test_a_name_that_no_network_has(command: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.zoo.__main__").main(["--only", "rasnet*"])
    assert "no network is called 'rasnet*'" in capsys.readouterr().err


# Workers ------------------------------------------------------------------------------------------


@dataclass
class FakeProcess:
    """A process that has ended, or still runs where `exitcode` is None."""

    exitcode: int | None = 0
    pid: int = -1
    killed: bool = False

    def kill(self) -> None:
        self.killed = True

    def join(self) -> None:
        pass


@dataclass
class Folder:
    """What a worker's process wrote."""

    name: str
    cleaned: list[str] = field(default_factory=list)

    def cleanup(self) -> None:
        self.cleaned.append(self.name)


def worker(path: Path, process: FakeProcess, job: Job | None = None) -> Worker:
    return Worker(job or Job("a", 0), Folder(str(path)), process)  # type: ignore[arg-type]


def test_what_a_process_wrote_is_its_row(tmp_path: Path) -> None:
    assert worker(tmp_path, FakeProcess(None)).row() is None
    (tmp_path / "row.json").write_text('{"outcome": "right"}')
    assert worker(tmp_path, FakeProcess(0)).row() == {"outcome": "right"}


@pytest.mark.parametrize(
    ("exitcode", "log", "why"),
    [
        (1, "Traceback\nValueError: no\n\n", "exit code 1: ValueError: no"),
        (-11, "", "SIGSEGV: no message"),
        (-9, "loading", "SIGKILL: loading"),
    ],
)
def test_a_crash_is_a_row(tmp_path: Path, exitcode: int, log: str, why: str) -> None:
    (tmp_path / "log").write_text(log)
    assert worker(tmp_path, FakeProcess(exitcode)).row() == {"outcome": "crashed", "why": why}


def test_one_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    process = FakeProcess(None)
    row = worker(tmp_path, process).row(limit_seconds=0)
    assert row == {"outcome": "crashed", "why": "it took more than 0 seconds"}
    assert process.killed


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Processes that end at once; gives the order in which they were started."""
    started: list[str] = []
    folders = []

    def start(job: Job) -> Worker:
        started.append(job.name)
        folder = TemporaryDirectory()
        folders.append(folder)
        (Path(folder.name) / "row.json").write_text('{"outcome": "right"}')
        return worker(Path(folder.name), FakeProcess(0), job)

    monkeypatch.setattr("benchmarks.zoo.workers.Worker.start", start)
    monkeypatch.setattr("benchmarks.zoo.workers.POLL_SECONDS", 0.0)
    yield started
    for folder in folders:
        folder.cleanup()


GIGABYTE = 2**30


def test_the_largest_start_first(at_once: list[str]) -> None:
    jobs = [Job("a", 1), Job("c", 3), Job("b", 2)]
    done = [job.name for job, _ in run_all(jobs, available=lambda: 10.0 * GIGABYTE)]
    assert at_once == ["c", "b", "a"]
    assert sorted(done) == ["a", "b", "c"]


def test_one_that_does_not_fit_beside_the_others_waits(at_once: list[str]) -> None:
    """The first takes 6.5 GiB, so that only the smallest fits beside it."""
    jobs = [Job("small", 0), Job("large", GIGABYTE), Job("middle", GIGABYTE // 2)]
    rows = dict(run_all(jobs, available=lambda: 8.5 * GIGABYTE))
    assert at_once == ["large", "small", "middle"]
    assert [row["outcome"] for row in rows.values()] == ["right"] * 3


def test_one_that_does_not_fit_at_all_is_left_out(at_once: list[str]) -> None:
    jobs = [Job("small", 0), Job("large", GIGABYTE)]
    rows = {job.name: row for job, row in run_all(jobs, available=lambda: 4.0 * GIGABYTE)}
    assert at_once == ["small"]
    assert rows["small"]["outcome"] == "right"
    assert rows["large"] == {
        "outcome": "left out",
        "why": "it needs up to 6 GiB of memory, and 4 GiB were free",
    }
