"""Small helpers on an FX graph of functional ATen: read a node, and edit the graph around it.

Every node carries a fake tensor in `meta["val"]` (its shape and dtype), in `meta["origins"]` the
names of the captured nodes that went into it, and in `meta["equals"]` the names of those whose
value it computes. `Edit` keeps the first two true; whoever moves users from one node to another
keeps the third, with `take_over`.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import _pytree as fx_pytree
from torch.fx.experimental.symbolic_shapes import statically_known_true

if TYPE_CHECKING:
    from optfuse.stages import Program

ASSERT = torch.ops.aten._assert_tensor_metadata.default

ONNX_LAYERS = "optfuse.layers"
"""Key in an ONNX file's metadata under which our export writes down, as JSON, what its values stand
for: `{value: {"equals": [...], "origins": [...]}}`, names of captured nodes as in a node's meta."""


def export_again(program: Program) -> torch.export.ExportedProgram:
    """What torch.export makes of a program's graph as it is now; its `exported` is as captured.

    Raises:
        Exception: torch.export does not take the graph; it raises whatever it likes.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about PyTorch's own code
        return torch.export.export(
            program.graph_module,
            tuple(program.example_args),
            dict(program.example_kwargs),
            dynamic_shapes=program.dynamic_shapes,
            strict=False,
        )


def operators(graph_module: fx.GraphModule) -> dict[str, int]:
    """How many operators of each kind the graph holds, e.g. `{"conv2d": 57}`, most frequent first.

    Counted as the ATen name without its overload; graphs inside higher-order operators count too.
    Python's own calls are not counted: picking one of several results, arithmetic on sizes.
    """
    counts: dict[str, int] = {}
    for module in _with_inner_graphs(graph_module):
        for node in module.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OperatorBase):
                name = kind(node)
                counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _with_inner_graphs(graph_module: fx.GraphModule) -> list[fx.GraphModule]:
    """A graph and those that its operators call, each once."""
    found = [graph_module]
    for module in found:
        for node in module.graph.find_nodes(op="get_attr"):
            inner = attribute(module, str(node.target))
            if isinstance(inner, fx.GraphModule) and all(inner is not each for each in found):
                found.append(inner)
    return found


def kind(node: fx.Node) -> str:
    """The operator's name without namespace and overload, e.g. `conv2d`; else the node's op."""
    return _kind_of(node.target) if node.op == "call_function" else node.op


def _kind_of(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target._schema.name.split("::")[1])
        # Batch norm has one ATen operator for each way it keeps its statistics.
        return "batch_norm" if name.startswith("_native_batch_norm_legit") else name
    return getattr(target, "__name__", str(target))


def describe(node: fx.Node) -> str:
    """A node as a user recognises it: its name, and the module it came from where that is known."""
    path = module_path(node)
    return f"{node.name} ({path})" if path else node.name


def module_path(node: fx.Node) -> str:
    """The module whose forward made the node, e.g. `features.conv1`; empty where it is unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def origins(node: fx.Node) -> tuple[str, ...]:
    """The names of every captured node that went into this one; its own in a captured graph."""
    return tuple(node.meta.get("origins", (node.name,)))


def origins_of_all(nodes: Iterable[fx.Node]) -> tuple[str, ...]:
    """The names of every captured node that went into any of these, each once.

    What one rewrite adds shares one tuple of names, which is read once: the results of a split in
    the place of a thousand branches have a thousand names each.
    """
    tuples = {id(each): each for each in map(origins, nodes)}
    return tuple(dict.fromkeys(name for each in tuples.values() for name in each))


def equals(node: fx.Node) -> tuple[str, ...]:
    """The names of the captured nodes whose value this one computes; its own in a captured graph.

    Empty for what a pass added in between, e.g. a convolution that gives what three gave before.
    """
    return tuple(dict.fromkeys(node.meta.get("equals", (node.name,))))


def take_over(new: fx.Node, old: fx.Node) -> None:
    """Note that `new` computes the value of `old`, and so of every node that `old` stood for.

    Nothing is noted where their shapes or dtypes differ: `new` then only keeps the place of `old`,
    e.g. as a piece of a tensor that grew while those behind it, now in it, went away.
    """
    if _alike(value(new), value(old)):
        # In place, since one node may stand for thousands; `copied` sees that nobody shares it.
        new.meta.setdefault("equals", [new.name]).extend(equals(old))


def _alike(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other)
    return (
        one.dtype == other.dtype
        and len(one.shape) == len(other.shape)
        and all(statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True))
    )


