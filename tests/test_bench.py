"""Latencies side by side: what is measured, what is said of what could not be, and what is kept."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from optfuse import backends
from optfuse.backends.torch_eager import TorchEagerSession
from optfuse.bench import BenchRequest, bench
from optfuse.errors import EngineError, OptfuseError, UsageError
from optfuse.measure import InProcess, Schedule, interleave
from optfuse.report import kinds, schema
from optfuse.roofline import Ceilings
from optfuse.stages import InputSpec, Report

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, repeats):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.repeats = repeats

    def forward(self, x):
        x = torch.relu(self.first(x))
        for _ in range(self.repeats):
            x = torch.relu(self.body(x))
        return x

def build():
    return Net(1)

def slow():
    return Net(12)

def example_inputs():
    return torch.randn(1, 3, 16, 16)
"""

QUICK = Schedule(budget_seconds=0.4, min_blocks=8, max_blocks=10, block_ms=1, warmup_ms=1)


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test depends on what this machine can do."""
    known = Ceilings(
        gflops_per_s=100.0,
        gbytes_per_s=10.0,
        threads=1,
        device="cpu",
        cpu_model="a processor",
        torch_version="2.0",
        measured="2026-01-01T00:00:00+00:00",
    )
    module = importlib.import_module("optfuse.bench")
    monkeypatch.setattr(module, "ceilings", lambda *_args, **_options: known)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


def request(*subjects: str, **options: Any) -> BenchRequest:
    return BenchRequest(subjects, schedule=QUICK, command=("optfuse", "bench"), **options)


def measured(*subjects: str, **options: Any) -> dict[str, Any]:
    outcome = bench(request(*subjects, **options))
    assert outcome.failures == ()
    document: dict[str, Any] = json.loads(schema.dump(outcome.report))
    jsonschema.validate(document, schema.json_schema("bench"))
    assert schema.parse(json.dumps(document)).document == document
    return document


def test_a_source_and_its_export_are_compared_with_the_first(folder: Path) -> None:
    document = measured("net.py:build", "net.py:build@onnxruntime")
    [run] = document["runs"]
    assert [(row["name"], row["engine"]) for row in run["latency"]] == [
        ("net@torch", "torch"),
        ("net@onnxruntime", "onnxruntime"),
    ]
    assert [(row["name"], row["against"]) for row in run["ratios"]] == [
        ("net@onnxruntime", "net@torch")
    ]
    assert run["control"]["floor"] >= 1
    blocks = {len(row["blocks"]) for row in run["latency"]}
    assert len(blocks) == 1
    assert blocks.pop() >= 8
    assert document["contenders"][0]["sha256"] is None
    # Two convolutions on 16x16: 2 * 256 * (27 * 8 + 72 * 8).
    assert {row["flops"] for row in run["latency"]} == {405_504}


def test_a_slow_variant_is_called_slower(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which every layer takes a millisecond, give or take 2 %: whatever else this
    machine does, twelve layers more are slower, and are called so."""
    now_ns = 0.0
    noise = random.Random(0)

    def takes_its_time(session: Any) -> None:
        nonlocal now_ns
        operators = len(
            session._graph_module.graph.find_nodes(
                op="call_function", target=torch.ops.aten.relu.default
            )
        )
        now_ns += operators * 1e6 * noise.gauss(1, 0.02)

    module = importlib.import_module("optfuse.bench")
    clock = lambda: int(now_ns)  # noqa: E731
    monkeypatch.setattr(TorchEagerSession, "run", takes_its_time)
    monkeypatch.setattr(module, "InProcess", partial(InProcess, clock=clock))
    monkeypatch.setattr(module, "interleave", partial(interleave, clock=clock))
    document = measured("net.py:build", "net.py:slow")
    [row] = document["runs"][0]["ratios"]
    assert row["verdict"] == "slower"
    # 2 layers against 13; 8 blocks of 2 % noise leave much less than 5 % in doubt.
    assert row["ratio"] == pytest.approx(2 / 13, rel=0.05)
    page = kinds.page(document)
    assert page.headline[0].startswith("net.py:slow@torch 0.15")
    assert page.headline[0].endswith("] slower than net.py:build@torch")


def test_each_batch_is_a_run_of_its_own(folder: Path) -> None:
    kept: list[Report] = []
    outcome = bench(
        request("net.py:build", "net.py:build@onnxruntime", batches=(1, 4)), keep=kept.append
    )
    document = outcome.report.document
    assert [run["batch"] for run in document["runs"]] == [1, 4]
    for run in document["runs"]:
        for row in run["latency"]:
            assert row["inputs"][0]["shape"] == [run["batch"], 3, 16, 16]
            assert row["items_per_s"] == run["batch"] * row["throughput_per_s"]
            assert row["flops"] == 405_504 * run["batch"]
    # After each batch, so that an interrupted sweep keeps what it found.
    assert [len(report.document["runs"]) for report in kept] == [1, 2]
    titles = [each.title for each in kinds.page(document).tables]
    assert titles == [
        "Latency and throughput by batch",
        "Latency, batch 1",
        "Speed-up, batch 1",
        "Latency, batch 4",
        "Speed-up, batch 4",
        "Roofline",
    ]


def test_processes_of_their_own_give_the_same_document(folder: Path) -> None:
    document = measured("net.py:build", "net.py:build@onnxruntime", isolated=True)
    [run] = document["runs"]
    assert document["settings"]["isolated"]
    assert [row["device"] for row in run["latency"]] == ["cpu", "cpu"]
    assert "a process for each" in kinds.page(document).facts[-1]


