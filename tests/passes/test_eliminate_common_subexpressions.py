"""eliminate_common_subexpressions: what is the same, what only looks the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optfuse.capture import capture
from optfuse.graph import constant_of
from optfuse.stages import LoadedModel, Program
from tests.harness import (
    assert_same_function,
    assert_settled,
    captured,
    counts,
    optimized,
    reasons,
    step,
)

PASS = "eliminate_common_subexpressions"
# The same operators on the same numbers: nothing moves at all.
EXACT = 0.0


class Function(nn.Module):
    """`function(x, *constants)` with each constant a buffer."""

    def __init__(self, function: Callable[..., Any], *constants: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for index, each in enumerate(constants):
            self.register_buffer(f"c{index}", each)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, *self.buffers())


def numbers(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def program_of(function: Callable[..., Any], *constants: torch.Tensor) -> Program:
    return captured(Function(function, *constants).eval(), numbers(2, 4, 6, seed=2))


SAME: dict[str, tuple[Callable[[torch.Tensor], Any], dict[str, int]]] = {
    "call": (lambda x: x.sin() * x.sin(), {"sin": 1, "mul": 1}),
    "chain": (
        lambda x: (x.sin() + 1).exp() * (x.sin() + 1).exp().cos(),
        {"sin": 1, "add": 1, "exp": 1, "cos": 1, "mul": 1},
    ),
    "default filled in": (lambda x: x.sum(1) * x.sum(1, keepdim=False), {"sum": 1, "mul": 1}),
    "lists": (lambda x: x.permute(0, 2, 1) - x.permute([0, 2, 1]), {"permute": 1, "sub": 1}),
    "dtypes": (
        lambda x: x.double().sin() + x.to(torch.float64),
        {"_to_copy": 1, "sin": 1, "add": 1},
    ),
    "several results": (
        lambda x: x.split(2, 1)[0] - x.split(2, 1)[1] * x.split(2, 1)[0],
        {"split": 1, "mul": 1, "sub": 1},
    ),
    "not-a-number": (
        lambda x: F.pad(x, (1, 1), value=float("nan")) * F.pad(x, (1, 1), value=float("nan")),
        {"pad": 1, "mul": 1},
    ),
    "one of two an output": (lambda x: (x.sin(), x.sin() + 1), {"sin": 1, "add": 1}),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_goes(case: str) -> None:
    function, expected = SAME[case]
    before = program_of(function)
    after = optimized(before, PASS)
    assert counts(after) == expected
    assert_same_function(before, after, tolerance=EXACT)
    assert_settled(after, PASS)


OTHER: dict[str, Callable[[torch.Tensor], Any]] = {
    "order": lambda x: (x - x.sin()) + (x.sin() - x),
    "integer and float": lambda x: (x > 0).mul(1) + (x > 0).mul(1.0),
    "integer and boolean": lambda x: (x > 0).mul(1) + (x > 0).mul(True),
    "signs of zero": lambda x: (x.abs() / 0.0) * (x.abs() / -0.0),
    "dimension": lambda x: x.sum(1, keepdim=True) + x.sum(2, keepdim=True),
    "keyword": lambda x: torch.add(x, x, alpha=2) * torch.add(x, x, alpha=3),
    "operator": lambda x: x.sin() + x.cos(),
    "overload": lambda x: torch.pow(x, 2) + torch.pow(2, x),
    "dtype": lambda x: x.to(torch.float16).float() + x.to(torch.bfloat16).float(),
    "result of several": lambda x: x.split(2, 1)[0] + x.split(2, 1)[1],
}


@pytest.mark.parametrize("case", OTHER)
def test_what_only_looks_the_same_stays(case: str) -> None:
    before = program_of(OTHER[case])
    after = optimized(before, PASS)
    # What both sides share may go; the two that are named may not.
    assert set(counts(after)) == set(counts(before))
    assert reasons(after, PASS) == []
    x = numbers(2, 4, 6, seed=7)
    # The same operators on the same numbers: equal to the last bit.
    torch.testing.assert_close(after.graph_module(x), before.graph_module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "kind", "left"),
    [
        ("order", "sub", 2),
        ("integer and float", "mul", 2),
        ("integer and boolean", "mul", 2),
        ("signs of zero", "div", 2),
        ("dimension", "sum", 2),
        ("overload", "pow", 2),
        ("dtype", "_to_copy", 4),
        ("result of several", "split", 1),
    ],
)
def test_how_many_are_left(case: str, kind: str, left: int) -> None:
    assert counts(optimized(program_of(OTHER[case]), PASS))[kind] == left


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.second.bias = nn.Parameter(self.first.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x).sin() + self.second(x).cos()


def constant_names(program: Program) -> list[str]:
    nodes = program.graph_module.graph.nodes
    return [str(node.target) for node in nodes if constant_of(node) is not None]


def test_tied_weights_are_one() -> None:
    before = captured(Tied().eval(), numbers(3, 6))
    after = optimized(before, PASS)
    assert counts(after) == {"linear": 1, "sin": 1, "cos": 1, "add": 1}
    assert len(constant_names(before)) == 3
    assert len(constant_names(after)) == 2
    assert_same_function(before, after, tolerance=EXACT)


def test_constants_of_one_memory_may_differ() -> None:
    memory = numbers(7)
    views = (
        memory[:4],
        memory[:3],
        memory[1:5],
        memory[:4].view(2, 2),
        memory[:4].view(2, 2).t(),
        memory[:4].view(torch.int32),
        memory[0:7:2],
    )

    def function(x: torch.Tensor, *c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(each.flatten()[:3] * 2 + x[0, 0, :3] for each in c)

    model = Function(function)
    for index, view in enumerate(views):
        model.register_buffer(f"c{index}", view)
    before = captured(model.eval(), numbers(2, 4, 6))
    after = optimized(before, PASS)
    assert len(constant_names(after)) == len(constant_names(before))
    assert_same_function(before, after, tolerance=EXACT)


def test_equal_numbers_in_two_memories_stay_two() -> None:
    before = program_of(lambda x, a, b: x * a + x * b, numbers(6), numbers(6))
    assert counts(optimized(before, PASS)) == {"mul": 2, "add": 1}


def test_constants_without_memory_are_told_apart_by_name() -> None:
    before = program_of(
        lambda x, a, b: (torch.cat([x, a], 1).sin(), torch.cat([x, b], 1).sin()),
        torch.ones(2, 0, 6),
        torch.ones(2, 0, 6),
    )
    assert counts(optimized(before, PASS)) == {"cat": 2, "sin": 2}


def test_refuses_random_numbers() -> None:
    before = program_of(lambda x: x.sigmoid().bernoulli() - x.sigmoid().bernoulli())
    after = optimized(before, PASS)
    assert counts(after) == {"sigmoid": 1, "bernoulli": 2, "sub": 1}
    assert reasons(after, PASS) == ["it draws other random numbers than bernoulli"]


def test_refuses_two_outputs() -> None:
    before = program_of(lambda x: (x.sin(), x.sin(), x.cos()))
    after = optimized(before, PASS)
    assert counts(after) == {"sin": 2, "cos": 1}
    assert reasons(after, PASS) == ["it and sin are both outputs of the model"]


def test_refuses_memory_that_is_written() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", numbers(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            old = self.count[0].sin()
            again = self.count[0].sin()
            self.count.add_(1)
            return x * old * again

    x = numbers(2, 4, 6)
    before = captured(Counter().eval(), x)
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == [
        "the model writes to the memory that it and select read",
    ]
    model = Counter().eval()
    for _ in range(2):
        # float32, the same operators: equal to the last bit.
        torch.testing.assert_close(after.graph_module(x), model(x), rtol=0, atol=0)


def test_sizes_that_depend_on_the_data_stay_apart() -> None:
    before = captured(Function(lambda x: x[x > 0].sum() - x[x > 0].exp().sum()), numbers(6))
    after = optimized(before, PASS)
    assert counts(before)["gt"] == 2
    assert counts(after)["gt"] == 1
    assert counts(after)["index"] == 2
    # Asserts on the sizes have effects, not results.
    assert counts(after)["_assert_scalar"] == counts(before)["_assert_scalar"]


@torch.library.custom_op("optfuse_test::measured", mutates_args=())
def measured(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@measured.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_operators_with_effects_stay() -> None:
    operator = torch.ops.optfuse_test.measured.default
    assert counts(optimized(program_of(lambda x: operator(x) * operator(x)), PASS)) == {
        "measured": 1,
        "mul": 1,
    }
    torch.fx.node.has_side_effect(operator)
    after = optimized(program_of(lambda x: operator(x) * operator(x)), PASS)
    assert counts(after) == {"measured": 2, "mul": 1}
    assert step(after, PASS).sites == ()


def test_dynamic_sizes() -> None:
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            flat = x.reshape(x.shape[0] * 4, 6).sin() + y.reshape(y.shape[0] * 4, 6)
            return flat * x.reshape(x.shape[0] * 4, 6).sin()

    batch = torch.export.Dim("batch", min=1, max=16)
    inputs = (numbers(2, 4, 6), numbers(2, 4, 6, seed=5))
    shapes = ({0: batch}, {0: batch})
    before = capture(LoadedModel("sized", Sized(), inputs, {}, dynamic_shapes=shapes))
    after = optimized(before, PASS)
    assert counts(after) == {"sym_size": 1, "mul": 1, "view": 2, "sin": 1, "add": 1}
    longer = (numbers(5, 4, 6), numbers(5, 4, 6, seed=6))
    # The same operators on the same numbers: equal to the last bit.
    torch.testing.assert_close(
        after.graph_module(*longer), before.graph_module(*longer), rtol=0, atol=0
    )


def test_what_goes_is_recorded() -> None:
    after = optimized(program_of(lambda x: x.sin() * x.sin()), PASS)
    assert [(site.site, site.note) for site in step(after, PASS).sites] == [
        ("sin_1", "the same as sin")
    ]


def test_all_three_clean_up_together() -> None:
    """What one pass leaves equal, the next one finds: identities, constants, then duplicates."""

    def function(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        first = F.dropout(x, training=False) * (c.exp() / c.exp())
        second = x.clone().contiguous() + torch.zeros(6)
        return first.sin() * second.sin()

    before = program_of(function, torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 3.0]))
    after = optimized(before, "eliminate_identity,fold_constants,eliminate_common_subexpressions")
    assert counts(after) == {"sin": 1, "mul": 1}
    # c.exp() / c.exp() is 1 exactly, in float64 as in float32.
    assert_same_function(before, after, tolerance=EXACT)
