"""Fold what is computed from constants alone into one constant.

    f(c1, c2, ...)  =  c                                    for constants c1, c2, ...

Weight-norm and spectral-norm become plain weights, masks and position tables are computed once.
Tensors that the model makes from nothing (`arange`, `zeros`, `full`) are constants too where they
are small, and so are those that it makes like another tensor (`new_zeros`, `ones_like`): they have
its dtype, perhaps its shape, and none of its numbers.

The whole chain is computed in float64 and its end is rounded, once, to the dtype the model gives it
(integers and booleans stay exact). So it is closer to the model's function than the chain of
float32 roundings it replaces.

Guards: the operators are ATen's own, draw no random numbers and write to nothing (those of other
namespaces, and fake quantisation, are marks that an engine reads); nothing writes to the
constants; the constant does not make the model larger than it has to be (`LIMIT_BYTES`, `GROWTH`);
it does not overflow in the model's own dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from optfuse.float64 import call_float64, widened
from optfuse.graph import Edit, constant_of, is_call, value
from optfuse.passes import Match, Pass, Refusal

aten = torch.ops.aten

LIMIT_BYTES = 2**20
"""A result up to this size is always folded,"""

GROWTH = 4
"""and a larger one where it is at most this many times as large as the constants it replaces."""

CREATED_LIMIT_BYTES = 2**16
"""Up to this size a tensor made from no other one is a constant."""

_UNFOLDED = (
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.empty_permuted,
    aten.new_empty,
    aten.new_empty_strided,
    aten.fake_quantize_per_tensor_affine,
    aten.fake_quantize_per_channel_affine,
)

_NEW = (aten.new_zeros, aten.new_ones, aten.new_full)
_LIKE = (aten.zeros_like, aten.ones_like, aten.full_like)
"""They read no number of their first argument, but its dtype and, in `_LIKE`, its shape."""


@dataclass(frozen=True, kw_only=True)
class Folded(Match):
    """The constant that `result` always is: `data` in float64, held as `dtype` in the end."""

    result: fx.Node
    data: torch.Tensor
    dtype: torch.dtype


class FoldConstants(Pass):
    """f(c1, c2, ...) = c; the guards stand in the module's docstring."""

    name = "fold_constants"
    equation = "f(c1, c2, ...)  =  c   (constants, computed once in float64)"

    def begin(self, graph: fx.Graph) -> None:
        self._constant: set[fx.Node] = set()
        self._refusals: dict[fx.Node, Refusal] = {}
        for node in graph.nodes:
            outcome = _classify(node, self._constant)
            if isinstance(outcome, Refusal):
                self._refusals[node] = outcome
            elif outcome:
                self._constant.add(node)
        self._replaceable = _replaceable_bytes(self._constant)

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at the last operator of a chain of constants, whose users compute with inputs."""
        if node not in self._constant or node.op == "get_attr" or not node.users:
            return self._refusals.get(node)
        if not isinstance(value(node), torch.Tensor) or all(
            u in self._constant for u in node.users
        ):
            return None
        if is_call(node, aten.clone.default) and _is_only_returned(node):
            return None
        chain, leaves = _chain(node)
        replaced_bytes = sum(self._replaceable.get(leaf, 0) for leaf in leaves)
        refusal = _refuse_growth(_size_bytes(value(node)), replaced_bytes, LIMIT_BYTES)
        data = refusal or _compute(chain)
        if isinstance(data, Refusal):
            return data
        return Folded(
            nodes=tuple(chain),
            note=f"a constant of shape {tuple(data.shape)} from {_count(len(chain), 'operator')}",
            result=node,
            data=data,
            dtype=value(node).dtype,
        )

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:
        """The constant in place of the chain's last result."""
        assert isinstance(match, Folded)
        name = f"{match.result.name}_constant"
        return {match.result: edit.constant(name, match.data, match.dtype)}


def _classify(node: fx.Node, constant: set[fx.Node]) -> bool | Refusal:
    """Whether a node's result is a constant that may be computed, given those before it."""
    if node.op == "get_attr":
        return constant_of(node) is not None
    inputs = _read(node)
    if not all(each in constant for each in inputs) or not _is_functional(node):
        return False
    if is_call(node, operator.getitem):
        return True
    if torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        return Refusal("it draws random numbers")
    result_bytes = _size_bytes(value(node))
    if inputs:
        input_bytes = sum(_size_bytes(value(each)) for each in inputs)
        return _refuse_growth(result_bytes, input_bytes, LIMIT_BYTES) or True
    return _refuse_growth(result_bytes, 0, CREATED_LIMIT_BYTES) or True


def _is_only_returned(copy: fx.Node) -> bool:
    """Whether it copies a constant so that what is returned is no constant of the model."""
    source = copy.args[0]
    assert isinstance(source, fx.Node)
    return source.op == "get_attr" and all(user.op == "output" for user in copy.users)


