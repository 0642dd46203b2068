"""Merge parallel branches that are summed, and convolutions behind each other, into one.

    s1 conv(x, W1, b1) + s2 conv(x, W2, b2) + s3 x + t  =  conv(x, W, b)
    conv(conv(x, W1, b1), W2, b2)                       =  conv(x, W2 o W1, W2 b1 + b2)

1. A sum is a tree of `add`, `sub`, `neg`, and of what scales and shifts channels (batch norm, and
   arithmetic with one number a channel), in which each partial sum is used by the next alone. So
   every convolution at its leaves counts with a factor s a channel, and so does x itself, an
   identity branch with or without a batch norm of its own: that is a depthwise 1x1 kernel. All
   shifts add up to t. RepVGG, MobileOne, RepGhost, ACNet, FastViT and LoRA are such sums; what else
   is added stays added. So does a branch that would cost more in one with the others.
2. A convolution behind a convolution, with nothing in between, and a linear layer behind a linear
   layer. A branch of a sum may be such a pair.

Kernels meet where they read: tap k of a convolution reads x at  stride o + dilation k - padding,
whatever its size. The merged kernel has the union of the offsets  dilation k - padding  on the
widest grid that holds them all, and as many groups as divide those of each (zeros fill in what was
apart). A pair has the sums of the offsets, those of the second one times the first one's stride.

Guards. FLOPs: the merged convolution takes no more multiply-adds than what it stands for, x itself
and elementwise operators counted as none (a depthwise kernel beside a dense one, or a bottleneck,
would). In a sum: equal strides; all transposed or none (a 1x1 with stride 1 is either). In a pair:
where the second one pads, zeros must be what the first one would give out there, so that it has no
bias, and is 1x1 or itself pads by its whole reach; a transposed one only beside a 1x1. Always:
constant weights and biases; nothing else sees what vanishes; one dtype, of real numbers, in which
the merged numbers are finite; equal shapes; a padding that a convolution can be given. Pooling is
not taken for a convolution, although average pooling could be.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from optfuse.convolution import Convolution, convolution_of
from optfuse.graph import Edit, constant_of, describe, value, why_not_sole_user
from optfuse.kernels import Axis, Kernel, Layout, by, kernel_of, layout_of
from optfuse.passes import Match, Pass, Refusal
from optfuse.sums import Scale, Tree, operands, roots, walk

aten = torch.ops.aten

_CONVOLUTIONS = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}
_TRANSPOSED = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}


# Branches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """A linear function of x: a convolution, two behind each other, or x itself (no convolution).

    Attributes:
        convolutions: the last one first.
        layout: what it takes as one convolution.
        cost: multiply-adds for each position, as it is.
        scale: what its result counts with, shape (channels,).
        leaf: the node that stands in the sum; several terms may be that node.
        terms: how many.
    """

    convolutions: tuple[Convolution, ...]
    layout: Layout
    cost: Fraction
    scale: torch.Tensor
    leaf: fx.Node
    terms: int = 1

    def kernel(self) -> Kernel:
        """Its numbers."""
        if not self.convolutions:
            weight = self.scale.reshape(-1, *[1] * (2 + len(self.layout.axes)))
            return Kernel(self.layout, weight, torch.zeros_like(self.scale))
        last, *before = map(kernel_of, self.convolutions)
        for each in before:
            last = last.behind_of(each, self.layout)
        return last.scaled(self.scale)


@dataclass(frozen=True)
class Group:
    """Branches on one tensor that become one convolution.

    Attributes:
        cost: multiply-adds for each position, as one where there are several.
    """

    branches: tuple[Branch, ...]
    layout: Layout
    cost: Fraction

    def with_branch(self, branch: Branch) -> Group | str:
        """This group and one branch more, or why not."""
        names = f"{describe(self.branches[0].leaf)} and {describe(branch.leaf)}"
        layout = self.layout.beside(branch.layout)
        if isinstance(layout, str):
            return f"{names} cannot be one: {layout}"
        together = self.cost + branch.cost
        if layout.weights > together:
            return f"{names} in one would take {_against(layout.weights, together)}"
        return Group((*self.branches, branch), layout, Fraction(layout.weights))

    @property
    def convolutions(self) -> list[Convolution]:
        """All of them."""
        return [each for branch in self.branches for each in branch.convolutions]

    @property
    def terms(self) -> int:
        """How many terms of the sum it stands for."""
        return sum(branch.terms for branch in self.branches)

    def kernel(self) -> Kernel:
        """The sum of the branches' numbers."""
        weights, biases = [], []
        for kernel in (branch.kernel() for branch in self.branches):
            weights.append(kernel.layout.spread(kernel.weight, self.layout))
            biases.append(kernel.bias)
        return Kernel(self.layout, sum(weights[1:], weights[0]), sum(biases[1:], biases[0]))


