"""fp16 and bf16, written into the graph: low weights, explicit casts, nothing left to an autocast.

What runs low are the layers of `rules.LAYERS`, but those whose numbers do not fit the precision
(`ranges`). What does not follow by itself stays in float32 (`rules`), and casts stand where the
fewest are needed (`casts`). In ONNX these are initializers of the low type and Cast nodes, so that
an engine runs in each precision what the file says.

Seen on a CPU with instructions for bf16 alone: OpenVINO runs what is in bf16 in it and all else in
float32; PyTorch runs both, fp16 slowly; ONNX Runtime has no bf16; and both it and OpenVINO compute
fp16 in float32. `Backend.refuses` has what an engine cannot.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.utils import _pytree as pytree

from optfuse.branches import independent
from optfuse.errors import UsageError
from optfuse.graph import (
    Edit,
    arguments,
    constant_of,
    describe,
    flat_inputs,
    is_call,
    kind,
    module_path,
    operators,
    origins,
    placeholders,
    prepare,
    written_memory,
)
from optfuse.precision.attention import INSIDE, is_attention, spell_out
from optfuse.precision.casts import low_operators
from optfuse.precision.ranges import (
    HEADROOM,
    fits,
    largest_results,
    why_constant_does_not_fit,
    why_results_do_not_fit,
)
from optfuse.precision.rules import (
    ASKED,
    NAMES,
    follows,
    is_layer,
    reads_no_data,
    why_it_stays,
    why_no_file_has_it,
)
from optfuse.stages import Involved, Program, Refused, Site, Step

aten = torch.ops.aten

Low = Literal["fp16", "bf16"]
DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}

_WRITTEN = "something writes to the memory of its result"


def layers(program: Program) -> tuple[str, ...]:
    """The names of the nodes that could run in a low precision, in the order they run.

    An attention is one layer. Whether their numbers fit a precision is not looked at: that is
    `Lowering.layers`.
    """
    return tuple(
        node.name
        for node in program.graph_module.graph.nodes
        if is_layer(node) or is_attention(node)
    )


def lower(
    program: Program,
    low: Low,
    *,
    high: Collection[str] = (),
    io: bool = False,
    samples: Sequence[Sequence[torch.Tensor]] = (),
) -> Program:
    """Write a low precision into a program's graph.

    Only the graph: its `exported` stays as captured, as after `optimize`. Whoever tries
    many choices of `high` keeps one `Lowering`, which looks at the samples once.

    Args:
        program: what `optimize` gave; it stays as it is.
        low: the precision.
        high: names out of `layers` that stay in float32.
        io: inputs and outputs in float32 become low, too.
        samples: inputs on which numbers are seen, as `ranges.largest_results` takes them.

    Returns:
        The program with a step in its trace that says of each layer what became of it.

    Raises:
        UsageError: there is no layer of a name in `high`.
        ModelError: the program does not run on a sample.
    """
    return Lowering(program, low, io=io, samples=samples).program(high)


class Lowering:
    """One program on its way to one low precision: what holds for every choice of layers.

    Args:
        program, low, io, samples: as `lower` takes them.

    Raises:
        ModelError: the program does not run on a sample.
    """

    def __init__(
        self,
        program: Program,
        low: Low,
        *,
        io: bool = False,
        samples: Sequence[Sequence[torch.Tensor]] = (),
    ) -> None:
        self._program = program
        self._low = low
        self._dtype = DTYPES[low]
        self._io = io
        self._samples = len(samples)
        self._held: dict[Any, torch.nn.Parameter] = {}
        """Constants in the low precision, by the memory of those in float32."""
        self._reasons: dict[Any, str | None] = {}
        """Why a constant does not fit, alike."""
        self._known = frozenset(layers(program))
        spelled = replace(program, graph_module=_spelled(program.graph_module, ()))
        self._largest = largest_results(spelled, samples)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that run low unless they are asked not to."""
        graph_module = _spelled(self._program.graph_module, ())
        plan = self._plan(graph_module, ())
        low = [node.meta.get(INSIDE, node.name) for node in plan.layers if node in plan.low]
        return tuple(dict.fromkeys(low))

    def program(self, high: Collection[str] = ()) -> Program:
        """The program with all layers low but those in `high`, as `lower` gives it.

        Raises:
            UsageError: there is no layer of a name in `high`.
        """
        started = time.perf_counter()
        if unknown := sorted(set(high) - self._known):
            raise UsageError(
                f"'{self._program.name}' has no layer '{unknown[0]}'",
                f"It has {len(self._known)} layers that could run in {self._low}",
                "Take the names from optfuse.precision.layers(program)",
            )
        graph_module = _spelled(self._program.graph_module, high)
        plan = self._plan(graph_module, high)
        casts = self._write(graph_module, plan)
        lowered = self._with_inputs(independent(graph_module))
        step = Step(
            stage="precision",
            name=self._low,
            seconds=time.perf_counter() - started,
            operators_before=sum(operators(self._program.graph_module).values()),
            operators_after=sum(operators(lowered.graph_module).values()),
            settings={
                "casts": casts,
                "headroom": HEADROOM,
                "high": sorted(high),
                "io": self._io,
                "samples": self._samples,
            },
            sites=tuple(
                Site(describe(node), f"in {self._low}", _involved(node))
                for node in plan.layers
                if node in plan.low
            ),
            refused=tuple(
                Refused(describe(node), reason, _involved(node))
                for node, reason in plan.reasons.items()
            ),
        )
        return lowered.with_step(step)

    # Which ----------------------------------------------------------------------------------------

    def _plan(self, graph_module: fx.GraphModule, high: Collection[str]) -> _Plan:
        """What runs low in a graph, and why what does not."""
        graph = graph_module.graph
        written = written_memory(graph)
        stay: set[fx.Node] = set()
        low: set[fx.Node] = set()
        reasons: dict[fx.Node, str] = {}
        for node in graph.nodes:
            layer, border = is_layer(node), self._io and node.op in ("placeholder", "output")
            if node.name in high:
                reason: str | None = ASKED
            elif layer or border or follows(node):
                reason = _WRITTEN if node in written else self._why_high(node)
            else:
                reason = why_it_stays(node)
                stay.add(node)
            if reason is not None:
                stay.add(node)
                reasons[node] = reason
            elif layer or border:
                low.add(node)
        chosen = [node for node in graph.nodes if is_layer(node)]
        told = {n: why for n, why in reasons.items() if not follows(n) or self._is_first(n)}
        return _Plan(low_operators(list(_values(graph)), stay, low), chosen, told)

    def _why_high(self, node: fx.Node) -> str | None:
        """Why an operator that might run low cannot, where its numbers do not fit or no file has
        it."""
        if (reason := why_no_file_has_it(node, self._dtype)) is not None:
            return reason
        for operand in node.all_input_nodes:
            constant = _free_constant(operand)
            if constant is None:
                reason = self._why_result_does_not_fit(operand, "the numbers it reads")
            else:
                reason = self._why_constant_does_not_fit(constant)
            if reason is not None:
                return reason
        for number in _scalars(node):
            if not fits(number, self._dtype):
                return f"its constant {number:g} does not fit {self._low}"
        return self._why_result_does_not_fit(node, "its results")

    def _why_result_does_not_fit(self, node: fx.Node, what: str) -> str | None:
        return why_results_do_not_fit(self._largest.get(node.name, 0.0), self._dtype, what)

    def _why_constant_does_not_fit(self, constant: torch.Tensor) -> str | None:
        place = _memory(constant)
        if place not in self._reasons:
            self._reasons[place] = why_constant_does_not_fit(constant, self._dtype)
        return self._reasons[place]

    def _is_first(self, node: fx.Node) -> bool:
        """Whether what it reads fits, so that what does not is its own doing."""
        operands = [each for each in node.all_input_nodes if _free_constant(each) is None]
        return all(self._why_result_does_not_fit(each, "") is None for each in operands)

    # How ------------------------------------------------------------------------------------------

    def _write(self, graph_module: fx.GraphModule, plan: _Plan) -> int:
        """Write the types into the graph; how many casts that took."""
        writing = _Writing(Edit(graph_module), self._dtype, plan.low)
        for node in list(graph_module.graph.nodes):
            if node.op in ("call_function", "output") and not reads_no_data(node):
                reads = {each: self._read(writing, node, each) for each in node.all_input_nodes}
                node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), reads.get)
            if _owner(node) in plan.low and node.op != "output":
                node.meta["val"] = writing.retyped(node.meta["val"])
        # Of what is unused now only constants go: the rest is none of this file's business.
        graph_module.graph.eliminate_dead_code(lambda node: node.op != "get_attr")
        graph_module.graph.lint()
        graph_module.recompile()
        return writing.count

    def _read(self, writing: _Writing, node: fx.Node, operand: fx.Node) -> fx.Node:
        """What a node reads in an operand's place."""
        low = _owner(node) in writing.low
        constant = _free_constant(operand)
        if operand not in writing.float32 or (constant is not None and not low):
            return operand
        if constant is not None:
            return self._constant(writing, operand, constant)
        if low == (_owner(operand) in writing.low):
            return operand
        return writing.cast(operand, self._dtype if low else torch.float32)

    def _constant(self, writing: _Writing, node: fx.Node, constant: torch.Tensor) -> fx.Node:
        """A constant in the low precision; one for all that share its memory."""
        place = _memory(constant)
        if place not in self._held:
            rounded = constant.to(self._dtype)
            self._held[place] = torch.nn.Parameter(rounded, requires_grad=False)
        if place not in writing.constants:
            name = f"{str(node.target).replace('.', '_')}_{self._low}"
            writing.constants[place] = writing.constant(name, node, self._held[place])
        return writing.constants[place]

    def _with_inputs(self, graph_module: fx.GraphModule) -> Program:
        """The program with that graph, and examples of the types that it takes."""
        program = replace(self._program, graph_module=graph_module)
        if not self._io:
            return program
        leaves, structure = pytree.tree_flatten(
            (program.example_args, dict(program.example_kwargs))
        )
        given = flat_inputs(graph_module, program.example_args, program.example_kwargs)
        taken = {
            id(leaf): node.meta["val"].dtype
            for leaf, node in zip(given, placeholders(graph_module.graph), strict=True)
            if isinstance(leaf, torch.Tensor)
        }
        typed = [leaf.to(taken[id(leaf)]) if id(leaf) in taken else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(typed, structure)
        return replace(program, example_args=args, example_kwargs=kwargs)


@dataclass(frozen=True)
class _Plan:
    """What runs low in one graph.

    Attributes:
        low: everything that does.
        layers: all layers, in order.
        reasons: why what might have run low does not.
    """

    low: set[fx.Node]
    layers: list[fx.Node]
    reasons: dict[fx.Node, str]


class _Writing:
    """One graph while types are written into it.

    Attributes:
        low: what runs low.
        float32: what gives float32 before.
        constants: those in the low precision, by the memory of those in float32.
    """

    def __init__(self, edit: Edit, dtype: torch.dtype, low: set[fx.Node]) -> None:
        self.low = low
        self.float32 = {node for node in edit.graph.nodes if _gives_float32(node)}
        self.constants: dict[Any, fx.Node] = {}
        self._edit = edit
        self._dtype = dtype
        self._casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """What a node gives in another dtype; one cast for all readers.

        It stands right behind the node, and so in front of every write, which torch.export puts
        last.
        """
        if (node, dtype) not in self._casts:
            self._edit.before(_behind(node), [node])
            cast = self._edit.call(aten._to_copy.default, node, dtype=dtype)
            cast._rename(f"{node.name}_{NAMES[dtype]}")
            for key in ("nn_module_stack", "stack_trace"):
                cast.meta.pop(key, None)  # those of what stands behind it
                if key in node.meta:
                    cast.meta[key] = node.meta[key]
            self._casts[node, dtype] = cast
        return self._casts[node, dtype]

    @property
    def count(self) -> int:
        """How many casts were written."""
        return len(self._casts)

    def constant(self, name: str, node: fx.Node, parameter: torch.nn.Parameter) -> fx.Node:
        """A constant that stands in front of another one, with its metadata."""
        graph_module = self._edit.graph_module
        while hasattr(graph_module, name):
            name += "_"
        graph_module.register_parameter(name, parameter)
        with node.graph.inserting_before(node):
            constant = node.graph.get_attr(name)
        constant.meta = {**node.meta, "equals": [], "val": self.retyped(node.meta["val"])}
        return constant

    def retyped(self, fake: Any) -> Any:
        """A fake value with every float32 in it in the low precision."""

        def retype(leaf: Any) -> Any:
            is_float32 = isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float32
            return leaf.to(self._dtype) if is_float32 else leaf

        return pytree.tree_map(retype, fake)


def _spelled(graph_module: fx.GraphModule, high: Collection[str]) -> fx.GraphModule:
    """A copy of a graph with every attention but these in plain operators."""
    copy = independent(graph_module)
    prepare(copy)
    edit = Edit(copy)
    written = written_memory(copy.graph)
    for node in list(copy.graph.nodes):
        if is_attention(node) and node.name not in high:
            spell_out(edit, node)
        elif is_call(node, aten.view.default) and _gives_float32(node) and node not in written:
            # Another kernel may lay out its result in another way, which no view can be taken of.
            node.target = aten.reshape.default
    return copy


def _values(graph: fx.Graph) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Every value in float32 that is no constant, as who gives it and who reads it."""
    for node in graph.nodes:
        if _gives_float32(node) and _free_constant(node) is None:
            yield _owner(node), [each for each in node.users if not reads_no_data(each)]


def _gives_float32(node: fx.Node) -> bool:
    found = node.meta.get("val")
    return isinstance(found, torch.Tensor) and found.dtype is torch.float32


def _free_constant(node: fx.Node) -> torch.Tensor | None:
    """A constant in float32, which can be held in any precision."""
    return constant_of(node) if _gives_float32(node) else None


def _owner(node: fx.Node) -> fx.Node:
    """The operator that gives a value: one of several is picked by a node of its own."""
    if is_call(node, operator.getitem):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _owner(source)
    return node


def _behind(node: fx.Node) -> fx.Node:
    """The node in front of which something may stand that reads this one, the inputs being first
    among themselves."""
    return (placeholders(node.graph)[-1] if node.op == "placeholder" else node).next


def _scalars(node: fx.Node) -> Iterator[float]:
    """The numbers that an operator computes with: not its sizes and dimensions."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    for argument, given in zip(
        node.target._schema.arguments, arguments(node).values(), strict=True
    ):
        if any(word in str(argument.type) for word in ("Tensor", "number", "float")):
            numbers = given if isinstance(given, (list, tuple)) else (given,)
            yield from (each for each in numbers if isinstance(each, (int, float)))


def _memory(constant: torch.Tensor) -> Any:
    """Tells constants from each other; tied weights are one."""
    place = (constant.untyped_storage().data_ptr(), constant.storage_offset())
    return (*place, constant.shape, constant.stride())


def _involved(node: fx.Node) -> Involved:
    return Involved(kind(node), module_path(node), origins(node))