def _read(node: fx.Node) -> list[fx.Node]:
    """Those of its inputs that a node reads numbers of."""
    made_like = node.args[0] if _is_made_like(node) else None
    return [each for each in node.all_input_nodes if each is not made_like]


def _is_made_like(node: fx.Node) -> bool:
    """Whether the node's first argument gives its dtype alone, or its shape too."""
    return getattr(node.target, "overloadpacket", None) in (*_NEW, *_LIKE)


def _is_functional(node: fx.Node) -> bool:
    if node.op != "call_function" or not all(_is_computable(v) for v in _results(node)):
        return False
    if is_call(node, operator.getitem):
        return True
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "prims")
        and target.overloadpacket not in _UNFOLDED
        and not target._schema.is_mutable
    )


def _results(node: fx.Node) -> tuple[Any, ...]:
    found = node.meta.get("val")
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def _is_computable(result: Any) -> bool:
    """A dense tensor of known shape, in a dtype that arithmetic and rounding exist for."""
    return (
        isinstance(result, torch.Tensor)
        and result.layout is torch.strided
        and all(isinstance(size, int) for size in result.shape)
        # float8 and smaller
        and not (result.dtype.is_floating_point and result.dtype.itemsize == 1)
    )


def _replaceable_bytes(constant: set[fx.Node]) -> dict[fx.Node, int]:
    """The size of every constant that nothing needs any more once all chains are folded."""
    leaves = [node for node in constant if node.op == "get_attr"]
    needed = {_storage(leaf) for leaf in leaves if any(user not in constant for user in leaf.users)}
    return {leaf: _size_bytes(value(leaf)) for leaf in leaves if _storage(leaf) not in needed}


def _storage(leaf: fx.Node) -> int:
    constant = constant_of(leaf)
    assert constant is not None
    return constant.untyped_storage().data_ptr()


def _chain(last: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """The operators that `last` is computed by, in order, and the constants they start from."""
    chain: dict[fx.Node, None] = {}
    leaves: dict[fx.Node, None] = {}
    waiting = [last]
    while waiting:
        node = waiting[-1]
        ahead = [n for n in _read(node) if n.op != "get_attr" and n not in chain]
        if ahead:
            waiting += ahead
            continue
        waiting.pop()
        chain[node] = None
        leaves.update(dict.fromkeys(n for n in _read(node) if n.op == "get_attr"))
    return list(chain), list(leaves)


def _compute(chain: list[fx.Node]) -> torch.Tensor | Refusal:
    results: dict[fx.Node, Any] = {}

    def load(node: fx.Node) -> Any:
        return constant_of(node) if node.op == "get_attr" else results[node]

    for node in chain:
        assert callable(node.target)
        given = node.args
        if _is_made_like(node):
            given = (_like(node), *given[1:])
        args, kwargs = fx.node.map_arg((given, node.kwargs), load)
        try:
            results[node] = call_float64(node.target, args, kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            return Refusal(f"{node.name} does not run in float64 ({str(error).splitlines()[0]})")
    data, expected = results[chain[-1]], value(chain[-1])
    assert isinstance(data, torch.Tensor)
    if data.shape != expected.shape or data.dtype != widened(expected.dtype):
        return Refusal("in float64 it gives another shape or dtype, as where it reads bits")
    if not torch.equal(torch.isfinite(data), torch.isfinite(data.to(expected.dtype))):
        return Refusal(f"its result is finite in float64 and overflows in {_name(expected.dtype)}")
    return data


def _like(node: fx.Node) -> torch.Tensor:
    """A tensor without meaning, as good as the first argument of one of `_NEW` or `_LIKE`."""
    assert isinstance(node.args[0], fx.Node)
    model = value(node.args[0])
    shape = value(node).shape if node.target.overloadpacket in _LIKE else ()  # type: ignore[union-attr]
    return torch.empty(shape, dtype=model.dtype, device=model.device)


def _refuse_growth(result_bytes: int, replaced_bytes: int, limit_bytes: int) -> Refusal | None:
    if result_bytes <= limit_bytes or result_bytes <= GROWTH * replaced_bytes:
        return None
    return Refusal(
        f"the constant would take {_readable(result_bytes)} in the model and replace "
        f"{_readable(replaced_bytes)}"
    )


def _size_bytes(result: Any) -> int:
    """Of a tensor, or of several, as the model holds them."""
    if isinstance(result, (tuple, list)):
        return sum(_size_bytes(each) for each in result)
    assert isinstance(result, torch.Tensor)
    return result.numel() * result.dtype.itemsize


def _readable(size_bytes: int) -> str:
    if size_bytes >= 2**20:
        return f"{size_bytes / 2**20:.1f} MiB"
    return f"{size_bytes / 2**10:.1f} KiB" if size_bytes >= 2**10 else f"{size_bytes} bytes"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
