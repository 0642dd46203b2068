"""Fold what scales, shifts and pads the input of a convolution into the convolution.

    conv(s x + t, W, b)  =  conv(x, W s, b + sum(W t))         one s and one t an input channel
    conv(pad(x), W, b)   =  conv(x, W, b) with more padding    pad with zeros, alike on both sides

Preprocessing in front of a network is such an s and t: (x - mean) / std. So are batch norm in eval
mode, and `mul`, `div`, `add` and `sub` with a constant that has one number a channel. Three cases:

1. One or several of these behind each other, in front of convolutions (1d, 2d, 3d, transposed,
   grouped) or linear layers: all of it goes into them.
2. Several, in front of a convolution that pads with zeros: a shift in front of it is not there in
   the padding, so it cannot be a number in the bias. The scale goes into the weight, and one
   operator is left:  s x + t = s (x + t / s).  Of (x - mean) / std, x - mean stays.
3. A constant `pad` of zeros becomes padding of the convolution itself.

Guards. Nothing but convolutions reads the result, or it would have to be calculated all the same;
all have their channels in one dimension, and batch norm counts them there. The constants have one
number a channel and change neither dtype nor shape. Weight and bias are constants of real numbers,
and so small or large after folding that their dtype still holds them well. No embedding is tied to
the weight: it would have to be held twice. The model does not write to what is read instead. In
front of a transposed convolution a shift must meet a 1x1 kernel, since otherwise the borders and
the places between strides get less of it, and its padding takes away instead of adding.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optfuse.convolution import (
    ARITHMETIC,
    BATCH_NORM,
    Affine,
    Convolution,
    arithmetic_affine,
    batch_norm_affine,
    convolution_of,
)
from optfuse.folding import Folded, FoldedLayers, fold_input, why_not_held
from optfuse.graph import (
    Edit,
    arguments,
    constant_of,
    describe,
    is_call,
    kind,
    sole_user,
    value,
    written_memory,
)
from optfuse.passes import Match, Pass, Refusal

aten = torch.ops.aten

_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_SUBTRACTIONS = (aten.sub.Tensor, aten.sub.Scalar)
_DIVISIONS = (aten.div.Tensor, aten.div.Scalar)
_WITH_NUMBERS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True)
class Link:
    """One operator of a chain in front of convolutions.

    Attributes:
        node: the call.
        source: what it scales and shifts.
        result: what it gives: the call, or what is picked from it.
    """

    node: fx.Node
    source: fx.Node
    result: fx.Node


@dataclass(frozen=True)
class Shift:
    """The one operator that is left of a chain.

    Attributes:
        target: an addition or a subtraction.
        by: what it adds or subtracts, float64, in a shape that broadcasts.
    """

    target: Any
    by: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FoldAffine(Match):
    """Layers that take in what scales and shifts their input.

    Attributes:
        x: what they read instead.
        shift: what is left in front of them, or None.
    """

    x: fx.Node
    folded: tuple[Folded, ...]
    shift: Shift | None


@dataclass(frozen=True, kw_only=True)
class FoldPad(Match):
    """Convolutions that pad by themselves what was padded for them.

    Attributes:
        x: what they read instead.
        padded: each with its new padding.
    """

    x: fx.Node
    padded: tuple[tuple[Convolution, tuple[int, ...]], ...]


class FoldAffineInput(Pass):
    """conv(s x + t, W, b) = conv(x, W s, b + sum(W t)), and padding likewise; see the module."""

    name = "fold_affine_input"
    equation = (
        "conv(s * x + t, W, b)  =  conv(x, W s, b + sum(W t));  "
        "conv(pad(x), W)  =  conv(x, W) with padding"
    )

    def begin(self, graph: fx.Graph) -> None:
        """Find the memory that the graph writes to, and the weights that not only layers read."""
        self._written = written_memory(graph)
        self._layers = FoldedLayers(graph)

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at the last operator in front of the convolutions."""
        outcome = _match_pad(node) if is_call(node, *_PADS) else self._match_chain(node)
        if isinstance(outcome, (FoldAffine, FoldPad)) and outcome.x in self._written:
            outcome = Refusal("the model writes to the memory of its input")
        if isinstance(outcome, Refusal):
            last = _link(node)
            readers = _readers(node if last is None else last.result)
            return replace(outcome, about=tuple(reader.node for reader in readers))
        return outcome

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """The same layers with other constants or more padding, reading what was in front."""
        if isinstance(match, FoldPad):
            return {layer.node: _pad(edit, match, layer, by) for layer, by in match.padded}
        assert isinstance(match, FoldAffine)
        x, chain = match.x, match.nodes[: match.anchor + 1]
        if match.shift is not None:
            edit.before(match.nodes[match.anchor], chain)
            x = _shifted(edit, x, match.shift)
        return {
            (old := folded.convolution.node): self._layers.call(edit, folded, x, (*chain, old))
            for folded in match.folded
        }

    def _match_chain(self, node: fx.Node) -> FoldAffine | Refusal | None:
        last = _link(node)
        readers = [] if last is None else _readers(last.result)
        if last is None or not readers:
            return None
        reason = _why_not_read_alone(last.result, readers)
        if reason:
            return Refusal(reason)
        first = readers[0]
        if any(reader.channel_dim != first.channel_dim for reader in readers):
            return Refusal("the layers behind it have their channels in different dimensions")
        if constant_of(first.weight) is None:
            return Refusal("the weight is not a constant")
        chain = _chain(last, first)
        if chain is None or isinstance(chain, str):
            return None if chain is None else Refusal(chain)
        links, affine = chain
        blocking = next((each for each in readers if each.why_no_shift()), None)
        if blocking is None or not bool((affine.shift != 0).any()):
            return self._fold(links, readers, affine, None)
        if len(links) == 1:
            return Refusal(f"{describe(blocking.node)} {blocking.why_no_shift()}")
        shift = _remaining(links[0], affine, first)
        if isinstance(shift, str):
            return Refusal(shift)
        scale = Affine(affine.scale, torch.zeros_like(affine.shift))
        return self._fold(links, readers, scale, shift)

    def _fold(
        self,
        links: Sequence[Link],
        readers: Sequence[Convolution],
        affine: Affine,
        shift: Shift | None,
    ) -> FoldAffine | Refusal:
        all_folded: list[Folded] = []
        for reader in readers:
            folded = fold_input(reader, affine)
            reason = folded if isinstance(folded, str) else self._layers.why_held(folded)
            if reason:
                return Refusal(reason)
            assert isinstance(folded, Folded)
            all_folded.append(folded)
        chain = tuple(dict.fromkeys(node for link in links for node in (link.result, link.node)))
        note = f"{_words(kind(link.node) for link in links)} folded into {_names(readers)}"
        if shift is not None:
            note += (
                f", but for its shift, which stays as one {shift.target.overloadpacket.__name__}"
            )
        return FoldAffine(
            nodes=(*chain, *(reader.node for reader in readers)),
            anchor=len(chain) - 1,
            note=note,
            x=links[0].source,
            folded=tuple(all_folded),
            shift=shift,
        )


