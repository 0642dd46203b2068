"""Graphs inside higher-order operators: the passes go in, each branch is proved by itself, and what
they don't go into is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import _pytree as pytree

from optfuse import backends
from optfuse.branches import branches, close_over, independent, left_alone, lift
from optfuse.capture import capture
from optfuse.errors import CaptureError
from optfuse.export import export
from optfuse.float64 import distance, run_float64
from optfuse.graph import Edit, is_call, operators, prepare
from optfuse.optimize import optimize, select
from optfuse.passes import Match, Pass
from optfuse.stages import BuildOptions, LoadedModel, Program
from tests.harness import (
    assert_settled,
    captured,
    counts,
    float64_distance,
    optimized,
    scramble,
    step,
)

aten = torch.ops.aten


class Layers(nn.Module):
    """Two convolutions with their batch norms, called by a function of them and the input."""

    gain: torch.Tensor

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.first, self.first_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.register_buffer("gain", torch.linspace(0.5, 2, 4)[:, None, None])

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def image(*shape: int, shift: float = 0.0) -> torch.Tensor:
    size = shape or (2, 3, 8, 8)
    return torch.randn(size, generator=torch.Generator().manual_seed(5)) + shift


def chosen(m: Layers, x: torch.Tensor) -> Any:
    def one(x: torch.Tensor) -> Any:
        return torch.relu(m.first_norm(m.first(x)))

    def other(x: torch.Tensor) -> Any:
        return m.second_norm(m.second(x)) * m.gain

    return torch.cond(x.sum() > 0, one, other, (x,))


def nested(m: Layers, x: torch.Tensor) -> Any:
    def inner(x: torch.Tensor) -> Any:
        with torch.no_grad():
            return m.first_norm(m.first(x))

    def outer(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 5, inner, lambda x: m.second_norm(m.second(x)), (x * 2,))

    return torch.cond(x.sum() > 0, outer, lambda x: x[:, :1].expand(-1, 4, -1, -1).clone(), (x,))


def looping(m: Layers, x: torch.Tensor) -> Any:
    def turn(i: torch.Tensor, x: torch.Tensor) -> Any:
        return i + 1, 0.1 * m.first_norm(m.first(x)).mean(1, keepdim=True) + 0.5 * x

    return while_loop(  # type: ignore[no-untyped-call]
        lambda i, x: i < 3, turn, (torch.tensor(0), x)
    )


def scanning(m: Layers, x: torch.Tensor) -> Any:
    def turn(carried: torch.Tensor, slice: torch.Tensor) -> Any:
        return carried + m.first_norm(m.first(slice[None])).sum(), slice * 2

    return scan(turn, torch.zeros(()), x)


def mapping(m: Layers, x: torch.Tensor) -> Any:
    def one(each: torch.Tensor) -> Any:
        return m.first_norm(m.first(each[None]))[0]

    return map_over(one, x)  # type: ignore[arg-type]


def program_of(function: Callable[..., Any]) -> Program:
    return captured(scramble(Layers(function)), image())


def assert_same_both_ways(program: Program, after: Program) -> None:
    """With inputs of a positive sum, a negative one, and one that is large."""
    for shift in (0.5, -0.5, 5.0):
        x = (image(shift=shift),)
        moved = distance(
            run_float64(program.graph_module, x, {}), run_float64(after.graph_module, x, {})
        )
        assert moved < 1e-6  # folded weights are rounded to float32, and loops add that up


EVERY = [
    (
        chosen,
        {"cond": 1, "conv_act": 1, "conv2d": 1, "gt": 1, "sum": 1},
        {"true_graph_0.conv2d", "false_graph_0.conv2d", "false_graph_0.conv2d_1"},
    ),
    (
        nested,
        {"cond": 2, "conv2d": 2, "gt": 2, "sum": 2, "clone": 1, "expand": 1, "mul": 1, "slice": 1},
        {"true_graph_0.true_graph_0.conv2d", "true_graph_0.false_graph_0.conv2d"},
    ),
    (
        looping,
        {"add": 2, "mul": 1, "conv2d": 1, "lt": 1, "mean": 1, "while_loop": 1},
        {"while_loop_body_graph_0.conv2d"},
    ),
    (
        scanning,
        {"add": 1, "conv2d": 1, "mul": 1, "scan": 1, "sum": 1, "unsqueeze": 1},
        {"scan_combine_graph_0.conv2d"},
    ),
    (
        mapping,
        {"conv2d": 1, "map_impl": 1, "select": 1, "unsqueeze": 1},
        {"body_graph_0.conv2d"},
    ),
]


@pytest.mark.parametrize(("function", "expected", "sites"), EVERY)
def test_the_passes_go_into_every_branch(
    function: Callable[..., Any], expected: dict[str, int], sites: set[str]
) -> None:
    program = program_of(function)
    before = counts(program)
    after = optimized(program, "all")
    assert counts(after) == expected
    folded = step(after, "fold_conv_bn")
    assert {each.site for each in folded.sites} == sites
    assert folded.relative_l2 is not None
    assert folded.relative_l2 < 1e-13  # a few roundings in float64
    assert_same_both_ways(program, after)
    assert_settled(after, "all")
    assert counts(program) == before  # what was captured is as it was


def test_a_branch_that_no_input_takes_is_proved_too() -> None:
    def never(m: Layers, x: torch.Tensor) -> Any:
        return torch.cond(x.abs().sum() < 0, lambda x: m.first_norm(m.first(x)), m.second, (x,))

    class Careless(Pass):
        """Takes half for every batch norm's epsilon."""

        name = "careless"
        equation = "batch_norm(x, eps) = batch_norm(x, 0.5)"

        def match(self, node: fx.Node) -> Match | None:
            is_norm = is_call(node, aten._native_batch_norm_legit_no_training.default)
            return Match(nodes=(node,), note="") if is_norm and node.args[6] != 0.5 else None

        def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
            (node,) = match.nodes
            norm = aten._native_batch_norm_legit_no_training.default
            return {node: edit.call(norm, *node.args[:6], 0.5)}

    program = program_of(never)
    after = optimize(program, [Careless(), *select("fold_conv_bn")])
    wrong = step(after, "careless")
    assert wrong.undone is not None
    assert wrong.undone.startswith("in true_graph_0 in float64 its outputs moved by a relative L2")
    assert [each.undone for each in after.trace if each.name == "fold_conv_bn"] == [None]
    assert counts(after)["conv2d"] == 2
    assert "batch_norm" not in counts(after)


