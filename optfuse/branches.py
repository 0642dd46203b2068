"""The graphs inside higher-order operators: `torch.cond`, `while_loop`, `scan` and `map`.

torch.export hands such a branch every tensor it reads as an operand, parameters included, so that a
pass would see no constant there. `close_over` moves constants from the operands into the branches,
which are then graphs like any other; `lift` moves them back out, since neither torch.export nor
torch.onnx takes a branch that holds tensors of its own.

Blocks that only wrap operators need none of this: torch.export's decompositions inline what stands
under `no_grad`, `enable_grad` and `autocast` (whose casts they write out), and `inline_calls`
inlines a region that was compiled once to be called several times.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from optfuse.float64 import random_inputs, run_stepwise
from optfuse.graph import (
    attribute,
    constant_of,
    copied,
    is_call,
    kind,
    memory_of,
    operators,
    placeholders,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class _Signature:
    """Where a higher-order operator takes its branches and their operands.

    A branch takes the operands of all lists, in order. Those in the last list are the same at each
    of its calls, and only they can be constants in it.

    Attributes:
        graphs: the positions of the branches.
        operands: the positions of the lists of operands.
        sliced: the position of the list of which a branch sees one slice along dimension 0.
    """

    graphs: tuple[int, ...]
    operands: tuple[int, ...]
    sliced: int | None = None


_SIGNATURES = {
    "cond": _Signature((1, 2), (3,)),
    "while_loop": _Signature((0, 1), (2, 3)),
    "scan": _Signature((0,), (1, 2, 3), sliced=2),
    "map_impl": _Signature((0,), (1, 2), sliced=1),
}
"""The operators whose branches the passes go into."""


@dataclass(frozen=True)
class Branch:
    """A graph that a higher-order operator calls, and its dotted name in the program, e.g.
    `true_graph_0.false_graph_0`."""

    path: str
    graph_module: fx.GraphModule


def independent(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy with branches of its own, that shares those parameters that its graphs use and keeps
    no others alive."""
    copy = fx.GraphModule(graph_module, copied(graph_module.graph)).eval()
    for name, inner in _modules_of(copy).items():
        owner, _, last = name.rpartition(".")
        setattr(attribute(copy, owner) if owner else copy, last, independent(inner))
    return copy


def branches(graph_module: fx.GraphModule, path: str = "") -> Iterator[Branch]:
    """The branches that passes go into, each before those inside it."""
    for call in _calls(graph_module):
        for name, inner in _branches_of(graph_module, call):
            yield Branch(path + name, inner)
            yield from branches(inner, f"{path}{name}.")


def left_alone(graph_module: fx.GraphModule, path: str = "") -> Iterator[tuple[str, str]]:
    """Every place whose inner graphs the passes do not go into, and the reason as a clause."""
    calls = _calls(graph_module)
    for node in graph_module.graph.nodes:
        inner = [] if node in calls else _branches_of(graph_module, node)
        number = sum(sum(operators(each).values()) for _, each in inner)
        if number:
            what = "operator inside {} is" if number == 1 else "operators inside {} are"
            why = (
                "its inner graph also belongs to another operator"
                if _signature(node)
                else "the passes do not know how it calls its inner graph"
            )
            reason = f"{number} {what.format(kind(node))} left alone: {why}"
            yield f"{path}{node.name}", reason
    for call in calls:
        for name, branch in _branches_of(graph_module, call):
            yield from left_alone(branch, f"{path}{name}.")


def close_over(graph_module: fx.GraphModule) -> bool:
    """Move every operand that is a constant into the branches that read it; whether there was one.

    Args:
        graph_module: prepared; its branches, which are changed, belong to no other program.
    """
    moved = False
    for call in _calls(graph_module):
        inner = _branches_of(graph_module, call)
        fixed = _last(call)
        constants = {i: each for i, each in enumerate(fixed) if constant_of(each) is not None}
        if constants:
            for _, branch in inner:
                given = placeholders(branch.graph)[-len(fixed) :]
                for position, constant in constants.items():
                    _move_in(branch, given[position], constant)
                branch.recompile()
            kept = tuple(each for i, each in enumerate(fixed) if i not in constants)
            call.args = (*call.args[:-1], kept)
            _erase_unused(constants.values())
            moved = True
        for _, branch in inner:
            moved |= close_over(branch)
    return moved


