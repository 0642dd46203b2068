"""The layers of a captured program: in float64 and in its own precision, and of another in step
with it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from optfuse.errors import ModelError, OptfuseError
from optfuse.float64 import run_stepwise
from optfuse.graph import (
    attribute,
    equals,
    is_call,
    kind,
    module_path,
    origins,
    written_memory,
)
from optfuse.layers.drifts import LIMIT, Exact, Place, apart, drifts, row
from optfuse.stages import LayerDrift, LayerDrifts, Program

REFERENCE = "captured program in float64"

_CAST = torch.ops.aten._to_copy.default


def compare_layers(
    reference: Program,
    other: Program,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    limit: float = LIMIT,
    seed: int = 0,
) -> LayerDrifts:
    """Run a program and the one it was captured as in step, and compare them layer by layer.

    Five runs take turns: the reference in float64; it and `other` in their own precision; and both
    of these once more with every layer fed with the float64 values. They keep only what is still
    needed, a few activations. PyTorch runs them, on the device that the programs are on.

    Args:
        reference: as captured.
        other: what `optimize` made of it, or another capture of the same architecture, whose nodes
            are then taken for those of the same name and kind.
        args, kwargs: inputs; by default the reference's examples.
        limit: the growth from which a layer is a suspect.
        seed: for operators that draw random numbers.

    Raises:
        ModelError: one of them does not run, or the reference not in float64.
    """
    inputs = (
        reference.example_args if args is None else args,
        reference.example_kwargs if kwargs is None else kwargs,
    )
    places = _places(Captured(reference.graph_module), other.graph_module)
    wanted = [place.target for place in places.values()]
    exact = ProgramReference(reference, *inputs, wanted, seed=seed)
    with running_in_step(other.name):
        rows = _in_step(exact, other.graph_module, places, *inputs, seed)
        return drifts(rows, "torch", exact.name, limit)


@contextmanager
def running_in_step(name: str) -> Iterator[None]:
    """Say of whatever an operator raises inside that the layers of `name` cannot be compared."""
    try:
        yield
    except OptfuseError:
        raise
    except Exception as error:  # an operator may raise anything
        raise ModelError(
            f"The layers of '{name}' cannot be compared",
            f"A layer does not run by itself or in float64: {_one_line(error)}",
            "Compare the outputs alone, without --per-layer",
        ) from error


class Captured:
    """The results of a captured graph that something else can be compared with: tensors that
    nothing writes to after they were computed.

    Attributes:
        nodes: by their names.
        names: of all nodes of the graph.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.names = {node.name for node in graph_module.graph.nodes}
        written = written_memory(graph_module.graph)
        self.nodes = {
            node.name: node
            for node in graph_module.graph.nodes
            if node.op == "call_function" and _is_tensor(node) and node not in written
        }

    def place(self, name: str, of_kind: str, equal: Sequence[str], made_of: Sequence[str]) -> Place:
        """Where a result stands that computes the value of these nodes, made of those.

        Args:
            name, of_kind: of the result.
            equal: the first of them is what it is compared with.
            made_of: names of captured nodes.
        """
        first = _first_of(self.nodes[equal[0]], set(made_of))
        module = module_path(first)
        return Place(name, of_kind, module, tuple(equal), tuple(made_of), equal[0])


class ProgramReference:
    """A captured program run in float64 and in its own precision, only as far as is needed.

    Args:
        program: as captured.
        args, kwargs: its inputs.
        wanted: the names of the nodes that will be asked for, each once.
        seed: for operators that draw random numbers.
    """

    name = REFERENCE

    def __init__(
        self,
        program: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        wanted: Collection[str],
        *,
        seed: int = 0,
    ) -> None:
        module = program.graph_module
        self._wanted = set(wanted)
        self._held: dict[str, Exact] = {}
        self._now: tuple[str, Any] = ("", None)
        self._exact = run_stepwise(module, args, kwargs, widen=True, seed=seed)
        self._own = run_stepwise(module, args, kwargs, widen=False, seed=seed)
        self._alone = run_stepwise(
            module, args, kwargs, widen=False, seed=seed, replace=self._replaced
        )

    def hold(self, targets: Sequence[str]) -> None:
        """Run on until all of these have been computed."""
        for target in targets:
            self.exact(target)

    def exact(self, target: str) -> Exact:
        """What that node gives in float64; it is computed now, if it was not yet."""
        while target not in self._held:
            self._advance()
        return self._held[target]

    def release(self, target: str) -> None:
        """Forget that node's value."""
        del self._held[target]

    def _advance(self) -> None:
        node, exact = next(self._exact)
        self._now = (node.name, exact)  # which the third run reads while it is at this node
        _, own = next(self._own)
        _, alone = next(self._alone)
        if node.name in self._wanted:
            self._held[node.name] = Exact(exact, apart(exact, own), apart(exact, alone))

    def _replaced(self, node: fx.Node, value: Any) -> Any:
        name, exact = self._now
        assert name == node.name
        return fed(exact, value) if name in self._wanted else value