@pytest.mark.parametrize(("known", "asked"), [(1e-6, [False, True]), (1e9, [False])])
def test_ceilings_that_a_run_surpasses_are_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, known: float, asked: list[bool]
) -> None:
    calls: list[bool] = []

    def remembered(*_args: Any, surpassed: bool = False) -> Ceilings:
        calls.append(surpassed)
        return Ceilings(
            1e9 if surpassed else known, 1.0, 1, "cpu", None, "2.0", "2026-01-01T00:00:00+00:00"
        )

    monkeypatch.setattr(importlib.import_module("optfuse.bench"), "ceilings", remembered)
    document = measured("net.py:build", batches=(1, 2))
    assert calls == asked
    assert document["ceilings"]["gflops_per_s"] == 1e9


def test_a_folder_of_results_is_compared_with_itself(folder: Path) -> None:
    from optfuse import pipeline
    from optfuse.stages import Source

    pipeline.run(
        pipeline.Request(
            Source("net.py:build"), output=folder / "out", engines=("torch",), duration_seconds=0
        )
    )
    document = measured("out")
    assert [row["name"] for row in document["runs"][0]["latency"]] == [
        "out/baseline.onnx@onnxruntime",
        "out/model.onnx@onnxruntime",
    ]
    assert [len(each["sha256"]) for each in document["contenders"]] == [64, 64]


def test_one_alone_is_measured_too(folder: Path) -> None:
    document = measured("net.py:build")
    assert document["runs"][0]["ratios"] == []
    assert kinds.page(document).headline[0].startswith("net@torch: ")


def refuses(*_args: Any, **_options: Any) -> Any:
    raise EngineError("The engine 'onnxruntime' cannot load it", "It is broken", "Mend it")


def test_what_fails_is_left_out_and_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backends.get("onnxruntime")), "open", refuses)
    outcome = bench(request("net.py:build", "net.py:build@onnxruntime"))
    [run] = outcome.report.document["runs"]
    assert [row["name"] for row in run["latency"]] == ["net@torch"]
    assert run["not_run"] == [{"name": "net@onnxruntime", "reason": "It is broken"}]
    assert [error.cause for error in outcome.failures] == ["It is broken"]
    assert (
        "net@onnxruntime not measured: It is broken" in kinds.page(outcome.report.document).headline
    )


def test_nothing_to_measure_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(backends.get("onnxruntime")), "open", refuses)
    with pytest.raises(EngineError, match="It is broken"):
        bench(request("net.py:build@onnxruntime"))


def test_an_engine_that_is_missing_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        type(backends.get("onnxruntime")), "cannot_run", lambda _self: "It is not installed"
    )
    outcome = bench(request("net.py:build", "net.py:build@onnxruntime"))
    assert outcome.report.document["runs"][0]["not_run"][0]["reason"] == "It is not installed"


def test_the_same_inputs_are_the_same_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[torch.Tensor] = []

    def watched(open_: Callable[..., Any]) -> Callable[..., Any]:
        def opened(self: Any, *args: Any) -> Any:
            session = open_(self, *args)
            bind = session.bind
            session.bind = lambda feeds: (fed.append(feeds[0]), bind(feeds))[1]
            return session

        return opened

    for name in ("torch", "onnxruntime"):
        kind = type(backends.get(name))
        monkeypatch.setattr(kind, "open", watched(kind.open))
    measured("net.py:build", "net.py:build@onnxruntime")
    assert len(fed) == 3  # the first one twice
    assert all(torch.equal(each, fed[0]) for each in fed)
    assert fed[0].std() > 0.5


def test_a_batch_that_a_file_was_not_exported_for_ends_it(folder: Path) -> None:
    from optfuse import export_baseline
    from optfuse.subjects import parse_subjects, program_of

    export_baseline(program_of(parse_subjects(["net.py:build"])[0]), folder / "net.onnx")
    with pytest.raises(UsageError, match="It was exported for a batch of 1"):
        bench(request("net.onnx", batches=(2,)))


def test_a_batch_and_inputs_that_contradict_each_other(folder: Path) -> None:
    inputs = (InputSpec(None, (8, 3, 16, 16)),)
    with pytest.raises(UsageError) as refused:
        bench(request("net.py:build", batches=(1, 4), inputs=inputs))
    assert str(refused.value) == (
        "--batch 1,4 contradicts --input. The first size of the inputs is 8 there. Leave one of "
        "them out, or write that size as 1."
    )


def test_every_subject_has_the_batch_that_the_report_says(folder: Path) -> None:
    shape = ("n", 3, 16, "width")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.save(model, folder / "open.onnx")
    for rows in (1, 4):
        # What a file leaves open beside the batch has to be said, too.
        inputs = (InputSpec(None, (rows, 3, 16, 16)),)
        document = measured("net.py:build", "open.onnx", batches=(1, 4), inputs=inputs)
        for run in document["runs"]:
            shapes = [row["inputs"][0]["shape"] for row in run["latency"]]
            assert shapes == [[run["batch"], 3, 16, 16]] * 2


@pytest.mark.parametrize("subjects", [("net.py:gone",), ("gone.onnx",), ("nothing",)])
def test_bad_subjects_are_refused(folder: Path, subjects: tuple[str, ...]) -> None:
    with pytest.raises(OptfuseError):
        bench(request(*subjects))