def _convolution_branch(
    convolution: Convolution, users: Iterable[fx.Node], scale: torch.Tensor
) -> Branch | str:
    """A convolution that the operators `users` alone see, or why it is none."""
    node = convolution.node
    other = next((user for user in node.users if user not in users), None)
    reason = _why_not_constant(convolution)
    if other is not None:
        reason = why_not_sole_user(node, other)
    if reason is not None:
        return reason
    layout = layout_of(convolution)
    return Branch((convolution,), layout, Fraction(layout.weights), scale, node)


def _why_not_constant(convolution: Convolution) -> str | None:
    name = describe(convolution.node)
    if constant_of(convolution.weight) is None:
        return f"the weight of {name} is not a constant"
    if convolution.bias is not None and constant_of(convolution.bias) is None:
        return f"the bias of {name} is not a constant"
    return None


def _identity_branch(x: fx.Node, like: Layout, scales: Sequence[torch.Tensor]) -> Branch:
    """x itself, seen as a depthwise 1x1 kernel for the dimensions that `like` has."""
    channels = len(scales[0])
    layout = Layout(channels, channels, channels, tuple(Axis() for _ in like.axes), False)
    return Branch((), layout, Fraction(0), sum(scales[1:], scales[0]), x, len(scales))


def _pair(inner: Convolution, outer: Branch) -> Branch | str:
    """The convolution of a branch and the one it reads as one branch, or why they cannot be."""
    (last,) = outer.convolutions
    reason = why_not_sole_user(inner.node, last.node) or _why_not_constant(inner)
    if reason is not None:
        return reason
    first = layout_of(inner)
    layout = outer.layout.behind_of(first)
    reason = layout if isinstance(layout, str) else _why_not_padded(inner, outer.layout)
    if isinstance(layout, str) or reason is not None:
        return f"it and {describe(inner.node)} cannot be one: {reason}"
    return replace(
        outer,
        convolutions=(last, inner),
        layout=layout,
        cost=_cost_of_pair(inner, last, first, outer.layout),
    )


def _why_not_padded(inner: Convolution, outer: Layout) -> str | None:
    """Why what `inner` would give beyond its result is not what `outer` takes to be there."""
    bias = constant_of(inner.bias)
    biased = bias is not None and bool((bias != 0).any())
    if outer.transposed:
        uneven = biased and not outer.pointwise
        return "a transposed one does not spread the bias of the first evenly" if uneven else None
    padded = [axis.before > 0 or axis.after > 0 for axis in outer.axes]
    if biased and any(padded):
        return "the second pads with zeros, where the first would have its bias"
    for axis, is_padded in zip(layout_of(inner).axes, padded, strict=True):
        if is_padded and axis.span > min(axis.before, axis.after):
            return "the second pads with zeros, where the first would still reach its input"
    return None


def _cost_of_pair(
    inner: Convolution, outer: Convolution, first: Layout, second: Layout
) -> Fraction:
    """Multiply-adds of two convolutions for each position of both in one, at the least."""
    before = inner.x if first.transposed else inner.node
    behind = outer.x if second.transposed else outer.node
    here = before if first.transposed else behind
    # Beside a transposed one the other is 1x1, so that one of the two lies between the positions.
    between = first.axes if first.transposed else second.axes
    shares = [_share(node, here, between) for node in (before, behind)]
    return first.weights * shares[0] + second.weights * shares[1]


def _share(node: fx.Node, here: fx.Node, between: Sequence[Axis]) -> Fraction:
    """How many positions `node` has at least for each one of `here`, which `between` leads to."""
    share = Fraction(1)
    for dim, axis in enumerate(reversed(between), start=1):
        size, other = (value(each).shape[-dim] for each in (node, here))
        if isinstance(size, int) and isinstance(other, int):
            share *= Fraction(size, other)
        elif node is not here and axis.before + axis.after > axis.span:
            share *= 0  # it gives more than it is given, by how much is not known
    return share


