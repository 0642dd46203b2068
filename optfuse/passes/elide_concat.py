"""Take out concats, splits and slices that only carry numbers to and fro along one dimension.

    cat(split(x)) = x        split(cat(a, b)) = [a, b]        cat(cat(a, b), c) = cat(a, b, c)

1. Nested concats along one dimension become one, where the outer one alone sees the inner one.
2. Pieces that a concat puts back beside each other as they were are joined: all pieces of a tensor
   are that tensor, and a run of them is one slice, or a split into fewer pieces where the others
   are in use. A piece is a result of a split or a slice, and a slice of a slice is one too.
3. A split or slice of a concat takes the concat's inputs: an input as it is, a part of an input,
   or a concat of some of the inputs.
4. With `partial`, a 1x1 convolution or linear layer on a concat runs on each input and is summed:

       conv(cat(a, b), [W1, W2], b)  =  conv(a, W1, b) + conv(b, W2)

   It moves no numbers, but adds an addition an input; whether that is faster depends on the engine.

Guards: the number of operators never rises (but for `partial`), so that a rewrite cannot cost more
than it saves; sizes along the dimension are known, and sizes in other dimensions do not matter;
the concat does not convert its inputs; nothing in the graph writes to the memory in which the
result would lie, since a concat is a copy and a slice is a view.

Each rewrite leaves fewer operators, or as many with fewer of them in a row, or as many with fewer
inputs; so it comes to an end.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from optfuse.convolution import Convolution, convolution_of
from optfuse.graph import (
    Edit,
    constant_of,
    describe,
    is_call,
    sole_user,
    value,
    why_not_sole_user,
)
from optfuse.passes import Match, Pass, Refusal
from optfuse.routing import (
    Concat,
    Piece,
    Run,
    Split,
    concat_of,
    flatten,
    runs_of,
    slice_of,
    split_of,
    storage,
)

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Route(Match):
    """Results that are put together from pieces of other tensors.

    Attributes:
        routes: old result -> the pieces that are its concat along `dim`.
    """

    dim: int
    routes: Mapping[fx.Node, tuple[Piece, ...]]


@dataclass(frozen=True)
class Group:
    """Neighbouring results of a split that a new split gives as one.

    Attributes:
        piece: what they are together.
        firsts: the `getitem` nodes of the first of them.
        picks: the `getitem` nodes of all of them.
    """

    piece: Piece
    firsts: tuple[fx.Node, ...]
    picks: tuple[fx.Node, ...]

    def with_next(self, piece: Piece, picks: tuple[fx.Node, ...]) -> Group:
        """The group with one more result."""
        both = Piece(piece.source, piece.dim, self.piece.start, piece.stop)
        return Group(both, self.firsts, (*self.picks, *picks))


@dataclass(frozen=True, kw_only=True)
class Regroup(Match):
    """A split into fewer pieces, since concats put some of them back together.

    Attributes:
        split, concats: these.
        groups: the results of the new split.
    """

    split: Split
    concats: tuple[Concat, ...]
    groups: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True)
class Partial(Match):
    """Convolutions on a concat that become sums of convolutions on its inputs."""

    concat: Concat
    layers: tuple[Convolution, ...]


class ElideConcat(Pass):
    """cat(split(x)) = x, split(cat(a, b)) = [a, b], cat(cat(a, b), c) = cat(a, b, c); see the
    module."""

    name = "elide_concat"
    equation = "cat(split(x)) = x;  split(cat(a, b)) = [a, b];  cat(cat(a, b), c) = cat(a, b, c)"
    OPTIONS = {"partial": "a 1x1 convolution on a concat becomes a sum of convolutions"}

    def __init__(self, options: frozenset[str] = frozenset()) -> None:
        super().__init__(options)
        self._written: set[fx.Node] = set()

    def begin(self, graph: fx.Graph) -> None:
        """Find the memory that the graph writes to."""
        self._written = {
            storage(node.args[0])
            for node in graph.nodes
            if getattr(getattr(node.target, "_schema", None), "is_mutable", False)
            and isinstance(node.args[0], fx.Node)
        }

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at every concat, split and slice."""
        outcome = self._match(node)
        if isinstance(outcome, Match) and self._written:
            for source in _sources(outcome):
                if storage(source) in self._written:
                    return Refusal(f"the model writes to {describe(storage(source))}")
        return outcome

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """The same results with fewer operators (or, with `partial`, without the concat)."""
        if isinstance(match, Partial):
            return _sum_of_parts(edit, match)
        if isinstance(match, Regroup):
            return _regroup(edit, match)
        assert isinstance(match, Route)
        return {old: _put_together(edit, pieces, match.dim) for old, pieces in match.routes.items()}

    def _match(self, node: fx.Node) -> Match | Refusal | None:
        concat = concat_of(node)
        if concat is not None:
            outcome = _match_concat(concat)
            if "partial" in self.options and not isinstance(outcome, Match):
                return _match_partial(concat) or outcome
            return outcome
        split = split_of(node)
        if split is not None:
            return _match_split(split)
        piece = slice_of(node)
        if piece is not None:
            return _through_concat(node, piece.source, piece.dim, {(node,): piece})
        return None