def is_call(node: Any, *targets: Callable[..., Any]) -> bool:
    """Whether `node` is a node that calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by their schema names, defaults filled in: graphs leave those out."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            bound[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value
    return bound


def value(node: fx.Node) -> Any:
    """The node's fake value: shape, dtype and device without data."""
    return node.meta["val"]


def sole_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses `node`, or None where there are none or several.

    A user that takes it twice counts once; the graph's output counts as a user.
    """
    return next(iter(node.users)) if len(node.users) == 1 else None


def why_not_sole_user(node: fx.Node, user: fx.Node) -> str | None:
    """None where `user` alone sees `node`'s result, else the reason as a clause."""
    if any(other.op == "output" for other in node.users):
        return f"the result of {describe(node)} is also an output of the model"
    if len(node.users) > 1:
        return f"the result of {describe(node)} has {len(node.users)} users"
    return None if sole_user(node) is user else f"{describe(node)} is not used here"


def attribute(graph_module: fx.GraphModule, target: str) -> Any:
    """The attribute a `get_attr` node names."""
    found: Any = graph_module
    for part in target.split("."):
        found = getattr(found, part)
    return found


def constant_of(node: Any) -> torch.Tensor | None:
    """The tensor behind a `get_attr` node that nothing in the graph writes to, else None.

    It is the caller's own parameter: never write to it.
    """
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner = node.graph.owning_module
    assert owner is not None
    assert isinstance(node.target, str)
    found = attribute(owner, node.target)
    if not isinstance(found, torch.Tensor) or node.meta.get("written", False):
        return None
    return found.detach()


