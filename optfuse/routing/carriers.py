"""Operators that compute each channel by itself, and every channel in the same way.

    f(x)[c] = f(x[c])           f(x, y)[c] = f(x[c], y[c])

They give their channels in the order in which they get them: activations and other elementwise
operators, pooling, resampling and padding of pixels, sums over pixels, batch norm in eval mode;
and whatever moves only other dimensions than the channels', e.g. a permute to channels last.
A constant with one number a channel must be put in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from optfuse.convolution import BATCH_NORM
from optfuse.graph import arguments, constant_of, value
from optfuse.routing.channels import CHANNELS, Channels

aten = torch.ops.aten

Dims = Callable[[fx.Node], int | None]


@dataclass(frozen=True)
class Carrier:
    """An operator through which channels pass one by one.

    Attributes:
        dim: the dimension of the result that holds the channels.
        operands: the tensors that must have their channels in one order.
        constants: the constants with one number a channel, and in which of their dimensions.
    """

    dim: int
    operands: tuple[fx.Node, ...]
    constants: Mapping[fx.Node, int]


def carrier_of(node: fx.Node, dims: Dims) -> Carrier | None:
    """How channels pass through `node`, or None where they do not.

    Args:
        node: a call.
        dims: in which dimension a tensor holds its channels; None where that is not known.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return None
    tensors = [each for each in node.all_input_nodes if isinstance(value(each), torch.Tensor)]
    holding = [each for each in tensors if dims(each) is not None and each.op != "get_attr"]
    if not holding:
        return None
    if torch.Tag.pointwise in target.tags or target in _POINTWISE:
        return _elementwise(node, tensors, holding, dims)
    rule = _RULES.get(target)
    if rule is None or len(holding) != len(_moved(tensors, target)):
        return None
    settings = arguments(node)
    found = {rule(_Passing(value(node), settings, value(x), dims(x) or 0)) for x in holding}
    dim = found.pop()
    per_channel = _PER_CHANNEL.get(target)
    constants = per_channel(settings) if per_channel else {}
    if dim is None or found or any(constant_of(each) is None for each in constants):
        return None
    return Carrier(dim, tuple(holding), constants)


def _elementwise(
    node: fx.Node, tensors: Sequence[fx.Node], holding: Sequence[fx.Node], dims: Dims
) -> Carrier | None:
    """Operands are aligned from the right, and those with one channel serve all of the others."""
    result = value(node)
    if not isinstance(result, torch.Tensor) or torch.Tag.nondeterministic_seeded in _tags(node):
        return None
    aligned = {each: result.dim() - value(each).dim() + (dims(each) or 0) for each in holding}
    wide = [x for x in holding if value(x).shape[dims(x) or 0] == result.shape[aligned[x]]]
    if not wide:
        return None
    dim = aligned[wide[0]]
    operands: list[fx.Node] = []
    constants: dict[fx.Node, int] = {}
    for tensor in tensors:
        own = dim - result.dim() + value(tensor).dim()
        if own < 0 or (isinstance(value(tensor).shape[own], int) and value(tensor).shape[own] == 1):
            continue
        if tensor in wide and aligned[tensor] == dim:
            operands.append(tensor)
        elif constant_of(tensor) is not None:
            constants[tensor] = own
        else:
            return None
    return Carrier(dim, tuple(operands), constants) if operands else None


def _tags(node: fx.Node) -> Any:
    return getattr(node.target, "tags", ())


def _moved(tensors: Sequence[fx.Node], target: Any) -> list[fx.Node]:
    """Those operands that are computed: all of them must hold their channels alike."""
    return [each for each in tensors if target is aten.cat.default or each.op != "get_attr"]


# One rule an operator -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Passing:
    """One operand of a call.

    Attributes:
        result: the fake tensor, or tensors, that the call gives.
        settings: its arguments by their names.
        x: the operand's fake tensor.
        dim: the dimension in which that holds its channels.
    """

    result: Any
    settings: Mapping[str, Any]
    x: torch.Tensor
    dim: int

    def other(self, *names: str) -> list[int]:
        """The dimensions that arguments name, counted from the front."""
        return [int(self.settings[name] % self.x.dim()) for name in names]