def _sources(match: Match) -> Iterator[fx.Node]:
    """The tensors whose memory the new results may share."""
    if isinstance(match, Route):
        yield from (piece.source for pieces in match.routes.values() for piece in pieces)
    elif isinstance(match, Regroup):
        yield match.split.source


# Cases 1 and 2: a concat of concats and pieces.


def _match_concat(concat: Concat) -> Match | Refusal | None:
    user = sole_user(concat.node)
    outer = concat_of(user)
    if outer is not None and outer.dim == concat.dim:
        return None  # the outermost concat takes in all within it at once
    inputs, nested = flatten(concat)
    runs = list(runs_of(inputs, concat.dim))
    joined = _worth_joining(runs, {concat.node, *nested}, Counter(inputs))
    if not joined and not nested:
        return _refuse_concat(concat, runs)
    pieces = [
        piece
        for run in runs
        for piece in ([run.piece] if run in joined else _wholes(run.inputs, concat.dim))
    ]
    return Route(
        nodes=(concat.node, *nested),
        anchor=0,
        note=_note(nested, joined),
        dim=concat.dim,
        routes={concat.node: tuple(pieces)},
    )


def _worth_joining(
    runs: Sequence[Run], gone: set[fx.Node], uses: Mapping[fx.Node, int]
) -> list[Run]:
    """The runs whose joining leaves no more operators than there were.

    Args:
        gone: the concats that read the inputs and go away.
        uses: how often each input stands in these concats.
    """

    def saves(run: Run) -> bool:
        if run.piece.whole or len(runs) == 1:
            return True  # no slice is needed, or it stands for the concat
        unused = {node for node in run.inputs if uses[node] == 1 and gone.issuperset(node.users)}
        cuts = {node.args[0] if is_call(node, operator.getitem) else node for node in unused}
        # The slice that takes the run's place is one operator, so one must go.
        return any(
            isinstance(cut, fx.Node) and (cut in unused or unused.issuperset(cut.users))
            for cut in cuts
        )

    return [run for run in runs if len(run.inputs) > 1 and saves(run)]


def _refuse_concat(concat: Concat, runs: Iterable[Run]) -> Refusal | None:
    for tensor in concat.tensors:
        inner = concat_of(tensor)
        if inner is not None and inner.dim == concat.dim:
            return Refusal(f"the concat inside it stays: {why_not_sole_user(tensor, concat.node)}")
    for run in runs:
        if len(run.inputs) > 1:
            return Refusal(
                f"joining {len(run.inputs)} of its pieces of {describe(run.piece.source)} would "
                "add an operator, since they have other users"
            )
    return None


def _wholes(inputs: Iterable[fx.Node], dim: int) -> list[Piece]:
    return [Piece(node, dim, 0, value(node).shape[dim]) for node in inputs]


def _note(nested: Sequence[fx.Node], joined: Iterable[Run]) -> str:
    parts = [f"{len(nested)} inside it into one with it"] if nested else []
    for run in joined:
        into = "" if run.piece.whole else " into a slice"
        parts.append(f"{len(run.inputs)} pieces of {describe(run.piece.source)} joined{into}")
    return ", ".join(parts)


