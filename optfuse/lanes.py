"""Which channel each element of a tensor belongs to, followed through views, averages and pads.

A tensor's *lanes* are a fake tensor of its shape whose strides and offset count channels instead of
memory: the element at index i belongs to channel  offset + sum(i * stride).  Along the channels the
stride is 1, along all other dimensions it is 0. Whatever torch can do with a tensor by giving other
strides to the same memory (view, permute, select, slice, expand, ...) it does to lanes as well, for
sizes that are known only at run time too; where it would have to copy they cannot be followed.

    linear(x)              (b, n, 24)         offset 0   strides (0, 0, 1)
    view(3, 2, 4)          (b, n, 3, 2, 4)    offset 0   strides (0, 0, 8, 4, 1)
    select(2, 1)           (b, n, 2, 4)       offset 8   strides (0, 0, 4, 1)

Operators that calculate along dimensions of stride 0 (pooling, mean, resampling, padding) give each
channel from that channel alone, and all channels alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import fx

from optfuse.graph import arguments, is_call, value

aten = torch.ops.aten

Lanes = torch.Tensor | tuple[torch.Tensor, ...]
"""Those of a tensor, or of each result of an operator that has several."""

Passage = Literal["moves", "averages", "scales"]
"""How an operator f passes on the number that a channel is multiplied with, or has added to it.
*moves*: it only carries elements to other places. *averages*: f(s x + t) = s f(x) + t. *scales*:
f(s x) = s f(x), but a t is not kept."""

_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_VIEWS = (
    *_RESHAPES,
    aten.transpose.int,
    aten.t.default,
    aten.permute.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
)
_SPLITS = (
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
)
_COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)
_SHUFFLES = (
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.index_select.default,
)
_STAYING = (aten.roll.default, aten.flip.default)
_SUMS = (aten.sum.dim_IntList,)
_MEANS = (aten.mean.dim,)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_POOLS: Mapping[Any, int] = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
}
_RESAMPLERS: Mapping[Any, int] = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest3d.vec: 3,
    aten._upsample_nearest_exact1d.vec: 1,
    aten._upsample_nearest_exact2d.vec: 2,
    aten._upsample_nearest_exact3d.vec: 3,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bicubic2d.vec: 2,
    aten.upsample_trilinear3d.vec: 3,
}
"""The numbers that they weigh the elements with, in the last so many dimensions, add up to 1."""


def lanes_along(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The lanes of a node's fake value that has its channels along `dim`, from channel 0 on."""
    strides = [0] * tensor.dim()
    strides[dim] = 1
    mode: Any = tensor.fake_mode  # type: ignore[attr-defined]
    with mode:
        return torch.empty_strided(tensor.shape, strides)


