"""What the pipeline makes of its findings: which way round a ratio is, whose drift is whose, and
what is open and held at the same time."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from optfuse import backends, pipeline, stats, trial
from optfuse.backends import Backend, Session, nvinfer, onnx_runtime, torch_eager
from optfuse.errors import EngineError, UsageError
from optfuse.precision.plan import Plan
from optfuse.report import rows
from optfuse.stages import LoadedModel, Measurement, Program, Source, Variant, silent
from tests.harness import captured

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image):
        return self.last(torch.relu(self.norm(self.stem(image))))


def build():
    return Net()


def example_inputs():
    return (torch.randn(1, 3, 8, 8),)
"""


def measured(engine: str, variant: Variant, milliseconds: float) -> Measurement:
    """Twelve blocks of three samples, a little different in each block for all alike."""
    blocks = tuple((milliseconds * (1 + 0.01 * (block % 3)),) * 3 for block in range(12))
    return Measurement(engine, variant, "cpu", blocks)


def test_a_ratio_above_one_means_that_ours_takes_less_time() -> None:
    comparisons, floors = trial._ratios(
        [
            measured("torch", "baseline", 12.0),
            measured("torch", "control", 12.0),
            measured("torch", "optimized", 8.0),
            measured("onnxruntime", "baseline", 3.0),
            measured("onnxruntime", "control", 3.0),
            measured("onnxruntime", "optimized", 4.0),
        ],
        seed=0,
    )
    found = {(c.engine, c.variant, c.against_engine, c.against): c.ratio.ratio for c in comparisons}
    # The blocks vary alike, so the paired ratio is exact but for float64 rounding.
    assert found == {
        ("torch", "optimized", "torch", "baseline"): pytest.approx(12 / 8, rel=1e-12),
        ("onnxruntime", "optimized", "onnxruntime", "baseline"): pytest.approx(3 / 4, rel=1e-12),
        ("onnxruntime", "optimized", "torch", "baseline"): pytest.approx(12 / 4, rel=1e-12),
    }
    verdicts = [
        stats.verdict(each.ratio, stats.noise_floor(floors[0].control)) for each in comparisons
    ]
    assert verdicts == ["faster", "slower", "faster"]
    assert [floor.control.ratio for floor in floors] == [pytest.approx(1.0, rel=1e-12)] * 2


class Giving:
    """A session whose last run gave these outputs."""

    def __init__(self, *outputs: torch.Tensor) -> None:
        self.outputs = outputs

    def fetch(self) -> list[torch.Tensor]:
        return list(self.outputs)


def opened(variant: Variant, output: torch.Tensor) -> tuple[str, Variant, Session]:
    return "torch", variant, cast(Session, cast(Any, Giving(output)))


class Tripling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 3


TORCH = backends.get("torch")
NO_TRIAL = cast(trial.Trial, None)
"""Looked into only where inputs are samples of the user's own."""


def test_each_drift_is_of_its_own_variant_against_float64() -> None:
    x = torch.linspace(1, 2, 8)
    exact = x.double() * 3
    found = trial.Findings(Path())
    sessions = [
        opened("baseline", exact * 1.01),
        opened("control", exact * 1.5),
        opened("optimized", exact * 1.04),
    ]
    [inputs] = pipeline._inputs(captured(Tripling(), x), [TORCH], Plan(), found, silent)
    trial._compare_all(sessions, inputs, NO_TRIAL, found)
    # Every output is scaled, so the relative distance is the scale's own; 1e-12 is rounding.
    assert {each.variant: each.relative_l2 for each in found.drifts} == {
        "baseline": pytest.approx(0.01, rel=1e-12),
        "optimized": pytest.approx(0.04, rel=1e-12),
    }


def test_without_float64_there_is_no_drift_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("not in float64")

    monkeypatch.setattr(pipeline, "run_float64", fails)
    x = torch.linspace(1, 2, 8)
    found = trial.Findings(Path())
    [inputs] = pipeline._inputs(captured(Tripling(), x), [TORCH], Plan(), found, silent)
    trial._compare_all([opened("optimized", x)], inputs, NO_TRIAL, found)
    assert found.drifts == []
    [failure] = found.failures
    assert failure.cause == "It does not run in float64: RuntimeError"


class Builder:
    """An engine that builds here and runs elsewhere."""

    name = "builder"
    consumes = "onnx"
    builds = True

    def cannot_run(self) -> str | None:
        return "no GPU"


BUILDER = cast(Backend, cast(Any, Builder()))


def test_nothing_is_run_in_float64_for_engines_that_only_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(pipeline, "run_float64")
    program = captured(Tripling(), torch.linspace(1, 2, 8))
    [inputs] = pipeline._inputs(program, [BUILDER], Plan(), trial.Findings(Path()), silent)
    assert inputs.reference is None