def _before_the_last(count: int) -> Callable[[_Passing], int | None]:
    """It computes along the last `count` dimensions only."""
    return lambda passing: passing.dim if passing.dim < passing.x.dim() - count else None


def _padded(passing: _Passing) -> int | None:
    padding = passing.settings["pad" if "pad" in passing.settings else "padding"]
    return passing.dim if passing.dim < passing.x.dim() - len(padding) // 2 else None


def _reduced(passing: _Passing) -> int | None:
    rank = passing.x.dim()
    gone = {int(each % rank) for each in passing.settings["dim"] or range(rank)}
    if passing.dim in gone:
        return None
    if passing.settings["keepdim"]:
        return passing.dim
    return passing.dim - sum(each < passing.dim for each in gone)


def _second(passing: _Passing) -> int | None:
    """It counts channels in dimension 1."""
    return passing.dim if passing.dim == 1 else None


def _elsewhere(passing: _Passing) -> int | None:
    """It acts along one other dimension, which stays."""
    return passing.dim if passing.dim not in passing.other("dim") else None


def _selected(passing: _Passing) -> int | None:
    (gone,) = passing.other("dim")
    return None if gone == passing.dim else passing.dim - (gone < passing.dim)


def _flipped(passing: _Passing) -> int | None:
    flipped = [each % passing.x.dim() for each in passing.settings["dims"]]
    return None if passing.dim in flipped else passing.dim


def _viewed(passing: _Passing) -> int | None:
    shape = passing.x.shape
    found = Channels.of(np.arange(shape[passing.dim]), passing.dim, shape)
    viewed = found.viewed(passing.result.shape)
    if viewed is None or viewed.ids.ndim != 1 or (CHANNELS,) not in viewed.axes:
        return None
    return viewed.axes.index((CHANNELS,))


def _permuted(passing: _Passing) -> int | None:
    return [each % passing.x.dim() for each in passing.settings["dims"]].index(passing.dim)


def _transposed(passing: _Passing) -> int | None:
    one, other = passing.other("dim0", "dim1")
    return {one: other, other: one}.get(passing.dim, passing.dim)


_POINTWISE = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.hardswish.default,
    aten.log_sigmoid.default,
}
"""Elementwise operators that PyTorch does not tag as such."""

_RULES: Mapping[Any, Callable[[_Passing], int | None]] = {
    **{
        getattr(getattr(aten, f"{name}{count}d"), overload): _before_the_last(count)
        for count in (1, 2, 3)
        for name, overload in (
            ("max_pool", "default"),
            ("avg_pool", "default"),
            ("adaptive_avg_pool", "default"),
            ("upsample_nearest", "vec"),
            ("upsample_nearest", "default"),
            ("_upsample_nearest_exact", "vec"),
        )
    },
    **dict.fromkeys(
        (
            aten.upsample_bilinear2d.vec,
            aten.upsample_bilinear2d.default,
            aten.upsample_bicubic2d.vec,
        ),
        _before_the_last(2),
    ),
    **dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), _padded),
    **dict.fromkeys((aten.reflection_pad2d.default, aten.replication_pad2d.default), _padded),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), _reduced),
    **dict.fromkeys((aten.slice.Tensor, aten.cat.default), _elsewhere),
    **dict.fromkeys(
        (
            aten.view.default,
            aten._unsafe_view.default,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
        _viewed,
    ),
    BATCH_NORM: _second,
    aten.prelu.default: _second,
    aten.select.int: _selected,
    aten.flip.default: _flipped,
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
}


def _statistics(settings: Mapping[str, Any]) -> dict[fx.Node, int]:
    names = ("weight", "bias", "running_mean", "running_var")
    return {settings[name]: 0 for name in names if settings[name] is not None}


def _slope(settings: Mapping[str, Any]) -> dict[fx.Node, int]:
    weight: fx.Node = settings["weight"]
    return {weight: 0} if value(weight).numel() > 1 else {}


_PER_CHANNEL: Mapping[Any, Callable[[Mapping[str, Any]], dict[fx.Node, int]]] = {
    BATCH_NORM: _statistics,
    aten.prelu.default: _slope,
}
