"""Sums of tensors, and of what scales and shifts their channels, read as terms with factors."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optfuse.convolution import (
    ARITHMETIC,
    BATCH_NORM,
    Affine,
    arithmetic_affine,
    batch_norm_affine,
    convolution_of,
)
from optfuse.graph import arguments, constant_of, is_call, sole_user, value

aten = torch.ops.aten

_SUMS: Mapping[Any, tuple[float, float]] = {
    aten.add.Tensor: (1.0, 1.0),
    aten.sub.Tensor: (1.0, -1.0),
    aten.rsub.Tensor: (-1.0, 1.0),
}
"""Operator -> the signs of its operands; alpha goes with the second one, and in rsub the first."""


@dataclass(frozen=True)
class Scale:
    """What a term of a sum counts with: a number, times one number a channel.

    Attributes:
        vector: shape (channels,), float64; None for ones.
        by: the operator nearest to the term that multiplies by numbers that differ.
    """

    factor: float = 1.0
    vector: torch.Tensor | None = None
    by: fx.Node | None = None

    def times(self, factor: float) -> Scale:
        """A term within this one that counts with `factor`."""
        return replace(self, factor=self.factor * factor)

    def through(self, node: fx.Node, numbers: torch.Tensor) -> Scale:
        """A term within this one, behind what `node` multiplies by."""
        first = float(numbers[0])
        # Not for zeros, by which nothing can be divided afterwards.
        if first != 0.0 and bool((numbers == first).all()):
            return self.times(first)
        return Scale(1.0, self.total(numbers), node)

    def total(self, ones: torch.Tensor) -> torch.Tensor:
        """All of it, multiplied with `ones`."""
        return ones * self.factor * (1.0 if self.vector is None else self.vector)


@dataclass
class Tree:
    """A sum: what `root` gives is the sum of the terms, each times its scale, and a shift.

    Attributes:
        dim: the dimension of the channels, counted from the end.
        shift: shape (channels,), float64.
        inner: every operator of the sum, the root first.
        shared: partial sums among the terms, which are not taken apart because others use them.
    """

    root: fx.Node
    dim: int
    shift: torch.Tensor
    terms: list[tuple[fx.Node, Scale]] = field(default_factory=list)
    inner: dict[fx.Node, None] = field(default_factory=dict)
    shared: list[fx.Node] = field(default_factory=list)

    @property
    def ones(self) -> torch.Tensor:
        """Shape (channels,), float64."""
        return torch.ones_like(self.shift)

    def like_result(self, node: fx.Node) -> bool:
        """Whether a node's result has the shape and dtype of the sum's."""
        return _alike(value(node), value(self.root))


@dataclass(frozen=True)
class Reading:
    """An operator of a sum: its result is the sum of the operands, each times its factor, then
    scaled and shifted where `affine` is not None.

    Attributes:
        nodes: the call, and the `getitem` that picks its result where it has several.
    """

    nodes: tuple[fx.Node, ...]
    operands: tuple[tuple[fx.Node, float], ...]
    affine: Affine | None = None


def roots(graph: fx.Graph) -> dict[fx.Node, int]:
    """The last operator of every sum with a convolution in it, and the dimension of its channels.

    Linear in the number of nodes, as every sum is walked once and no node is in two of them.
    """
    channel_dim: dict[fx.Node, int] = {}
    for node in graph.nodes:
        convolution = convolution_of(node)
        if convolution is not None:
            channel_dim[node] = convolution.channel_dim
        else:
            found = [channel_dim[each] for each in operands(node) if each in channel_dim]
            if found:
                channel_dim[node] = found[0]
    found_roots: dict[fx.Node, int] = {}
    inner: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in channel_dim and node not in inner:
            tree = walk(node, channel_dim[node])
            if tree is not None:
                found_roots[node] = channel_dim[node]
                inner.update(tree.inner)
    return found_roots


def operands(node: fx.Node) -> list[fx.Node]:
    """What an operator that sums, scales or shifts is applied to; nothing for other operators."""
    if is_call(node, operator.getitem) and is_call(node.args[0], BATCH_NORM):
        node = node.all_input_nodes[0]
        return [arguments(node)["input"]]
    if is_call(node, *ARITHMETIC, aten.neg.default):
        nodes = [each for each in node.args[:2] if isinstance(each, fx.Node)]
        # A size of a tensor is a node as well.
        computed = [each for each in nodes if isinstance(value(each), torch.Tensor)]
        return [each for each in computed if constant_of(each) is None]
    return []


def walk(root: fx.Node, dim: int) -> Tree | None:
    """The sum that ends in `root`, or None where it is none."""
    result = value(root)
    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return None
    channels = result.shape[dim] if result.dim() >= -dim else None
    if not isinstance(channels, int) or _read(root, dim, channels) is None:
        return None
    tree = Tree(root, dim, torch.zeros(channels, dtype=torch.float64, device=result.device))
    waiting = [(root, Scale())]
    while waiting:
        node, scale = waiting.pop()
        enters = node is root or (_used_once(node, tree.inner) and tree.like_result(node))
        reading = _read(node, dim, channels) if enters else None
        if reading is None:
            tree.terms.append((node, scale))
            if not enters and operands(node):
                tree.shared.append(node)
            continue
        tree.inner.update(dict.fromkeys(reading.nodes))
        if reading.affine is not None:
            # A Python number lives on the CPU wherever the model is.
            tree.shift += scale.total(reading.affine.shift.to(result.device))
            scale = scale.through(node, reading.affine.scale.to(result.device))
        waiting += [(each, scale.times(factor)) for each, factor in reversed(reading.operands)]
    return tree


def _used_once(node: fx.Node, sums: Iterable[fx.Node]) -> bool:
    """Whether one of the sum's operators takes `node`, once, and nothing else does."""
    user = sole_user(node)
    return user is not None and user in sums and [*user.args].count(node) == 1


