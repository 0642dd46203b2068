"""FLOPs and parameters, counted by hand and by the program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optfuse.cost import compulsory_bytes, flops, parameters
from tests.harness import captured, optimized, scramble


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


LAYERS: list[tuple[nn.Module, tuple[int, ...], int]] = [
    # A multiply-add is two: 2 x outputs x inputs behind each output.
    (nn.Linear(5, 7), (3, 5), 2 * 3 * 7 * 5),
    (nn.Linear(5, 7, bias=False), (3, 5), 2 * 3 * 7 * 5),
    (nn.Conv2d(4, 6, 3), (2, 4, 8, 9), 2 * (2 * 6 * 6 * 7) * (4 * 3 * 3)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 9), 2 * (2 * 6 * 6 * 7) * (2 * 3 * 3)),
    (nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9), 2 * (2 * 6 * 4) * (4 * 3)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 3, 5), 2 * (4 * 3 * 5) * (6 * 2 * 2)),
    (nn.ReLU(), (3, 5), 0),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS)
def test_flops_of_a_layer(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    assert flops(captured(layer.eval(), numbers(*shape))) == expected


def test_attention_is_counted_as_its_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = numbers(2, 3, 5, 8), numbers(2, 3, 7, 8), numbers(2, 3, 7, 8)
    # 6 heads; 5 queries by 7 keys of 8 numbers, then 5 results of 8 numbers from 7 values.
    assert flops(captured(Attention(), q, k, v)) == 2 * 6 * (5 * 7 * 8 + 5 * 8 * 7)


def test_attention_is_counted_inside_a_model_that_takes_its_result_apart() -> None:
    """Attention's kernel leaves its result in an order of its own, and the view that was captured
    behind it fits no other."""

    class Heads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.unflatten(2, (3, 4)).transpose(1, 2)
            attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return attended.transpose(1, 2).flatten(2)

    # 3 heads; 5 queries by 5 keys of 4 numbers, then 5 results of 4 numbers from 5 values.
    assert flops(captured(Heads(), numbers(2, 5, 12))) == 2 * 2 * 3 * (5 * 5 * 4 + 5 * 4 * 5)


def test_what_is_called_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.linear(x))  # type: ignore[no-any-return]

    program = captured(scramble(Twice()), numbers(3, 4))
    assert flops(program) == 2 * (2 * 3 * 4 * 4)
    assert parameters(program) == 4 * 4 + 4


def test_folding_takes_parameters_away_and_leaves_the_flops() -> None:
    module = scramble(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    before = captured(module, numbers(2, 3, 6, 6))
    after = optimized(before, "all")
    assert flops(before) == flops(after) == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    assert parameters(before) == 4 * 27 + 4 + 4 + 4
    assert parameters(after) == 4 * 27 + 4


def test_counting_runs_nothing() -> None:
    """Neither a buffer that forward writes to nor an input changes, and no memory is needed."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(7))
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            x.add_(1)
            return self.linear(x) * self.calls  # type: ignore[no-any-return]

    program = captured(scramble(Counting()), numbers(3, 4))
    example = program.example_args[0].clone()
    assert flops(program) == 2 * 3 * 4 * 4
    assert int(program.graph_module.calls) == 7
    assert torch.equal(program.example_args[0], example)


def test_inputs_of_any_nesting() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, pair: Any, times: int, *, named: Any) -> Any:
            return self.linear(pair[0] + pair[1]) * times + named["x"]

    module = scramble(Nested())
    program = captured(
        module, (numbers(3, 4), numbers(4)), 2, kwargs={"named": {"x": numbers(3, 2)}}
    )
    assert flops(program) == 2 * 3 * 2 * 4