def _readers(node: fx.Node) -> list[Convolution]:
    """The layers that take `node` as their input, and as nothing else."""
    found = []
    for user in node.users:
        layer = convolution_of(user)
        if layer is not None and layer.x is node and node not in (layer.weight, layer.bias):
            found.append(layer)
    return found


def _why_not_read_alone(node: fx.Node, readers: Sequence[Convolution]) -> str | None:
    """None where the layers alone see the result of `node`, else the reason as a clause."""
    layers = [reader.node for reader in readers]
    other = next((user for user in node.users if user not in layers), None)
    if other is None:
        return None
    if other.op == "output":
        return f"the result of {describe(node)} is also an output of the model"
    return f"{describe(other)} also reads the result of {describe(node)}"


# Cases 1 and 2: scales and shifts -----------------------------------------------------------------


def _link(node: fx.Node) -> Link | None:
    """The link of a chain that `node` calls, or None."""
    if is_call(node, BATCH_NORM):
        picked = sole_user(node)
        if picked is None or not is_call(picked, operator.getitem) or picked.args[1] != 0:
            return None
        return Link(node, arguments(node)["input"], picked)
    if not is_call(node, *ARITHMETIC):
        return None
    operands = node.args[:2]
    computed = [each for each in operands if isinstance(each, fx.Node) and each.op != "get_attr"]
    # A constant divided by x is not linear in x.
    if len(computed) != 1 or (node.target in _DIVISIONS and operands[1] is computed[0]):
        return None
    return Link(node, computed[0], node)


def _link_giving(node: fx.Node) -> Link | None:
    call = node.args[0] if is_call(node, operator.getitem) else node
    assert isinstance(call, fx.Node)
    link = _link(call)
    return link if link is not None and link.result is node else None


def _chain(last: Link, layer: Convolution) -> tuple[list[Link], Affine] | str | None:
    """The links that end in `last`, and what they do together to the channels of `layer`; a clause
    where `last` does something else to them, None where it has nothing to do with constants."""
    affine = _affine(last, layer)
    if not isinstance(affine, Affine):
        return affine
    links = [last]
    while (link := _link_giving(links[-1].source)) is not None:
        above = _affine(link, layer)
        if sole_user(link.result) is not links[-1].node or not isinstance(above, Affine):
            break
        affine = Affine(affine.scale * above.scale, affine.scale * above.shift + affine.shift)
        links.append(link)
    return links[::-1], affine


