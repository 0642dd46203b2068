"""Which channels a tensor holds and where they stand, seen through whatever only moves them.

Concat, split and slice move channels along one dimension. A shuffle moves them through others:

    view (b, g c, h, w) -> (b, g, c, h, w), transpose -> (b, c, g, h, w), view -> (b, c g, h, w)

So a tensor is described by its axes, each a product of factors in row-major order. A factor is a
*whole* dimension (batch, height, width) or some of the *channels*; an array of as many dimensions
as there are channel factors says which channel stands where. Views cut and join factors, permutes
move them, and along an axis that holds channels alone the array is cut as the tensor is. A whole
dimension is never cut: what mixes channels with pixels (a pixel shuffle) ends up with axes that no
view brings back, and is not a matter of channels alone.

Sizes other than the channels' may stand for numbers that are known only at run time.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optfuse.graph import arguments, constant_of, is_call, value

aten = torch.ops.aten

Array = npt.NDArray[np.int64]
Size = int | torch.SymInt
Known = Mapping[fx.Node, "Channels | tuple[Channels, ...]"]

CHANNELS = -1
"""The factor that is not a whole dimension but some of the channels."""


@dataclass(frozen=True, eq=False)
class Channels:
    """Where the channels of one tensor stand.

    Attributes:
        ids: the channels' numbers, one dimension a channel factor, as the factors follow each
            other through the axes.
        axes: for each dimension of the tensor its factors, `CHANNELS` or the number of a whole
            dimension; what has size 1 is no factor.
        dim: in which dimension the channels stood where they came from.
        sizes: the sizes of the whole dimensions by number (the entry at `dim` means nothing).
    """

    ids: Array
    axes: tuple[tuple[int, ...], ...]
    dim: int
    sizes: tuple[Size, ...]

    @staticmethod
    def of(ids: Array, dim: int, sizes: Sequence[Size]) -> Channels:
        """A tensor with these channels along `dim`, and `sizes` otherwise."""
        ids = ids.reshape([] if ids.size == 1 else [-1])
        return Channels(ids, _axes(ids, dim, sizes), dim, tuple(sizes))

    @property
    def in_place(self) -> bool:
        """Whether the channels stand along `dim` again, and every other dimension where it was."""
        return self.axes == _axes(self.ids, self.dim, self.sizes)

    @property
    def order(self) -> Array:
        """The channels' numbers in the order in which they stand."""
        return self.ids.reshape(-1)

    def viewed(self, shape: Sequence[Size]) -> Channels | None:
        """The same elements in the same order in memory, as a tensor of that shape."""
        channels = iter(self.ids.shape)
        waiting = deque(
            (factor, next(channels) if factor == CHANNELS else self.sizes[factor])
            for axis in self.axes
            for factor in axis
        )
        axes: list[tuple[int, ...]] = []
        extents: list[int] = []
        for size in shape:
            factors: list[int] = []
            product: Size = 1
            while not equal(product, size):
                if not waiting:
                    return None
                factor, extent = waiting.popleft()
                if factor == CHANNELS:
                    assert isinstance(extent, int)
                    part = _fitting(extent, product, size)
                    if part < extent:
                        waiting.appendleft((CHANNELS, extent // part))
                    extent = part
                if factor == CHANNELS and factors[-1:] == [CHANNELS]:
                    extents[-1] *= part
                else:
                    factors.append(factor)
                    extents += [part] if factor == CHANNELS else []
                product = product * extent
            axes.append(tuple(factors))
        return replace(self, ids=self.ids.reshape(extents), axes=tuple(axes))

    def permuted(self, order: Sequence[int]) -> Channels:
        """The dimensions in another order."""
        number = iter(range(self.ids.ndim))
        numbers = [[next(number) for factor in axis if factor == CHANNELS] for axis in self.axes]
        moved = self.ids.transpose([each for dim in order for each in numbers[dim]])
        return replace(self, ids=moved, axes=tuple(self.axes[dim] for dim in order))

    def along(self, dim: int, change: Callable[[Array, int], Array]) -> Channels | None:
        """What `change`, given an array and which of its dimensions, makes of the channels along
        `dim`; None where that dimension does not hold channels alone, or nothing is left."""
        if any(factor != CHANNELS for factor in self.axes[dim]):
            return None
        position = self._position(dim)
        ids = self.ids if self.axes[dim] else np.expand_dims(self.ids, position)
        ids = change(ids, position)
        if ids.size == 0:
            return None
        axis: tuple[int, ...] = (CHANNELS,)
        if ids.shape[position] == 1:
            ids, axis = ids.squeeze(position), ()
        return replace(self, ids=ids, axes=(*self.axes[:dim], axis, *self.axes[dim + 1 :]))

    def selected(self, dim: int, index: int) -> Channels | None:
        """One index of a dimension that holds channels alone; the dimension goes away."""
        one = self.along(dim, lambda ids, axis: ids.take([index], axis))
        return one and replace(one, axes=(*one.axes[:dim], *one.axes[dim + 1 :]))

    def unsqueezed(self, dim: int) -> Channels:
        """A new dimension of size 1."""
        return replace(self, axes=(*self.axes[:dim], (), *self.axes[dim:]))

    def same_place(self, other: Channels) -> bool:
        """Whether both had their channels in one dimension of tensors with equal other sizes."""
        return self.dim == other.dim and _same_sizes(self, other)

    def _position(self, dim: int) -> int:
        """Which dimension of `ids` the first channel factor at or behind `dim` is."""
        return sum(factor == CHANNELS for axis in self.axes[:dim] for factor in axis)


def joined(parts: Sequence[Channels], dim: int) -> Channels | None:
    """The concat of tensors along a dimension that holds channels alone in each of them."""
    first = parts[0]
    position = first._position(dim)
    arrays: list[Array] = []
    for part in parts:
        others = (*part.axes[:dim], *part.axes[dim + 1 :])
        if others != (*first.axes[:dim], *first.axes[dim + 1 :]) or not part.same_place(first):
            return None
        if any(factor != CHANNELS for factor in part.axes[dim]):
            return None
        arrays.append(part.ids if part.axes[dim] else np.expand_dims(part.ids, position))
    # A dimension of size 1 that holds no channels here may be a whole one, e.g. a batch of one.
    if len({array.shape[:position] + array.shape[position + 1 :] for array in arrays}) > 1:
        return None
    ids = np.concatenate(arrays, position)
    if ids.shape[position] == 1:
        return first
    axes = (*first.axes[:dim], (CHANNELS,), *first.axes[dim + 1 :])
    return replace(first, ids=ids, axes=axes)


def equal(one: Size, other: Size) -> bool:
    """Whether two sizes are equal whatever the inputs' dynamic dimensions are."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return statically_known_true(one == other)


def routed(node: fx.Node, known: Known) -> Channels | tuple[Channels, ...] | None:
    """What `node` holds if it only moves channels, or None.

    Args:
        known: the channels of the tensors in front of it; a tuple for a node of several results.

    Returns:
        One `Channels` for each result.
    """
    if is_call(node, operator.getitem):
        source, index = node.args
        several = known.get(source) if isinstance(source, fx.Node) else None
        return several[index] if isinstance(several, tuple) and isinstance(index, int) else None
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    if rule is None:
        return None
    settings = arguments(node)
    first = next(iter(settings.values()))
    given = [known.get(each) for each in (first if isinstance(first, (list, tuple)) else [first])]
    parts = [each for each in given if isinstance(each, Channels)]
    if len(parts) != len(given):
        return None
    return rule(_Move(value(node), settings, parts))


def moves(node: fx.Node) -> bool:
    """Whether it calls an operator that may move channels, whatever it is given."""
    return node.op == "call_function" and node.target in _RULES


def copies(node: fx.Node) -> bool:
    """Whether moving channels with this operator takes a copy, rather than another view."""
    return node.op == "call_function" and node.target in _RULES and node.target not in _FREE


def reorders(node: fx.Node) -> bool:
    """Whether it can do more than cut and join: change the order of channels."""
    return node.op == "call_function" and node.target in _REORDER


def picks_computed(node: fx.Node) -> bool:
    """Whether it picks the channels that a computed index names."""
    if not is_call(node, aten.index_select.default, aten.index.Tensor):
        return False
    indices = node.args[1] if node.target is aten.index.Tensor else [node.args[2]]
    assert isinstance(indices, (list, tuple))
    return any(index is not None and constant_of(index) is None for index in indices)


def dimension_of(node: fx.Node, rank: int) -> int | None:
    """The dimension along which the operator cuts, joins or reorders a tensor of that rank, or
    None where it names none."""
    if not moves(node):
        return None
    settings = arguments(node)
    if node.target is aten.index.Tensor:
        indices = enumerate(settings["indices"])
        return next((dim for dim, index in indices if index is not None), None)
    if node.target not in (*_SPLITS, *_ALONG):
        return None
    named = [settings["dim"]] if "dim" in settings else settings["dims"]
    return int(named[0] % rank) if named else None


# One rule an operator -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Move:
    """One call of an operator that moves channels.

    Attributes:
        result: the fake tensor, or tensors, that it gives.
        settings: its arguments by their names.
        parts: the channels of the tensors that it is given.
    """

    result: Any
    settings: Mapping[str, Any]
    parts: Sequence[Channels]

    @property
    def x(self) -> Channels:
        """The channels of the one tensor that it is given."""
        return self.parts[0]

    def dimension(self, name: str = "dim") -> int:
        """The dimension that an argument names, counted from the front."""
        return int(self.settings[name] % len(self.x.axes))


def _same(move: _Move) -> Channels | None:
    # A copy into another layout in memory (channels last) is there on purpose.
    kept = (None, torch.contiguous_format, torch.preserve_format)
    return move.x if move.settings.get("memory_format") in kept else None


def _viewed(move: _Move) -> Channels | None:
    return move.x.viewed(move.result.shape)


def _permuted(move: _Move) -> Channels:
    return move.x.permuted([dim % len(move.x.axes) for dim in move.settings["dims"]])


def _transposed(move: _Move) -> Channels:
    order = list(range(len(move.x.axes)))
    one, other = move.dimension("dim0"), move.dimension("dim1")
    order[one], order[other] = order[other], order[one]
    return move.x.permuted(order)


def _sliced(move: _Move) -> Channels | None:
    limits = [move.settings[name] for name in ("start", "end", "step")]
    if not all(limit is None or isinstance(limit, int) for limit in limits):
        return None
    cut = slice(*limits)
    return move.x.along(
        move.dimension(), lambda ids, axis: ids.take(range(ids.shape[axis])[cut], axis)
    )


def _selected(move: _Move) -> Channels | None:
    return move.x.selected(move.dimension(), move.settings["index"])


def _flipped(move: _Move) -> Channels | None:
    found: Channels | None = move.x
    for dim in move.settings["dims"]:
        found = found and found.along(dim % len(move.x.axes), np.flip)
    return found


def _rolled(move: _Move) -> Channels | None:
    shifts, dims = move.settings["shifts"], move.settings["dims"]
    if len(dims) != 1 or not isinstance(shifts[0], int):
        return None
    return move.x.along(dims[0] % len(move.x.axes), lambda ids, axis: np.roll(ids, shifts[0], axis))


def _index_selected(move: _Move) -> Channels | None:
    return _picked(move.x, move.dimension(), move.settings["index"])


def _indexed(move: _Move) -> Channels | None:
    indices = [(dim, each) for dim, each in enumerate(move.settings["indices"]) if each is not None]
    return _picked(move.x, *indices[0]) if len(indices) == 1 else None


def _picked(x: Channels, dim: int, index: Any) -> Channels | None:
    chosen = constant_of(index)
    if chosen is None or chosen.dim() != 1 or chosen.dtype not in (torch.int64, torch.int32):
        return None
    return x.along(dim, lambda ids, axis: ids.take(chosen.cpu().numpy(), axis))


def _shuffled(move: _Move) -> Channels | None:
    def interleaved(ids: Array, axis: int) -> Array:
        order: Array = np.arange(ids.shape[axis]).reshape(move.settings["groups"], -1).T
        return ids.take(order.reshape(-1), axis)

    return move.x.along(1, interleaved)


def _split(move: _Move) -> tuple[Channels, ...] | None:
    dim = move.dimension()
    if any(factor != CHANNELS for factor in move.x.axes[dim]):
        return None
    borders = [0, *accumulate(result.shape[dim] for result in move.result)]
    pieces = [
        move.x.along(dim, partial(_taken, start=start, stop=stop))
        for start, stop in pairwise(borders)
    ]
    return _all(pieces)


def _taken(ids: Array, axis: int, *, start: int, stop: int) -> Array:
    return ids.take(range(start, stop), axis)


def _unbound(move: _Move) -> tuple[Channels, ...] | None:
    dim = move.dimension()
    return _all([move.x.selected(dim, index) for index in range(len(move.result))])


def _all(pieces: Sequence[Channels | None]) -> tuple[Channels, ...] | None:
    found = tuple(piece for piece in pieces if piece is not None)
    return found if len(found) == len(pieces) else None


def _concatenated(move: _Move) -> Channels | None:
    return joined(move.parts, move.dimension()) if _keeps_dtype(move) else None


def _stacked(move: _Move) -> Channels | None:
    dim = int(move.settings["dim"] % move.result.dim())
    return joined([x.unsqueezed(dim) for x in move.parts], dim) if _keeps_dtype(move) else None


def _keeps_dtype(move: _Move) -> bool:
    return all(value(each).dtype == move.result.dtype for each in move.settings["tensors"])


_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)
_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
)

_ALONG = (
    aten.cat.default,
    aten.slice.Tensor,
    aten.index_select.default,
    aten.flip.default,
    aten.roll.default,
)

_RULES: Mapping[Any, Callable[[_Move], Channels | tuple[Channels, ...] | None]] = {
    **dict.fromkeys(_VIEWS, _viewed),
    **dict.fromkeys(_COPIES, _same),
    **dict.fromkeys(_SPLITS, _split),
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    aten.unbind.int: _unbound,
    aten.flip.default: _flipped,
    aten.roll.default: _rolled,
    aten.index_select.default: _index_selected,
    aten.index.Tensor: _indexed,
    aten.channel_shuffle.default: _shuffled,
    aten.cat.default: _concatenated,
    aten.stack.default: _stacked,
}
"""How an operator moves channels; None where it does something else to them."""

# A copy counts with the operator whose order it makes real, and a view moves nothing.
_FREE = {*_VIEWS, *_COPIES}
_REORDER = {
    aten.permute.default,
    aten.transpose.int,
    aten.flip.default,
    aten.roll.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.channel_shuffle.default,
    aten.stack.default,
}


def _axes(ids: Array, dim: int, sizes: Sequence[Size]) -> tuple[tuple[int, ...], ...]:
    here = (CHANNELS,) if ids.size > 1 else ()
    return tuple(
        here if number == dim else () if equal(size, 1) else (number,)
        for number, size in enumerate(sizes)
    )


def _fitting(extent: int, product: Size, size: Size) -> int:
    """The largest part of a channel factor that brings `product` up to `size`, else all of it."""
    for part in range(extent, 1, -1):
        if extent % part == 0 and equal(product * part, size):
            return part
    return extent


def _same_sizes(one: Channels, other: Channels) -> bool:
    return len(one.sizes) == len(other.sizes) and all(
        number == one.dim or equal(a, b)
        for number, (a, b) in enumerate(zip(one.sizes, other.sizes, strict=True))
    )