def lift(graph_module: fx.GraphModule) -> None:
    """Undo `close_over`: every tensor that a branch holds becomes an operand of it.

    What a branch returns gets memory of its own where a rewrite gave it that of an operand or of
    another result, which higher-order operators do not take.
    """
    for call in _calls(graph_module):
        inner = [branch for _, branch in _branches_of(graph_module, call)]
        held: dict[int, fx.Node] = {}
        for branch in inner:
            lift(branch)
            _own_results(branch.graph)
            for node in branch.graph.find_nodes(op="get_attr"):
                found = attribute(branch, str(node.target))
                if isinstance(found, torch.Tensor) and id(found) not in held:
                    held[id(found)] = _outside(graph_module, call, node, found)
        for branch in inner:
            _move_out(branch, list(held))
        call.args = (*call.args[:-1], (*_last(call), *held.values()))
    graph_module.recompile()


def inline_calls(graph_module: fx.GraphModule) -> None:
    """Put the operators of every region that is only called (`invoke_subgraph`, from
    `torch.compiler.nested_compile_region`) in place of the call."""
    graph = graph_module.graph
    for call in _of_kind(graph, "invoke_subgraph"):
        region, _, *operands = call.args
        assert isinstance(region, fx.Node)
        inner = attribute(graph_module, str(region.target))
        inline_calls(inner)
        given: dict[Any, Any] = dict(zip(placeholders(inner.graph), operands, strict=True))
        before = set(graph.nodes)
        with graph.inserting_before(call):
            results: Any = graph.graph_copy(inner.graph, given)
        for node in graph.nodes:
            if node.op == "get_attr" and node not in before:
                node.target = f"{region.target}.{node.target}"
        for user in list(call.users):
            assert is_call(user, operator.getitem)
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(call)
        _erase_unused([region])
    for branch in branches(graph_module):
        inline_calls(branch.graph_module)
    graph_module.recompile()


def example_inputs(
    graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int
) -> dict[str, tuple[Any, ...]]:
    """What every branch is called with when the program runs in float64 on random inputs, by the
    branch's path; both branches of a `cond`, whichever one is taken.

    A branch inside a branch gets what its own one computes from random inputs like these. A loop's
    are those of its first turn.
    """
    found: dict[str, tuple[Any, ...]] = {}
    calls = set(_calls(graph_module))
    needed = {node for call in calls for node in call.all_input_nodes}
    results: dict[fx.Node, Any] = {
        node: attribute(graph_module, str(node.target)) for node in needed if node.op == "get_attr"
    }
    drawn = random_inputs(tuple(args), kwargs, seed)
    for node, result in run_stepwise(graph_module, *drawn, widen=True, seed=seed):
        if node in needed:
            results[node] = result
        if node not in calls:
            continue
        seen = operands_of(kind(node), fx.node.map_arg(node.args, lambda n: results.get(n, n)))
        assert seen is not None
        inputs = tuple(_owned(each) for each in seen)
        for name, branch in _branches_of(graph_module, node):
            found[name] = inputs
            inner = example_inputs(branch, inputs, {}, seed)
            found.update({f"{name}.{path}": each for path, each in inner.items()})
    return found