def test_the_time_is_divided_among_the_turns_that_can_run() -> None:
    onnxruntime = backends.get("onnxruntime")
    assert trial._seconds_of_each([[TORCH], [BUILDER], [onnxruntime]], 6.0) == 3.0
    assert trial._seconds_of_each([[TORCH, BUILDER, onnxruntime]], 6.0) == 6.0
    assert trial._seconds_of_each([[BUILDER]], 6.0) == 6.0


class Watched:
    """What happened in one run of the pipeline: sessions, and whatever of the programs was alive
    when each was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.alive_at: dict[str, int] = {}
        self.measured: list[tuple[float, list[str], int]] = []
        self._held: list[weakref.ref[Any]] = []
        for name, backend, session in (
            ("torch", torch_eager.BACKEND, torch_eager.TorchEagerSession),
            ("onnxruntime", onnx_runtime.CPU_BACKEND, onnx_runtime.OnnxRuntimeSession),
        ):
            monkeypatch.setattr(backend, "open", self._opening(name, backend.open))
            monkeypatch.setattr(session, "__exit__", self._closing(name, session.__exit__))
        for name in ("load", "capture", "optimize"):
            monkeypatch.setattr(pipeline, name, self._holding(vars(pipeline)[name]))
        monkeypatch.setattr(trial, "measure", self._measuring(vars(trial)["measure"]))

    def _opening(self, name: str, really: Any) -> Any:
        def open_(*arguments: Any) -> Any:
            self.events.append(f"open {name}")
            self.alive_at[name] = sum(each() is not None for each in self._held)
            return really(*arguments)

        return open_

    def _closing(self, name: str, really: Any) -> Any:
        def exit_(session: Any, *error: Any) -> Any:
            self.events.append(f"close {name}")
            return really(session, *error)

        return exit_

    def _holding(self, really: Any) -> Any:
        def give(*arguments: Any, **options: Any) -> LoadedModel | Program:
            given: LoadedModel | Program = really(*arguments, **options)
            module = given.module if isinstance(given, LoadedModel) else given.graph_module
            self._held += [weakref.ref(each) for each in (module, *module.parameters())]
            return given

        return give

    def _measuring(self, really: Any) -> Any:
        def measure(sessions: Sequence[tuple[str, str, Session]], **options: Any) -> Any:
            names = [f"{engine} {variant}" for engine, variant, _ in sessions]
            different = len({id(session) for _, _, session in sessions})
            self.measured.append((options["schedule"].budget_seconds, names, different))
            # Rounds as short as they can be: their number is what a ratio needs.
            quick = replace(options.pop("schedule"), block_ms=1.0, warmup_ms=1.0)
            return really(sessions, schedule=quick, **options)

        return measure


VARIANTS = ("baseline", "control", "optimized")


def request(folder: Path, *engines: str, duration_seconds: float = 0.5) -> pipeline.Request:
    source = folder / "net_of_pipeline_tests.py"
    source.write_text(MODEL)
    return pipeline.Request(
        Source(f"{source}:build"),
        output=folder / "out",
        engines=engines,
        duration_seconds=duration_seconds,
    )


def test_engines_take_turns_with_a_large_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LARGE_BYTES", 1)
    watched = Watched(monkeypatch)
    # Asked for last, and first all the same: it runs the programs, which can go after it.
    outcome = pipeline.run(request(tmp_path, "onnxruntime", "torch"))
    document = outcome.report.document
    assert outcome.failures == ()
    assert watched.events == [
        *("open torch", "open torch", "close torch", "close torch"),
        *("open onnxruntime", "open onnxruntime", "close onnxruntime", "close onnxruntime"),
    ]
    # Of two sessions three are measured: the control is the export as it comes once more.
    assert watched.measured == [
        (0.25, [f"{engine} {variant}" for variant in VARIANTS], 2)
        for engine in ("torch", "onnxruntime")
    ]
    assert document["settings"]["interleaved"] == [["torch"], ["onnxruntime"]]
    drifts = {(row["engine"], row["variant"]) for row in document["drift"]}
    assert drifts == {(e, v) for e in ("torch", "onnxruntime") for v in ("baseline", "optimized")}
    compared = [(row["engine"], row["against_engine"]) for row in document["speedups"]]
    assert compared == [("torch", "torch"), ("onnxruntime", "onnxruntime")]
    assert [row["engine"] for row in document["noise_floors"]] == ["torch", "onnxruntime"]
    assert rows.not_measured(document) == [
        "onnxruntime against torch not measured: with 0 MB of parameters the engines took turns to "
        "save memory, and only runs that were interleaved are compared"
    ]


def test_a_large_model_is_let_go_before_an_engine_opens_that_runs_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "LARGE_BYTES", 1)
    watched = Watched(monkeypatch)
    pipeline.run(request(tmp_path, "torch", "onnxruntime", duration_seconds=0))
    assert watched.alive_at["torch"] > 0
    # The model, both programs, and the parameters of all three.
    assert watched.alive_at["onnxruntime"] == 0


def test_everything_is_open_at_once_with_a_model_that_is_not_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    document = pipeline.run(request(tmp_path, "onnxruntime", "torch")).report.document
    engines = ("onnxruntime", "torch")
    # Closed in reverse, as with-blocks are.
    opens = [f"open {engine}" for engine in engines for _ in VARIANTS]
    closes = [f"close {engine}" for engine in reversed(engines) for _ in VARIANTS]
    assert watched.events == [*opens, *closes]
    names = [f"{engine} {variant}" for engine in engines for variant in VARIANTS]
    assert watched.measured == [(0.5, names, 6)]
    assert document["settings"]["interleaved"] == [["onnxruntime", "torch"]]
    compared = [(row["engine"], row["against_engine"]) for row in document["speedups"]]
    assert compared == [
        ("onnxruntime", "onnxruntime"),
        ("onnxruntime", "torch"),
        ("torch", "torch"),
    ]
    assert document["not_measured"] == []


def test_an_engine_that_fails_in_its_turn_leaves_the_others_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise EngineError("It cannot start", "Out of memory", "Free some memory")

    monkeypatch.setattr(trial, "LARGE_BYTES", 1)
    Watched(monkeypatch)
    monkeypatch.setattr(torch_eager.BACKEND, "open", fails)
    outcome = pipeline.run(request(tmp_path, "torch", "onnxruntime"))
    document = outcome.report.document
    assert [failure.cause for failure in outcome.failures] == ["Out of memory"]
    assert {row["engine"] for row in document["latency"]} == {"onnxruntime"}
    # Nothing is missing that interleaving would have given.
    assert rows.not_measured(document) == ["torch not measured: it failed: Out of memory"]


# Options that an engine does not have

RTX, TENSORRT = backends.get("tensorrt-rtx"), backends.get("tensorrt")
SOURCE = Source("nowhere.py:build")


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages of TensorRT, on a machine whose GPU is older than Ampere."""
    monkeypatch.setattr(nvinfer.NvinferBackend, "unavailable", lambda _self: None)
    monkeypatch.setattr(nvinfer.NvinferBackend, "cannot_run", lambda _self: None)
    monkeypatch.setattr(nvinfer, "device_target", lambda: "sm_75")


