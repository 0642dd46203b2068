"""A convolution or a linear layer as the passes see it, whichever ATen operator spells it, and what
scales and shifts its channels."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from optfuse.graph import arguments, constant_of, is_call, kind, value

aten = torch.ops.aten

BATCH_NORM = aten._native_batch_norm_legit_no_training.default
"""Batch norm with stored statistics; its first result is the normalised tensor."""

_REVERSED = (aten.rsub.Tensor, aten.rsub.Scalar)
ARITHMETIC: Mapping[Any, Any] = {
    aten.mul.Tensor: operator.mul,
    aten.mul.Scalar: operator.mul,
    aten.div.Tensor: operator.truediv,
    aten.div.Scalar: operator.truediv,
    aten.add.Tensor: operator.add,
    aten.add.Scalar: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.sub.Scalar: operator.sub,
    **dict.fromkeys(_REVERSED, operator.sub),
}
"""The operators of two operands that are linear in one where the other is a constant (a constant
divided by something is not), and what each calculates; `rsub` with its operands exchanged."""

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)


@dataclass(frozen=True)
class Convolution:
    """One convolution's operands and settings, normalised.

    Attributes:
        node: the call.
        x, weight, bias: its operands; bias is None where it has none.
        stride, dilation, output_padding: one number a spatial dimension.
        padding: likewise, or None where `padding="same"` pads one side more than the other.
        transposed: whether it is a transposed convolution, whose weight is (in, out/groups, *k).
        groups: as usual; 1 for a linear layer.
        linear: it is a linear layer, with its features in the last dimension.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | None = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1
    linear: bool = False

    @property
    def spatial(self) -> int:
        """How many spatial dimensions it has: 1, 2 or 3; 0 for a linear layer."""
        return len(self.stride)

    @property
    def out_channels(self) -> int:
        """How many channels (features) it gives."""
        shape = value(self.weight).shape
        return int(shape[1] * self.groups if self.transposed else shape[0])

    @property
    def in_channels(self) -> int:
        """How many channels (features) it takes."""
        shape = value(self.weight).shape
        return int(shape[0] if self.transposed else shape[1] * self.groups)

    @property
    def channel_dim(self) -> int:
        """Which dimension of what it takes and gives holds the channels, counted from the end: -1
        for a linear layer, -3 for a two-dimensional convolution (so that unbatched inputs need no
        case)."""
        return -1 - self.spatial

    @property
    def layer(self) -> str:
        """The name that its weight is held under, without what passes appended to it."""
        return re.sub(r"[._]?weight(_\w+)?$", "", str(self.weight.target))

    def with_constants(self, weight: fx.Node, bias: fx.Node | None) -> tuple[Any, ...]:
        """The call's arguments with another weight and bias and all else as it was."""
        return (self.x, weight, bias, *self.node.args[3:])

    def scale_weight(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight multiplied by one number an output channel.

        Args:
            weight: as this convolution holds it, shape (out, in/groups, *k), or
                (in, out/groups, *k) where it is transposed.
            scale: shape (out,).
        """
        if not self.transposed:
            return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        # Group g reads input channels g * in/groups onwards and writes output channels
        # g * out/groups onwards, so each group has its own part of the scale.
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        scale = scale.reshape(self.groups, 1, -1, *[1] * (weight.dim() - 2))
        return (grouped * scale).reshape(weight.shape)

    def scale_inputs(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight multiplied by one number an input channel.

        Args:
            weight: as `scale_weight` takes it.
            scale: shape (in,).
        """
        if self.transposed:
            return weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        scale = scale.reshape(self.groups, 1, -1, *[1] * (weight.dim() - 2))
        return (grouped * scale).reshape(weight.shape)

    def response(self, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """What the layer without its bias gives where each input channel is one number everywhere,
        shape (out,), float64. Away from a border, or where `why_no_shift` is None.

        Args:
            weight: as `scale_weight` takes it.
            shift: that number, shape (in,).
        """
        kernel = tuple(range(2, weight.dim()))
        summed = self.scale_inputs(weight.double(), shift)
        summed = summed.sum(kernel) if kernel else summed
        grouped = summed.reshape(self.groups, -1, summed.shape[1])
        return grouped.sum(1 if self.transposed else 2).reshape(-1)

    def why_no_shift(self) -> str | None:
        """None where adding one number a channel to what it takes adds one number a channel to
        what it gives, else the reason as a clause."""
        if self.linear:
            return None
        if self.transposed:
            ones = {*value(self.weight).shape[2:], *self.stride} == {1}
            if ones and not any(self.output_padding):
                return None
            return "is transposed, and a shift in front of it comes out differently at each place"
        if self.padding is not None and not any(self.padding):
            return None
        return "pads with zeros, where a folded shift would be missing"


@dataclass(frozen=True)
class Affine:
    """y -> scale * y + shift, in float64, one number a channel: both of shape (channels,)."""

    scale: torch.Tensor
    shift: torch.Tensor

    def part(self, start: int, size: int) -> Affine:
        """The same for `size` channels from `start` on."""
        chosen = slice(start, start + size)
        return Affine(self.scale[chosen], self.shift[chosen])


def batch_norm_affine(norm: fx.Node) -> Affine | str:
    """What a call of `BATCH_NORM` does to the channels in dimension 1, or as a clause why that
    cannot be told."""
    bound = arguments(norm)
    mean, var = constant_of(bound["running_mean"]), constant_of(bound["running_var"])
    if mean is None or var is None:
        return "the batch norm's statistics are not constants"
    gamma, beta = constant_of(bound["weight"]), constant_of(bound["bias"])
    if (bound["weight"] is not None and gamma is None) or (
        bound["bias"] is not None and beta is None
    ):
        return "the batch norm's weight or bias is not a constant"
    scale = torch.rsqrt(var.double() + bound["eps"])
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    if beta is not None:
        shift = shift + beta.double()
    return Affine(scale, shift)


def arithmetic_affine(
    node: fx.Node, source: fx.Node, channel_dim: int, channels: int
) -> Affine | str | None:
    """What one of `ARITHMETIC` does to the channels of `source`, the other operand being a number
    or a constant tensor.

    Args:
        node: the call; `source` is one of its operands.
        channel_dim: the dimension of `source` that holds the channels, counted from the end.
        channels: how many there are.

    Returns:
        None where the other operand is no constant of real numbers; a clause where it is one, and
        yet this is nothing that scales and shifts channels.
    """
    operands = list(node.args[:2])
    other = operands[1 - operands.index(source)]
    constant = (
        torch.tensor(other, dtype=torch.float64)
        if isinstance(other, (int, float)) and not isinstance(other, bool)
        else constant_of(other)
    )
    if constant is None or constant.is_complex() or constant.dtype is torch.bool:
        return None
    if value(node).dtype != value(source).dtype:
        return f"the {kind(node)} changes the dtype"
    per_channel = _per_channel(constant.double(), value(source).dim(), channel_dim, channels)
    if per_channel is None:
        return f"the constant of {kind(node)} does not have one number a channel"
    constant_first = (operands[0] is not source) != (node.target in _REVERSED)
    combine = ARITHMETIC[node.target]
    one, zero = torch.ones_like(per_channel), torch.zeros_like(per_channel)
    if combine is operator.truediv and constant_first:
        return "a constant divided by the convolution's result is not linear"
    if combine is operator.mul or combine is operator.truediv:
        return Affine(combine(one, per_channel), zero)
    # add: a + alpha * b, sub: a - alpha * b
    alpha = arguments(node).get("alpha", 1)
    sign = alpha if combine is operator.add else -alpha
    if constant_first:
        return Affine(one * sign, per_channel)
    return Affine(one, per_channel * sign)


def _per_channel(
    constant: torch.Tensor, rank: int, channel_dim: int, channels: int
) -> torch.Tensor | None:
    """The constant as one float64 number a channel, shape (channels,), or None if it has more."""
    if constant.dim() > rank:
        return None
    shape = (1,) * (rank - constant.dim()) + tuple(constant.shape)
    if any(size != 1 for dim, size in enumerate(shape) if dim != rank + channel_dim):
        return None
    # One channel times three numbers is three channels: a constant may not widen the result.
    if constant.numel() not in (1, channels):
        return None
    return constant.reshape(-1).expand(channels).clone()


def convolution_of(node: Any) -> Convolution | None:
    """The convolution or linear layer that `node` calls, or None."""
    if is_call(node, aten.linear.default):
        return _linear(node)
    if not is_call(node, *_CONVOLUTIONS, *_TRANSPOSED):
        return None
    bound = arguments(node)
    weight: fx.Node = bound["weight"]
    spatial = value(weight).dim() - 2
    transposed = node.target in _TRANSPOSED
    dilation = _each(bound["dilation"], spatial)
    return Convolution(
        node,
        bound["input"],
        weight,
        bound["bias"],
        stride=_each(bound["stride"], spatial),
        padding=_padding(bound["padding"], tuple(value(weight).shape[2:]), dilation),
        dilation=dilation,
        output_padding=_each(bound["output_padding"], spatial) if transposed else (0,) * spatial,
        transposed=transposed,
        groups=bound["groups"],
    )


def _linear(node: fx.Node) -> Convolution | None:
    bound = arguments(node)
    weight, bias = bound["weight"], bound["bias"]
    # ATen also takes a vector as weight (the result then has no features) and, by broadcasting,
    # any bias that fits: those are not layers with one number a channel.
    if value(weight).dim() != 2:
        return None
    if bias is not None and value(bias).shape != value(weight).shape[:1]:
        return None
    return Convolution(node, bound["input"], weight, bias, linear=True)


def _each(setting: Any, spatial: int) -> tuple[int, ...]:
    numbers = tuple(setting) if isinstance(setting, (list, tuple)) else (setting,)
    return numbers * spatial if len(numbers) == 1 else numbers


def _padding(
    setting: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    if setting == "valid":
        return (0,) * len(kernel)
    if setting == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return _each(setting, len(kernel))