def test_what_is_computed_outside_from_constants_is_a_constant_inside() -> None:
    def normed(m: Layers, x: torch.Tensor) -> Any:
        weight = torch._weight_norm(m.first.weight, m.first.weight[:, :1, :1, :1] + 1, 0)

        def one(x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.conv2d(x, weight, padding=1)
            return torch.relu(m.first_norm(y))

        return torch.cond(x.sum() > 0, one, m.second, (x,))

    program = program_of(normed)
    after = optimized(program, "all")
    assert counts(after) == {"cond": 1, "conv2d": 1, "conv_act": 1, "gt": 1, "sum": 1}
    assert_same_both_ways(program, after)
    assert_settled(after, "all")


def test_what_is_written_to_is_no_constant_inside() -> None:
    def counting(m: Layers, x: torch.Tensor) -> Any:
        m.gain.add_(1)
        return torch.cond(x.sum() > 0, lambda x: m.first(x) * m.gain, m.second, (x,))

    program = program_of(counting)
    after = optimized(program, "all")
    assert counts(after) == counts(program)
    for shift in (0.5, -0.5):
        x = image(shift=shift)
        assert torch.equal(after.graph_module(x), program.graph_module(x))


def test_a_branch_never_returns_the_memory_of_an_operand_or_of_another_result() -> None:
    """Which `torch.cond` does not take: where a rewrite leads to that, the result is copied."""

    def views(m: Layers, x: torch.Tensor) -> Any:
        def one(x: torch.Tensor) -> Any:
            return (x * 1.0).view(2, -1), x + 0.0, m.gain * 2, m.gain * 2

        def other(x: torch.Tensor) -> Any:
            y = m.first(x).mean(1, keepdim=True)
            return x.view(2, -1) + 1, x * 2, m.gain + y.mean(), m.gain + 1

        return torch.cond(x.sum() > 0, one, other, (x,))

    program = program_of(views)
    after = optimized(program, "all")
    assert_same_both_ways(program, after)
    assert_settled(after, "all")
    module = scramble(Layers(views))
    for shift in (0.5, -0.5):
        x = image(shift=shift)
        for ours, theirs in zip(after.graph_module(x), module(x), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # a few roundings in float32
        assert len({each.data_ptr() for each in (x, *after.graph_module(x))}) == 5


def test_tensors_are_shared_with_the_program_and_not_copied() -> None:
    program = program_of(chosen)
    graph_module = independent(program.graph_module)
    prepare(graph_module)
    original = {each.data_ptr() for each in program.graph_module.state_dict().values()}
    assert close_over(graph_module)
    assert not close_over(graph_module)
    for branch in branches(graph_module):
        held = branch.graph_module.state_dict().values()
        assert held
        assert {each.data_ptr() for each in held} <= original
        assert len(branch.graph_module.graph.find_nodes(op="placeholder")) == 1
    lift(graph_module)
    assert operators(graph_module) == counts(program)
    for branch in branches(independent(graph_module)):
        assert not branch.graph_module.state_dict()
    x = image()
    # The same operators on the same numbers.
    assert torch.equal(graph_module(x), program.graph_module(x))


@pytest.mark.parametrize("batch", [2, 5])
def test_dynamic_sizes(batch: int) -> None:
    """Sizes are operands too, and not tensors."""

    def by_size(m: Layers, x: torch.Tensor) -> Any:
        def one(x: torch.Tensor) -> Any:
            return m.first_norm(m.first(x)).flatten(2).view(x.shape[0], 4, -1) * x.shape[2]

        return torch.cond(x.sum() > 0, one, lambda x: m.second(x).flatten(2), (x,))

    dim = torch.export.Dim
    shapes = (({0: dim("batch", min=2), 2: dim("height", min=4)},),)
    program = capture(
        LoadedModel("net", scramble(Layers(by_size)), (image(),), dynamic_shapes=shapes)
    )
    after = optimized(program, "all")
    assert "batch_norm" not in counts(after)
    for shift in (0.5, -0.5):
        x = (image(batch, 3, 6, 8, shift=shift),)
        moved = distance(
            run_float64(program.graph_module, x, {}), run_float64(after.graph_module, x, {})
        )
        assert moved < 1e-6  # the folded weights were rounded to float32


def test_indices_for_a_branch_stay_in_their_range() -> None:
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, ids: torch.Tensor, x: torch.Tensor) -> Any:
            def one(ids: torch.Tensor) -> Any:
                return self.table(ids).mul(1.0) * 3 - 0.0

            return torch.cond(x.sum() > 0, one, lambda ids: self.table(ids) + 1, (ids,))

    program = captured(scramble(Looked()), torch.tensor([4, 0, 2]), image(3))
    after = optimized(program, "eliminate_identity")
    assert [each.site for each in step(after, "eliminate_identity").sites] == [
        "true_graph_0.mul",
        "true_graph_0.sub",
    ]


def test_what_the_passes_do_not_go_into_is_refused_by_name() -> None:
    class Attending(nn.Module):
        def forward(self, q: torch.Tensor) -> Any:
            def bias(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
                return score * 1.5 + (i - j)

            return flex_attention(q, q * 1.0, q, score_mod=bias)

    program = captured(Attending(), image(1, 2, 16, 16))
    ((site, reason),) = left_alone(program.graph_module)
    assert site == "flex_attention"
    assert reason.endswith(
        " operators inside flex_attention are left alone: the passes do not know how it calls its "
        "inner graph"
    )
    after = optimize(program, select("fold_conv_bn,fold_constants"))
    for name in ("fold_conv_bn", "fold_constants"):
        assert (site, reason) in [(each.site, each.reason) for each in step(after, name).refused]


def test_a_branch_that_two_operators_call_is_left_alone() -> None:
    program = program_of(chosen)
    graph_module = independent(program.graph_module)
    (call,) = (node for node in graph_module.graph.nodes if node.name == "cond")
    call.args = (call.args[0], call.args[1], call.args[1], call.args[3])
    with graph_module.graph.inserting_after(call):
        graph_module.graph.call_function(call.target, call.args)
    prepare(graph_module)
    assert list(branches(graph_module)) == []
    reasons = [reason for _, reason in left_alone(graph_module)]
    shared = "its inner graph also belongs to another operator"
    assert reasons == [f"3 operators inside cond are left alone: {shared}"] * 2


def test_a_region_that_is_compiled_once_and_called_twice_is_inlined() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        @torch.compiler.nested_compile_region
        def block(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.norm(self.conv(x)))

        def forward(self, x: torch.Tensor) -> Any:
            return self.block(x) + self.block(x * 2)

    module = scramble(Regions())
    exported = torch.export.export(module, (image(),), strict=True)
    assert "invoke_subgraph" in str(exported.graph)
    program = captured(exported.module(), image())
    assert counts(program) == {"batch_norm": 2, "conv2d": 2, "relu": 2, "add": 1, "mul": 1}
    assert torch.equal(program.graph_module(image()), module(image()))
    after = optimized(program, "all")
    assert counts(after) == {"conv_act": 2, "add": 1}  # one convolution took the factor in
    assert float64_distance(program, after) < 1e-6  # the folded weights were rounded to float32


def test_blocks_that_only_wrap_operators_are_inlined() -> None:
    """`no_grad`, `enable_grad` and `autocast`, as torch.export hands them on."""

    def wrapped(m: Layers, x: torch.Tensor) -> Any:
        with torch.no_grad():
            y = m.first(x)
        with torch.autocast("cpu", enabled=False):
            y = m.first_norm(y)
        with torch.enable_grad():
            return torch.relu(y)

    module = scramble(Layers(wrapped))
    exported = torch.export.export(module, (image(),))
    assert "wrap_with" in str(exported.graph)
    program = captured(exported.module(), image())
    assert counts(program) == {"batch_norm": 1, "conv2d": 1, "relu": 1}
    assert counts(optimized(program, "all")) == {"conv_act": 1}


@pytest.mark.parametrize("function", [nested, looping, scanning])
def test_the_file_runs_both_ways(function: Callable[..., Any], tmp_path: Path) -> None:
    backend = backends.get("onnxruntime")
    if reason := backend.unavailable():
        pytest.skip(reason)
    program = program_of(function)
    artifact = export(optimized(program, "all"), tmp_path / "model.onnx")
    for shift in (0.5, -0.5, 5.0):
        x = image(shift=shift)
        reference = run_float64(program.graph_module, (x,), {})
        with backend.open(artifact, BuildOptions()) as session:
            session.bind((x,))
            session.run()
            outputs = session.fetch()
        for ours, theirs in zip(outputs, pytree.tree_leaves(reference), strict=True):
            error = (ours.double() - theirs).norm() / theirs.double().norm()
            assert error < 1e-5  # float32, three turns of a loop


# What torch.export does not take


@pytest.mark.parametrize(
    ("one", "cause", "next_step"),
    [
        (
            lambda x: x.half(),
            "do not fit: When merging two branches' output in torch.cond",
            "Give all branches contiguous results of one shape and one dtype, none of which is an "
            "input or a view of one",
        ),
        (
            lambda x: x * torch.tensor([1.5] * 8),
            "makes a tensor from numbers, where torch.export cannot follow",
            "Register that tensor with register_buffer, or make it in front of the operator",
        ),
    ],
)
def test_branches_that_cannot_be_captured(
    one: Callable[..., Any], cause: str, next_step: str
) -> None:
    def forward(m: Layers, x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, one, lambda x: x + 1, (x,))

    with pytest.raises(CaptureError) as raised:
        program_of(forward)
    assert cause in raised.value.cause
    assert raised.value.next_step == next_step
