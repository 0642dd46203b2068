"""Drift layer by layer: which layers are compared with which, who is blamed, and who is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from optfuse import backends
from optfuse.errors import LoadError, ModelError
from optfuse.export import export, export_baseline
from optfuse.float64 import distance, run_float64
from optfuse.graph import ONNX_LAYERS, attribute
from optfuse.layers import (
    LIMIT,
    compare_file,
    compare_files,
    compare_layers,
    compare_with_float64,
    onnx_file,
)
from optfuse.layers.drifts import ROUNDING, drifts, growth
from optfuse.layers.onnx_float64 import run_file_float64
from optfuse.layers.onnx_part import OnnxParts, read_by
from optfuse.layers.programs import ProgramReference
from optfuse.precision import floats
from optfuse.stages import LayerDrift, LayerDrifts, Program
from tests.harness import captured, optimized, scramble

onnxruntime = pytest.mark.skipif(
    backends.get("onnxruntime").unavailable() is not None,
    reason=str(backends.get("onnxruntime").unavailable()),
)


class Block(nn.Module):
    """conv -> norm -> relu, and what came in added to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    """Four blocks, two parallel branches and a classifier: enough for every pass to find work."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(4)))
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(torch.tanh(self.stem(x)))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return self.head(x.mean((2, 3)))


def numbers(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net() -> Net:
    """Weights that keep every layer's results near 1, as training does."""
    module = Net()
    scramble(module)
    with torch.no_grad():
        for each in module.modules():
            if isinstance(each, nn.Conv2d | nn.Linear):
                each.weight.mul_(1 / each.weight[0].numel() ** 0.5)
    return module


def program_of(module: nn.Module | None = None, *, name: str = "net") -> Program:
    return captured(net() if module is None else module, numbers(2, 3, 12, 12), name=name)


def rows(found: LayerDrifts) -> dict[str, LayerDrift]:
    return {row.name: row for row in found.rows}


def worst(found: LayerDrifts) -> float:
    return max(row.growth or 0.0 for row in found.rows)


def weight_of(program: Program, name: str) -> torch.Tensor:
    """The weight that a convolution of the program reads."""
    graph = program.graph_module.graph
    (node,) = [each for each in graph.nodes if each.name == name]
    found: torch.Tensor = attribute(program.graph_module, node.args[1].target).data
    return found


# Which layer is compared with which


def test_every_optimized_layer_is_compared_with_the_captured_one_it_computes() -> None:
    found = compare_layers(program_of(), optimized(program_of(), "all"))
    assert {row.name: row.equals for row in found.rows} == {
        "conv_act": ("tanh",),
        "conv_act_1": ("relu",),
        "conv_act_2": ("relu_1",),
        "conv_act_3": ("relu_2",),
        "conv_act_4": ("relu_3",),
        # The two branches are one convolution now, which gives what the concat gave.
        "conv_act_5": ("cat",),
        "mean": ("mean",),
        "linear": ("linear",),
    }
    block = rows(found)["conv_act_2"]
    assert (block.kind, block.module) == ("conv_act", "blocks.1.conv"), "where its weights are"
    assert block.origins[0] == "conv2d_2"
    assert {"add_1", "relu_1"} <= set(block.origins)
    assert block.shape == (2, 8, 10, 10)
    assert (found.engine, found.reference) == ("torch", "captured program in float64")
    assert (found.suspect, found.limit) == (None, LIMIT)


def test_branches_of_one_convolution_are_compared_each_with_its_own() -> None:
    program = program_of()
    found = rows(compare_layers(program, optimized(program, "combine_parallel_convs")))
    branches = {row.equals: row for row in found.values() if row.kind == "getitem"}
    assert branches[("relu_4",)].module == "left"
    assert branches[("relu_5",)].module == "right"
    assert branches[("relu_5",)].shape == (2, 4, 10, 10)


def test_the_error_is_what_is_left_between_two_runs() -> None:
    program = program_of()
    after = optimized(program, "all")
    last = compare_layers(program, after).rows[-1]
    exact = run_float64(program.graph_module, program.example_args, {})
    with torch.no_grad():
        own, ours = (each.graph_module(*program.example_args) for each in (program, after))
    # Exactly: the same operators on the same numbers, in another order of the steps.
    assert last.own_relative_l2 == distance(exact, [own.double()])
    assert last.relative_l2 == distance(exact, [ours.double()])
    # float32 rounds at 6e-8; eight layers stay below a hundred times that.
    assert 0 < last.relative_l2 < 6e-6


def test_a_program_can_be_compared_with_itself() -> None:
    program = program_of()
    found = compare_layers(program, program)
    calls = [n for n in program.graph_module.graph.nodes if n.op == "call_function"]
    # All but the four batch norms, which give three things each; picks of them are there.
    assert len(found.rows) == len(calls) - 4
    assert all(row.relative_l2 == row.own_relative_l2 for row in found.rows)
    assert worst(found) <= 1.0


def test_other_inputs_than_the_examples() -> None:
    program = program_of()
    other = numbers(2, 3, 12, 12, seed=7)
    (one, two) = (compare_layers(program, program, *given) for given in ((), ((other,), {})))
    assert [row.relative_l2 for row in one.rows] != [row.relative_l2 for row in two.rows]


