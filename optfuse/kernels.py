"""Convolutions as numbers: which taps one has and where they read, and what two of them are as one.

Nothing here looks at a graph but `layout_of` and `kernel_of`, which read a convolution from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, prod
from typing import Any

import torch

from optfuse.convolution import Convolution
from optfuse.graph import constant_of, value


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a kernel: tap k reads x at  stride o + dilation k - before.

    A transposed one instead writes what it reads at i to  stride i + dilation k - before.

    Attributes:
        before, after: how many zeros stand around x, or how much of a transposed result is cut
            off.
    """

    size: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    @property
    def step(self) -> int:
        """How far its taps are apart; 0 where there is but one."""
        return self.dilation if self.size > 1 else 0

    @property
    def span(self) -> int:
        """How far its last tap is from the first."""
        return self.step * (self.size - 1)

    def beside(self, other: Axis) -> Axis:
        """The smallest one that has the taps of both, which have one stride and give one size."""
        before = max(self.before, other.before)
        last = max(self.span - self.before, other.span - other.before)
        dilation = gcd(self.step, other.step, self.before - other.before) or 1
        # What must stand after it for the size that each gives. With a stride the two may differ
        # and give one size all the same, and so does all between them.
        low, high = sorted(axis.after + last - axis.span + axis.before for axis in (self, other))
        after = min(max(before, low), high)
        return Axis((before + last) // dilation + 1, self.stride, dilation, before, after)

    def behind_of(self, inner: Axis) -> Axis:
        """Both in one, this one reading what `inner` gives."""
        dilation = gcd(inner.step, inner.stride * self.step) or 1
        return Axis(
            (inner.span + inner.stride * self.span) // dilation + 1,
            inner.stride * self.stride,
            dilation,
            inner.before + inner.stride * self.before,
            inner.after + inner.stride * self.after,
        )

    def taps_in(self, wider: Axis, first: int) -> slice:
        """Where its taps stand among those of `wider`, the first of them at index `first`."""
        step = max(self.step // wider.dilation, 1)
        return slice(first, first + step * (self.size - 1) + 1, step)


@dataclass(frozen=True)
class Layout:
    """All of a convolution but its numbers; a linear layer has no axes."""

    in_channels: int
    out_channels: int
    groups: int
    axes: tuple[Axis, ...]
    transposed: bool

    @property
    def weights(self) -> int:
        """How many weights it has, which is its multiply-adds for each position of its result (of
        what it reads, where it is transposed)."""
        kernel = prod(axis.size for axis in self.axes)
        return self.in_channels * self.out_channels // self.groups * kernel

    @property
    def pointwise(self) -> bool:
        """Whether it maps each position to itself, so that it is transposed as well as not."""
        return all(axis == Axis(dilation=axis.dilation) for axis in self.axes)

    def beside(self, other: Layout) -> Layout | str:
        """The smallest one that can do the work of both on one tensor, or why there is none."""
        strides = [[axis.stride for axis in each.axes] for each in (self, other)]
        if strides[0] != strides[1]:
            return f"their strides are {by(strides[0])} and {by(strides[1])}"
        if self.transposed != other.transposed and not (self.pointwise or other.pointwise):
            return "only one of them is transposed"
        axes = [a.beside(b) for a, b in zip(self.axes, other.axes, strict=True)]
        return self._proper(other, axes)

    def behind_of(self, inner: Layout) -> Layout | str:
        """Both in one, this one reading what `inner` gives, or why there is none."""
        if (self.transposed or inner.transposed) and not (self.pointwise or inner.pointwise):
            return "one of them is transposed, and the other is not 1x1 with a stride of 1"
        axes = [a.behind_of(b) for a, b in zip(self.axes, inner.axes, strict=True)]
        return replace(self, in_channels=inner.in_channels)._proper(inner, axes)

    def _proper(self, other: Layout, axes: Iterable[Axis]) -> Layout | str:
        # What is 1x1 takes the side of the other.
        transposed = (other if self.pointwise else self).transposed
        groups = gcd(self.groups, other.groups)
        merged = replace(self, groups=groups, axes=tuple(axes), transposed=transposed)
        if merged.padding is None:
            return "no convolution pads the way the two do together"
        return merged

    @property
    def padding(self) -> list[int] | str | None:
        """The padding as the operators take it; None where they cannot."""
        before = [axis.before for axis in self.axes]
        if self.transposed:
            # The output padding, which must be less than the stride or the dilation.
            fits = all(a.before - a.after in range(max(a.stride, a.dilation)) for a in self.axes)
            return before if fits else None
        if all(axis.before == axis.after for axis in self.axes):
            return before
        same = (
            (axis.stride, axis.before, axis.after) == (1, axis.span // 2, (axis.span + 1) // 2)
            for axis in self.axes
        )
        return "same" if all(same) else None

    def spread(self, weight: torch.Tensor, wider: Layout) -> torch.Tensor:
        """This layout's weight among zeros in that of `wider`."""
        pairs = list(zip(self.axes, wider.axes, strict=True))
        taps = [a.taps_in(w, (w.before - a.before) // w.dilation) for a, w in pairs]
        weight = _with_groups(weight, wider.groups)
        spread = weight.new_zeros(*weight.shape[:3], *[axis.size for axis in wider.axes])
        spread[_at(taps)] = weight
        return spread


@dataclass(frozen=True)
class Kernel:
    """A convolution as numbers, in float64.

    Attributes:
        weight: shape (groups, out/groups, in/groups, *size), whatever the operator's own is.
        bias: shape (out,).
    """

    layout: Layout
    weight: torch.Tensor
    bias: torch.Tensor

    def scaled(self, scale: torch.Tensor) -> Kernel:
        """This one, then its result times one number a channel, shape (out,)."""
        per_row = scale.reshape(self.layout.groups, -1, *[1] * (self.weight.dim() - 2))
        return Kernel(self.layout, self.weight * per_row, self.bias * scale)

    def behind_of(self, inner: Kernel, layout: Layout) -> Kernel:
        """This one reading what `inner` gives, as `layout` has it."""
        ours, theirs = (_with_groups(k.weight, layout.groups) for k in (self, inner))
        size = [axis.size for axis in layout.axes]
        weight = ours.new_zeros(layout.groups, ours.shape[1], theirs.shape[2], *size)
        for tap in product(*[range(axis.size) for axis in self.layout.axes]):
            taps = [
                b.taps_in(wider, b.stride * a.dilation * k // wider.dilation)
                for k, a, b, wider in zip(
                    tap, self.layout.axes, inner.layout.axes, layout.axes, strict=True
                )
            ]
            rows = ours[_at(tap)]
            weight[_at(taps)] += torch.einsum("gom,gmi...->goi...", rows, theirs)
        per_group = inner.bias.reshape(self.layout.groups, 1, -1)
        summed = self.weight.flatten(3).sum(3) if self.layout.axes else self.weight
        bias = self.bias + (summed * per_group).sum(2).flatten()
        return Kernel(layout, weight, bias)

    def held(self) -> torch.Tensor:
        """The weight in the shape that the operator takes."""
        groups, out, given, *size = self.weight.shape
        if self.layout.transposed:
            return self.weight.transpose(1, 2).reshape(groups * given, out, *size)
        return self.weight.reshape(groups * out, given, *size)


def _at(taps: Iterable[Any]) -> tuple[Any, ...]:
    """Taps as an index of a kernel's weight."""
    return (..., *taps)


def kernel_of(convolution: Convolution) -> Kernel:
    """The numbers of a convolution whose weight and bias are constants."""
    weight, bias = constant_of(convolution.weight), constant_of(convolution.bias)
    assert weight is not None
    weight = weight.double()
    groups = convolution.groups
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    if bias is None:
        bias = weight.new_zeros(convolution.out_channels)
    if convolution.transposed:
        grouped = grouped.transpose(1, 2)
    return Kernel(layout_of(convolution), grouped, bias.double())


def layout_of(convolution: Convolution) -> Layout:
    """The layout of a convolution or a linear layer."""
    shape = tuple(value(convolution.weight).shape)
    given = shape[0] if convolution.transposed else shape[1] * convolution.groups
    axes = []
    for dim, (size, stride) in enumerate(zip(shape[2:], convolution.stride, strict=True)):
        axis = Axis(size, stride, convolution.dilation[dim])
        padding = convolution.padding
        before = axis.span // 2 if padding is None else padding[dim]
        after = axis.span - before if padding is None else before
        axes.append(replace(axis, before=before, after=after - convolution.output_padding[dim]))
    return Layout(
        given, convolution.out_channels, convolution.groups, tuple(axes), convolution.transposed
    )


def _with_groups(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """A kernel's weight as one of fewer groups, with zeros between what was apart."""
    ratio = weight.shape[0] // groups
    if ratio == 1:
        return weight
    out, given, *size = weight.shape[1:]
    wide = weight.new_zeros(groups, ratio, out, ratio, given, *size)
    index = torch.arange(ratio, device=weight.device)
    wide[:, index, :, index] = weight.reshape(groups, ratio, out, given, *size).transpose(0, 1)
    return wide.reshape(groups, ratio * out, ratio * given, *size)


def by(numbers: Iterable[int]) -> str:
    """Sizes or strides as people write them, e.g. `3x3`."""
    return "x".join(map(str, numbers))