def is_finite_as(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor has no NaN and no infinity once it is rounded to `dtype`.

    By its extremes, since rounding keeps the order and a NaN makes both NaN: a mask of each large
    constant would leave holes in the heap that the next one doesn't fit into.
    """
    if tensor.is_complex():
        tensor, dtype = torch.view_as_real(tensor), dtype.to_real()
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor)).to(dtype)).all())


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy of the nodes and their metadata, with the same signature."""
    new = fx.Graph()
    output = new.graph_copy(graph, {})
    new.output(output)
    for node in new.nodes:
        if "equals" in node.meta:
            node.meta["equals"] = list(node.meta["equals"])
    # Not deep-copied: nothing writes to it, and torch warns about its own pytrees when copying.
    new._codegen = graph._codegen
    return new


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def flat_inputs(
    graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Any]:
    """The leaves of a call's arguments, one a placeholder, in the placeholders' order."""
    codegen: Any = graph_module.graph._codegen
    if not hasattr(codegen, "pytree_info"):  # a branch, which takes its leaves one by one
        return list(args)
    spec = codegen.pytree_info.in_spec
    return list(fx_pytree.tree_flatten_spec((tuple(args), dict(kwargs)), spec))


class Edit:
    """Adds nodes to one graph, in front of the node last passed to `before`.

    Args:
        graph_module: the graph to edit; its parameters are never written, new constants are
            registered beside them.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self._fake_mode = _fake_mode_of(self.graph)
        self._anchor: fx.Node | None = None
        self._origins: tuple[str, ...] = ()
        self.constants: list[str] = []
        """Names of the constants added so far."""
        self._numbered: dict[str, int] = {}

    def before(self, anchor: fx.Node, replaced: Iterable[fx.Node]) -> None:
        """Put what is added from now on in front of `anchor`, as coming from `replaced`."""
        self._anchor = anchor
        self._origins = origins_of_all(replaced)

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add one operator call, with its shape and dtype worked out."""
        node = self._insert("call_function", target, args, kwargs)
        with self._fake_mode:
            node.meta["val"] = target(*_values(args), **_values(kwargs))
        return node

    def constant(self, name: str, data: torch.Tensor, dtype: torch.dtype) -> fx.Node:
        """Add a new constant that the program will hold as `dtype`.

        Args:
            name: what to call it; made unique.
            data: kept as it is (float64 for folded weights) until all passes are done, so that
                each pass can be proved exactly; `round_constants` then converts it.
        """
        name = self._unused(re.sub(r"\W", "_", name))
        self.graph_module.register_parameter(
            name, torch.nn.Parameter(data.contiguous(), requires_grad=False)
        )
        self.constants.append(name)
        node = self._insert("get_attr", name, (), {})
        node.meta.update(round_to=dtype, written=False)
        with self._fake_mode:
            node.meta["val"] = torch.empty(data.shape, dtype=dtype, device=data.device)
        return node

    def erase_unused(self, nodes: Iterable[fx.Node]) -> None:
        """Erase those of `nodes` that nothing uses any more, and what only they used."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node._erased or node.users or node.op in ("placeholder", "output"):
                continue
            # Random numbers that nothing uses are no effect; writes and asserts are.
            if node.op == "call_function" and node.is_impure(impure_random=False):
                continue
            inputs = list(node.all_input_nodes)
            self.graph.erase_node(node)
            waiting.extend(inputs)

    def _insert(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        assert self._anchor is not None, "call before() first"
        with self.graph.inserting_before(self._anchor):
            name = _kind_of(target) if op == "call_function" else None
            node = self.graph.create_node(op, target, args, kwargs, name=name)
        for key in ("nn_module_stack", "stack_trace"):
            if key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        node.meta.update(origins=self._origins, equals=[])
        return node

    def _unused(self, name: str) -> str:
        # Counted on from the last one of that name, or a thousand of one name would take a
        # million looks.
        candidate, number = name, self._numbered.get(name, 0)
        while hasattr(self.graph_module, candidate):
            number += 1
            candidate = f"{name}_{number}"
        self._numbered[name] = number
        return candidate


def prepare(graph_module: fx.GraphModule, path: str = "") -> None:
    """Give every node the metadata that passes keep true: `val`, `origins`, `equals`, and `written`
    on constants and inputs, whether the graph writes to them.

    Args:
        graph_module: the graph; those of its branches are prepared too.
        path: in front of each node's name: of a branch, its dotted name and a dot.
    """
    fake_mode = _fake_mode_of(graph_module.graph)
    for node in graph_module.graph.nodes:
        node.meta.setdefault("origins", (path + node.name,))
        node.meta.setdefault("equals", [path + node.name])
        if node.op not in ("get_attr", "placeholder"):
            continue
        node.meta["written"] = any(_writes_to(user, node) for user in node.users)
        if node.op == "get_attr":
            found = attribute(graph_module, node.target)
            if isinstance(found, fx.GraphModule):
                prepare(found, f"{path}{node.target}.")
            elif isinstance(found, torch.Tensor) and "val" not in node.meta:
                node.meta["val"] = fake_mode.from_tensor(found, static_shapes=True)


def own_what_is_written(graph_module: fx.GraphModule) -> None:
    """Give a prepared graph its own copy of every constant that running it writes to, so that
    whoever shares the others sees nothing of it."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.meta["written"]:
            owner, _, name = str(node.target).rpartition(".")
            holder = attribute(graph_module, owner) if owner else graph_module
            shared = attribute(graph_module, node.target)
            copied = shared.detach().clone()
            if isinstance(shared, torch.nn.Parameter):
                setattr(holder, name, torch.nn.Parameter(copied, requires_grad=False))
            else:
                holder.register_buffer(name, copied)


def written_memory(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose memory something in the graph writes to: what is written, and its views.

    Such a node holds one thing before the write and another after it, and a graph's outputs are
    read after it. Linear in the number of nodes.
    """
    written = {taken for node in graph.nodes for taken in _aliased(node, writing=True)}
    for node in reversed(graph.nodes):
        if node in written:
            written.update(_aliased(node, writing=False))
    for node in graph.nodes:
        if any(viewed in written for viewed in _aliased(node, writing=False)):
            written.add(node)
    return frozenset(written)


def memory_of(node: fx.Node) -> frozenset[fx.Node]:
    """The nodes whose memory a node's result may lie in: itself, or what it is a view of."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        # One of several results is a view of what the operator that gives them views.
        source = each.args[0] if is_call(each, operator.getitem) else each
        viewed = _aliased(source, writing=False) if isinstance(source, fx.Node) else []
        waiting.extend(viewed)
        if not viewed:
            found.add(each)
    return frozenset(found)


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    return node in _aliased(user, writing=True)


def _aliased(node: fx.Node, *, writing: bool) -> list[fx.Node]:
    """The arguments whose memory a call writes to, or else those that its results are views of."""
    if is_call(node, operator.getitem):
        return [] if writing else list(node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    bound = arguments(node).values()
    return [
        leaf
        for argument, given in zip(node.target._schema.arguments, bound, strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write == writing
        for leaf in _leaves(given)
        if isinstance(leaf, fx.Node)
    ]


def _fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    for node in graph.nodes:
        for leaf in _leaves(node.meta.get("val")):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return FakeTensorMode()


def _leaves(nested: Any) -> Iterator[Any]:
    if isinstance(nested, (tuple, list)):
        for item in nested:
            yield from _leaves(item)
    else:
        yield nested


def _values(nested: Any) -> Any:
    return fx.node.map_arg(nested, value)