def _affine(link: Link, layer: Convolution) -> Affine | str | None:
    source, result = value(link.source), value(link.result)
    if link.result is not link.node:
        channels = result.dim() + layer.channel_dim
        if channels != 1:
            return (
                "the batch norm runs over dimension 1, the layer's channels are in dimension "
                f"{channels}"
            )
        return batch_norm_affine(link.node)
    affine = arithmetic_affine(link.node, link.source, layer.channel_dim, layer.in_channels)
    if isinstance(affine, Affine) and not _same_shape(source, result):
        return f"the constant of {kind(link.node)} makes the result larger"
    return affine


def _remaining(first: Link, affine: Affine, layer: Convolution) -> Shift | str:
    """The t / s of s x + t = s (x + t / s), as the addition or subtraction that stays, or why there
    is none as a clause."""
    by = affine.shift / affine.scale
    reason = why_not_held("shift", by, value(first.source).dtype)
    if reason is not None:
        return reason
    by = by.reshape(-1, *[1] * (-1 - layer.channel_dim))
    if first.node.target in _SUBTRACTIONS and first.node.args[0] is first.source:
        return Shift(aten.sub.Tensor, -by)
    return Shift(aten.add.Tensor, by)


def _shifted(edit: Edit, x: fx.Node, shift: Shift) -> fx.Node:
    constant = edit.constant(f"{x.name}_shift_folded", shift.by, value(x).dtype)
    return edit.call(shift.target, x, constant)


def _same_shape(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dim() == second.dim() and all(
        statically_known_true(one == other)
        for one, other in zip(first.shape, second.shape, strict=True)
    )


# Case 3: padding ----------------------------------------------------------------------------------


def _match_pad(node: fx.Node) -> FoldPad | Refusal | None:
    bound = arguments(node)
    readers = [reader for reader in _readers(node) if not reader.linear]
    if not readers or bound.get("mode", "constant") != "constant":
        return None
    reason = _why_not_read_alone(node, readers) or _why_no_padding(bound["pad"], bound["value"])
    if reason:
        return Refusal(reason)
    padded = []
    for reader in readers:
        by = _padding(bound["pad"], reader)
        if isinstance(by, str):
            return Refusal(by)
        padded.append((reader, by))
    return FoldPad(
        nodes=(node, *(reader.node for reader in readers)),
        anchor=0,
        note=f"{kind(node)} folded into {_names(readers)}",
        x=bound["self"],
        padded=tuple(padded),
    )


def _why_no_padding(amounts: Sequence[Any], filled_with: float | None) -> str | None:
    """None where the padding is one of zeros, and known; else the reason as a clause."""
    if filled_with:
        return f"it pads with {filled_with}, and a convolution pads with zeros"
    if not all(isinstance(amount, int) for amount in amounts):
        return "how much it pads is known only when it runs"
    if min(amounts) < 0:
        return f"it pads by {min(amounts)}, which cuts off"
    return None


def _padding(amounts: Sequence[int], layer: Convolution) -> tuple[int, ...] | str:
    """The layer's padding together with this one, which is given from the last dimension on, before
    and behind in turn; or why it is none, as a clause."""
    if layer.transposed:
        return f"the padding of {describe(layer.node)}, which is transposed, takes away"
    if any(amounts[2 * layer.spatial :]):
        return "it pads more dimensions than the convolution does"
    if layer.padding is None:
        return f"{describe(layer.node)} itself pads one side more than the other"
    padding = list(layer.padding)
    for last, (before, behind) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), 1):
        if before != behind:
            dim = value(layer.x).dim() - last
            return (
                f"it pads dimension {dim} by {before} before and {behind} behind, and a "
                "convolution pads both sides alike"
            )
        if last <= layer.spatial:
            padding[-last] += before
    return tuple(padding)


def _pad(edit: Edit, match: FoldPad, layer: Convolution, padding: Iterable[int]) -> fx.Node:
    edit.before(layer.node, (match.nodes[0], layer.node))
    settings = [list(layer.stride), list(padding), list(layer.dilation), layer.groups]
    target = _WITH_NUMBERS[layer.spatial]
    return edit.call(target, match.x, layer.weight, layer.bias, *settings)


def _names(layers: Iterable[Convolution]) -> str:
    return _words(describe(layer.node) for layer in layers)


def _words(words: Iterable[str]) -> str:
    *some, last = words
    return f"{', '.join(some)} and {last}" if some else last
