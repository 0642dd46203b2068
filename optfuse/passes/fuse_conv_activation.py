"""Fuse what follows a convolution into it, as one operator.

    activation(conv(x, W, b))      =  conv_act(x, W, b)
    activation(conv(x, W, b) + r)  =  conv_act(x, W, b, r)         r as large as the result

The activations are those of `optfuse.activations`. A convolution without a bias gets one of zeros,
because fused kernels and engines match the form with a bias.

Guards: nothing else sees the convolution's result, the sum, or the inside of an activation that is
spelt with several operators; the residual has the convolution's own shape and dtype, and is added
with a factor of 1; the padding is the same on both sides; PReLU counts its channels where the
convolution has them.

A sum without an activation behind it stays as it is: engines fuse that one only as a part of more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optfuse.activations import Reading, activation_of
from optfuse.conv_act import CONV_ACT
from optfuse.convolution import Convolution, convolution_of
from optfuse.graph import Edit, arguments, describe, is_call, value, why_not_sole_user
from optfuse.passes import Match, Pass, Refusal

aten = torch.ops.aten


@dataclass(frozen=True)
class Ending:
    """The activation that a match ends with.

    Attributes:
        activation: a name in `ACTIVATIONS`.
        reading: its numbers, and what it is applied to.
        node: its last node.
    """

    activation: str
    reading: Reading
    node: fx.Node


@dataclass(frozen=True, kw_only=True)
class Fusion(Match):
    """A convolution, what is added to it, and the activation behind.

    Attributes:
        convolution: it.
        padding: its padding, the same on both sides.
        residual: what is added to its result, or None.
        ending: the activation.
    """

    convolution: Convolution
    padding: tuple[int, ...]
    residual: fx.Node | None
    ending: Ending


class FuseConvActivation(Pass):
    """activation(conv(x, W, b) [+ r]) = conv_act(x, W, b [, r]); see the module."""

    name = "fuse_conv_activation"
    equation = "activation(conv(x, W, b) [+ r])  =  conv_act(x, W, b [, r])"

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at the activation's last node."""
        found = activation_of(node)
        if found is None:
            return None
        ending = Ending(*found, node)
        source = ending.reading.source
        convolution = _proper_convolution(source)
        if convolution is not None:
            return _fuse(convolution, ending)
        return _match_sum(source, ending) if is_call(source, aten.add.Tensor) else None

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """One `conv_act` in place of all of them."""
        assert isinstance(match, Fusion)
        convolution, reading = match.convolution, match.ending.reading
        bias = convolution.bias
        if bias is None:
            bias = _zero_bias(edit, convolution)
        fused = edit.call(
            CONV_ACT,
            convolution.x,
            convolution.weight,
            bias,
            match.residual,
            reading.slope,
            list(convolution.stride),
            list(match.padding),
            list(convolution.dilation),
            convolution.transposed,
            list(convolution.output_padding),
            convolution.groups,
            match.ending.activation,
            list(reading.scalars),
        )
        return {match.ending.node: fused}


def _zero_bias(edit: Edit, convolution: Convolution) -> fx.Node:
    weight = value(convolution.weight)
    layer = re.sub(r"[._]?weight(_\w+)?$", "", str(convolution.weight.target))
    zeros = torch.zeros(convolution.out_channels, dtype=torch.float64, device=weight.device)
    return edit.constant(f"{layer}_bias_zero", zeros, weight.dtype)


def _proper_convolution(node: object) -> Convolution | None:
    convolution = convolution_of(node)
    return None if convolution is None or convolution.linear else convolution


def _match_sum(add: fx.Node, ending: Ending) -> Fusion | Refusal | None:
    bound = arguments(add)
    left, right = bound["self"], bound["other"]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    # Of two convolutions the later one, which stands nearer to the sum, has the other as its
    # residual; the reverse only where that is not possible.
    first: Refusal | None = None
    for node in sorted({left, right}, reverse=True):
        convolution = _proper_convolution(node)
        if convolution is None:
            continue
        residual = right if node is left else left
        reason = _why_not_residual(node, residual, bound["alpha"])
        outcome = (
            Refusal(reason, about=(node,)) if reason else _fuse(convolution, ending, add, residual)
        )
        if isinstance(outcome, Fusion):
            return outcome
        first = first or outcome
    return first


def _why_not_residual(convolution: fx.Node, residual: fx.Node, alpha: object) -> str | None:
    if residual is convolution:
        return "the convolution's result is added to itself"
    if alpha != 1:
        return f"the sum has a factor: its alpha is {alpha}"
    result, other = value(convolution), value(residual)
    if other.dtype != result.dtype:
        return (
            f"{describe(residual)} is {_dtype_name(other.dtype)}, "
            f"and the convolution's result is {_dtype_name(result.dtype)}"
        )
    same_rank = len(other.shape) == len(result.shape)
    if not same_rank or not all(map(_equal, other.shape, result.shape)):
        return (
            f"{describe(residual)} has the shape {tuple(other.shape)}, "
            f"and the convolution's result has {tuple(result.shape)}"
        )
    return None


def _fuse(
    convolution: Convolution,
    ending: Ending,
    add: fx.Node | None = None,
    residual: fx.Node | None = None,
) -> Fusion | Refusal:
    inner = (convolution.node, *([] if add is None else [add]), *ending.reading.between)
    nodes = (*inner, ending.node)
    about = (convolution.node,)
    for node in inner:
        reason = _why_seen_by_others(node, nodes)
        if reason:
            return Refusal(reason, about)
    if convolution.padding is None:
        return Refusal("its padding 'same' pads one side more than the other", about)
    slope = ending.reading.slope
    unbatched = value(convolution.node).dim() == convolution.spatial + 1
    if slope is not None and unbatched and not _equal(value(slope).numel(), 1):
        return Refusal(
            "the PReLU runs over dimension 1, the channels of the convolution without a batch "
            "are in dimension 0",
            about,
        )
    with_residual = "" if residual is None else f" and the sum with {describe(residual)}"
    return Fusion(
        nodes=nodes,
        note=f"{ending.activation}{with_residual} into {describe(convolution.node)}",
        convolution=convolution,
        padding=convolution.padding,
        residual=residual,
        ending=ending,
    )


def _why_seen_by_others(node: fx.Node, users: Collection[fx.Node]) -> str | None:
    """None where `users` alone see `node`'s result, else the reason as a clause."""
    other = next((user for user in node.users if user not in users), None)
    return None if other is None else why_not_sole_user(node, other)


def _equal(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every input; never specialises a dynamic one."""
    return bool(statically_known_true(left == right))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
