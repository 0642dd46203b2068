"""What each pass earned, on times that are laid down for each variant."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optfuse import backends
from optfuse.ablate import Ablation, ablate, choices
from optfuse.errors import EngineError
from optfuse.export import export_baseline
from optfuse.float64 import run_float64
from optfuse.optimize import select
from optfuse.report import schema
from optfuse.stages import Artifact, BuildOptions, Measurement, Program
from optfuse.stats import verdict
from tests.harness import captured, scramble
from tests.report.example import full_arguments

ablating = import_module("optfuse.ablate")

PASSES = "eliminate_identity,fold_conv_bn,elide_concat,fuse_conv_activation"
"""The third of them finds nothing to do in `network`."""


def network() -> Program:
    layers = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Conv2d(4, 2, 1))
    )
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return captured(scramble(layers), image)


class Stopwatch:
    """Stands for `measure`: 10 ms for everything but what `run_ms` names, with a little noise."""

    def __init__(self, run_ms: Mapping[str, float]) -> None:
        self.run_ms = run_ms
        self.runs: list[list[str]] = []
        self.budgets: list[float] = []

    def __call__(
        self, sessions: Sequence[tuple[str, str, Any]], *, schedule: Any, seed: int, notify: Any
    ) -> list[Measurement]:
        self.runs.append([variant for _, variant, _ in sessions])
        self.budgets.append(schedule.budget_seconds)
        noise = random.Random(seed)
        return [
            Measurement(
                engine,
                variant,
                session.device,
                tuple(
                    (self.run_ms.get(variant, 10.0) * noise.uniform(0.999, 1.001),)
                    for _ in range(12)
                ),
            )
            for engine, variant, session in sessions
        ]


@dataclass
class Case:
    """A program with its export and its reference."""

    program: Program
    folder: Path
    baseline: Artifact = field(init=False)
    reference: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.baseline = export_baseline(self.program, self.folder / "baseline.onnx")
        self.reference = run_float64(self.program.graph_module, self.program.example_args, {})

    def ablate(self, *engines: Any, passes: str = PASSES, **options: Any) -> Ablation:
        return ablate(
            self.program,
            select(passes),
            [backends.get(each) if isinstance(each, str) else each for each in engines],
            baseline=self.baseline,
            feeds=list(self.program.example_args),
            reference_name="float64",
            options=BuildOptions(threads=1),
            folder=self.folder / "variants",
            **{"reference": self.reference, **options},
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(network(), tmp_path_factory.mktemp("case"))


RUN_MS = {
    "up_to fold_conv_bn": 5.0,
    "alone fold_conv_bn": 5.0,
    "up_to fuse_conv_activation": 2.5,
    "without eliminate_identity": 2.5,
}
"""What folds the batch norm takes half the time; fusing besides, a quarter."""


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch(RUN_MS)
    monkeypatch.setattr(ablating, "measure", watch)
    return watch


@dataclass(frozen=True)
class Done:
    """One ablation on two engines, what was measured for it, told meanwhile, and left behind."""

    ablation: Ablation
    stopwatch: Stopwatch
    told: list[tuple[str, float | None]]
    files: set[str]


@pytest.fixture(scope="module")
def done(case: Case) -> Done:
    watch, told = Stopwatch(RUN_MS), list[tuple[str, float | None]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablating, "measure", watch)
        ablation = case.ablate(
            *("torch", "onnxruntime"),
            seconds_each=2.0,
            notify=lambda text, fraction: told.append((text, fraction)),
        )
    files = {path.name for path in (case.folder / "variants").iterdir()}
    return Done(ablation, watch, told, files)


def found(ablation: Ablation, engine: str) -> dict[tuple[str, str], schema.Ablated]:
    return {(row.how, row.name): row for row in ablation.rows if row.engine == engine}


def test_every_pass_up_to_alone_and_left_out() -> None:
    selected = select("eliminate_identity,fold_conv_bn,elide_concat")
    one, two, three = selected
    assert [(str(each), each.passes) for each in choices(selected)] == [
        ("up_to eliminate_identity", (one,)),
        ("up_to fold_conv_bn", (one, two)),
        ("up_to elide_concat", (one, two, three)),
        ("alone eliminate_identity", (one,)),
        ("alone fold_conv_bn", (two,)),
        ("alone elide_concat", (three,)),
        ("without eliminate_identity", (two, three)),
        ("without fold_conv_bn", (one, three)),
        ("without elide_concat", (one, two)),
    ]
    assert choices([]) == []


def test_every_choice_has_a_row_on_every_engine(done: Done) -> None:
    ablation = done.ablation
    names = [each.name for each in select(PASSES)]
    rows = [(how, name) for how in ("up_to", "alone", "without") for name in names]
    assert [(row.engine, row.how, row.name) for row in ablation.rows] == [
        (engine, *row) for engine in ("torch", "onnxruntime") for row in rows
    ]
    on_torch = found(ablation, "torch")
    assert on_torch["up_to", "fold_conv_bn"].passes == ("eliminate_identity", "fold_conv_bn")
    assert on_torch["without", "fold_conv_bn"].passes == (names[0], *names[2:])
    # Two convolutions, a batch norm, a dropout and an activation, as captured: 5.
    assert {row: on_torch[row].operators for row in rows} == {
        ("up_to", "eliminate_identity"): 4,
        ("up_to", "fold_conv_bn"): 3,
        ("up_to", "elide_concat"): 3,
        ("up_to", "fuse_conv_activation"): 2,
        ("alone", "eliminate_identity"): 4,
        ("alone", "fold_conv_bn"): 4,
        ("alone", "elide_concat"): 5,
        ("alone", "fuse_conv_activation"): 5,
        ("without", "eliminate_identity"): 3,
        ("without", "fold_conv_bn"): 4,
        ("without", "elide_concat"): 2,
        ("without", "fuse_conv_activation"): 3,
    }
    assert (ablation.skipped, ablation.failures) == ({}, ())


def test_what_gives_the_same_program_is_measured_once(done: Done) -> None:
    on_torch = found(done.ablation, "torch")
    assert {row: each.same_as for row, each in on_torch.items()} == {
        ("up_to", "eliminate_identity"): None,
        ("up_to", "fold_conv_bn"): None,
        ("up_to", "elide_concat"): "up_to fold_conv_bn",
        ("up_to", "fuse_conv_activation"): None,
        ("alone", "eliminate_identity"): "up_to eliminate_identity",
        ("alone", "fold_conv_bn"): None,
        ("alone", "elide_concat"): "baseline",
        ("alone", "fuse_conv_activation"): "baseline",
        ("without", "eliminate_identity"): None,
        ("without", "fold_conv_bn"): "up_to eliminate_identity",
        ("without", "elide_concat"): "up_to fuse_conv_activation",
        ("without", "fuse_conv_activation"): "up_to fold_conv_bn",
    }
    assert done.stopwatch.runs[0] == [
        *("baseline", "control", "up_to eliminate_identity", "up_to fold_conv_bn"),
        *("up_to fuse_conv_activation", "alone fold_conv_bn", "without eliminate_identity"),
    ]
    for row in on_torch.values():
        assert row.measurement.variant == row.same_as or row.same_as is None
    without, full = on_torch["without", "elide_concat"], on_torch["up_to", "fuse_conv_activation"]
    assert (without.measurement, without.ratio) == (full.measurement, full.ratio)


def test_what_gives_the_same_file_is_measured_once(done: Done) -> None:
    """In the file there is no dropout, and an activation stands by itself."""
    on_ort = found(done.ablation, "onnxruntime")
    baselines = {row for row, each in on_ort.items() if each.same_as == "baseline"}
    assert baselines == {
        ("up_to", "eliminate_identity"),
        ("alone", "eliminate_identity"),
        ("alone", "elide_concat"),
        ("alone", "fuse_conv_activation"),
        ("without", "fold_conv_bn"),
    }
    assert [row for row, each in on_ort.items() if each.same_as is None] == [
        ("up_to", "fold_conv_bn")
    ]
    assert done.stopwatch.runs[1] == ["baseline", "control", "up_to fold_conv_bn"]
    assert done.files == {"up_to-fold_conv_bn.onnx"}


def test_a_ratio_is_to_the_export_as_it_comes_and_above_1_is_faster(done: Done) -> None:
    on_torch = found(done.ablation, "torch")
    # 0.001: the noise of a block is at most 0.001 on either side, and 12 of them are averaged.
    expected = {"eliminate_identity": 1.0, "fold_conv_bn": 2.0, "fuse_conv_activation": 4.0}
    for name, ratio in expected.items():
        row = on_torch["up_to", name]
        assert row.ratio.ratio == pytest.approx(ratio, rel=0.001)
        assert verdict(row.ratio, row.noise_floor) == ("faster" if ratio > 1 else "undecided")
        assert 1 < row.noise_floor < 1.002
    same = on_torch["alone", "elide_concat"]
    assert (same.ratio.low, same.ratio.ratio, same.ratio.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_every_choice_has_its_drift(engine: str, done: Done) -> None:
    drifts = {row: each.drift for row, each in found(done.ablation, engine).items()}
    for seen in drifts.values():
        assert seen is not None
        # A few roundings of float32 (6e-8) in sums of 27 products.
        assert 1e-9 < seen.relative_l2 < 1e-5
        assert (seen.engine, seen.reference) == (engine, "float64")
    full, none = drifts["up_to", "fuse_conv_activation"], drifts["alone", "elide_concat"]
    assert full is not None
    assert none is not None
    assert full.relative_l2 != none.relative_l2  # the batch norm's constants were rounded anew


def test_without_a_reference_there_is_no_drift(case: Case, stopwatch: Stopwatch) -> None:
    assert {row.drift for row in case.ablate("torch", reference=None).rows} == {None}


def test_each_variant_gets_its_seconds(done: Done) -> None:
    assert done.stopwatch.budgets == [2.0 * 7, 2.0 * 3]


def test_the_captured_program_stays_as_it_was(case: Case, stopwatch: Stopwatch) -> None:
    module = case.program.graph_module
    code, before = module.code, {name: p.clone() for name, p in module.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    case.ablate("torch")
    assert module.code == code
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses
    assert all(torch.equal(before[name], now) for name, now in module.state_dict().items())


class Stub:
    """An engine that builds engines, or that fails, or that cannot run here."""

    name = "stub"
    builds = False
    consumes = "onnx"

    def __init__(self, missing: str | None = None, fails: bool = False) -> None:
        self.missing, self.fails = missing, fails
        self.built: list[tuple[Path, Path, tuple[str, ...]]] = []
        self.opened: list[Any] = []

    def cannot_run(self) -> str | None:
        return self.missing

    def build(
        self, artifact: Artifact, options: BuildOptions, directory: Path
    ) -> list[tuple[Artifact, Any]]:
        self.built.append((artifact.path, directory, options.targets))
        return [(replace(artifact, path=directory / "x.engine", kind="engine"), None)]

    def open(self, program: Any, options: BuildOptions) -> Any:
        if self.fails and self.opened:
            raise EngineError("The engine 'stub' failed", "It ran out of memory", "Buy more")
        self.opened.append(program)
        return StubSession()


class StubSession:
    device = "stub device"

    def bind(self, feeds: Any) -> None:
        """Nothing."""

    def run(self) -> None:
        """Nothing."""

    def fetch(self) -> list[torch.Tensor]:
        return [torch.full((2, 2, 6, 6), 0.5)]

    def __enter__(self) -> StubSession:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def test_an_engine_that_cannot_run_here_is_skipped(case: Case, stopwatch: Stopwatch) -> None:
    ablation = case.ablate(Stub(missing="no GPU"), "torch")
    assert ablation.skipped == {"stub": "no GPU"}
    assert {row.engine for row in ablation.rows} == {"torch"}
    assert ablation.failures == ()


def test_an_engine_that_fails_costs_only_its_own_rows(case: Case, stopwatch: Stopwatch) -> None:
    ablation = case.ablate(Stub(fails=True), "torch")
    assert ablation.skipped == {"stub": "it failed: It ran out of memory"}
    assert [error.thing for error in ablation.failures] == ["The engine 'stub' failed"]
    assert {row.engine for row in ablation.rows} == {"torch"}


def test_an_engine_with_a_build_step_builds_every_variant_for_this_device(
    case: Case, stopwatch: Stopwatch
) -> None:
    stub = Stub()
    stub.builds = True
    ablation = case.ablate(stub)
    folder = case.folder / "variants"
    assert stub.built == [
        (case.baseline.path, folder / "stub" / "baseline", ()),
        (folder / "up_to-fold_conv_bn.onnx", folder / "stub" / "up_to fold_conv_bn", ()),
    ]
    # The control is the same engine, opened a second time.
    places = [opened.path.parent.name for opened in stub.opened]
    assert places == ["baseline", "baseline", "up_to fold_conv_bn"]
    assert len(ablation.rows) == 12


def test_what_does_not_fit_into_memory_at_once_is_measured_in_turn(
    tmp_path: Path, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for a baseline, its control and two variants, then for less than one."""
    wider, passes = Case(wider_network(), tmp_path), "fold_conv_bn,combine_parallel_convs"
    everything = wider.ablate("onnxruntime", passes=passes)
    (at_once,) = stopwatch.runs
    first, second, *others = at_once[2:]
    assert len(others) == 1
    files = [*tmp_path.glob("variants/*.onnx"), wider.baseline.path]
    largest = max(path.stat().st_size for path in files)
    memory = {"memory_bytes": int(4.9 * 3 * largest / 0.5), "gpu": None}
    monkeypatch.setattr(ablating, "environment", lambda threads: memory)
    in_turn = wider.ablate("onnxruntime", passes=passes)
    assert stopwatch.runs[1:] == [
        ["baseline", "control", first, second],
        ["baseline", "control", *others],
    ]
    assert [row.same_as for row in in_turn.rows] == [row.same_as for row in everything.rows]
    memory["gpu"] = {"memory_bytes": 1}
    wider.ablate("onnxruntime", passes=passes)
    assert stopwatch.runs[3:] == [["baseline", "control", each] for each in at_once[2:]]


