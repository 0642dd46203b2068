"""Layers with other weights: what stands in front of one or behind it, folded into its constants.

    conv(s x + t, W, b)  =  conv(x, W s, b + sum(W t))      one s and one t an input channel
    s conv(x, W, b) + t  =  conv(x, s W, s b + t)           one s and one t an output channel

Everything is calculated in float64. A layer is refused, with the reason as a clause, where its
constants are none or would not be held well in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from optfuse.convolution import Affine, Convolution, convolution_of
from optfuse.graph import Edit, constant_of, describe, value


@dataclass(frozen=True)
class Folded:
    """A layer with a new weight and bias in float64; bias is None where it has none."""

    convolution: Convolution
    weight: torch.Tensor
    bias: torch.Tensor | None


def fold_input(convolution: Convolution, affine: Affine) -> Folded | str:
    """The layer that takes x where this one takes `scale * x + shift`, or why there is none, as a
    clause. Whether it can take a shift at all is for `why_no_shift` to say."""
    held = _held(convolution)
    if isinstance(held, str):
        return held
    weight, bias = held
    # A Python number or a scalar tensor lives on the CPU wherever the model is.
    scale, shift = affine.scale.to(weight.device), affine.shift.to(weight.device)
    if bool((shift != 0).any()):
        added = convolution.response(weight, shift)
        bias = added if bias is None else bias + added
    return _checked(Folded(convolution, convolution.scale_inputs(weight, scale), bias))


def fold_output(convolution: Convolution, affine: Affine) -> Folded | str:
    """The layer that gives `scale * y + shift` where this one gives y, or why there is none, as a
    clause."""
    held = _held(convolution)
    if isinstance(held, str):
        return held
    weight, bias = held
    scale, shift = affine.scale.to(weight.device), affine.shift.to(weight.device)
    if bias is not None or bool((shift != 0).any()):
        bias = shift if bias is None else bias * scale + shift
    return _checked(Folded(convolution, convolution.scale_weight(weight, scale), bias))


class FoldedLayers:
    """Puts folded layers in the place of the old ones, for one sweep over a graph.

    A constant is made once for a layer that runs several times. A weight that something else than
    a layer reads (an embedding that is tied to it) stays, and so is none to be held twice.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._made: dict[str, list[fx.Node]] = {}
        self._read: dict[int, fx.Node] = {}
        for node in graph.nodes:
            constant = constant_of(node)
            for user in node.users if constant is not None else ():
                convolution = convolution_of(user)
                if convolution is None or convolution.weight is not node:
                    assert constant is not None
                    self._read[constant.data_ptr()] = user

    def why_held(self, folded: Folded) -> str | None:
        """None where the old weight goes away with the layers that use it, else the reason why not
        as a clause."""
        weight = constant_of(folded.convolution.weight)
        assert weight is not None
        reader = self._read.get(weight.data_ptr())
        if reader is None:
            return None
        return f"{describe(reader)} reads the same weight, which would have to be held twice"

    def call(self, edit: Edit, folded: Folded, x: fx.Node, replaced: Iterable[fx.Node]) -> fx.Node:
        """The folded layer on `x`, where the old one stands, as coming from `replaced`."""
        old = folded.convolution
        edit.before(old.node, replaced)
        dtype = value(old.weight).dtype
        weight = self.constant(edit, f"{old.layer}_weight_folded", folded.weight, dtype, old.node)
        bias = None
        if folded.bias is not None:
            bias = self.constant(edit, f"{old.layer}_bias_folded", folded.bias, dtype, old.node)
        assert callable(old.node.target)
        arguments = old.with_constants(weight, bias)[1:]
        return edit.call(old.node.target, x, *arguments, **old.node.kwargs)

    def constant(
        self, edit: Edit, name: str, data: torch.Tensor, dtype: torch.dtype, user: fx.Node
    ) -> fx.Node:
        """A constant of that name and data in front of `user`, where the edit stands."""
        made = self._made.setdefault(name, [])
        for node in made:
            known = None if node._erased else constant_of(node)
            if known is not None and node < user and torch.equal(known, data):
                return node
        made.append(edit.constant(name, data, dtype))
        return made[-1]


def why_not_held(what: str, data: torch.Tensor, dtype: torch.dtype) -> str | None:
    """None where `dtype` holds these float64 numbers as precisely as any, else why not as a
    clause: too large, or so small that they lose their digits."""
    name = str(dtype).removeprefix("torch.")
    rounded = data.to(dtype).double()
    if not bool(torch.isfinite(rounded).all()):
        return f"the folded {what} is not finite in {name}"
    error, norm = torch.linalg.vector_norm(rounded - data), torch.linalg.vector_norm(data)
    # Rounding moves a number by half of eps of itself, unless it is too small to be held in full.
    if bool(error > torch.finfo(dtype).eps * norm):
        return f"the folded {what} is too small to be held in {name}"
    return None


def _held(convolution: Convolution) -> tuple[torch.Tensor, torch.Tensor | None] | str:
    """Weight and bias in float64, or why they cannot be folded into, as a clause."""
    weight = constant_of(convolution.weight)
    if weight is None:
        return "the weight is not a constant"
    if not weight.dtype.is_floating_point:
        return f"the weight is {str(weight.dtype).removeprefix('torch.')}, not real numbers"
    bias = None if convolution.bias is None else constant_of(convolution.bias)
    if convolution.bias is not None and bias is None:
        return "the bias is not a constant"
    return weight.double(), None if bias is None else bias.double()


def _checked(folded: Folded) -> Folded | str:
    dtype = value(folded.convolution.weight).dtype
    reason = why_not_held("weight", folded.weight, dtype)
    if reason is None and folded.bias is not None:
        # A bias that is too small for its digits hardly counts beside what it is added to.
        finite = torch.isfinite(folded.bias.to(dtype)).all()
        if not bool(finite):
            reason = f"the folded bias is not finite in {str(dtype).removeprefix('torch.')}"
    return folded if reason is None else reason
