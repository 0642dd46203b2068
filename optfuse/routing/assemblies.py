"""Tensors put together anew from parts of others, and what that costs.

The cost of moving channels is counted in two figures, how many operators move something and how
many numbers they write: a concat writes its result, a cut what it cuts out, a permute or a gather
its result. Views write nothing. PyTorch makes views of cuts too, but engines copy them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from optfuse.graph import value

Array = npt.NDArray[np.int64]

FEW = 2
"""Up to so many runs of one tensor beside each other are cut out one by one; more are gathered."""


@dataclass(frozen=True)
class Cost:
    """How many numbers are written, by how many operators, to move channels."""

    numbers: int = 0
    operators: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.numbers + other.numbers, self.operators + other.operators)

    def below(self, other: Cost) -> bool:
        """Whether it is less in one of the two, and not more in the other."""
        return self != other and not (
            self.numbers > other.numbers or self.operators > other.operators
        )


@dataclass(frozen=True)
class Part:
    """Some channels of a tensor.

    Attributes:
        source: the tensor, one of the graph or one that is put together itself.
        size: how many channels it has.
        indices: which of them, and in which order.
    """

    source: fx.Node | Assembly
    size: int
    indices: tuple[int, ...]

    @property
    def run(self) -> tuple[int, int] | None:
        """Where it starts and stops, or None where it is not one run of channels."""
        start, stop = self.indices[0], self.indices[-1] + 1
        return (start, stop) if self.indices == tuple(range(start, stop)) else None

    @property
    def whole(self) -> bool:
        """Whether it is all of its source as it is."""
        return self.run == (0, self.size)

    @property
    def pixels(self) -> int:
        """How many numbers a channel has, all images of a batch together."""
        if isinstance(self.source, Assembly):
            return self.source.parts[0].pixels
        return numbers_in(value(self.source)) // self.size


@dataclass(frozen=True)
class Assembly:
    """Parts one after the other along dimension `dim`; a whole part alone stands for its copy."""

    parts: tuple[Part, ...]
    dim: int

    @property
    def size(self) -> int:
        """How many channels it has."""
        return sum(len(part.indices) for part in self.parts)


def assemble(
    sources: Sequence[fx.Node], which: Array, positions: Array, dim: int
) -> fx.Node | Assembly:
    """The tensor whose channel i is channel `positions[i]` of `sources[which[i]]`, along `dim`.

    One of the sources itself, where it is all of that as it is.
    """
    parts: list[Part] = []
    for start, stop in pairwise([0, *np.flatnonzero(np.diff(which)) + 1, len(which)]):
        source = sources[which[start]]
        size = value(source).shape[dim]
        taken = positions[start:stop]
        borders = [0, *np.flatnonzero(np.diff(taken) != 1) + 1, len(taken)]
        if len(borders) > FEW + 1:
            borders = [0, len(taken)]
        parts += [Part(source, size, tuple(taken[a:b].tolist())) for a, b in pairwise(borders)]
    if len(parts) == 1 and parts[0].whole:
        return parts[0].source
    return Assembly(tuple(parts), dim)


def with_those_inside(tensors: Iterable[fx.Node | Assembly]) -> list[Assembly]:
    """The assemblies among `tensors` and inside them, each once, the inner ones first."""
    found: dict[Assembly, None] = {}
    for tensor in tensors:
        if isinstance(tensor, Assembly):
            found.update(dict.fromkeys(with_those_inside(part.source for part in tensor.parts)))
            found[tensor] = None
    return list(found)


def splits_of(assemblies: Iterable[Assembly]) -> dict[fx.Node, tuple[tuple[int, int], ...]]:
    """The tensors that one split cuts into all the runs that are taken of them, and these runs."""
    runs: dict[fx.Node, set[tuple[int, int]]] = {}
    sizes: dict[fx.Node, int] = {}
    for part in _cut(assemblies):
        if part.run is not None and isinstance(part.source, fx.Node):
            runs.setdefault(part.source, set()).add(part.run)
            sizes[part.source] = part.size
    return {
        source: tuple(sorted(found))
        for source, found in runs.items()
        if len(found) > 1 and _tile(sorted(found), sizes[source])
    }


def cost_of(assemblies: Iterable[Assembly]) -> Cost:
    """What it costs to make them, a part that several of them take being cut out once."""
    assemblies = list(assemblies)
    splits = splits_of(assemblies)
    total = Cost(operators=len(splits))
    for part in dict.fromkeys(_cut(assemblies)):
        split = part.source in splits and part.run is not None
        total += Cost(len(part.indices) * part.pixels, 0 if split else 1)
    for assembly in assemblies:
        if len(assembly.parts) > 1:
            total += Cost(assembly.size * assembly.parts[0].pixels, 1)
    return total


def numbers_in(tensor: torch.Tensor) -> int:
    """How many numbers a tensor holds, dynamic dimensions as large as in the example inputs."""
    return prod(_hint(size) for size in tensor.shape)


def _cut(assemblies: Iterable[Assembly]) -> Iterator[Part]:
    """The parts that must be cut out or copied; an input of a concat that is whole need not."""
    for assembly in assemblies:
        for part in assembly.parts:
            if len(assembly.parts) == 1 or not part.whole:
                yield part


def _tile(runs: Sequence[tuple[int, int]], size: int) -> bool:
    borders = [(0, 0), *runs, (size, size)]
    return all(one[1] == other[0] for one, other in pairwise(borders))


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return hint if isinstance(hint, int) else 1