def fed(exact: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What later layers read in place of `value`: the reference's, in the precision of `value`.

    Integers and booleans stay, since a near tie may be decided either way.
    """
    if not (value.is_floating_point() or value.is_complex()) or value.shape != exact.shape:
        return value
    return exact.to(value.device, value.dtype)


def _first_of(node: fx.Node, made_of: Collection[str]) -> fx.Node:
    """The node that a layer begins with: back from its end, as long as an input is part of it. The
    first that has weights, where one has."""
    chain = [node]
    while True:
        inputs = [each for each in chain[-1].all_input_nodes if each.op == "call_function"]
        before = next((each for each in inputs if each.name in made_of), None)
        if before is None:
            break
        chain.append(before)
    weighted = [each for each in chain if any(i.op == "get_attr" for i in each.all_input_nodes)]
    return (weighted or chain)[-1]


def _places(captured: Captured, graph_module: fx.GraphModule) -> dict[fx.Node, Place]:
    """Which node of another graph computes the value of which captured one, each of them once."""
    written = written_memory(graph_module.graph)
    places: dict[fx.Node, Place] = {}
    taken: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op not in ("call_function", "get_attr") or node in written or not _is_tensor(node):
            continue
        equal = [name for name in equals(node) if name in captured.nodes and name not in taken]
        if not equal or _is_another(node, captured.nodes[equal[0]]):
            continue
        taken.update(equal)
        places[node] = captured.place(node.name, kind(node), equal, origins(node))
    return places


def _is_another(node: fx.Node, captured: fx.Node) -> bool:
    """Whether two nodes of different captures merely have the same name."""
    return origins(node) == (node.name,) == (captured.name,) and kind(node) != kind(captured)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _types_read(node: fx.Node, fed_at: Collection[fx.Node]) -> set[torch.dtype]:
    """The types of what is read in a layer, from where it is fed to its result, as `growth` takes
    them."""
    found: set[torch.dtype] = set()
    inside = {node}
    waiting = [node]
    while waiting:
        reader = waiting.pop()
        for each in reader.all_input_nodes:
            if _is_tensor(each) and not (is_call(reader, _CAST) and is_call(each, _CAST)):
                found.add(each.meta["val"].dtype)
            if each not in fed_at and each not in inside:
                inside.add(each)
                waiting.append(each)
    return found


def _in_step(
    reference: ProgramReference,
    graph_module: fx.GraphModule,
    places: Mapping[fx.Node, Place],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    seed: int,
) -> Iterator[LayerDrift]:
    def replaced(node: fx.Node, value: Any) -> Any:
        place = places.get(node)
        return value if place is None else fed(reference.exact(place.target).value, value)

    def compared(node: fx.Node, value: torch.Tensor, alone: torch.Tensor) -> Iterator[LayerDrift]:
        place = places[node]
        exact = reference.exact(place.target)
        if value.shape == exact.value.shape:
            yield row(place, exact, value, alone, _types_read(node, places))
        reference.release(place.target)

    for node in places:
        if node.op == "get_attr":
            constant = attribute(graph_module, str(node.target)).detach()
            yield from compared(node, constant, constant)
    runs = zip(
        run_stepwise(graph_module, args, kwargs, widen=False, seed=seed),
        run_stepwise(graph_module, args, kwargs, widen=False, seed=seed, replace=replaced),
        strict=True,
    )
    for (node, value), (_, alone) in runs:
        if node in places:
            yield from compared(node, value, alone)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
