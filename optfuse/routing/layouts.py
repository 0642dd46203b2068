"""Which order the channels of each tensor should have, so that little has to be moved.

A *layout* is one order that several tensors share because channels pass from one to the other one
by one. A convolution parts two layouts: its weight takes any order in and gives any order out. A
*bundle* is a tensor that must be put together from channels of others, in any order that suits.

What is best for one tensor depends on the others, so this is a heuristic, in two walks. Backwards,
every layout ranks its channels: those that the first taker takes come first, in the order of that
taker's own ranks, then those that the second takes, and so on. Forwards, every layout tries a few
orders, and keeps the one that leaves the fewest pieces to be cut and joined:

- the model's own, which wins where others are not better;
- for a bundle, its sources one after the other, each from front to back;
- an order that somebody wants as it is (an output of the model, an operator of unknown kind);
- sorted by rank, so that each taker finds its channels side by side;
- the same with the groups of a grouped convolution kept together.

Layouts are arrays alone: nothing here knows of graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]


@dataclass(eq=False)
class Layout:
    """One order of `size` channels, to be chosen.

    Channels are named by slots, 0 to size - 1, such that `order` may always be 0, 1, 2, ...: the
    order in which the model itself has them in the tensor that the layout began with.

    Attributes:
        size: how many channels.
        fixed: the order cannot be chosen, because what computes the tensor cannot be changed.
        groups: of the grouped convolution that computes it, whose channels must stay together.
        order: which slot stands where; chosen by `choose`.
        joined: the layout that this one was made a part of, with the slots there; None if it
            stands for itself.
    """

    size: int
    fixed: bool = False
    groups: int = 1
    joined: Placement | None = None
    order: Array = field(init=False)

    def __post_init__(self) -> None:
        self.order = np.arange(self.size)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the channels of one tensor are in a layout: channel `c` in slot `slots[c]`."""

    layout: Layout
    slots: Array

    def settled(self) -> Placement:
        """The same in the layout that this one became a part of, if it did."""
        placement = self
        while placement.layout.joined is not None:
            onwards = placement.layout.joined
            placement = Placement(onwards.layout, onwards.slots[placement.slots])
        return placement

    def sequence(self) -> Array:
        """Which channel stands where."""
        own = self.settled()
        return np.argsort(own.slots)[own.layout.order]

    def positions(self) -> Array:
        """Where each channel stands."""
        own = self.settled()
        return np.argsort(own.layout.order)[own.slots]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A tensor put together from channels of others, which `placement` puts in an order.

    Attributes:
        tensors: the others.
        sources: for each channel which of them it comes from.
        channels: and which channel it is there.
    """

    placement: Placement
    tensors: tuple[Placement, ...]
    sources: Array
    channels: Array

    def positions(self) -> Array:
        """Where each channel stands in the tensor that it comes from."""
        found = np.empty(len(self.channels), np.int64)
        for number, tensor in enumerate(self.tensors):
            here = self.sources == number
            found[here] = tensor.positions()[self.channels[here]]
        return found


@dataclass(frozen=True, eq=False)
class Grouped:
    """A grouped convolution: group i computes its outputs from its inputs, and must find them at
    place i of `groups` equal places."""

    groups: int
    inputs: Placement
    outputs: Placement

    def fits(self) -> bool:
        """Whether the chosen orders leave each group its own place, the same on both sides."""
        places = places_of(self.inputs.sequence(), self.groups)
        return places is not None and np.array_equal(
            places,
            places_of(self.outputs.sequence(), self.groups),  # type: ignore[arg-type]
        )


def join(one: Placement, other: Placement) -> None:
    """Have two tensors keep their channels in one order from now on, unless neither can change."""
    one, other = one.settled(), other.settled()
    if one.layout is other.layout:
        return
    if other.layout.fixed or other.layout.groups > 1:
        if one.layout.fixed or one.layout.groups > 1:
            return
        one, other = other, one
    slots = np.empty(other.layout.size, np.int64)
    slots[other.slots] = one.slots
    other.layout.joined = Placement(one.layout, slots)


def places_of(sequence: Array, groups: int) -> Array | None:
    """Which group's channels stand in each of `groups` equal places, or None if they are mixed."""
    places = (sequence // (len(sequence) // groups)).reshape(groups, -1)
    return places[:, 0] if bool((places == places[:, :1]).all()) else None


def choose(
    layouts: Sequence[Layout],
    bundles: Iterable[Bundle],
    wishes: Iterable[Placement],
    grouped: Iterable[Grouped],
) -> None:
    """Set the order of every layout.

    Args:
        layouts: all of them, as they come into being when the model runs.
        bundles: what is put together.
        wishes: tensors that somebody wants in the model's own order.
        grouped: the grouped convolutions.
    """
    views = {layout: _View(layout) for layout in layouts if layout.joined is None}
    for bundle in bundles:
        whole = bundle.placement.settled()
        views[whole.layout].bundles.append((bundle, whole.slots))
        for number, tensor in enumerate(bundle.tensors):
            here = np.flatnonzero(bundle.sources == number)
            part = tensor.settled()
            taken = part.slots[bundle.channels[here]]
            views[part.layout].takers.append(_Taker(taken, views[whole.layout], whole.slots[here]))
    for wish in wishes:
        own = wish.settled()
        views[own.layout].wishes.append(own.slots)
    for each in grouped:
        views[each.inputs.settled().layout].read_by.append(each)
        views[each.outputs.settled().layout].written_by = each
    for view in reversed(views.values()):
        view.rank()
    for view in views.values():
        view.choose()


@dataclass(frozen=True, eq=False)
class _Taker:
    """A bundle that takes the slots `taken`, which are `slots` in its own layout."""

    taken: Array
    view: _View
    slots: Array


@dataclass(eq=False)
class _View:
    """A layout, and everybody who has to do with it."""

    layout: Layout
    bundles: list[tuple[Bundle, Array]] = field(default_factory=list)
    takers: list[_Taker] = field(default_factory=list)
    wishes: list[Array] = field(default_factory=list)
    read_by: list[Grouped] = field(default_factory=list)
    written_by: Grouped | None = None
    ranks: Array = field(init=False)
    where: list[Array] = field(init=False)
    """For each bundle where its channels stand in the tensors that they come from."""

    def __post_init__(self) -> None:
        self.ranks = np.zeros(self.layout.size, np.int64)

    def rank(self) -> None:
        """Say which slots should come first; equal ranks leave it open."""
        if self.layout.fixed:
            self.ranks = np.arange(self.layout.size)
        elif self.wishes:
            self.ranks = np.argsort(self.wishes[0])
        elif self.takers:
            keys = np.full((len(self.takers), self.layout.size), self._last_rank())
            for key, taker in zip(keys, self.takers, strict=True):
                key[taker.taken] = taker.view.ranks[taker.slots]
            order = np.lexsort(keys[::-1])
            steps = (keys[:, order[1:]] != keys[:, order[:-1]]).any(axis=0)
            self.ranks[order] = np.concatenate([[0], np.cumsum(steps)])

    def _last_rank(self) -> int:
        return max(taker.view.layout.size for taker in self.takers)

    def choose(self) -> None:
        """Keep the best of the orders that come into question, the first of equals."""
        self.where = [bundle.positions() for bundle, _ in self.bundles]
        if not self.layout.fixed:
            self.layout.order = min(self._candidates(), key=self._pieces)

    def _candidates(self) -> Iterator[Array]:
        own = np.arange(self.layout.size)
        natural = self._natural()
        by_rank = natural[np.argsort(self.ranks[natural], kind="stable")]
        orders = [own, natural, *self.wishes, by_rank]
        for reader in self.read_by:
            orders.append(_together(orders[-1], reader.inputs, reader.groups))
        if self.written_by is None:
            yield from orders
            return
        writer = self.written_by
        read = places_of(writer.inputs.sequence(), writer.groups)
        yield own
        for order in orders:
            for places in (None, read):
                yield _together(order, writer.outputs, writer.groups, places)

    def _natural(self) -> Array:
        """The sources of a bundle one after the other, each from front to back."""
        if not self.bundles:
            return np.arange(self.layout.size)
        bundle, slots = self.bundles[0]
        _, firsts = np.unique(bundle.sources, return_index=True)
        return slots[np.lexsort((self.where[0], firsts[bundle.sources]))]

    def _pieces(self, order: Array) -> int:
        """How many pieces there are to cut and to join with this order."""
        total = 0
        for (bundle, slots), where in zip(self.bundles, self.where, strict=True):
            sequence = np.argsort(slots)[order]
            sources, positions = bundle.sources[sequence], where[sequence]
            total += 1 + int(np.sum((np.diff(sources) != 0) | (np.diff(positions) != 1)))
        for taker in self.takers:
            taken = np.zeros(self.layout.size + 1, np.int64)
            taken[1:][np.isin(order, taker.taken)] = 1
            total += int(np.sum(np.diff(taken) == 1))
        total += sum(not np.array_equal(order, wish) for wish in self.wishes)
        for reader in self.read_by:
            total += places_of(_sequence(order, reader.inputs), reader.groups) is None
        if self.written_by is not None:
            writer = self.written_by
            read = places_of(writer.inputs.sequence(), writer.groups)
            written = places_of(_sequence(order, writer.outputs), writer.groups)
            total += read is None or not np.array_equal(read, written)  # type: ignore[arg-type]
        return total


def _sequence(order: Array, placement: Placement) -> Array:
    """Which channel of a tensor stands where if its layout has this order."""
    return np.argsort(placement.settled().slots)[order]


def _together(
    order: Array, placement: Placement, groups: int, places: Array | None = None
) -> Array:
    """An order with the channels of each group beside each other.

    Args:
        places: which group comes where; as they first appear, if None.
    """
    group = _sequence(order, placement) // (len(order) // groups)
    if places is None:
        _, firsts = np.unique(group, return_index=True)
        places = np.argsort(firsts)
    return order[np.argsort(np.argsort(places)[group], kind="stable")]