def operands_of(name: str, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """What a higher-order operator calls its branches with; None for one that is not known.

    Args:
        name: its own, e.g. `cond`.
        args: its arguments, with tensors for nodes.
    """
    signature = _SIGNATURES.get(name)
    if signature is None:
        return None
    seen: list[Any] = []
    for position in signature.operands:
        given = args[position]
        seen += [each[0] for each in given] if position == signature.sliced else given
    return tuple(seen)


def _owned(operand: Any) -> Any:
    return operand.clone() if isinstance(operand, torch.Tensor) else operand


def _signature(node: fx.Node) -> _Signature | None:
    is_higher = isinstance(node.target, torch._ops.HigherOrderOperator)
    return _SIGNATURES.get(kind(node)) if is_higher else None


def _of_kind(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if isinstance(node.target, torch._ops.HigherOrderOperator) and kind(node) == name
    ]


def _calls(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The operators whose branches the passes go into; they are theirs alone."""
    calls = [node for node in graph_module.graph.nodes if _signature(node)]
    names = [name for call in calls for name, _ in _branches_of(graph_module, call)]
    return [
        call
        for call in calls
        if all(names.count(name) == 1 for name, _ in _branches_of(graph_module, call))
    ]


def _branches_of(graph_module: fx.GraphModule, node: fx.Node) -> list[tuple[str, fx.GraphModule]]:
    """The inner graphs that a node is given, with their names."""
    if node.op != "call_function":
        return []
    found = [
        (str(each.target), attribute(graph_module, str(each.target)))
        for each in node.all_input_nodes
        if each.op == "get_attr"
    ]
    return [(name, inner) for name, inner in found if isinstance(inner, fx.GraphModule)]


def _modules_of(graph_module: fx.GraphModule) -> dict[str, fx.GraphModule]:
    return dict(
        pair for node in graph_module.graph.nodes for pair in _branches_of(graph_module, node)
    )


def _last(call: fx.Node) -> Sequence[Any]:
    fixed = call.args[-1]
    assert isinstance(fixed, (tuple, list))
    return fixed


def _move_in(branch: fx.GraphModule, given: fx.Node, constant: fx.Node) -> None:
    """Hold a constant of the graph around the branch in the branch itself."""
    if given.users:
        owner = constant.graph.owning_module
        assert owner is not None
        target = str(constant.target)
        name = _hold(branch, target.replace(".", "_"), attribute(owner, target))
        with branch.graph.inserting_before(given):
            held = branch.graph.get_attr(name)
        held.meta = {**constant.meta, "outside": target}
        given.replace_all_uses_with(held)
    branch.graph.erase_node(given)


def _outside(
    graph_module: fx.GraphModule, call: fx.Node, held: fx.Node, found: torch.Tensor
) -> fx.Node:
    """A tensor that a branch holds, as a constant of the graph around it."""
    target = held.meta.get("outside", "")
    try:
        is_there = attribute(graph_module, target) is found
    except AttributeError:
        is_there = False
    with graph_module.graph.inserting_before(call):
        node = graph_module.graph.get_attr(
            target if is_there else _hold(graph_module, f"{call.name}_{held.target}", found)
        )
    node.meta = {key: held.meta[key] for key in ("val", "origins", "written") if key in held.meta}
    node.meta["equals"] = []
    return node


def _move_out(branch: fx.GraphModule, held: Sequence[int]) -> None:
    """Take the tensors with these identities as operands, behind all others."""
    nodes: dict[int, list[fx.Node]] = {}
    for node in branch.graph.find_nodes(op="get_attr"):
        nodes.setdefault(id(attribute(branch, str(node.target))), []).append(node)
    operands = placeholders(branch.graph)
    taken = {str(node.target) for node in operands}
    for identity in held:
        free = next(name for n in count() if (name := f"constant_{n}") not in taken)
        taken.add(free)
        with _behind(branch.graph, operands):
            given = branch.graph.placeholder(free)
        operands.append(given)
        given.meta["written"] = False
        for node in nodes.get(identity, ()):
            given.meta.update(node.meta)
            node.replace_all_uses_with(given)
            branch.graph.erase_node(node)
    branch.recompile()


def _behind(graph: fx.Graph, operands: Sequence[fx.Node]) -> Any:
    if operands:
        return graph.inserting_after(operands[-1])
    return graph.inserting_before(next(iter(graph.nodes)))


def _hold(graph_module: fx.GraphModule, wanted: str, tensor: torch.Tensor) -> str:
    """Register a tensor under the name wanted, or one like it that is free."""
    name, number = wanted, 0
    while hasattr(graph_module, name):
        name, number = f"{wanted}_{number + 1}", number + 1
    if isinstance(tensor, torch.nn.Parameter):
        graph_module.register_parameter(name, tensor)
    else:
        graph_module.register_buffer(name, tensor)
    return name


def _own_results(graph: fx.Graph) -> None:
    """Copy every result that shares its memory with an operand, a constant or another result."""
    output = graph.output_node()
    taken: set[fx.Node] = set()

    def own(result: fx.Node) -> fx.Node:
        memory = memory_of(result)
        if not memory & taken and all(each.op == "call_function" for each in memory):
            taken.update(memory)
            return result
        with graph.inserting_before(output):
            copy = graph.call_function(aten.clone.default, (result,))
        copy.meta = {**result.meta, "equals": list(result.meta.get("equals", []))}
        return copy

    output.args = fx.node.map_arg(output.args, own)


def _erase_unused(nodes: Any) -> None:
    for node in dict.fromkeys(nodes):
        if not node.users:
            node.graph.erase_node(node)