def test_nothing_is_written_to() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.tensor(3.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return (x * self.seen).sigmoid()

    x = numbers(4)
    program = captured(Counting(), x)
    found = compare_layers(program, optimized(program, "all"))
    assert float(program.graph_module.seen) == 3.0
    assert torch.equal(x, numbers(4))
    # What is written to is one thing before and another after: it is not compared.
    assert [row.name for row in found.rows] == ["add", "mul", "sigmoid"]


def test_few_values_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                x = x.sigmoid()
            return x

    most = 0
    real = ProgramReference.exact

    def watched(self: ProgramReference, target: str) -> Any:
        nonlocal most
        found = real(self, target)
        most = max(most, len(self._held))
        return found

    monkeypatch.setattr(ProgramReference, "exact", watched)
    program = captured(Chain(), numbers(4))
    assert len(compare_layers(program, program).rows) == 20
    assert most == 1


def test_another_capture_of_the_same_architecture() -> None:
    other = net()
    found = compare_layers(program_of(), program_of(other))
    assert (worst(found), found.suspect) == (1.0, None)
    with torch.no_grad():
        other.blocks[2].conv.weight.mul_(1.01)  # type: ignore[index, union-attr]
    found = compare_layers(program_of(), program_of(other))
    assert found.suspect == "conv2d_3"
    assert rows(found)["conv2d_3"].module == "blocks.2.conv"


def test_of_another_architecture_what_has_the_same_name_and_shape() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Tanh(), nn.Conv2d(7, 8, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).relu()

    names = [row.name for row in compare_layers(program_of(), program_of(scramble(Other()))).rows]
    # Its conv2d and tanh have seven channels; its other two results have the shape of namesakes.
    assert names == ["conv2d_1", "relu"]


# Who is blamed


def test_a_scaled_weight_in_the_middle_is_named() -> None:
    program = program_of()
    after = optimized(program, "all")
    weight_of(after, "conv_act_3").mul_(1.01)
    found = compare_layers(program, after)
    assert found.suspect == "conv_act_3"
    wrong = rows(found)["conv_act_3"]
    assert (wrong.module, wrong.equals) == ("blocks.2.conv", ("relu_2",))
    # About one per cent: of what the convolution gives, in a sum with what came in.
    assert 3e-3 < wrong.relative_l2 < 3e-2
    assert wrong.growth is not None
    assert wrong.growth > 1000


def test_layers_behind_it_inherit_the_error_and_are_not_blamed() -> None:
    program = program_of()
    after = optimized(program, "all")
    weight_of(after, "conv_act_3").mul_(1.01)
    found = compare_layers(program, after)
    behind = found.rows[[row.name for row in found.rows].index("conv_act_3") + 1 :]
    assert [row.name for row in behind] == ["conv_act_4", "conv_act_5", "mean", "linear"]
    for row in behind:
        assert row.own_relative_l2 is not None
        assert row.relative_l2 > 100 * row.own_relative_l2
        assert row.growth is not None
        assert row.growth < 2


def test_of_two_wrong_layers_the_first_is_named() -> None:
    program = program_of()
    after = optimized(program, "all")
    for name, factor in (("conv_act_2", 1.001), ("conv_act_4", 1.5)):
        weight_of(after, name).mul_(factor)
    found = compare_layers(program, after)
    assert found.suspect == "conv_act_2"
    assert rows(found)["conv_act_4"].growth > rows(found)["conv_act_2"].growth  # type: ignore[operator]


@pytest.mark.parametrize("rank", [0.5, 1.0])
def test_one_single_weight_is_named(rank: float) -> None:
    """The median and the largest of 576 weights, scaled by 1.01."""
    program = program_of()
    after = optimized(program, "all")
    weight = weight_of(after, "conv_act_3").view(-1)
    order = weight.abs().argsort()
    weight[order[int(rank * (len(order) - 1))]] *= 1.01
    assert compare_layers(program, after).suspect == "conv_act_3"


def test_a_weight_that_is_off_by_rounding_is_nobodys_fault() -> None:
    program = program_of()
    after = optimized(program, "all")
    weight = weight_of(after, "conv_act_3")
    weight.copy_(torch.nextafter(weight, torch.full_like(weight, math.inf)))
    assert compare_layers(program, after).suspect is None


def test_a_constant_that_was_folded_wrongly_is_named_before_who_reads_it() -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(numbers(6, 4))
            self.scale = nn.Parameter(numbers(6, 1, seed=5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight * self.scale).tanh()

    program = captured(Folding().eval(), numbers(3, 4))
    after = optimized(program, "all")
    (folded,) = [
        node
        for node in after.graph_module.graph.nodes
        if node.op == "get_attr" and node.meta["equals"] == ["mul"]
    ]
    assert compare_layers(program, after).suspect is None
    attribute(after.graph_module, folded.target).data.mul_(1.01)
    found = compare_layers(program, after)
    assert found.suspect == folded.name
    assert [row.equals for row in found.rows] == [("mul",), ("linear",), ("tanh",)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precisions_have_no_suspects_but_wrong_layers(dtype: torch.dtype) -> None:
    def of(module: nn.Module) -> Program:
        return captured(module.to(dtype), numbers(2, 3, 12, 12).to(dtype))

    program = of(net())
    after = optimized(program, "all")
    found = compare_layers(program, after)
    assert found.suspect is None
    weight_of(after, "conv_act_3").mul_(2)
    assert compare_layers(program, after).suspect == "conv_act_3"


def test_a_program_in_half_precision_against_one_in_single() -> None:
    """Every layer rounds to half precision, which is usual for it: none is to blame."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net().half()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x.half())  # type: ignore[no-any-return]

    found = compare_layers(program_of(), program_of(Half()))
    assert found.rows[-1].relative_l2 > 1e-5
    assert found.suspect is None


def lowered(low: floats.Low, *high: str) -> Program:
    """The net after all passes with its layers in half precision; its mean stays in float32."""
    return floats.lower(optimized(program_of(), "all"), low, high=high)


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_what_stays_in_float32_may_add_the_rounding_of_what_it_reads(low: floats.Low) -> None:
    """The mean is exact, but of numbers that a convolution rounded."""
    after = lowered(low)
    (mean,) = [each for each in after.graph_module.graph.nodes if each.name == "mean"]
    assert mean.meta["val"].dtype == mean.all_input_nodes[0].meta["val"].dtype == torch.float32
    found = compare_layers(program_of(), after)
    # Far more than float32 rounds by, as it was judged once.
    assert rows(found)["mean"].relative_l2 > 100 * 2.0**-24
    assert found.suspect is None
    # Each rounds its result once, its weights once and what it reads once.
    assert worst(found) < 3


@pytest.mark.parametrize(
    ("low", "name"),
    [
        *((low, name) for low in ("fp16", "bf16") for name in ("conv_act", "conv_act_5")),
        ("fp16", "linear"),  # whose 10 results may all be off by a few roundings of bf16 by luck
    ],
)
def test_a_wrong_layer_of_a_lowered_program_is_named(low: floats.Low, name: str) -> None:
    after = lowered(low)
    weight_of(after, name).mul_(1.1)
    assert compare_layers(program_of(), after).suspect == name


def test_one_wrong_weight_of_a_lowered_program_is_named() -> None:
    after = lowered("fp16")
    weight = weight_of(after, "conv_act_3").view(-1)
    weight[weight.abs().argmax()] *= 1.1
    assert compare_layers(program_of(), after).suspect == "conv_act_3"


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_what_stays_in_float32_and_is_wrong_is_named(factor: float) -> None:
    after = lowered("fp16")
    graph = after.graph_module.graph
    (mean,) = [each for each in graph.nodes if each.name == "mean"]
    with graph.inserting_before(mean):
        wrong = graph.call_function(
            torch.ops.aten.mul.Tensor, (mean.all_input_nodes[0], factor), name="scaled"
        )
    wrong.meta = {"val": mean.all_input_nodes[0].meta["val"], "equals": []}
    mean.replace_input_with(mean.all_input_nodes[0], wrong)
    after.graph_module.recompile()
    assert compare_layers(program_of(), after).suspect == "mean"


def test_a_layer_that_reads_and_gives_float32_is_judged_by_it_among_others_in_half() -> None:
    """An error of one rounding of float16, which is much for float32."""
    high = ("conv_act_2", "conv_act_3")
    after = lowered("fp16", *high)
    assert compare_layers(program_of(), after).suspect is None
    weight_of(after, "conv_act_3").mul_(1 + 2.0**-11)
    found = compare_layers(program_of(), after)
    assert found.suspect == "conv_act_3"
    # The one before it is fed with float16, and may add that.
    after = lowered("fp16", *high)
    weight_of(after, "conv_act_2").mul_(1 + 2.0**-11)
    assert compare_layers(program_of(), after).suspect is None


def test_rounding_that_nothing_computes_in_is_to_blame() -> None:
    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.net.blocks(torch.tanh(self.net.stem(x)).half().float())
            x = torch.cat([torch.relu(self.net.left(x)), torch.relu(self.net.right(x))], 1)
            return self.net.head(x.mean((2, 3)))  # type: ignore[no-any-return]

    program = program_of()
    found = compare_layers(program, program_of(Rounding()))
    assert found.suspect == "conv2d_1"
    assert compare_layers(program, program).suspect is None


def test_values_that_are_not_finite_in_both_are_no_error() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 0.5, -math.inf).softmax(-1)

    program = captured(Masked(), numbers(3, 8))
    found = compare_layers(program, optimized(program, "all"))
    assert found.suspect is None
    assert all(math.isfinite(row.relative_l2) for row in found.rows)


def test_a_layer_that_overflows_is_named_with_an_infinite_error() -> None:
    program = program_of()
    after = optimized(program, "all")
    weight_of(after, "conv_act_3").mul_(1e38).mul_(100)
    found = compare_layers(program, after)
    assert (found.suspect, rows(found)["conv_act_3"].growth) == ("conv_act_3", math.inf)


def test_integers_are_equal_or_not_and_are_handed_on_as_they_are() -> None:
    class Indexing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)
            self.table = nn.Parameter(numbers(6, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table[self.linear(x).argmax(1)].tanh()

    module = scramble(Indexing())
    program = captured(module, numbers(5, 4))
    index = rows(compare_layers(program, program))["argmax"]
    assert (index.relative_l2, index.growth, index.kind) == (0.0, None, "argmax")
    with torch.no_grad():
        module.linear.bias.add_(numbers(6, seed=9) * 10)  # type: ignore[union-attr, operator]
    other = captured(module, numbers(5, 4))
    found = compare_layers(captured(scramble(Indexing()), numbers(5, 4)), other)
    assert found.suspect == "linear"
    assert rows(found)["argmax"].relative_l2 == math.inf


def test_an_operator_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of()
    with pytest.raises(ModelError) as raised:
        compare_layers(program, program, (numbers(2, 5, 12, 12),), {})
    assert raised.value.thing == "The layers of 'net' cannot be compared"
    assert raised.value.cause.startswith("A layer does not run by itself or in float64: Runtime")


@pytest.mark.parametrize("name", ["shufflenet_v2", "repvgg_a0", "yolo_neck"])
def test_real_networks_have_no_suspect(name: str) -> None:
    """Whatever the passes did to them: every node computes what it is said to compute."""
    from optfuse.capture import capture
    from optfuse.load import load
    from optfuse.stages import Source

    program = capture(load(Source(f"models/{name}.py:build")))
    found = compare_layers(program, optimized(program, "all"))
    assert found.suspect is None
    # At most 1.4 was seen; half the limit leaves room for other kernels.
    assert worst(found) < LIMIT / 2
    assert len(found.rows) >= 20


def test_the_programs_own_layers_are_fed_with_exact_values_too() -> None:
    """So that the error of a deep program hides no wrong layer in its depth."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(40)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).tanh()

    module = scramble(Deep())
    with torch.no_grad():
        for each in module.parameters():
            each.mul_(0.5)
    program = captured(module, numbers(3, 16))
    names = [n.name for n in program.graph_module.graph.nodes if n.op == "call_function"]
    reference = ProgramReference(program, program.example_args, {}, names)
    reference.hold(names)
    last = reference.exact("linear_39")
    assert last.own is not None
    assert last.own_alone is not None
    # One layer rounds; forty hand their rounding on. Three times is far less than was seen.
    assert last.own > 3 * last.own_alone > 0


# Growth


@pytest.mark.parametrize(
    ("error", "own", "expected"),
    [
        (3e-6, 1e-6, 3.0),
        (0.0, 1e-6, 0.0),
        # Below what float32 rounds to, the unit of rounding counts.
        (6e-7, 1e-9, 6e-7 / 2**-24),
        # Nothing to compare with: what a sum of some thousand terms comes to.
        (6e-7, 0.0, 6e-7 / (ROUNDING * 2**-24)),
        (6e-7, None, 6e-7 / (ROUNDING * 2**-24)),
        (math.inf, 1e-6, math.inf),
        (1.0, math.inf, None),
        (math.inf, math.inf, None),
    ],
)
def test_growth(error: float, own: float | None, expected: float | None) -> None:
    found = growth(error, own, torch.empty(1000))
    # 1e-12: a division or two.
    assert found == expected or found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("types", "coarsest"),
    [
        ([], 2.0**-24),
        ([torch.float32, torch.int64, torch.bool], 2.0**-24),
        ([torch.float64], 2.0**-24),
        ([torch.float32, torch.float16], 2.0**-11),
        ([torch.float16, torch.bfloat16], 2.0**-8),
        ([torch.complex64], 2.0**-24),
    ],
)
def test_the_coarsest_type_that_is_read_counts(types: list[torch.dtype], coarsest: float) -> None:
    assert growth(1e-2, 1e-9, torch.empty(1000), types) == 1e-2 / coarsest
    # That of the result, where it is coarser.
    assert growth(1e-2, 1e-9, torch.empty(1000).bfloat16(), types) == 1e-2 / 2.0**-8
    # An error of its own that is larger than any rounding is the usual one.
    assert growth(1e-2, 5e-3, torch.empty(1000), types) == 1e-2 / 5e-3


def test_few_elements_may_have_little_error_by_luck() -> None:
    lucky, error = 2.0**-26, 2.0**-22
    assert growth(error, lucky, torch.empty(1)) == 2.0**-22 / (16 * 2.0**-24)
    assert growth(error, lucky, torch.empty(4)) == 2.0**-22 / (8 * 2.0**-24)
    assert growth(error, lucky, torch.empty(256)) == 2.0**-22 / 2.0**-24
    assert growth(error, lucky, torch.empty(0)) is not None


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_what_cannot_be_rounded_has_no_growth(dtype: torch.dtype) -> None:
    assert growth(math.inf, 0.0, torch.empty(3).to(dtype)) is None


def layer(name: str, grown: float | None) -> LayerDrift:
    return LayerDrift(name, "relu", "", (name,), (name,), (2,), 0.25, 0.125, grown)


def test_the_suspect_is_the_first_that_grows_by_more_than_the_limit() -> None:
    given = [layer("a", None), layer("b", 8.0), layer("c", 8.1), layer("d", math.inf)]
    found = drifts(given, "torch", "a reference", 8.0)
    assert (found.suspect, found.rows) == ("c", tuple(given))
    assert drifts(given, "torch", "a reference", 9.0).suspect == "d"
    assert drifts(given[:2], "torch", "a reference", 8.0).suspect is None
    assert drifts([], "torch", "a reference", 8.0).suspect is None


# Against ONNX Runtime


def exported(program: Program, folder: Path, name: str = "baseline.onnx") -> Path:
    return export_baseline(program, folder / name).path


def edited(path: Path, change: Callable[[onnx.ModelProto], None], name: str) -> Path:
    """A changed copy of an ONNX file beside it."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, path.with_name(name))
    return path.with_name(name)


def scaled(output: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    """Scale the weight of the node that makes that value."""

    def change(model: onnx.ModelProto) -> None:
        (node,) = [each for each in model.graph.node if output in each.output]
        (weight,) = [each for each in model.graph.initializer if each.name == node.input[1]]
        wrong = numpy_helper.to_array(weight) * np.float32(factor)
        weight.CopyFrom(numpy_helper.from_array(wrong, weight.name))

    return change


def compared(program: Program, path: Path, **options: Any) -> LayerDrifts:
    feeds = list(program.example_args)
    return compare_file(program, path, program.example_args, {}, feeds, **options)


@onnxruntime
def test_values_of_an_exported_file_are_found_by_their_names(tmp_path: Path) -> None:
    program = program_of()
    found = compared(program, exported(program, tmp_path))
    assert (found.engine, found.suspect) == ("onnxruntime", None)
    assert found.reference == "captured program in float64"
    # Each batch norm is folded into its convolution by torch.onnx, and stands for both.
    norm = rows(found)["getitem_3"]
    assert (norm.kind, norm.module, norm.equals) == ("Conv", "blocks.1.conv", ("getitem_3",))
    assert norm.origins == ("conv2d_2", "_native_batch_norm_legit_no_training_1", "getitem_3")
    assert [row.name for row in found.rows if row.kind == "Relu"] == [
        f"relu{number}" for number in ("", "_1", "_2", "_3", "_4", "_5")
    ]
    assert found.rows[-1].name == "linear"
    # At most 1.9 was seen on the networks of models/; another version may sum in another order.
    assert worst(found) < LIMIT / 2


@onnxruntime
@pytest.mark.parametrize("factor", [1.01, 1.0001])
def test_a_weight_scaled_in_the_file_is_named(tmp_path: Path, factor: float) -> None:
    program = program_of()
    path = edited(exported(program, tmp_path), scaled("getitem_6", factor), "planted.onnx")
    found = compared(program, path)
    assert found.suspect == "getitem_6"
    assert rows(found)["getitem_6"].module == "blocks.2.conv"
    behind = rows(found)["linear"]
    assert behind.relative_l2 > 10 * (behind.own_relative_l2 or 0.0)
    assert (behind.growth or 0.0) < LIMIT / 2


@onnxruntime
def test_what_stays_in_float32_of_a_lowered_file_is_not_to_blame(tmp_path: Path) -> None:
    path = export(lowered("fp16"), tmp_path / "low.onnx").path
    found = compared(program_of(), path)
    assert "mean" in rows(found)
    assert found.suspect is None
    assert worst(found) < 3  # as in PyTorch
    # Without types of values in between, those of what it is fed with and of casts tell.
    bare = edited(path, lambda model: model.graph.ClearField("value_info"), "bare.onnx")
    assert compared(program_of(), bare).rows == found.rows
    # Neither is what it casts to float32, where the file alone is looked at or beside another.
    example = [numbers(2, 3, 12, 12)]
    assert compare_with_float64(path, example).suspect is None
    assert compare_files(exported(program_of(), tmp_path), path, example).suspect is None


@onnxruntime
@pytest.mark.parametrize("name", ["conv_act", "conv_act_3", "mean", "linear"])
def test_a_wrong_layer_of_a_lowered_file_is_named(tmp_path: Path, name: str) -> None:
    def change(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        (index,) = [i for i, each in enumerate(nodes) if name in each.output]
        dtype = np.float32 if name == "mean" else np.float16
        model.graph.initializer.append(numpy_helper.from_array(np.array(1.1, dtype), "factor"))
        nodes[index].output[0] = "right"
        wrong = helper.make_node("Mul", ["right", "factor"], [name])
        del model.graph.node[:]
        model.graph.node.extend([*nodes[: index + 1], wrong, *nodes[index + 1 :]])

    path = export(lowered("fp16"), tmp_path / "low.onnx").path
    assert compared(program_of(), edited(path, change, "wrong.onnx")).suspect == name


@onnxruntime
def test_what_the_export_wrote_down_is_believed_whatever_the_names(tmp_path: Path) -> None:
    """Names like those of captured nodes mean something else in an optimized program's file."""
    program = program_of()
    stated = {
        "relu_1": {"equals": ["relu_1"], "origins": ["conv2d_2", "relu_1"]},
        "renamed": {"equals": ["no such node", "relu_3"], "origins": ["relu_3"]},
    }

    def state(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["renamed" if name == "relu_3" else name for name in names]
        onnx.helper.set_model_props(model, {ONNX_LAYERS: json.dumps(stated)})

    found = compared(program, edited(exported(program, tmp_path), state, "stated.onnx"))
    assert [(row.name, row.equals) for row in found.rows] == [
        ("relu_1", ("relu_1",)),
        ("renamed", ("relu_3",)),
    ]
    assert found.rows[0].origins == ("conv2d_2", "relu_1")
    assert found.suspect is None


@onnxruntime
@pytest.mark.parametrize("text", ["", "[]", "{", '{"relu": 3}', '{"relu": {"equals": [3]}}'])
def test_what_was_written_down_and_spoilt_is_not_believed(tmp_path: Path, text: str) -> None:
    program = program_of()

    def spoil(model: onnx.ModelProto) -> None:
        onnx.helper.set_model_props(model, {ONNX_LAYERS: text})

    found = compared(program, edited(exported(program, tmp_path), spoil, "spoilt.onnx"))
    assert found.rows[-1].equals == ("linear",)


@onnxruntime
def test_names_alone_say_nothing(tmp_path: Path) -> None:
    """A file of another origin, or of another model, that has a value called `relu`."""
    program = program_of()

    def forget(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            del node.metadata_props[:]

    path = exported(program, tmp_path)
    assert compared(program, edited(path, forget, "forgotten.onnx")).rows == ()

    def other_operator(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for entry in node.metadata_props:
                entry.value = entry.value.replace("aten.relu.default", "aten.sigmoid.default")

    names = rows(compared(program, edited(path, other_operator, "other.onnx")))
    assert "linear" in names
    assert not [name for name in names if name.startswith("relu")]

    def other_inputs(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for entry in node.metadata_props:
                entry.value = entry.value.replace("%p_head_weight", "%p_head_weight_folded")

    assert "linear" not in rows(compared(program, edited(path, other_inputs, "inputs.onnx")))


@onnxruntime
def test_many_values_are_asked_for_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of()
    path = edited(exported(program, tmp_path), scaled("getitem_6", 1.01), "planted.onnx")
    at_once = compared(program, path)
    asked: list[int] = []
    real = OnnxParts.run

    def watched(self: OnnxParts, outputs: Any, feeds: Any) -> Any:
        asked.append(len(outputs))
        return real(self, outputs, feeds)

    monkeypatch.setattr(OnnxParts, "run", watched)
    # Two results of 8 channels, 10 by 10, for a batch of two.
    monkeypatch.setattr(onnx_file, "EXPOSED_BYTES", 2 * 8 * 10 * 10 * 2 * 4)
    in_parts = compared(program, path)
    assert max(asked) <= 6
    assert len(asked) > 10
    assert [row.name for row in in_parts.rows] == [row.name for row in at_once.rows]
    assert in_parts.suspect == at_once.suspect == "getitem_6"


@onnxruntime
def test_weights_in_a_second_file(tmp_path: Path) -> None:
    program = program_of()
    path = exported(program, tmp_path)
    model = onnx.load(path)
    options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 128}
    onnx.save(model, tmp_path / "large.onnx", **options)
    found = compared(program, tmp_path / "large.onnx")
    assert found.rows[-1].name == "linear"
    assert found.suspect is None
    assert len(compare_with_float64(tmp_path / "large.onnx", [numbers(2, 3, 12, 12)]).rows) > 10
    (tmp_path / "w.bin").unlink()
    with pytest.raises(LoadError) as raised:
        compared(program, tmp_path / "large.onnx")
    assert raised.value.cause == "No such file or directory"
    assert "'w.bin'" in raised.value.thing


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname"])
def test_weights_outside_of_the_files_folder_are_not_touched(tmp_path: Path, location: str) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [tensor])
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"1234")
    (folder / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(LoadError) as raised, OnnxParts(folder / "m.onnx", "onnxruntime", 1):
        pass
    assert raised.value.cause == "it lies outside of the file's own folder"


@onnxruntime
def test_two_files_are_compared_by_the_names_of_their_values(tmp_path: Path) -> None:
    path = exported(program_of(), tmp_path)
    planted = edited(path, scaled("getitem_6", 1.01), "planted.onnx")
    feeds = [numbers(2, 3, 12, 12)]
    same, found = (compare_files(path, each, feeds) for each in (path, planted))
    assert (same.suspect, worst(same)) == (None, 0.0)
    assert found.reference == "baseline.onnx as onnxruntime runs it"
    assert found.suspect == "getitem_6"
    wrong = rows(found)["getitem_6"]
    assert (wrong.own_relative_l2, wrong.module) == (None, "blocks.2.norm")
    assert rows(found)["getitem_3"].relative_l2 == 0.0


def stating(equals: dict[str, list[str]]) -> Callable[[onnx.ModelProto], None]:
    """What our export writes: for which captured nodes values stand."""
    text = json.dumps({name: {"equals": each, "origins": each} for name, each in equals.items()})

    def change(model: onnx.ModelProto) -> None:
        onnx.helper.set_model_props(model, {ONNX_LAYERS: text})

    return change


@onnxruntime
def test_an_optimized_file_is_compared_by_what_its_values_stand_for(tmp_path: Path) -> None:
    """Names like those of the export as it comes mean something else in it."""
    path = exported(program_of(), tmp_path)
    feeds = [numbers(2, 3, 12, 12)]
    ours = {"relu": ["relu"], "relu_2": ["relu_2", "gone"], "mean": ["no such node"], "no": ["cat"]}
    found = compare_files(path, edited(path, stating(ours), "ours.onnx"), feeds)
    assert {row.name: row.equals for row in found.rows} == {
        "relu": ("relu",),
        "relu_2": ("relu_2",),
    }
    # The other way round, and where it says that a value stands for what another one is named.
    theirs = edited(path, stating({"relu_1": ["relu_3"], "relu_3": ["relu_1"]}), "theirs.onnx")
    found = compare_files(theirs, path, feeds)
    assert {row.name for row in found.rows} == {"relu_1", "relu_3"}
    assert min(row.relative_l2 for row in found.rows) > 0.1, "each was taken for the other one"


@onnxruntime
def test_values_whose_records_differ_are_not_taken_for_each_other(tmp_path: Path) -> None:
    path = exported(program_of(), tmp_path)

    def renumbered(model: onnx.ModelProto) -> None:
        """As another export of a changed model would number its nodes."""
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [{"relu_1": "relu_2", "relu_2": "relu_1"}.get(n, n) for n in names]

    found = compare_files(path, edited(path, renumbered, "b.onnx"), [numbers(2, 3, 12, 12)])
    names = rows(found)
    assert not {"relu_1", "relu_2"} & names.keys()
    assert {"relu", "relu_3", "linear"} <= names.keys()


@onnxruntime
def test_inputs_go_to_those_of_the_same_name(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - 2 * b).tanh()

    program = captured(Two(), numbers(4), numbers(4, seed=5))

    def swap(model: onnx.ModelProto) -> None:
        first, second = list(model.graph.input)
        del model.graph.input[:]
        model.graph.input.extend([second, first])

    path = exported(program, tmp_path)
    found = compare_files(path, edited(path, swap, "swapped.onnx"), list(program.example_args))
    assert found.rows
    assert worst(found) == 0.0


@onnxruntime
def test_a_file_is_compared_with_itself_in_float64(tmp_path: Path) -> None:
    path = exported(program_of(), tmp_path)
    found = compare_with_float64(path, [numbers(2, 3, 12, 12)])
    assert found.reference == "baseline.onnx in float64"
    assert found.suspect is None
    assert rows(found)["linear"].own_relative_l2 is None
    # float32 rounds at 6e-8; a dozen layers stay below a hundred times that.
    assert 0 < rows(found)["linear"].relative_l2 < 6e-6


@onnxruntime
def test_a_node_that_rounds_to_half_precision_is_found_by_the_file_alone(tmp_path: Path) -> None:
    def round_relu_2(model: onnx.ModelProto) -> None:
        nodes = list(model.graph.node)
        (index,) = [i for i, each in enumerate(nodes) if "relu_2" in each.output]
        nodes[index].output[0] = "wide"
        narrow = helper.make_node("Cast", ["wide"], ["narrow"], to=TensorProto.FLOAT16)
        back = helper.make_node("Cast", ["narrow"], ["relu_2"], to=TensorProto.FLOAT)
        del model.graph.node[:]
        model.graph.node.extend([*nodes[: index + 1], narrow, back, *nodes[index + 1 :]])

    path = edited(exported(program_of(), tmp_path), round_relu_2, "rounding.onnx")
    found = compare_with_float64(path, [numbers(2, 3, 12, 12)])
    # As float16 the value is as good as can be; as float32 it is not.
    assert found.suspect == "relu_2"


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07\xff\xff no model")
    with pytest.raises(LoadError) as raised:
        OnnxParts(tmp_path / "m.onnx", "onnxruntime", 1)
    assert raised.value.cause.startswith("It is no ONNX file")


# A part of a file


def model_of(nodes: list[onnx.NodeProto], outputs: list[str], **initializers: Any) -> Any:
    """A model with the input x: 2x3 float32."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])]
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(each), name) for name, each in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def saved(model: Any, folder: Path) -> Path:
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def test_a_part_holds_what_it_needs_and_no_more(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["first"]),
        helper.make_node("Add", ["first", "b"], ["second"]),
        helper.make_node("Sub", ["second", "x"], ["third"]),
    ]
    model = model_of(nodes, ["third"], a=np.float32(2), b=np.float32(3))
    parts = OnnxParts(saved(model, tmp_path), "onnxruntime", 1)
    assert parts.inputs == ("x",)
    feeds = {"x": numbers(2, 3), "first": numbers(2, 3)}
    part = parts.part(["second"], feeds)
    assert [node.op_type for node in part.graph.node] == ["Add"]
    assert [each.name for each in part.graph.initializer] == ["b"]
    assert [each.name for each in part.graph.input] == ["first"]
    # A value that is fed in and asked for is computed under another name.
    part = parts.part(["first", "third"], feeds)
    assert [each.name for each in part.graph.output] == ["first/computed", "third"]
    assert [node.op_type for node in part.graph.node] == ["Mul", "Add", "Sub"]
    assert parts.reads(["third"], ["first", "second"]) == {"second"}
    assert parts.reads(["third"], ["first"]) == {"first"}
    assert parts.reads(["first"], ["first", "second"]) == set()


@onnxruntime
def test_a_part_reads_what_it_is_fed_and_gives_what_it_computes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "a"], ["first"]),
        helper.make_node("Add", ["first", "first"], ["second"]),
    ]
    model = model_of(nodes, ["second"], a=np.float32(2))
    x, fed = numbers(2, 3), numbers(2, 3, seed=8)
    with OnnxParts(saved(model, tmp_path), "onnxruntime", 1) as parts:
        found = parts.run(["first", "second"], {"x": x, "first": fed})
        folder = parts._folder
        assert folder is not None
        assert folder.is_dir()
    # Exactly: doubling rounds nothing.
    assert torch.equal(found["first"], 2 * x)
    assert torch.equal(found["second"], 2 * fed)
    assert not folder.exists(), "it leaves nothing behind"


def test_a_node_reads_what_its_branches_take_from_outside() -> None:
    inner = helper.make_graph(
        [
            helper.make_node("Add", ["outside", "own"], ["made"]),
            helper.make_node("Mul", ["made", "also outside"], ["result"]),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(1), "own")],
    )
    node = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
    assert set(read_by(node)) == {"condition", "outside", "also outside"}


# A file in float64


def in_float64(model: Any, folder: Path, x: torch.Tensor | None = None) -> list[torch.Tensor]:
    return run_file_float64(saved(model, folder), [numbers(2, 3) if x is None else x])


def test_an_exported_file_computes_the_function_of_its_program(tmp_path: Path) -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Flatten(2)
            )
            self.norm = nn.LayerNorm(64)
            self.linear = nn.Linear(64, 5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.norm(self.layers(x))
            return self.linear(y).softmax(-1), torch.erf(y).argmax(-1)

    program = captured(scramble(Everything()), numbers(2, 3, 12, 12))
    expected = run_float64(program.graph_module, program.example_args, {})
    found = run_file_float64(exported(program, tmp_path), list(program.example_args))
    assert [each.dtype for each in found] == [torch.float64, torch.int64]
    # 1e-12: the same sums in another order; float32 anywhere on the way would leave 1e-8.
    assert distance(expected, found) < 1e-12


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT])
def test_casts_are_read_as_float64(tmp_path: Path, kind: int) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=kind),
        helper.make_node("Cast", ["narrow"], ["y"], to=TensorProto.FLOAT),
    ]
    x = numbers(2, 3)
    (found,) = in_float64(model_of(nodes, ["y"]), tmp_path, x)
    assert torch.equal(found, x.double())


def test_a_cast_to_an_integer_stays_one(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.INT64)]
    (found,) = in_float64(model_of(nodes, ["y"]), tmp_path, numbers(2, 3) * 9)
    assert torch.equal(found, (numbers(2, 3) * 9).to(torch.int64))


def test_constants_that_are_no_tensors(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["third"], value_float=1.0 / 3),
        helper.make_node("Constant", [], ["both"], value_floats=[0.5, 0.25]),
        helper.make_node("Constant", [], ["shape"], value_ints=[2, 3]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceSum", ["both"], ["sum"], keepdims=0),
        helper.make_node("Add", ["third", "zeros"], ["thirds"]),
        helper.make_node("Mul", ["thirds", "sum"], ["product"]),
        helper.make_node("Add", ["x", "product"], ["y"]),
    ]
    x = numbers(2, 3)
    (found,) = in_float64(model_of(nodes, ["y"]), tmp_path, x)
    third = float(np.float32(1.0 / 3))  # as the file holds it
    # 1e-15: two roundings in float64.
    assert distance([x.double() + third * 0.75], [found]) < 1e-15


def test_branches_are_read_as_float64(tmp_path: Path) -> None:
    def branch(name: str, factor: float) -> onnx.GraphProto:
        return helper.make_graph(
            [
                helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16),
                helper.make_node("Mul", ["narrow", "factor"], ["result"]),
            ],
            name,
            [],
            [helper.make_tensor_value_info("result", TensorProto.FLOAT16, None)],
            [numpy_helper.from_array(np.float16(factor), "factor")],
        )

    nodes = [
        helper.make_node(
            "If", ["yes"], ["y"], then_branch=branch("a", 0.5), else_branch=branch("b", 2)
        )
    ]
    (found,) = in_float64(model_of(nodes, ["y"], yes=np.array(True)), tmp_path)
    assert torch.equal(found, numbers(2, 3).double() * 0.5)


def test_half_precision_inputs_and_constants(tmp_path: Path) -> None:
    model = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], ["y"], w=numbers(3, 4).half().numpy()
    )
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    x = numbers(2, 3).half()
    (found,) = in_float64(model, tmp_path, x)
    # 1e-15: sums of three terms in float64; in float16 1e-3 would be left.
    assert distance([x.double() @ numbers(3, 4).half().double()], [found]) < 1e-15


@pytest.mark.parametrize(
    ("node", "cause"),
    [
        (helper.make_node("Mine", ["x"], ["y"], domain="com.example"), "com.example"),
        (
            helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"]),
            "ONNX's reference implementation computes DynamicQuantizeLinear in float32",
        ),
    ],
    ids=["unknown", "float32 only"],
)
def test_what_has_no_float64_is_one_sentence(
    tmp_path: Path, node: onnx.NodeProto, cause: str
) -> None:
    model = model_of([node], ["y"])
    if node.domain:
        model.opset_import.append(helper.make_opsetid(node.domain, 1))
    with pytest.raises(ModelError) as raised:
        in_float64(model, tmp_path)
    assert cause in raised.value.cause
    assert raised.value.thing == f"'{tmp_path / 'm.onnx'}' cannot be run in float64"
    assert raised.value.exit_code == 3