def wider_network() -> Program:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.second = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.first(x), self.second(x)], 1)

    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    return captured(scramble(Branches()), image)


def test_variants_share_their_constants(case: Case, stopwatch: Stopwatch) -> None:
    stub = Stub()
    stub.consumes = "program"
    case.ablate(stub)
    opened = [program.graph_module for program in stub.opened if program is not case.program]
    assert len(opened) == 5
    memory = {each.data_ptr() for module in opened for each in module.parameters()}
    # Weight and bias of two convolutions and of the batch norm as captured, and the folded two.
    assert len(memory) == 6 + 2


def test_a_report_takes_the_rows(done: Done) -> None:
    report = schema.assemble(**{**full_arguments(), "ablation": done.ablation.rows})
    (first, *_) = schema.parse(schema.dump(report)).document["ablation"]
    assert (first["how"], first["pass"]) == ("up_to", "eliminate_identity")
    assert json.loads(schema.dump(report))["ablation"][1]["verdict"] == "faster"


def test_progress_is_told(done: Done) -> None:
    texts = [text for text, _ in done.told]
    assert texts[0] == "Optimizing up_to eliminate_identity"
    assert "Exporting up_to fold_conv_bn" in texts
    assert texts[-1] == "Opening onnxruntime up_to fold_conv_bn"
    assert all(fraction is None or 0 <= fraction <= 1 for _, fraction in done.told)


def test_the_real_clock_once(case: Case) -> None:
    ablation = case.ablate("torch", passes="eliminate_identity", seconds_each=0.01)
    assert [row.same_as for row in ablation.rows] == [None, "up_to eliminate_identity", "baseline"]
    assert all(len(row.measurement.blocks) == 10 for row in ablation.rows)
