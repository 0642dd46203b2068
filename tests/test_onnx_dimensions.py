"""The names of open dimensions and of outputs in the ONNX files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import sympy  # type: ignore[import-untyped]
import torch
from torch import nn

from optfuse import capture, export, export_baseline, load, optimize, select
from optfuse.dimensions import parse_dimension
from optfuse.errors import UsageError
from optfuse.float64 import run_float64
from optfuse.graph import flat_inputs
from optfuse.inputs import parse_input
from optfuse.onnx_dimensions import dimensions_of, renamed
from optfuse.stages import Artifact, Dimension, Program, Source
from tests.harness import scramble
from tests.open_sizes import opened

N, H = sympy.symbols("N H", integer=True, positive=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s1", "N"),
        ("16*s30", "H"),
        ("s30", "(H//16)"),
        ("4*s30", "(H//4)"),
        ("32*s30", "2*H"),
        ("4*s1 + 16*s30", "H + 4*N"),
        ("16*s1*s30", "H*N"),
        ("s1 - 1", "N - 1"),
        ("((s1 + 1)//2)", "((N + 1)//2)"),
        # s30 is a whole number, and so H is even.
        ("((16*s30 - 3)//2) + 2", "(H//2)"),
        ("u0 + s1", "N + u0"),
    ],
)
def test_a_size_is_a_formula_of_the_users_names(text: str, expected: str) -> None:
    found = renamed(text, {"s1": N, "s30": H / 16})
    s1, s30 = 7, 3
    numbers = {"N": s1, "H": 16 * s30, "u0": 5}
    assert eval(found, {}, numbers) == eval(text, {}, {"s1": s1, "s30": s30, "u0": 5})
    assert found == expected


def test_a_users_name_may_be_one_of_torchs() -> None:
    swapped = {"s1": sympy.Symbol("s2"), "s2": sympy.Symbol("s1")}
    assert renamed("s1 - s2", swapped) in ("-s1 + s2", "s2 - s1")


def files(program: Program, folder: Path, names: Sequence[str] = ()) -> list[Artifact]:
    """Both files of a program, after all passes."""
    faster = optimize(program, select("all"))
    assert [step.undone for step in faster.trace if step.undone] == []
    baseline = export_baseline(program, folder / "baseline.onnx", output_names=names)
    ours = export(
        faster,
        folder / "model.onnx",
        input_names=baseline.input_names,
        output_names=baseline.output_names,
    )
    return [baseline, ours]


def shapes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in values
    }


def assert_runs_at_every_point(artifact: Artifact, program: Program) -> None:
    """ONNX Runtime's outputs are near those of the program in float64, at each point."""
    assert program.sizes is not None
    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    for point in program.sizes.points:
        feeds = flat_inputs(program.graph_module, point.args, point.kwargs)
        named = dict(zip(artifact.input_names, (each.numpy() for each in feeds), strict=True))
        exact = run_float64(program.graph_module, point.args, point.kwargs)
        for found, wanted in zip(session.run(None, named), exact, strict=True):
            assert found.shape == tuple(wanted.shape)
            moved = torch.from_numpy(found).double() - wanted
            # Random weights, twelve layers of attention at most: 1e-4 is a thousand roundings.
            assert moved.norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize(
    ("name", "inputs", "dims", "given", "returned"),
    [
        (
            *("squeezenet", ["Nx3x224x224"], ["N=1:2:4"]),
            *(["N", 3, 224, 224], ["N", 1000]),
        ),
        ("vit_tiny", ["image=Nx3x224x224"], ["N=1:1:2"], ["N", 3, 224, 224], ["N", 1000]),
        (
            *("unet", ["NxCxHxW"], ["N=1:1:2", "C=3", "H=32:48:64", "W=32:32:48"]),
            *(["N", 3, "H", "W"], ["N", 1, "H", "W"]),
        ),
    ],
)
def test_real_networks(
    name: str,
    inputs: list[str],
    dims: list[str],
    given: list[int | str],
    returned: list[int | str],
    tmp_path: Path,
) -> None:
    program = capture(opened(import_module(f"models.{name}").build(), inputs, dims, name))
    for artifact in files(program, tmp_path, ["logits"]):
        graph = onnx.load(artifact.path).graph
        onnx.checker.check_model(onnx.load(artifact.path), full_check=True)
        assert list(shapes(graph.input).values()) == [given]
        assert shapes(graph.output) == {"logits": returned}
        inner = {size for each in shapes(graph.value_info).values() for size in each}
        assert not [size for size in inner if isinstance(size, str) and size.startswith("s")]
        assert_runs_at_every_point(artifact, program)


