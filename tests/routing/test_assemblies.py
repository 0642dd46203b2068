"""Tensors put together from parts, and what they cost."""

import numpy as np
import pytest
import torch
from torch import fx

from optfuse.routing.assemblies import (
    Assembly,
    Cost,
    Part,
    assemble,
    cost_of,
    numbers_in,
    splits_of,
    with_those_inside,
)


def tensor(channels: int) -> fx.Node:
    """An input of one image with 3x5 pixels."""
    node = fx.Graph().placeholder("x")
    node.meta["val"] = torch.empty(1, channels, 3, 5, device="meta")
    return node


def put_together(*taken: tuple[fx.Node, list[int]]) -> fx.Node | Assembly:
    sources = [source for source, _ in taken]
    which = np.repeat(range(len(taken)), [len(channels) for _, channels in taken])
    positions = np.concatenate([channels for _, channels in taken])
    return assemble(sources, which, positions, 1)


def parts_of(*taken: tuple[fx.Node, list[int]]) -> list[tuple[fx.Node | Assembly, list[int]]]:
    found = put_together(*taken)
    assert isinstance(found, Assembly)
    return [(part.source, list(part.indices)) for part in found.parts]


def made(*taken: tuple[fx.Node, list[int]]) -> Assembly:
    found = put_together(*taken)
    assert isinstance(found, Assembly)
    return found


def test_a_tensor_as_it_is_needs_nothing() -> None:
    x = tensor(3)
    assert put_together((x, [0, 1, 2])) is x
    assert cost_of(with_those_inside([x])) == Cost()


def test_a_few_runs_are_cut_and_many_are_gathered() -> None:
    x, y = tensor(6), tensor(2)
    assert parts_of((x, [4, 5, 1, 2]), (y, [0, 1])) == [(x, [4, 5]), (x, [1, 2]), (y, [0, 1])]
    assert parts_of((y, [1]), (x, [5, 3, 0, 1])) == [(y, [1]), (x, [5, 3, 0, 1])]


def test_what_a_concat_and_its_cuts_cost() -> None:
    x, y = tensor(6), tensor(2)
    # Both cuts and the concat of all; y goes in as it is.
    assert cost_of([made((x, [4, 5]), (y, [0, 1]), (x, [0]))]) == Cost(15 * (2 + 1 + 5), 3)
    assert cost_of([made((x, [1, 2, 3]))]) == Cost(15 * 3, 1)
    assert cost_of([made((x, [5, 3, 1, 0]))]) == Cost(15 * 4, 1)
    assert cost_of([made((x, list(range(6))), (y, [0, 1]))]) == Cost(15 * 8, 1)


def test_one_split_gives_all_runs_of_a_tensor() -> None:
    x, y = tensor(6), tensor(2)
    first, second = made((x, [0, 1]), (y, [0, 1])), made((y, [0, 1]), (x, [2, 3, 4, 5]))
    assert splits_of([first, second]) == {x: ((0, 2), (2, 6))}
    assert cost_of([first, second]) == Cost(15 * (6 + 4 + 6), 3)
    # Without the rest, or with runs that overlap, they are slices.
    assert splits_of([first]) == {}
    assert splits_of([first, second, made((x, [1, 2, 3]))]) == {}


def test_a_cut_that_several_take_is_made_once() -> None:
    x, y = tensor(6), tensor(2)
    assert cost_of([made((x, [0, 1]), (y, [0, 1])), made((y, [0, 1]), (x, [0, 1]))]) == Cost(
        15 * (2 + 4 + 4), 3
    )


def test_a_copy_and_a_gather_of_what_is_put_together() -> None:
    x, y = tensor(3), tensor(2)
    both = made((x, [0, 1, 2]), (y, [0, 1]))
    gathered = Assembly((Part(both, 5, (4, 2, 0, 1, 3)),), 1)
    assert with_those_inside([gathered, both]) == [both, gathered]
    assert cost_of(with_those_inside([gathered])) == Cost(15 * 10, 2)
    copy = Assembly((Part(x, 3, (0, 1, 2)),), 1)
    assert cost_of([copy]) == Cost(15 * 3, 1)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Cost(1, 1), Cost(1, 1), False),
        (Cost(1, 1), Cost(2, 1), True),
        (Cost(1, 1), Cost(1, 2), True),
        (Cost(1, 2), Cost(2, 1), False),
        (Cost(2, 2), Cost(1, 1), False),
    ],
)
def test_less_of_one_and_not_more_of_the_other(one: Cost, other: Cost, expected: bool) -> None:
    assert one.below(other) == expected


def test_numbers_of_a_tensor_with_open_sizes_are_those_of_the_example() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x], 1)

    dims = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(Twice(), (torch.randn(4, 3),), dynamic_shapes=dims)
    (concat,) = (n for n in exported.graph.nodes if n.op == "call_function")
    assert numbers_in(concat.meta["val"]) == 24