@pytest.mark.parametrize("share", [lambda weight: weight, lambda weight: nn.Parameter(weight.data)])
def test_parameters_count_a_shared_one_once_and_no_buffers(share: Any) -> None:
    """Shared is what lies in the same memory, under one name or two."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4)
            self.second.weight = share(self.first.weight)
            self.norm = nn.BatchNorm1d(4, affine=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.second(self.first(x)))  # type: ignore[no-any-return]

    assert parameters(captured(scramble(Shared()), numbers(3, 4))) == 16 + 4


def test_parameters_of_a_model_without_any() -> None:
    assert parameters(captured(nn.ReLU(), numbers(3))) == 0


BYTES: list[tuple[nn.Module, tuple[int, ...], int]] = [
    # Weights, inputs and outputs, four bytes each.
    (nn.Linear(5, 7), (3, 5), 4 * ((5 * 7 + 7) + 3 * 5 + 3 * 7)),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 8, 9), 4 * (6 * 2 * 9 + 576 + 2 * 6 * 42)),
    (nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 2)), (3, 5), 4 * (54 + 20 + 15 + 6)),
    (nn.BatchNorm1d(5), (3, 5), 4 * (4 * 5 + 15 + 15)),
    (nn.ReLU(), (3, 5), 4 * (15 + 15)),
]


@pytest.mark.parametrize(("layer", "shape", "expected"), BYTES)
def test_bytes_that_have_to_be_moved(
    layer: nn.Module, shape: tuple[int, ...], expected: int
) -> None:
    assert compulsory_bytes(captured(scramble(layer), numbers(*shape))) == expected


def test_bytes_are_those_of_each_dtype() -> None:
    module = scramble(nn.Linear(5, 7).half())
    assert compulsory_bytes(captured(module, numbers(3, 5).half())) == 2 * (42 + 15 + 21)


def test_of_a_table_what_is_looked_up_is_moved() -> None:
    module, tokens = scramble(nn.Embedding(100, 4)), torch.tensor([[3, 7, 99]])
    assert compulsory_bytes(captured(module, tokens)) == 3 * 4 * 4 + 3 * 8 + 3 * 4 * 4
    many = torch.arange(1000) % 100
    assert compulsory_bytes(captured(module, many)) == 100 * 4 * 4 + 1000 * 8 + 1000 * 4 * 4


def test_a_table_that_is_a_weight_as_well_is_moved_whole_and_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(100, 4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.table(tokens) @ self.table.weight.mT
            return logits

    program = captured(scramble(Tied()), torch.tensor([3, 7]))
    assert compulsory_bytes(program) == 100 * 4 * 4 + 2 * 8 + 2 * 100 * 4


def test_what_is_not_used_is_not_moved() -> None:
    class Slicing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(numbers(1000))
            self.scale = nn.Parameter(numbers(4))

        def forward(self, x: torch.Tensor, ignored: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = x[:2] * self.scale
            return y, y

    program = captured(Slicing(), numbers(50, 4), numbers(30))
    # Two rows of x, the scale, and one result although it is returned twice.
    assert compulsory_bytes(program) == 4 * (2 * 4 + 4 + 2 * 4)


class Branching(nn.Module):
    def __init__(self, turns: str) -> None:
        super().__init__()
        self.turns = turns
        self.linear = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> Any:
        from torch._higher_order_ops.map import map as map_over
        from torch._higher_order_ops.scan import scan
        from torch._higher_order_ops.while_loop import while_loop

        def twice(x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.linear(x))  # type: ignore[no-any-return]

        if self.turns == "cond":
            return torch.cond(x.sum() > 0, self.linear, twice, (x,))
        if self.turns == "map":
            return map_over(self.linear, x)
        if self.turns == "scan":
            return scan(lambda c, each: (c + 1, self.linear(each)), torch.zeros(()), x)
        return while_loop(  # type: ignore[no-untyped-call]
            lambda i, x: i < 7, lambda i, x: (i + 1, self.linear(x)), (torch.tensor(0), x)
        )


@pytest.mark.parametrize(("turns", "times"), [("cond", 2), ("while", 1), ("map", 3), ("scan", 3)])
def test_branches_are_counted(turns: str, times: int) -> None:
    """The dearer branch; a body once where nobody knows how often it runs; else every time."""
    program = captured(scramble(Branching(turns)), numbers(3, 4, 5))
    rows = 4 if turns in ("map", "scan") else 12
    assert flops(program) == times * rows * 2 * 5 * 5
    # The input, the weight and the bias are read, and the result is written.
    assert compulsory_bytes(program) >= 4 * (3 * 4 * 5 + 5 * 5 + 5 + 3 * 4 * 5)