class Two(nn.Module):
    """Two inputs that share a dimension, one of them integers, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8)
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.table(ids) + x
        return torch.cat([torch.relu(self.left(both)), self.right(both)], 0), both.mean(1)


def two() -> Program:
    inputs, dims = ["NxL:int64", "NxLx8"], ["N=1:2:5", "L=1:7:9"]
    return capture(opened(scramble(Two()), inputs, dims))


def test_a_dimension_of_two_inputs(tmp_path: Path) -> None:
    program = two()
    for artifact in files(program, tmp_path):
        graph = onnx.load(artifact.path).graph
        assert shapes(graph.input) == {"ids": ["N", "L"], "x": ["N", "L", 8]}
        assert list(shapes(graph.output).values()) == [["2*N", "L", 6], ["N", 8]]
        # And the file says how far they go.
        declared = dimensions_of(onnx.load(artifact.path))
        assert declared == {"N": Dimension("N", 1, 2, 5), "L": Dimension("L", 1, 7, 9)}
        assert_runs_at_every_point(artifact, program)


def test_names_of_outputs(tmp_path: Path) -> None:
    # The name of something in the middle is free for an output.
    inner = onnx.load(files(two(), tmp_path)[0].path).graph.node[0].output[0]
    for artifact in files(two(), tmp_path, ["both", inner]):
        model = onnx.load(artifact.path)
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.output] == ["both", inner]
        assert artifact.output_names == ("both", inner)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["one"], "The model has 2 outputs (cat, mean), and --output-name is given 1 times."),
        (["a", "b", "c"], "and --output-name is given 3 times."),
        (["a", "a"], "An output cannot be called 'a'. It is given more than once."),
        (["a", "x"], "An output cannot be called 'x'. It is the name of an input."),
        (["table.weight", "a"], "cannot be called 'table.weight'. It is the name of a weight."),
        (["a", " "], "An output cannot be called ' '."),
        (["a", "b\n"], "An output cannot be called 'b\\n'."),
    ],
)
def test_names_that_outputs_cannot_have(names: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        export_baseline(two(), tmp_path / "baseline.onnx", output_names=names)
    assert sentence in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_source_with_dimensions() -> None:
    source = Source(
        "models.squeezenet:build",
        inputs=(parse_input("Nx3xSx224", names=True),),
        dimensions=(parse_dimension("N=1:2:4"), parse_dimension("S=224")),
    )
    model = load(source)
    assert model.sizes is not None
    assert model.example_args[0].shape == (2, 3, 224, 224)
    assert [spec.shape for spec in model.sizes.inputs] == [("N", 3, 224, 224)]
    assert [point.at for point in model.sizes.points] == ["N=1", "N=2", "N=4"]
    assert [point.args[0].shape[0] for point in model.sizes.points] == [1, 2, 4]
    assert model.sizes.usual.at == "N=2"
    # Where all are the same there is nothing open, and the model is static.
    fixed = replace(source, dimensions=(parse_dimension("N=3"), parse_dimension("S=224:224")))
    static = load(fixed)
    assert (static.sizes, static.dynamic_shapes) == (None, None)
    assert static.example_args[0].shape == (3, 3, 224, 224)
