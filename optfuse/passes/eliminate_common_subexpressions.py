"""Eliminate operators that compute again what has been computed before.

    y1 = f(x, c),  y2 = f(x, c)   =>   y2 = y1

Two calls are the same if operator and arguments are (defaults filled in). Numbers are the same if
their types are too: `1`, `1.0` and `True` give results of different dtypes, and 0.0 and -0.0 give
different infinities. Two constants are the same if they are one memory seen with one shape, stride
and dtype, whatever they are called: that is how tied weights look.

Guards: the operator draws no random numbers and writes to nothing, nothing writes to the memory of
its arguments, two outputs of the model do not become one tensor, and the size of the result does
not depend on the data (`nonzero`, `item`: each call's size has its own symbol).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from optfuse.graph import Edit, arguments, constant_of, describe, value, written_memory
from optfuse.passes import Match, Pass, Refusal


@dataclass(frozen=True, kw_only=True)
class Duplicate(Match):
    """`later` computes what `earlier` has computed."""

    earlier: fx.Node
    later: fx.Node


class EliminateCommonSubexpressions(Pass):
    """f(x) and f(x) are one; what makes two calls the same stands in the module's docstring."""

    name = "eliminate_common_subexpressions"
    equation = "y1 = f(x), y2 = f(x)  =>  y2 = y1"

    def begin(self, graph: fx.Graph) -> None:
        self._seen: dict[Hashable, fx.Node] = {}
        self._written = written_memory(graph)
        self._output = graph.output_node()

    def match(self, node: fx.Node) -> Match | Refusal | None:
        """Called at every call and constant; matches at the later one of two."""
        key = _key(node) if node.users else None
        if key is None:
            return None
        earlier = self._seen.setdefault(key, node)
        if earlier is node:
            return None
        reason = self._why_not(earlier, node)
        if reason:
            return Refusal(reason)
        return Duplicate(
            nodes=(node,), note=f"the same as {describe(earlier)}", earlier=earlier, later=node
        )

    def rewrite(self, edit: Edit, match: Match) -> Mapping[fx.Node, fx.Node]:  # noqa: ARG002
        """The earlier result in place of the later one."""
        assert isinstance(match, Duplicate)
        return {match.later: match.earlier}

    def _why_not(self, earlier: fx.Node, later: fx.Node) -> str | None:
        if _is_random(later):
            return f"it draws other random numbers than {describe(earlier)}"
        if any(node in self._written for node in (earlier, later, *later.all_input_nodes)):
            return f"the model writes to the memory that it and {describe(earlier)} read"
        if self._output in earlier.users and self._output in later.users:
            return f"it and {describe(earlier)} are both outputs of the model"
        return None


def _key(node: fx.Node) -> Hashable | None:
    """What two nodes that compute the same have in common; None where that cannot be told."""
    if node.op == "get_attr":
        return _constant_key(node)
    if node.op != "call_function" or (node.is_impure() and not _is_random(node)):
        return None
    if node.meta.get("unbacked_bindings"):
        # Its size depends on the data and has a name of its own that later nodes are described by.
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        given: Any = tuple(arguments(node).values())
    elif getattr(node.target, "__module__", None) == "_operator":
        given = node.args
    else:
        return None
    key = (node.target, _frozen(given))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _constant_key(node: fx.Node) -> Hashable | None:
    constant = constant_of(node)
    if constant is None:
        return None
    return (
        # No memory, as that of an empty tensor, has the address 0: there the name must do.
        constant.untyped_storage().data_ptr() or node.target,
        constant.storage_offset(),
        constant.shape,
        constant.stride(),
        constant.device,
        constant.is_conj(),
        constant.is_neg(),
        value(node).dtype,
    )


def _is_random(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )


def _frozen(argument: Any) -> Any:
    """An argument as something that can be compared and hashed, numbers with their types."""
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(each) for each in argument)
    if isinstance(argument, slice):
        return (slice, _frozen(argument.start), _frozen(argument.stop), _frozen(argument.step))
    if isinstance(argument, (float, complex)):
        # Tells 0.0 from -0.0, and finds not-a-number equal to itself.
        return (type(argument), repr(argument))
    return argument if isinstance(argument, fx.Node) else (type(argument), argument)