# The pass -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """A new convolution on `x` in place of others; its names and dtype are those of `like`."""

    nodes: tuple[fx.Node, ...]
    x: fx.Node
    kernel: Kernel
    like: Convolution


@dataclass(frozen=True)
class Rest:
    """Terms that stay: the sum of the nodes, each times its factor, then times the scale.

    Attributes:
        scale: one number a channel, in a shape that broadcasts to the result, and then the first
            factor is 1; None for ones.
    """

    terms: tuple[tuple[fx.Node, float], ...]
    scale: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Merge(Match):
    """Convolutions that become fewer, and what is added to them."""

    merged: tuple[Merged, ...]
    rest: tuple[Rest, ...] = ()


class MergeBranches(Pass):
    """A sum of linear branches on x, or two of them behind each other, are one; see the module."""

    name = "merge_branches"
    equation = (
        "s1 conv(x, W1) + s2 conv(x, W2) + s3 x + t  =  conv(x, W, t);  "
        "conv(conv(x, W1), W2)  =  conv(x, W2 W1)"
    )

    def __init__(self, options: frozenset[str] = frozenset()) -> None:
        super().__init__(options)
        self._roots: dict[fx.Node, int] = {}
        self._made: dict[str, list[fx.Node]] = {}

    def begin(self, graph: fx.Graph) -> None:
        """Find where the sums end: a part of one is no place of its own."""
        self._roots = roots(graph)
        self._made = {}

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at the last operator of a sum, or at the second of two convolutions."""
        if node in self._roots:
            return _match_sum(node, self._roots[node])
        outer = convolution_of(node)
        inner = None if outer is None else convolution_of(outer.x)
        return None if outer is None or inner is None else _match_pair(inner, outer)

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """The new convolutions, and the sum of them and of what is left."""
        assert isinstance(match, Merge)
        root, gone = match.nodes[match.anchor], {n for each in match.merged for n in each.nodes}
        sums = [node for node in match.nodes if node not in gone]
        made = []
        for each in match.merged:
            edit.before(root, (*each.nodes, *sums))
            made.append(self._convolution(edit, each))
        edit.before(root, match.nodes)
        total, *more = made
        for part in more:
            total = _add(edit, total, part, 1.0)
        for rest in match.rest:
            total = self._add_rest(edit, total, rest)
        return {root: total}

    def _convolution(self, edit: Edit, merged: Merged) -> fx.Node:
        dtype = value(merged.like.weight).dtype
        layer = re.sub(r"[._]?weight(_\w+)?$", "", str(merged.like.weight.target))
        kernel, layout = merged.kernel, merged.kernel.layout
        weight = self._constant(edit, f"{layer}_weight_merged", kernel.held(), dtype)
        bias = None
        if bool((kernel.bias != 0).any()):
            bias = self._constant(edit, f"{layer}_bias_merged", kernel.bias, dtype)
        if merged.like.linear:
            return edit.call(aten.linear.default, merged.x, weight, bias)
        target, settings = _settings(layout)
        return edit.call(target, merged.x, weight, bias, *settings)

    def _constant(self, edit: Edit, name: str, data: torch.Tensor, dtype: torch.dtype) -> fx.Node:
        """A new constant, made once for a block that runs on several tensors."""
        made = self._made.setdefault(name, [])
        for node in made:
            known = None if node._erased else constant_of(node)
            if known is not None and torch.equal(known, data):
                return node
        made.append(edit.constant(name, data, dtype))
        return made[-1]

    def _add_rest(self, edit: Edit, total: fx.Node, rest: Rest) -> fx.Node:
        if rest.scale is None:
            for node, factor in rest.terms:
                total = _add(edit, total, node, factor)
            return total
        (part, _), *more = rest.terms
        for node, factor in more:
            part = _add(edit, part, node, factor)
        scale = self._constant(edit, f"{part.name}_scale_merged", rest.scale, value(total).dtype)
        return _add(edit, total, edit.call(aten.mul.Tensor, part, scale), 1.0)


def _add(edit: Edit, total: fx.Node, node: fx.Node, factor: float) -> fx.Node:
    if factor == -1.0:
        return edit.call(aten.sub.Tensor, total, node)
    alpha = {} if factor == 1.0 else {"alpha": factor}
    return edit.call(aten.add.Tensor, total, node, **alpha)


def _settings(layout: Layout) -> tuple[Any, Sequence[object]]:
    """The operator for a layout, and its arguments behind the bias."""
    axes = layout.axes
    stride, dilation = [axis.stride for axis in axes], [axis.dilation for axis in axes]
    if layout.transposed:
        output_padding = [axis.before - axis.after for axis in axes]
        settings = [stride, layout.padding, output_padding, layout.groups, dilation]
        return _TRANSPOSED[len(axes)], settings
    overload = "padding" if layout.padding == "same" else "default"
    settings = [stride, layout.padding, dilation, layout.groups]
    return getattr(_CONVOLUTIONS[len(axes)], overload), settings


def _match_sum(root: fx.Node, dim: int) -> Merge | Refusal | None:
    # What the sum reads may have been replaced since `begin`, so it is walked again.
    tree = walk(root, dim)
    if tree is None:
        return None
    found = _branches(tree)
    reasons: list[str] = []
    groups: list[Group] = []
    for branches in found.values():
        # A lone branch is no place that looks like a match.
        if sum(1 if isinstance(each, str) else each.terms for each in branches) > 1:
            reasons += [each for each in branches if isinstance(each, str)]
            groups += _grouped([each for each in branches if isinstance(each, Branch)], reasons)
    reasons += _why_shared(tree, found)
    outcome = _merge(tree, groups) if groups else Refusal(reasons[0]) if reasons else None
    return replace(outcome, about=_held_in(tree)) if isinstance(outcome, Refusal) else outcome


def _held_in(tree: Tree) -> tuple[fx.Node, ...]:
    """The convolutions that are added up."""
    inside = [each for node in tree.shared for each in operands(node)]
    candidates = dict.fromkeys((*(node for node, _ in tree.terms), *inside))
    return tuple(node for node in candidates if convolution_of(node) is not None)


def _branches(tree: Tree) -> dict[fx.Node, list[Branch | str]]:
    """For each tensor that convolutions of the sum read, the branches on it, or why they are none;
    x itself comes last."""
    scales: dict[fx.Node, list[torch.Tensor]] = {}
    for node, scale in tree.terms:
        if tree.like_result(node):
            scales.setdefault(node, []).append(scale.total(tree.ones))
    found: dict[fx.Node, list[Branch | str]] = {}
    for node, each in scales.items():
        convolution = convolution_of(node)
        if convolution is not None and convolution.channel_dim == tree.dim:
            branch = _convolution_branch(convolution, tree.inner, sum(each[1:], each[0]))
            if isinstance(branch, Branch):
                branch = replace(branch, terms=len(each))
            found.setdefault(convolution.x, []).append(branch)
    _pair_up(found)
    for x, branches in found.items():
        if x in scales:
            like = next((each.layout for each in branches if isinstance(each, Branch)), None)
            if like is not None:
                branches.append(_identity_branch(x, like, scales[x]))
    return found


def _pair_up(found: dict[fx.Node, list[Branch | str]]) -> None:
    """Take a branch that reads a convolution's result as one on what that one reads, where there
    are others on it."""
    for x in list(found):
        inner = convolution_of(x)
        (branch, *others) = found[x]
        if inner is None or inner.x not in found or others or isinstance(branch, str):
            continue
        pair = _pair(inner, branch)
        if isinstance(pair, Branch):
            found[inner.x].append(pair)
            del found[x]


def _grouped(branches: Sequence[Branch], reasons: list[str]) -> list[Group]:
    """Groups of branches on one tensor that become one each. The costliest branch comes first: its
    kernel is the likeliest to have room for the others."""
    groups: list[Group] = []
    for branch in sorted(branches, key=lambda each: -each.cost):
        refused: list[str] = []
        for index, group in enumerate(groups):
            grown = group.with_branch(branch)
            if isinstance(grown, Group):
                groups[index] = grown
                break
            refused.append(grown)
        else:
            reasons += refused[:1]
            groups.append(Group((branch,), branch.layout, branch.cost))
    return [group for group in groups if group.convolutions and group.terms > 1]


def _why_shared(tree: Tree, found: Mapping[fx.Node, object]) -> Iterator[str]:
    """Why partial sums that hold a convolution on one of these tensors are not taken apart."""
    for node in tree.shared:
        held = [convolution_of(each) for each in operands(node)]
        if any(convolution is not None and convolution.x in found for convolution in held):
            user = next(user for user in node.users if user in tree.inner)
            reason = why_not_sole_user(node, user)
            if reason is not None:
                yield reason


def _merge(tree: Tree, groups: Sequence[Group]) -> Merge | Refusal:
    kernels = [group.kernel() for group in groups]
    kernels[0] = replace(kernels[0], bias=kernels[0].bias + tree.shift)
    rest = _rest(tree, {branch.leaf for group in groups for branch in group.branches})
    scales = [each.scale for each in rest if each.scale is not None]
    reason = _why_not_finite(kernels, scales, value(tree.root).dtype)
    if reason is not None:
        return Refusal(reason)
    merged = tuple(map(_merged, groups, kernels))
    notes = [
        f"{group.terms} branches on {describe(each.x)} into {_name(each)}"
        for group, each in zip(groups, merged, strict=True)
    ]
    vanished = [each.node for group in groups for each in group.convolutions]
    sums = [node for node in tree.inner if node is not tree.root]
    return Merge(
        nodes=(*vanished, *sums, tree.root), note=", ".join(notes), merged=merged, rest=rest
    )


def _rest(tree: Tree, gone: Container[fx.Node]) -> tuple[Rest, ...]:
    """The terms that are not in `gone`, those together that are scaled by one operator."""
    scaled: dict[fx.Node | None, list[tuple[fx.Node, Scale]]] = {}
    for node, scale in tree.terms:
        if node not in gone:
            scaled.setdefault(scale.by, []).append((node, scale))
    shape = (-1, *[1] * (-1 - tree.dim))
    rest = []
    for terms in scaled.values():
        first = terms[0][1]
        # The first term of those that are scaled counts once, so that it needs no operator.
        unit = 1.0 if first.vector is None else first.factor
        factors = tuple((node, scale.factor / unit) for node, scale in terms)
        rest.append(
            Rest(factors, None if first.vector is None else first.total(tree.ones).reshape(shape))
        )
    return tuple(rest)


def _match_pair(inner: Convolution, outer: Convolution) -> Merge | Refusal | None:
    alike = (inner.linear, inner.channel_dim) == (outer.linear, outer.channel_dim)
    if not alike or not value(outer.node).is_floating_point():
        return None
    ones = torch.ones(outer.out_channels, dtype=torch.float64, device=value(outer.weight).device)
    branch = _convolution_branch(outer, outer.node.users, ones)
    pair = branch if isinstance(branch, str) else _pair(inner, branch)
    if isinstance(pair, str):
        return Refusal(pair, about=(inner.node,))
    if pair.layout.weights > pair.cost:
        costs = _against(pair.layout.weights, pair.cost)
        costly = f"it and {describe(inner.node)} in one would take {costs}"
        return Refusal(costly, about=(inner.node,))
    group = Group((pair,), pair.layout, pair.cost)
    kernel = group.kernel()
    reason = _why_not_finite([kernel], [], value(outer.node).dtype)
    if reason is not None:
        return Refusal(reason, about=(inner.node,))
    merged = _merged(group, kernel)
    return Merge(
        nodes=(inner.node, outer.node),
        note=f"it and {describe(inner.node)} into {_name(merged)}",
        merged=(merged,),
    )


def _merged(group: Group, kernel: Kernel) -> Merged:
    # The first branch is the costliest, so there is a convolution in it.
    convolutions = group.branches[0].convolutions
    nodes = tuple(each.node for each in group.convolutions)
    return Merged(nodes, convolutions[-1].x, kernel, convolutions[0])


def _why_not_finite(
    kernels: Iterable[Kernel], scales: Iterable[torch.Tensor], dtype: torch.dtype
) -> str | None:
    numbers = [("scale", scale) for scale in scales]
    for kernel in kernels:
        numbers += [("weight", kernel.weight), ("bias", kernel.bias)]
    for what, number in numbers:
        if not bool(torch.isfinite(number.to(dtype)).all()):
            return f"the merged {what} is not finite in {str(dtype).removeprefix('torch.')}"
    return None


def _against(merged: int, apart: Fraction) -> str:
    # Rounded down, so that the two differ as they are printed.
    return f"{merged:,} multiply-adds a position, and on their own they take {int(apart):,}"


def _name(merged: Merged) -> str:
    if merged.like.linear:
        return "one linear layer"
    layout = merged.kernel.layout
    transposed = "transposed " if layout.transposed else ""
    return f"one {transposed}{by([axis.size for axis in layout.axes])} convolution"
