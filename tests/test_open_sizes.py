"""A model with open dimensions through the whole pipeline: measured at each point, and told so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jsonschema
import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from optfuse import backends, pipeline, trial
from optfuse.backends import Backend, onnx_runtime
from optfuse.capture import capture
from optfuse.cli import app
from optfuse.errors import EngineError
from optfuse.inputs import parse_input
from optfuse.optimize import optimize
from optfuse.passes import Match, Pass
from optfuse.report import comparison, markdown, rows, schema
from optfuse.report import document as html
from optfuse.stages import BuildOptions, Dimension, InputShapes, Source
from tests.harness import scramble
from tests.open_sizes import opened

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image):
        return self.head(torch.relu(self.norm(self.stem(image))).mean((2, 3)))


def build():
    return Net()


def example_inputs():
    return (torch.randn(2, 3, 12, 12),)


class Limited(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(6, 4)

    def forward(self, x):
        places = torch.arange(x.shape[1])
        return x + self.positions(places)


def limited():
    return Limited()
"""

POINTS = ["N=1", "N=2", "N=4"]
ENGINES = ["torch", "onnxruntime"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    """One run of the model above at three points on two engines, which every test here looks at."""
    folder = tmp_path_factory.mktemp("open")
    (folder / "net_of_open_sizes.py").write_text(MODEL)
    quick = pytest.MonkeyPatch()
    budgets = []
    measure = vars(trial)["measure"]

    def quickly(sessions: Any, **options: Any) -> Any:
        # Rounds as short as they can be: their number is what a ratio needs.
        budgets.append(options["schedule"].budget_seconds)
        short = replace(options.pop("schedule"), block_ms=1.0, warmup_ms=1.0)
        return measure(sessions, schedule=short, **options)

    quick.setattr(trial, "measure", quickly)
    outcome = pipeline.run(
        pipeline.Request(
            Source(
                f"{folder / 'net_of_open_sizes.py'}:build",
                inputs=(parse_input("Nx3x12x12", names=True),),
                dimensions=(Dimension("N", 1, 2, 4),),
            ),
            output=folder / "out",
            engines=tuple(ENGINES),
            duration_seconds=0.9,
            output_names=("logits",),
            ablate=True,
            passes="fold_conv_bn",
        )
    )
    quick.undo()
    # The time is divided among the points.
    assert budgets[:3] == pytest.approx([0.3] * 3)
    return outcome


def test_everything_is_taken_at_each_point(outcome: pipeline.Outcome) -> None:
    document = outcome.report.document
    assert outcome.failures == ()
    jsonschema.validate(document, schema.json_schema())
    assert schema.parse(schema.dump(outcome.report)).document == document
    places = [(engine, at) for engine in ENGINES for at in POINTS]
    assert [(row["engine"], row["at"], row["variant"]) for row in document["drift"]] == [
        (*place, variant) for place in places for variant in ("baseline", "optimized")
    ]
    measured = [(row["engine"], row["at"], row["variant"]) for row in document["latency"]]
    variants = ("baseline", "control", "optimized")
    assert measured == [(*place, variant) for place in places for variant in variants]
    assert [(row["engine"], row["at"]) for row in document["noise_floors"]] == places
    compared = [(row["engine"], row["at"], row["against_engine"]) for row in document["speedups"]]
    assert compared == [
        *(("torch", at, "torch") for at in POINTS),
        *(("onnxruntime", at, other) for at in POINTS for other in ("onnxruntime", "torch")),
    ]
    # float32 rounds at 6e-8; three layers stay below a hundred times that.
    assert all(0 < row["relative_l2"] < 6e-6 for row in document["drift"])
    own = {(row["engine"], row["at"]): row["relative_l2"] for row in document["drift"][::2]}
    for row in document["drift"]:
        assert row["baseline_relative_l2"] == own[row["engine"], row["at"]]


def test_the_report_says_what_is_open(outcome: pipeline.Outcome) -> None:
    document = outcome.report.document
    program = document["program"]
    assert program["inputs"] == [{"name": "image", "shape": ["N", 3, 12, 12], "dtype": "float32"}]
    assert program["dimensions"] == [{"name": "N", "least": 1, "usual": 2, "most": 4}]
    assert document["source"]["dimensions"] == program["dimensions"]
    # The convolution, and the linear layer: of two images.
    assert program["flops_after"] == 2 * 2 * (8 * 3 * 9 * 144 + 8 * 5)
    assert document["layers"]["at"] == "N=1"
    assert {row["at"] for row in document["ablation"]} == {"N=2"}


def test_both_files_have_the_names(outcome: pipeline.Outcome) -> None:
    [baseline, ours] = outcome.report.document["artifacts"]
    folder = Path(outcome.report.document["source"]["text"]).parent / "out"
    for artifact in (baseline, ours):
        graph = onnx.load(folder / artifact["path"]).graph
        sizes = [
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        ]
        assert sizes == [["N", 3, 12, 12], ["N", 5]]
        assert artifact["output_names"] == ["logits"]


def test_every_rendering_says_which_is_which(outcome: pipeline.Outcome) -> None:
    document = outcome.report.document
    for shown in (rows.speedups, rows.latency, rows.drift):
        table = shown(document)
        place = [column.heading for column in table.columns].index("at")
        assert [row[place] for row in table.rows if row[0] == "torch"]
        assert {row[place] for row in table.rows} == set(POINTS)
    facts = rows.program_lines(document)
    assert facts[0] == "inputs: image Nx3x12x12 float32; N from 1 to 4, usually 2"
    assert facts[1].endswith(" at N=2")
    headline = rows.headline(document)
    assert [line.split("x ")[0].rsplit(" ", 1)[0] for line in headline[1:]] == [
        f"{engine} at {at}" for engine in ENGINES for at in POINTS
    ]
    text = markdown.render(outcome.report)
    page = html.render(outcome.report)
    for at in POINTS:
        assert f"| torch | {at} | as exported |" in text
        assert f"onnxruntime at {at}" in page
    assert "All of it at N=2." in text
    # In a terminal, the cosine gives way to the column.
    columns = [column.heading for column in rows.drift(document, brief=True).columns]
    assert columns[:2] == ["engine", "at"]
    assert "cosine" not in columns
    assert "cosine" in [column.heading for column in rows.drift(document).columns]


def test_equal_points_of_several_reports_stand_side_by_side(outcome: pipeline.Outcome) -> None:
    document = outcome.report.document
    page = comparison.page([("one", document), ("two", {**document, "created": "2030-01-01"})])
    [latency] = [table for table in page.tables if table.title == "Latency"]
    place = [column.heading for column in latency.columns].index("inputs")
    assert [row[place] for row in latency.rows if row[2] == "torch"] == [
        f"Nx3x12x12 float32 at {at}" for at in POINTS for _ in range(2)
    ]
    trends = [table.title for table in page.tables if table.title.startswith("Trend")]
    assert len(trends) == len(ENGINES) * len(POINTS)
    assert len(set(trends)) == len(trends)


def test_raw_pixels_of_any_number_of_images(folder: Path) -> None:
    result = optimized(
        *("net_of_open_sizes.py:build", "--dim", "N=1:2:4", "--input", "Nx3x12x12"),
        *("--normalize", "mean=128,std=64", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert {row["at"] for row in report["drift"]} == set(POINTS)
    assert all(row["relative_l2"] < 6e-6 for row in report["drift"])


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def optimized(*arguments: str) -> Result:
    return typed("optimize", *arguments, "--engine", "onnxruntime", "--duration", "0")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net_of_open_sizes.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--dim", "N=8:1:32", "--input", "Nx3x12x12"), 2, "'N=8:1:32' contradicts itself."),
        (("--dim", "N=0:1:2", "--input", "Nx3x12x12"), 2, "'0' is no whole number from 1"),
        (("--dim", "N=1:2:4"), 2, "There is no --input that could name it."),
        (("--dim", "N=1:2:4", "--input", "2x3x12x12"), 2, "No --input names it."),
        (("--input", "Nx3x12x12"), 2, "There is no --dim N that says what it stands for."),
        (
            ("--dim", "N=1:2", "--dim", "N=1:3", "--input", "Nx3x12x12"),
            *(2, "The dimension 'N' cannot be used. It is given more than once."),
        ),
        # The model needs three channels.
        (("--dim", "C=1:3:4", "--input", "2xCx12x12"), 3, "Its forward fails at C=1 at "),
        (
            ("--output-name", "a", "--output-name", "b"),
            *(2, "The model has 1 output (linear), and --output-name is given 2 times."),
        ),
        (("--output-name", "image"), 2, "It is the name of an input."),
    ],
)
def test_bad_input_is_a_sentence_and_nothing_is_written(
    arguments: tuple[str, ...], code: int, sentence: str, folder: Path
) -> None:
    result = optimized("net_of_open_sizes.py:build", *arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    # The console breaks lines.
    assert sentence in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    written = [path for path in folder.rglob("*") if path.suffix in (".onnx", ".json", ".md")]
    assert written == []


def test_a_model_that_fails_at_its_most(folder: Path) -> None:
    result = optimized("net_of_open_sizes.py:limited", "--dim", "L=2:4:8", "--input", "2xLx4")
    assert result.exit_code == 3
    said = " ".join(result.stderr.split())
    assert "Its forward fails at L=8 at " in said
    assert "It runs at L=2: give a narrower range with --dim" in said


def test_bench_and_diff_take_numbers_alone(folder: Path) -> None:
    for command in ("bench", "diff"):
        result = typed(command, "net_of_open_sizes.py:build", "--input", "Nx3x12x12")
        assert result.exit_code == 2
        assert "only 'optfuse optimize' and 'optfuse explain' have --dim" in " ".join(
            result.stderr.split()
        )


def test_explain_with_an_open_dimension(folder: Path) -> None:
    source = ("net_of_open_sizes.py:build", "--dim", "N=1:2:4", "--input", "Nx3x12x12", "--json")
    result = typed("explain", *source)
    assert result.exit_code == 0, result.stderr
    [convolution] = [
        each for each in json.loads(result.stdout)["convolutions"] if each["operator"] == "conv2d"
    ]
    assert convolution["events"][0]["name"] == "fold_conv_bn"


# --- Engines


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.convolve(x))


def request(folder: Path, *engines: str, duration_seconds: float = 0) -> pipeline.Request:
    return pipeline.Request(
        Source(
            f"{folder / 'net_of_open_sizes.py'}:build",
            inputs=(parse_input("Nx3x12x12", names=True),),
            dimensions=(Dimension("N", 1, 2, 4),),
        ),
        output=folder / "out",
        engines=engines,
        duration_seconds=duration_seconds,
    )


def test_an_engine_that_fails_at_one_point_has_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bind = onnx_runtime.OnnxRuntimeSession.bind

    def fails_at_two(session: Any, feeds: Sequence[torch.Tensor]) -> None:
        if feeds[0].shape[0] == 2:
            raise EngineError("It cannot", "Two is too many", "Give it one")
        bind(session, feeds)

    monkeypatch.setattr(onnx_runtime.OnnxRuntimeSession, "bind", fails_at_two)
    outcome = pipeline.run(request(folder, "torch", "onnxruntime"))
    document = outcome.report.document
    assert [failure.cause for failure in outcome.failures] == ["Two is too many"]
    assert [(row["engine"], row["at"]) for row in document["drift"][::2]] == [
        *(("torch", at) for at in POINTS),
        *(("onnxruntime", at) for at in ("N=1", "N=4")),
    ]
    assert rows.not_measured(document) == [
        "torch not measured: no time was given to it (--duration 0)",
        "onnxruntime not measured: no time was given to it (--duration 0)",
        "onnxruntime not measured at N=2: it failed: Two is too many",
    ]


class Building:
    """An engine that only builds, and keeps what it was asked for."""

    name = "building"
    consumes = "onnx"
    builds = True

    def __init__(self) -> None:
        self.asked: list[BuildOptions] = []

    def unavailable(self) -> str | None:
        return None

    def cannot_run(self) -> str | None:
        return "no GPU"

    def widens(self, precision: str) -> str | None:
        del precision
        return None

    def check_target(self, target: str) -> None:
        del target

    def build(self, _artifact: Any, options: BuildOptions, _folder: Path) -> list[Any]:
        self.asked.append(options)
        return []


def test_an_engine_is_built_for_the_shapes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    building = Building()
    backend = cast(Backend, cast(Any, building))
    monkeypatch.setattr(pipeline, "choose", lambda *_: ([backend], []))
    pipeline.run(replace(request(folder), targets=("sm_89",)))
    expected = InputShapes("image", (1, 3, 12, 12), (2, 3, 12, 12), (4, 3, 12, 12))
    assert [options.shapes for options in building.asked] == [(expected,), (expected,)]


@pytest.mark.parametrize("name", ["torch", "torch-compile", "onnxruntime", "openvino"])
def test_every_engine_takes_other_sizes_after_it_was_opened(name: str, tmp_path: Path) -> None:
    backend = backends.get(name)
    if backend.cannot_run():
        pytest.skip(str(backend.cannot_run()))
    from optfuse import export_baseline

    program = capture(opened(scramble(Net()), ["Nx3xHx9"], ["N=1:2:3", "H=5:8:12"]))
    assert program.sizes is not None
    thing = program if backend.consumes == "program" else None
    artifact = thing or export_baseline(program, tmp_path / "net.onnx")
    with backend.open(artifact, BuildOptions()) as session:
        for point in program.sizes.points:
            session.bind(point.args)
            session.run()
            [found] = session.fetch()
            with torch.no_grad():
                expected = program.graph_module(*point.args)
            # One convolution of 27 products: float32 rounds each at 6e-8.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- The proof


class Forgetful(Pass):
    """relu(x) = relu of the rows that were there when it was captured: right at two rows alone."""

    name = "forgetful"
    equation = "f(x) = f(x[:2])"

    def match(self, node: torch.fx.Node) -> Match | None:
        aten = torch.ops.aten
        if node.target is not aten.relu.default or node.meta.get("seen"):
            return None
        return Match(nodes=(node,), note="")

    def rewrite(self, edit: Any, match: Match) -> Any:
        [node] = match.nodes
        aten = torch.ops.aten
        taken = edit.call(aten.slice.Tensor, node.args[0], 0, 0, 2)
        new = edit.call(aten.relu.default, taken)
        new.meta["seen"] = True
        return {node: new}


def test_a_pass_that_is_right_at_the_captured_size_alone_is_undone() -> None:
    program = capture(opened(scramble(Net()), ["Nx3x9x9"], ["N=3:4:5"]))
    assert program.sizes is not None
    # Captured on another size than that of the channels.
    assert program.example_args[0].shape[0] == 4
    right = replace(program, example_args=(program.example_args[0][:2],))
    [step] = [each for each in optimize(right, [Forgetful()]).trace if each.name == "forgetful"]
    assert step.undone == (
        "in float64 its outputs differ at N=3 in shape, in dtype, in an integer, or in where they "
        "are finite"
    )
    alone = replace(right, sizes=None)
    [step] = [each for each in optimize(alone, [Forgetful()]).trace if each.name == "forgetful"]
    assert step.undone is None