# Case 2 where other results of the split are in use, and case 3.


def _match_split(split: Split) -> Match | Refusal | None:
    cuts = {picks: piece for picks, piece in zip(split.picks, split.pieces, strict=True) if picks}
    through = _through_concat(split.node, split.source, split.dim, cuts)
    return through if isinstance(through, Match) else _match_regroup(split) or through


def _match_regroup(split: Split) -> Regroup | None:
    places = _places(split)
    groups: list[Group] = []
    concats: dict[fx.Node, Concat] = {}
    before: tuple[Concat, int] | None = None
    for piece, picks in zip(split.pieces, split.picks, strict=True):
        place = places.get(picks)
        if before and place and (place[0], place[1] - 1) == before:
            groups[-1] = groups[-1].with_next(piece, picks)
            concats[place[0].node] = place[0]
        else:
            groups.append(Group(piece, picks, picks))
        before = place
    if not concats:
        return None
    return Regroup(
        nodes=(split.node, *concats),
        anchor=0,
        note=f"{len(split.pieces)} pieces of {describe(split.source)} into {len(groups)}, "
        f"joined again by {' and '.join(map(describe, concats))}",
        split=split,
        concats=tuple(concats.values()),
        groups=tuple(groups),
    )


def _places(split: Split) -> dict[tuple[fx.Node, ...], tuple[Concat, int]]:
    """Where a result of the split stands in a concat, for results that are seen once only."""
    readers = {sole_user(pick) for picks in split.picks for pick in picks}
    places: dict[tuple[fx.Node, ...], tuple[Concat, int]] = {}
    for concat in map(concat_of, readers):
        if concat is not None and concat.dim == split.dim:
            uses = Counter(concat.tensors)
            for index, tensor in enumerate(concat.tensors):
                if uses[tensor] == len(tensor.users) == 1:
                    places[(tensor,)] = concat, index
    return places


def _through_concat(
    node: fx.Node, source: fx.Node, dim: int, cuts: Mapping[tuple[fx.Node, ...], Piece]
) -> Route | Refusal | None:
    """What a split or slice of a concat takes from the concat's inputs.

    Args:
        node, source, dim: the split or slice, the concat, and the dimension that is cut.
        cuts: results, several where they are the same, and what they are of `source`.
    """
    concat = concat_of(source)
    if concat is None or concat.dim != dim:
        return None
    routes = {
        picks: (cut,) if cut.whole else tuple(concat.pieces(cut.start, cut.stop))
        for picks, cut in cuts.items()
    }
    if not routes or not all(routes.values()):
        return None  # an empty result has no piece to take
    added = sum(map(_cost, routes.values()))
    removed = 2 if sole_user(source) is node else 1
    on_borders = all(len(r) == 1 or all(piece.whole for piece in r) for r in routes.values())
    if added > removed or (added == removed and not on_borders):
        reason = (
            f"taking its pieces from the inputs of {describe(source)} would need {added} operators "
            f"in place of {removed}"
        )
        routes = {picks: pieces for picks, pieces in routes.items() if _cost(pieces) == 0}
        if not routes:
            return Refusal(reason)
    taken = {piece.source for pieces in routes.values() for piece in pieces}
    return Route(
        nodes=(node, source),
        anchor=0,
        note=f"takes {len(taken)} inputs of {describe(source)} directly",
        dim=dim,
        routes={pick: pieces for picks, pieces in routes.items() for pick in picks},
    )


def _cost(pieces: Sequence[Piece]) -> int:
    """How many operators put the pieces together: a slice a part, and a concat of several."""
    return sum(not piece.whole for piece in pieces) + (len(pieces) > 1)


def _put_together(edit: Edit, pieces: Iterable[Piece], dim: int) -> fx.Node:
    parts = [_take(edit, piece) for piece in pieces]
    return parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, dim)


def _take(edit: Edit, piece: Piece) -> fx.Node:
    if piece.whole:
        return piece.source
    return edit.call(aten.slice.Tensor, piece.source, piece.dim, piece.start, piece.stop)


