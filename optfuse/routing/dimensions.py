"""In which dimension the users of a tensor expect its channels.

A convolution says so for what it gives; an input of the model, or what an operator of unknown kind
gives, is only known by those who read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch
from torch import fx

from optfuse.convolution import BATCH_NORM
from optfuse.graph import value
from optfuse.routing.absorbers import Layer
from optfuse.routing.channels import Size, dimension_of, equal, moves

aten = torch.ops.aten


def dimensions_wanted(
    graph: fx.Graph, layer_of: Callable[[fx.Node], Layer | None]
) -> dict[fx.Node, int]:
    """In which dimension the users of a tensor expect its channels, the first user's word."""
    found: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        if node.op == "call_function":
            found.update(_wanted_of(node, layer_of(node), found.get(node)))
    return found


def _wanted_of(
    node: fx.Node, layer: Layer | None, own: int | None
) -> Iterator[tuple[fx.Node, int]]:
    """Each operand with the dimension in which the call expects its channels, if it does.

    Args:
        own: the dimension in which the call's users expect them in its result.
    """
    if layer is not None:
        x = layer.convolution.x
        yield x, value(x).dim() + layer.convolution.channel_dim
        return
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return
    for operand in node.all_input_nodes:
        tensor = value(operand)
        if not isinstance(tensor, torch.Tensor):
            continue
        named = dimension_of(node, tensor.dim())
        if node.target in _SECOND:
            yield operand, 1
        elif named is not None:
            yield operand, named
        elif not isinstance(value(node), torch.Tensor):
            continue
        elif moves(node):
            yield operand, _first_change(tensor.shape, value(node).shape, own)
        elif own is not None and own >= value(node).dim() - tensor.dim():
            yield operand, own - value(node).dim() + tensor.dim()


def _first_change(old: Sequence[Size], new: Sequence[Size], own: int | None) -> int:
    """The first dimension in which a view has another size, or that of the channels before it."""
    same = takewhile(lambda sizes: equal(*sizes), zip(old, new, strict=False))
    changed = sum(1 for _ in same)
    return changed if own is None or own >= changed else own


_SECOND = {BATCH_NORM, aten.prelu.default, aten.channel_shuffle.default}
"""They count channels in dimension 1 without saying so."""
