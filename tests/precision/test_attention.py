"""Attention in plain operators computes what PyTorch's own does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from optfuse.branches import independent
from optfuse.float64 import distance, random_inputs, run_float64
from optfuse.graph import Edit
from optfuse.precision.attention import INSIDE, is_attention, spell_out
from optfuse.stages import Program
from tests.harness import captured, counts

EXACT = 1e-13
"""Relative L2 in float64: the same sums in another order, of some dozen numbers each."""


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Any, key: Any, value: Any, mask: Any = None) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, mask, **self.options)


def operands(*, heads: int = 4, key_heads: int = 4, keys: int = 7) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 5, 8), (2, key_heads, keys, 8), (2, key_heads, keys, 6))
    return tuple(torch.randn(shape, generator=random) for shape in shapes)


def spelled(program: Program) -> Program:
    graph_module = independent(program.graph_module)
    edit = Edit(graph_module)
    for node in list(graph_module.graph.nodes):
        if is_attention(node):
            spell_out(edit, node)
    graph_module.recompile()
    graph_module.graph.lint()
    return replace(program, graph_module=graph_module)


def apart(before: Program, after: Program) -> float:
    inputs = random_inputs(before.example_args, before.example_kwargs, seed=1)
    return distance(
        run_float64(before.graph_module, *inputs), run_float64(after.graph_module, *inputs)
    )


SOME = torch.tensor([[True, False, True, True, False, True, True]] * 5)
NONE_IN_ROW_2 = SOME.clone().index_fill_(0, torch.tensor([2]), False)


@pytest.mark.parametrize(
    ("options", "sizes", "mask"),
    [
        ({}, {}, None),
        ({"scale": 0.3}, {}, None),
        ({"is_causal": True}, {}, None),
        ({"is_causal": True}, {"keys": 5}, None),
        ({"enable_gqa": True}, {"key_heads": 2}, None),
        ({}, {}, SOME),
        ({}, {}, SOME.float() * -3),
        ({}, {}, torch.zeros(2, 1, 5, 7).masked_fill(~SOME, -torch.inf)),
        ({"scale": 2.0, "enable_gqa": True}, {"key_heads": 1}, SOME),
    ],
)
def test_it_is_the_same_function(
    options: dict[str, Any], sizes: dict[str, int], mask: torch.Tensor | None
) -> None:
    given = (*operands(**sizes), *(() if mask is None else (mask,)))
    before = captured(Attention(**options), *given)
    after = spelled(before)
    assert "scaled_dot_product_attention" in counts(before)
    assert "scaled_dot_product_attention" not in counts(after)
    assert counts(after)["matmul"] == 2
    # On the mask itself, too: random numbers in its place would not be a mask.
    found, expected = (run_float64(each.graph_module, given, {}) for each in (after, before))
    assert distance(expected, found) < EXACT
    assert apart(before, after) < EXACT


def test_a_row_that_is_masked_as_a_whole_gives_zeros() -> None:
    given = (*operands(), NONE_IN_ROW_2)
    after = spelled(captured(Attention(), *given))
    (found,) = run_float64(after.graph_module, given, {})
    assert torch.equal(found[:, :, 2], torch.zeros(2, 4, 6, dtype=torch.float64))
    assert torch.isfinite(found).all()


def test_each_part_says_what_it_is_of_and_the_result_stands_for_the_whole() -> None:
    after = spelled(captured(Attention(), *operands()))
    inside = [node for node in after.graph_module.graph.nodes if INSIDE in node.meta]
    name = "scaled_dot_product_attention"
    assert [node.name for node in inside] == [
        f"{name}_{part}" for part in ("mul", "transpose", "matmul", "softmax", "matmul_1")
    ]
    assert {node.meta[INSIDE] for node in inside} == {name}
    assert inside[-1].meta["equals"] == [name]
    assert all(node.meta["origins"] == (name,) for node in inside)


@pytest.mark.parametrize("given", [{"dropout_p": 0.5}])
def test_what_draws_random_numbers_is_left_alone(given: dict[str, Any]) -> None:
    before = captured(Attention(**given), *operands())
    assert counts(spelled(before)) == counts(before)


def test_other_precisions_are_left_alone() -> None:
    before = captured(Attention(), *(each.half() for each in operands()))
    assert counts(spelled(before)) == counts(before)