def _regroup(edit: Edit, match: Regroup) -> Mapping[fx.Node, fx.Node]:
    split = match.split
    used = [group for group in match.groups if group.picks]
    if len(used) == 1:
        parts = [_take(edit, used[0].piece)]
    else:
        sizes = [group.piece.size for group in match.groups]
        new = edit.call(aten.split_with_sizes.default, split.source, sizes, split.dim)
        parts = [
            edit.call(operator.getitem, new, index)
            for index, group in enumerate(match.groups)
            if group.picks
        ]
    became = {pick: part for group, part in zip(used, parts, strict=True) for pick in group.firsts}
    dropped = {pick for group in used for pick in group.picks} - became.keys()
    replaced = dict(became)
    for concat in match.concats:
        inputs = [became.get(tensor, tensor) for tensor in concat.tensors if tensor not in dropped]
        # The split's other users may stand in front of the concat, and the concat's other inputs
        # behind the split, so each is replaced at its own place.
        edit.before(concat.node, match.nodes)
        replaced[concat.node] = (
            inputs[0] if len(inputs) == 1 else edit.call(aten.cat.default, inputs, concat.dim)
        )
    return replaced


# Case 4: a convolution of a concat.


def _match_partial(concat: Concat) -> Partial | Refusal | None:
    users = list(concat.node.users)
    layers = [layer for user in users if (layer := _layer_on(concat, user)) is not None]
    if not layers or len(concat.tensors) < 2:
        return None
    about = tuple(layer.node for layer in layers)
    for user in users:
        layer = _layer_on(concat, user)
        if layer is None:
            return Refusal(f"the concat stays, since {describe(user)} reads it too", about)
        reason = _why_not_partial(layer)
        if reason:
            return Refusal(f"the concat stays, since {reason}", about)
    return Partial(
        nodes=(concat.node, *users),
        anchor=0,
        note=f"{len(layers)} layers on it into a sum over its {len(concat.tensors)} inputs",
        options=frozenset({"partial"}),
        concat=concat,
        layers=tuple(layers),
    )


def _layer_on(concat: Concat, user: fx.Node) -> Convolution | None:
    """The convolution or linear layer that `user` is, if the concat is along its channels."""
    layer = convolution_of(user)
    if layer is None or layer.x is not concat.node:
        return None
    return layer if value(concat.node).dim() + layer.channel_dim == concat.dim else None


def _why_not_partial(layer: Convolution) -> str | None:
    kernel = value(layer.weight).shape[2:]
    name = describe(layer.node)
    if layer.transposed:
        return f"{name} is a transposed convolution"
    if layer.groups != 1:
        return f"{name} has {layer.groups} groups"
    if any(size != 1 for size in kernel):
        return f"the kernel of {name} is {'x'.join(map(str, kernel))}, not 1x1"
    if constant_of(layer.weight) is None:
        return f"the weight of {name} is not a constant"
    if layer.bias is not None and constant_of(layer.bias) is None:
        return f"the bias of {name} is not a constant"
    return None


def _sum_of_parts(edit: Edit, match: Partial) -> Mapping[fx.Node, fx.Node]:
    summed = {}
    for layer in match.layers:
        edit.before(match.concat.node, (match.concat.node, layer.node))
        summed[layer.node] = _sum_over(edit, match.concat, layer)
    return summed


def _sum_over(edit: Edit, concat: Concat, layer: Convolution) -> fx.Node:
    exact, dtype = constant_of(layer.weight), value(layer.weight).dtype
    assert exact is not None
    # Made anew, since the layer's own bias may stand behind the concat.
    bias = constant_of(layer.bias)
    name = layer.weight.target
    once = None if bias is None else edit.constant(f"{name}_bias", bias.double(), dtype)
    target = layer.node.target
    assert callable(target)
    total: fx.Node | None = None
    for tensor, (start, stop) in zip(concat.tensors, pairwise(concat.borders), strict=True):
        weight = edit.constant(f"{name}_part", exact[:, start:stop].double(), dtype)
        settings = layer.with_constants(weight, once if total is None else None)[1:]
        part = edit.call(target, tensor, *settings, **layer.node.kwargs)
        total = part if total is None else edit.call(aten.add.Tensor, total, part)
    assert total is not None
    return total