def _read(node: fx.Node, dim: int, channels: int) -> Reading | None:
    """An operator that sums, scales or shifts channels in dimension `dim`, or None."""
    given = operands(node)
    if not given or any(value(each).dtype != value(node).dtype for each in given):
        return None
    source = given[0]
    nodes: tuple[fx.Node, ...] = (node,)
    affine = None
    if is_call(node, operator.getitem):
        norm = node.all_input_nodes[0]
        if node.args[1] == 0 and sole_user(norm) is node and value(node).dim() + dim == 1:
            affine, nodes = batch_norm_affine(norm), (norm, node)
    elif is_call(node, aten.neg.default):
        return Reading(nodes, ((source, -1.0),))
    elif len(given) == 1:
        affine = arithmetic_affine(node, source, dim, channels)
    return Reading(nodes, ((source, 1.0),), affine) if isinstance(affine, Affine) else _sum(node)


def _sum(node: fx.Node) -> Reading | None:
    """A sum or difference of two tensors of one dtype, of which one may be a constant."""
    if not is_call(node, *_SUMS):
        return None
    bound = arguments(node)
    given, alpha = (bound["self"], bound["other"]), bound["alpha"]
    tensors = [each for each in given if isinstance(each, fx.Node)]
    dtypes = {getattr(value(each), "dtype", None) for each in tensors}
    if len(tensors) < 2 or dtypes != {value(node).dtype}:
        return None
    if not isinstance(alpha, (int, float)) or alpha == 0:
        return None
    first, second = _SUMS[node.target]
    if node.target is aten.rsub.Tensor:
        return Reading((node,), ((given[0], first * alpha), (given[1], second)))
    return Reading((node,), ((given[0], first), (given[1], second * alpha)))


def _alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether shape and dtype are equal for every input; never specialises a dynamic size."""
    return (
        isinstance(first, torch.Tensor)
        and first.dtype == second.dtype
        and first.dim() == second.dim()
        and all(
            statically_known_true(one == other)
            for one, other in zip(first.shape, second.shape, strict=True)
        )
    )