@pytest.mark.parametrize(
    ("engine", "asked", "told"),
    [
        (
            "tensorrt-rtx",
            pipeline.Request(SOURCE, version_compatible=True),
            "--version-compatible cannot be used with tensorrt-rtx. It loads no engine of an "
            "earlier release, however that was built. Leave the option out, or use the engine "
            "tensorrt on the GPU itself: pip install 'optfuse[gpu]'.",
        ),
        (
            "tensorrt",
            pipeline.Request(SOURCE, hardware_compatible=True),
            "--hardware-compatible cannot be used with tensorrt here. It builds for later GPUs "
            "from sm_80 on, and the GPU here is sm_75. Leave the option out, or build on a GPU of "
            "sm_80 or later.",
        ),
    ],
)
def test_an_option_that_an_engine_lacks_is_refused_before_anything_is_loaded(
    turing: None, engine: str, asked: pipeline.Request, told: str
) -> None:
    # By name, also beside an engine that has the option; and where no other engine builds files.
    for engines in (("tensorrt", "tensorrt-rtx"), (engine,), (engine, "torch")):
        with pytest.raises(UsageError) as refused:
            pipeline.run(replace(asked, engines=engines))
        assert str(refused.value) == told


def test_an_option_leaves_out_the_engine_that_lacks_it_where_none_is_named(turing: None) -> None:
    torch_backend = backends.get("torch")
    everything = [torch_backend, TENSORRT, RTX]
    for engines in ((), ("auto",)):
        asked = pipeline.Request(SOURCE, engines=engines)
        later = replace(asked, version_compatible=True)
        able, [left_out] = pipeline._able_to_build(everything, later)
        assert able == [torch_backend, TENSORRT]
        assert (left_out.engine, left_out.variant) == ("tensorrt-rtx", "optimized")
        assert left_out.reason == "it loads no engine of an earlier release, however that was built"
        able, [left_out] = pipeline._able_to_build(
            everything, replace(asked, hardware_compatible=True)
        )
        assert able == [torch_backend, RTX]
        assert (
            left_out.reason == "it builds for later GPUs from sm_80 on, and the GPU here is sm_75"
        )
        with pytest.raises(
            UsageError, match="--version-compatible cannot be used with tensorrt-rtx"
        ):
            pipeline._able_to_build([torch_backend, RTX], later)
