"""Eliminate operators that give back what they are given.

    f(x) = x                    for every x of this shape, dtype, device and memory layout

1. Copies and marks: `clone`, `detach`, `alias`, `lift_fresh_copy` (eval dropout and nn.Identity are
   captured as these), and `native_dropout` that is not training.
2. Shapes that stay: `view`, `reshape`, `flatten`, `squeeze`, `expand`, `repeat`, a slice of the
   whole dimension, a split into one part.
3. Orders that stay: `permute` and `transpose` that move no dimension but those of size 1.
4. Casts that stay: `to` the same dtype, device and memory format; `contiguous` of what already is.
5. Neutral elements: `x*1`, `1*x`, `x/1`, `x+0`, `0+x`, `x-0`, with a number or a constant tensor.
6. `pad` by zero in any mode, `cat` of one tensor (and empty ones behind it).
7. Pooling with a kernel of 1 that keeps the size (max, average), adaptive pooling to the same size,
   nearest upsampling to the same size by a scale of 1.

Guards: shape, dtype and device are equal, symbolic ones provably so; the strides are equal too,
since a `view` behind it may need them; the model writes to neither's memory; no output of the model
becomes one of its inputs or parameters, or the same tensor as another output (ONNX cannot say
that without renaming an input or an output), nor a view of one, which it was not before.

`x + 0` turns -0.0 into 0.0, and dropping it does not; that difference is accepted. All else is
exact for every number, infinities and not-a-numbers included.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from optfuse.graph import (
    Edit,
    arguments,
    constant_of,
    describe,
    is_call,
    kind,
    memory_of,
    value,
    written_memory,
)
from optfuse.passes import Match, Pass, Refusal

aten = torch.ops.aten

_ADAPTIVE_AVERAGE = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
)
# Where these give the shape they are given, they give every element in its place.
_COPIES = (
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten._to_copy.default,
    aten.type_as.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.repeat.default,
    aten.slice.Tensor,
)
_PADS = (
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
)
_POOLS = (
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
)
_NEAREST = (
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
    aten._upsample_nearest_exact1d.default,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact3d.default,
)
_MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar)
_ADD = (aten.add.Tensor, aten.add.Scalar)
_DIVIDE = (aten.div.Tensor, aten.div.Scalar)
_SUBTRACT = (aten.sub.Tensor, aten.sub.Scalar)
_ARITHMETIC = (*_MULTIPLY, *_ADD, *_DIVIDE, *_SUBTRACT)
# Operators of several results, of which the first may be what they were given.
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_POOLS_WITH_INDICES = (
    aten.max_pool2d_with_indices.default,
    aten.max_pool3d_with_indices.default,
)
_ADAPTIVE_MAX = (
    aten.adaptive_max_pool2d.default,
    aten.adaptive_max_pool3d.default,
)


@dataclass(frozen=True, kw_only=True)
class Identity(Match):
    """An operator whose result is `source`."""

    result: fx.Node
    source: fx.Node


class EliminateIdentity(Pass):
    """f(x) = x; the cases and the guards stand in the module's docstring."""

    name = "eliminate_identity"
    equation = "f(x) = x   (eval dropout, no-op view / permute / to / pad / cat / pool, x*1, x+0)"

    def begin(self, graph: fx.Graph) -> None:
        self._written = written_memory(graph)
        self._output = graph.output_node()

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at the operator that may be an identity (or at the result picked from it)."""
        if is_call(node, aten.native_dropout.default) and arguments(node)["train"] is not False:
            return Refusal("the dropout is in training mode and draws random numbers")
        rule = _RULES.get(node.target) if node.op == "call_function" and node.users else None
        source = rule(node) if rule else None
        if source is None or isinstance(source, Refusal):
            return source
        given, result = value(source), value(node)
        if not _comparable(given, result):
            return None
        if result.dtype != given.dtype or not _same_shape(result, given):
            return _refuse_arithmetic(node, given) if node.target in _ARITHMETIC else None
        if not _same_strides(result, given):
            # A copy into another layout is no identity at all.
            return None if node.target in _COPIES else Refusal("it also changes the memory layout")
        reason = self._why_not(node, source)
        if reason:
            return Refusal(reason)
        return Identity(nodes=(node,), note=f"gives {describe(source)}", result=node, source=source)

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:  # noqa: ARG002
        """The input in place of the result."""
        assert isinstance(match, Identity)
        return {match.result: match.source}

    def _why_not(self, node: fx.Node, source: fx.Node) -> str | None:
        if source in self._written or node in self._written:
            return "the model writes to the memory of its input"
        if self._output not in node.users:
            return None
        memory = memory_of(source)
        is_a = "is" if source in memory else "is a view of"
        if any(each.op == "placeholder" for each in memory):
            return f"its result is an output and its input {is_a} an input of the model"
        if any(each.op == "get_attr" for each in memory):
            return f"its result is an output and its input {is_a} a parameter of the model"
        if self._output in source.users:
            return "its result and its input are both outputs of the model"
        others = [each for each in self._output.all_input_nodes if each is not node]
        if any(memory_of(other) & memory for other in others):
            return "its result is an output, and another output lies in the memory of its input"
        return None


def _first(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def _permuted(node: fx.Node) -> fx.Node | None:
    bound = arguments(node)
    shape = value(bound["self"]).shape
    order = [dim % len(shape) for dim in bound["dims"]]
    moved = [dim for dim in order if not _equal(shape[dim], 1)]
    return _first(node) if moved == sorted(moved) else None


def _transposed(node: fx.Node) -> fx.Node | None:
    bound = arguments(node)
    shape = value(bound["self"]).shape
    first, second = (bound[name] % max(len(shape), 1) for name in ("dim0", "dim1"))
    return _first(node) if first == second else None


def _concatenated(node: fx.Node) -> fx.Node | None:
    """At an equal size, all tensors but this one are empty."""
    return next(iter(node.all_input_nodes), None)


def _padded(node: fx.Node) -> fx.Node | None:
    bound = arguments(node)
    amounts = bound["pad"] if "pad" in bound else bound["padding"]
    return _first(node) if all(_is_number(amount, 0) for amount in amounts) else None


def _pooled(node: fx.Node) -> fx.Node | None:
    """A kernel of 1 reads one element; at an equal size it reads every one, in order."""
    bound = arguments(node)
    if not all(_is_number(size, 1) for size in bound["kernel_size"]):
        return None
    if not all(_is_number(amount, 0) for amount in bound["padding"]):
        return None
    return _first(node) if bound.get("divisor_override") in (None, 1) else None


def _upsampled(node: fx.Node) -> fx.Node | Refusal | None:
    """At an equal size a scale given beside it still decides which elements are read."""
    bound = arguments(node)
    source = _first(node)
    if source is None or not _same_shape(value(node), value(source)):
        return None
    scales = [
        scale
        for name, given in bound.items()
        if name.startswith("scale") and given is not None
        for scale in (given if isinstance(given, (list, tuple)) else [given])
    ]
    for scale in scales:
        if not _is_number(scale, 1):
            return Refusal(f"its scale of {scale} reads some elements twice and others never")
    return source


def _calculated(node: fx.Node) -> fx.Node | None:
    """The operand beside a neutral element."""
    bound = arguments(node)
    neutral = 1 if node.target in (*_MULTIPLY, *_DIVIDE) else 0
    pairs = [(bound["self"], bound["other"])]
    if node.target in _MULTIPLY or (node.target in _ADD and bound["alpha"] == 1):
        pairs.append((bound["other"], bound["self"]))
    for operand, constant in pairs:
        if isinstance(operand, fx.Node) and _is_all(constant, neutral):
            return operand
    return None


def _picked(node: fx.Node) -> fx.Node | None:
    """The first result of an operator that has several."""
    call, index = node.args
    if index != 0 or not isinstance(call, fx.Node):
        return None
    if is_call(call, *_SPLITS, *_ADAPTIVE_MAX):
        return _first(call)
    if is_call(call, *_POOLS_WITH_INDICES):
        return _pooled(call)
    if is_call(call, aten.native_dropout.default) and arguments(call)["train"] is False:
        return _first(call)
    return None


_RULES: Mapping[Any, Callable[[fx.Node], fx.Node | Refusal | None]] = {
    **dict.fromkeys((*_COPIES, *_ADAPTIVE_AVERAGE), _first),
    **dict.fromkeys(_PADS, _padded),
    **dict.fromkeys(_POOLS, _pooled),
    **dict.fromkeys(_NEAREST, _upsampled),
    **dict.fromkeys(_ARITHMETIC, _calculated),
    aten.permute.default: _permuted,
    aten.transpose.int: _transposed,
    aten.cat.default: _concatenated,
    operator.getitem: _picked,
}
"""Which argument an operator gives back if that has the shape, dtype and layout of its result."""


def _comparable(first: Any, second: Any) -> bool:
    return (
        isinstance(first, torch.Tensor)
        and isinstance(second, torch.Tensor)
        and first.device == second.device
        and first.layout == second.layout
    )


def _refuse_arithmetic(node: fx.Node, given: torch.Tensor) -> Refusal:
    result = value(node)
    if result.dtype != given.dtype:
        return Refusal(f"the {kind(node)} changes the dtype from {_name(given)} to {_name(result)}")
    return Refusal(f"the constant of {kind(node)} makes the result larger")


def _same_shape(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dim() == second.dim() and all(
        _equal(one, other) for one, other in zip(first.shape, second.shape, strict=True)
    )


def _same_strides(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; a dimension of size 1 has no stride."""
    if first.layout is not torch.strided:
        return True
    return all(
        _equal(size, 1) or _equal(one, other)
        for size, one, other in zip(first.shape, first.stride(), second.stride(), strict=True)
    )


def _equal(first: int | torch.SymInt, second: int | torch.SymInt) -> bool:
    """Whether two sizes are equal whatever the inputs' dynamic dimensions are."""
    return statically_known_true(first == second)


def _is_number(given: Any, number: int) -> bool:
    return isinstance(given, (int, float)) and given == number


def _is_all(given: Any, number: int) -> bool:
    """Whether a scalar or a constant tensor is `number` everywhere."""
    if not isinstance(given, fx.Node):
        return isinstance(given, (int, float, complex)) and given == number
    constant = constant_of(given)
    if constant is None or constant.numel() == 0:
        return False
    # Most constants are told apart by their first element alone.
    first = constant[(0,) * constant.dim()]
    return bool(first == number) and bool((constant == number).all())


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
