"""Where to cast, so that the fewest casts are left: a minimum cut.

Some operators must be low and some must be high; the others are as good in either. One cast serves
all who read a value in the precision that it doesn't have, so that the cost of a choice is the
number of values with such a reader. That is the capacity of a cut in a network with an edge for
each value and precision (Ishikawa, "Exact optimization for Markov random fields with convex
priors", IEEE TPAMI 2003, has two labels and pairs as the plainest case), and the smallest one is
found exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import TypeVar

import networkx

Operator = TypeVar("Operator", bound=Hashable)
_HIGH, _LOW = "high", "low"


def low_operators(
    values: Sequence[tuple[Operator, Sequence[Operator]]],
    high: Collection[Operator],
    low: Collection[Operator],
) -> set[Operator]:
    """The operators that are low in the choice with the fewest casts.

    Among choices with as few, it is the one whose casts stand latest: an operator follows what it
    reads, and e.g. an activation stays in the precision of the convolution in front of it.

    Args:
        values: for each value, in the order they are computed, who gives it and who reads it.
        high, low: operators that are not free.

    Returns:
        `low`, and those of the free ones that are low.
    """
    network = networkx.DiGraph()
    network.add_nodes_from((_HIGH, _LOW))
    fixed = {**dict.fromkeys(high, _HIGH), **dict.fromkeys(low, _LOW)}
    ends = {each: fixed.get(each, ("free", each)) for value in values for each in _all(value)}
    # No sum of what tells an early cast from a late one comes near the cost of one cast more.
    one_cast = len(values) * (len(values) + 1)
    for position, (giver, readers) in enumerate(values):
        cost = one_cast + len(values) - position
        there = list(dict.fromkeys(ends[each] for each in readers))
        # Paid where the giver is high and a reader low, then the other way round.
        if ends[giver] != _LOW and there not in ([], [_HIGH]):
            network.add_edge(ends[giver], ("down", position), capacity=cost)
            network.add_edges_from((("down", position), each) for each in there if each != _HIGH)
        if ends[giver] != _HIGH and there not in ([], [_LOW]):
            network.add_edge(("up", position), ends[giver], capacity=cost)
            network.add_edges_from((each, ("up", position)) for each in there if each != _LOW)
    _, (_, found) = networkx.minimum_cut(network, _HIGH, _LOW)
    return {*low, *(each for each, end in ends.items() if end in found)}


def _all(value: tuple[Operator, Sequence[Operator]]) -> tuple[Operator, ...]:
    giver, readers = value
    return (giver, *readers)
