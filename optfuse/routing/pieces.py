"""Where the numbers of a tensor come from, seen through concat, split and slice.

Along one dimension those three only move numbers. So what they give can be described as pieces,
each a run of indices of some other tensor, and rewritten as an operation on pieces. Nothing here
changes a graph, and nothing describes a dimension whose size is not known.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import fx

from optfuse.graph import arguments, is_call, value

aten = torch.ops.aten

_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
)


@dataclass(frozen=True)
class Piece:
    """The indices from `start` up to `stop` of `source`, along dimension `dim` (0 or more)."""

    source: fx.Node
    dim: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many indices it has."""
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether it is all of its source."""
        return self.start == 0 and self.stop == value(self.source).shape[self.dim]

    def adjoins(self, later: Piece) -> bool:
        """Whether `later` goes on in the same tensor where this one stops."""
        return (self.source, self.dim, self.stop) == (later.source, later.dim, later.start)

    def part(self, start: int, stop: int) -> Piece:
        """The piece from `start` up to `stop` of this piece."""
        return Piece(self.source, self.dim, self.start + start, self.start + stop)


@dataclass(frozen=True)
class Concat:
    """A `cat` that changes neither dtype nor rank, along dimension `dim` (0 or more).

    Attributes:
        tensors: its inputs.
        borders: where each of them starts in the result, and the result's size behind the last.
    """

    node: fx.Node
    tensors: tuple[fx.Node, ...]
    dim: int
    borders: tuple[int, ...]

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Which pieces of its inputs the indices from `start` up to `stop` are; none is empty."""
        overlaps = (
            Piece(tensor, self.dim, max(start, first) - first, min(stop, last) - first)
            for tensor, (first, last) in zip(self.tensors, pairwise(self.borders), strict=True)
        )
        return [piece for piece in overlaps if piece.size > 0]


@dataclass(frozen=True)
class Split:
    """A split along dimension `dim` (0 or more) whose results are all picked one by one.

    Attributes:
        pieces: what each result is of the tensor that is split.
        picks: the `getitem` nodes of each result, one tuple a result.
    """

    node: fx.Node
    pieces: tuple[Piece, ...]
    picks: tuple[tuple[fx.Node, ...], ...]

    @property
    def source(self) -> fx.Node:
        """The tensor that is split."""
        return self.pieces[0].source

    @property
    def dim(self) -> int:
        """The dimension that is split."""
        return self.pieces[0].dim


@dataclass(frozen=True)
class Run:
    """Neighbours among a concat's inputs that are neighbours in the tensor they were cut from.

    Attributes:
        piece: what they are together.
        inputs: the nodes, one or more.
    """

    piece: Piece
    inputs: tuple[fx.Node, ...]


def concat_of(node: object) -> Concat | None:
    """The concat that `node` calls, or None; also None where it converts one of its inputs, or a
    size along its dimension is not known."""
    if not isinstance(node, fx.Node) or not is_call(node, aten.cat.default):
        return None
    bound = arguments(node)
    tensors: tuple[fx.Node, ...] = tuple(bound["tensors"])
    result = value(node)
    dim = bound["dim"] % result.dim()
    # An empty tensor of rank 1 is allowed beside tensors of any rank.
    if any(value(t).dtype != result.dtype or value(t).dim() != result.dim() for t in tensors):
        return None
    sizes = known([value(tensor).shape[dim] for tensor in tensors])
    return None if sizes is None else Concat(node, tensors, dim, (0, *accumulate(sizes)))


def split_of(node: object) -> Split | None:
    """The split that `node` calls, or None; also None where its results are used as a list, or a
    size along its dimension is not known."""
    if not isinstance(node, fx.Node) or not is_call(node, *_SPLITS):
        return None
    sizes, dim = _sizes_of_split(node)
    if sizes is None:
        return None
    picks: list[list[fx.Node]] = [[] for _ in sizes]
    for user in node.users:
        if not is_call(user, operator.getitem):
            return None
        picks[user.args[1]].append(user)  # type: ignore[index]
    borders = [0, *accumulate(sizes)]
    source = arguments(node)["self"]
    pieces = [Piece(source, dim, a, b) for a, b in pairwise(borders)]
    return Split(node, tuple(pieces), tuple(map(tuple, picks)))


