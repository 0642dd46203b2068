"""Layers whose weight can take channels in any order, and give them in any.

conv(P x, W)  =  conv(x, W P)          P conv(x, W, b)  =  conv(x, P W, P b)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from optfuse.convolution import Convolution
from optfuse.graph import constant_of, describe, value


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer, with what may be fused into it.

    Attributes:
        convolution: it.
        residual: a tensor that is added to its result.
        slope: a constant with one number a channel of its result, or one for all.
    """

    convolution: Convolution
    residual: fx.Node | None = None
    slope: fx.Node | None = None


def why_fixed(layer: Layer) -> str | None:
    """None where the layer's constants can be put in another order, else the reason as a clause."""
    convolution = layer.convolution
    constants = {"weight": convolution.weight, "bias": convolution.bias, "slope": layer.slope}
    for name, constant in constants.items():
        if constant is None:
            continue
        if constant_of(constant) is None:
            return f"the {name} of {describe(convolution.node)} is not a constant"
        if not value(constant).is_floating_point():
            return f"the {name} of {describe(convolution.node)} has no floating-point numbers"
    return None


def reordered_weight(
    convolution: Convolution, weight: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor
) -> torch.Tensor:
    """The weight for channels in another order.

    Args:
        weight: shape (out, in/groups, *k), or (in, out/groups, *k) where it is transposed.
        inputs: which channel stands where in what it reads, shape (in,).
        outputs: which channel is to stand where in what it gives, shape (out,). Of several groups
            both have the same in each of `groups` equal places.
    """
    groups = convolution.groups
    inputs, outputs = inputs.reshape(groups, -1), outputs.reshape(groups, -1)
    group = outputs[:, :1] // outputs.shape[1]
    inside = [outputs % outputs.shape[1], inputs % inputs.shape[1]]
    rows, columns = reversed(inside) if convolution.transposed else inside
    grouped = weight.reshape(groups, rows.shape[1], columns.shape[1], *weight.shape[2:])
    moved = grouped[group[:, :, None], rows[:, :, None], columns[:, None, :]]
    return moved.reshape(weight.shape)
