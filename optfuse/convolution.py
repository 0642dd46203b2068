"""A convolution or a linear layer as the passes see it, whichever ATen operator spells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from optfuse.graph import arguments, is_call, value

aten = torch.ops.aten

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
    def channel_dim(self) -> int:
        """Which dimension of the result holds the channels, counted from the end: -1 for a linear
        layer, -3 for a two-dimensional convolution (so that unbatched inputs need no case)."""
        return -1 - self.spatial

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