def slice_of(node: object) -> Piece | None:
    """What the slice that `node` calls cuts out, or None; also None where it leaves indices out in
    between, or its limits are not known."""
    if not isinstance(node, fx.Node) or not is_call(node, aten.slice.Tensor):
        return None
    bound = arguments(node)
    source: fx.Node = bound["self"]
    dim = bound["dim"] % value(source).dim()
    size = value(source).shape[dim]
    start = 0 if bound["start"] is None else bound["start"]
    end = size if bound["end"] is None else bound["end"]
    if known([size, start, end]) is None or bound["step"] != 1:
        return None
    # As in Python: negative ones count from the end, and those outside are moved to the border.
    first, last, _ = slice(start, end).indices(size)
    return Piece(source, dim, first, max(first, last))


def origin(node: fx.Node, dim: int) -> Piece | None:
    """Which piece of the tensor that it was cut from, through any number of cuts, `node` is.

    A node that was not cut along `dim` is the whole of itself; None where its size is not known.
    """
    size = known([value(node).shape[dim]])
    if size is None:
        return None
    piece = Piece(node, dim, 0, size[0])
    while (cut := _cut(piece.source)) is not None and cut.dim == dim:
        piece = cut.part(piece.start, piece.stop)
    return piece


def flatten(concat: Concat) -> tuple[list[fx.Node], list[fx.Node]]:
    """The inputs of a concat with those of the concats inside it, and these concats."""
    inputs: list[fx.Node] = []
    nested: dict[fx.Node, None] = {}
    gone = {concat.node}
    waiting = list(reversed(concat.tensors))
    while waiting:
        tensor = waiting.pop()
        inner = concat_of(tensor)
        if inner is not None and inner.dim == concat.dim and gone.issuperset(tensor.users):
            nested[tensor] = None
            gone.add(tensor)
            waiting.extend(reversed(inner.tensors))
        else:
            inputs.append(tensor)
    return inputs, list(nested)


def runs_of(nodes: Iterable[fx.Node], dim: int) -> Iterator[Run]:
    """The nodes, which stand behind each other along `dim`, in runs that are as long as can be."""
    piece: Piece | None = None
    inputs: list[fx.Node] = []
    for node in nodes:
        each = origin(node, dim)
        assert each is not None, "the inputs of a concat have known sizes"
        if piece is not None and piece.adjoins(each):
            piece = Piece(piece.source, dim, piece.start, each.stop)
            inputs.append(node)
            continue
        if piece is not None:
            yield Run(piece, tuple(inputs))
        piece, inputs = each, [node]
    if piece is not None:
        yield Run(piece, tuple(inputs))


def storage(node: fx.Node) -> fx.Node:
    """The node whose memory `node`'s result may be a view of; itself where it has its own."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        schema = getattr(node.target, "_schema", None)
        is_view = schema is not None and any(r.alias_info is not None for r in schema.returns)
        if not is_view and node.target is not operator.getitem:
            break
        node = node.args[0]
    return node


def known(sizes: Sequence[object]) -> list[int] | None:
    """The sizes, or None if one of them stands for a number that is known only at run time."""
    numbers = [size for size in sizes if isinstance(size, int)]
    return numbers if len(numbers) == len(sizes) else None


def _cut(node: fx.Node) -> Piece | None:
    """What a slice or one result of a split is of the tensor in front of it."""
    if not is_call(node, operator.getitem):
        return slice_of(node)
    split, index = node.args[0], node.args[1]
    if not isinstance(split, fx.Node) or not is_call(split, *_SPLITS):
        return None
    sizes, dim = _sizes_of_split(split)
    if sizes is None:
        return None
    assert isinstance(index, int)
    start = sum(sizes[:index])
    return Piece(arguments(split)["self"], dim, start, start + sizes[index])


def _sizes_of_split(split: fx.Node) -> tuple[list[int] | None, int]:
    results = value(split)
    dim = arguments(split)["dim"] % results[0].dim()
    return known([result.shape[dim] for result in results]), dim