def passage(node: fx.Node) -> Passage | None:
    """How `node` passes on what all elements of its first argument are multiplied with or have
    added, or None where it does not."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if is_call(node, operator.getitem):
        return "moves" if is_call(node.args[0], *_SPLITS) else None
    if is_call(node, *_SPLITS):
        return "moves"
    rule = _PASSAGES.get(node.target)
    # A mean may be asked for in another dtype.
    if rule is None or value(node).dtype != value(node.args[0]).dtype:
        return None
    return rule(arguments(node)) if callable(rule) else rule


def followed(node: fx.Node, lanes: Lanes) -> Lanes | None:
    """The lanes of what `node` gives, if its first argument has these; None where they mix."""
    if passage(node) is None or is_call(node, *_SHUFFLES):
        return None
    if is_call(node, operator.getitem):
        return lanes[node.args[1]]  # type: ignore[index]
    assert isinstance(lanes, torch.Tensor)
    if is_call(node, *_COPIES):
        return lanes
    if is_call(node, *_VIEWS, *_SPLITS):
        return _viewed(node, lanes)
    bound, rank = arguments(node), lanes.dim()
    dims = _calculated_along(node, bound, rank)
    if any(lanes.stride(dim) != 0 and lanes.shape[dim] != 1 for dim in dims):
        return None
    if is_call(node, *_STAYING):
        return lanes
    result = value(node)
    kept = [dim for dim in range(rank) if result.dim() == rank or dim not in dims]
    strides = [0 if dim in dims else lanes.stride(dim) for dim in kept]
    return lanes.as_strided(result.shape, strides)


def channels_in(lanes: Lanes, channels: int) -> torch.Tensor:
    """Which of so many channels a tensor holds: shape (channels,), bool."""
    held = torch.zeros(channels, dtype=torch.bool)
    for each in lanes if isinstance(lanes, tuple) else (lanes,):
        held[_numbers(each, channels)] = True
    return held


def per_channel(
    lanes: torch.Tensor, constant: torch.Tensor, channels: int, *, otherwise: float
) -> torch.Tensor | None:
    """The constant, which broadcasts to the tensor with these lanes, as one number a channel.

    Returns:
        Shape (channels,), with `otherwise` for the channels that the tensor does not hold; None
        where the constant has several numbers for one channel.
    """
    numbers = _numbers(lanes, channels)
    constant = constant.reshape([1] * (lanes.dim() - constant.dim()) + list(constant.shape))
    pairs = zip(constant.shape, numbers.shape, strict=True)
    if any(wanted not in (1, held) for wanted, held in pairs):
        return None
    found = constant.new_full((channels,), otherwise)
    found[numbers] = constant.expand(numbers.shape)
    return found


def channels_along(lanes: torch.Tensor, dim: int) -> torch.Tensor | None:
    """Which channel each index of dimension `dim` belongs to, shape (size,); None where that
    differs along other dimensions too."""
    others = [each for each in range(lanes.dim()) if each != dim % lanes.dim()]
    if any(lanes.stride(each) != 0 and lanes.shape[each] != 1 for each in others):
        return None
    step, first = int(lanes.stride(dim)), int(lanes.storage_offset())
    return torch.arange(lanes.shape[dim]) * step + first


def _numbers(lanes: torch.Tensor, channels: int) -> torch.Tensor:
    """The channel of each element; one along the dimensions where it stays the same."""
    shape = [
        size if stride != 0 else 1 for size, stride in zip(lanes.shape, lanes.stride(), strict=True)
    ]
    return torch.arange(channels).as_strided(shape, lanes.stride(), lanes.storage_offset())


def _viewed(node: fx.Node, lanes: torch.Tensor) -> Lanes | None:
    source, target = node.args[0], node.target

    def given(argument: fx.Node) -> Any:
        return lanes if argument is source else value(argument)

    try:
        with lanes.fake_mode:  # type: ignore[attr-defined]
            if is_call(node, *_RESHAPES):
                # Without dimensions of size 1: torch's fake view takes what lies on both sides of
                # one for a single strided piece, whatever the strides. And never as a copy.
                lanes = lanes.squeeze([n for n, size in enumerate(lanes.shape) if _is_one(size)])
                target = aten.view.default
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
            assert callable(target)
            result = target(*args, **kwargs)
    except (RuntimeError, ValueError):  # these elements are not one strided piece of memory
        return None
    several = tuple(result) if isinstance(result, (list, tuple)) else (result,)
    for each in several:
        sizes = zip(each.shape, each.stride(), strict=True)
        counted = [size for size, stride in sizes if stride != 0]
        if not all(isinstance(number, int) for number in (*counted, each.storage_offset())):
            return None
    return several if isinstance(result, (list, tuple)) else several[0]


def _is_one(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) and size == 1


def _calculated_along(node: fx.Node, bound: Mapping[str, Any], rank: int) -> Iterable[int]:
    if node.target in (*_MEANS, *_SUMS, *_STAYING):
        dims = bound["dim"] if "dim" in bound else bound["dims"]
        return [dim % rank for dim in dims] if dims else range(rank)
    if node.target in _PADS:
        return range(rank - len(bound["pad"]) // 2, rank)
    return range(rank - {**_POOLS, **_RESAMPLERS}[node.target], rank)


def _pooled(bound: Mapping[str, Any]) -> Passage:
    divided = bound.get("divisor_override") is None
    return "averages" if divided and not any(bound["padding"]) else "scales"


def _padded(bound: Mapping[str, Any]) -> Passage | None:
    if bound.get("mode", "constant") != "constant":
        return "moves"
    return None if bound["value"] else "scales"


_PASSAGES: Mapping[Any, Passage | Callable[[Mapping[str, Any]], Passage | None]] = {
    **dict.fromkeys((*_VIEWS, *_COPIES, *_SHUFFLES, *_STAYING), "moves"),
    **dict.fromkeys((*_MEANS, *_RESAMPLERS), "averages"),
    **dict.fromkeys(_SUMS, "scales"),
    **dict.fromkeys(_POOLS, _pooled),
    **dict.fromkeys(_PADS, _padded),
}
