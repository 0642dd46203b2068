"""What a program costs, by counting: floating-point operations, parameters and bytes moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from optfuse.branches import operands_of
from optfuse.graph import attribute, flat_inputs, placeholders
from optfuse.stages import Program

Shape = tuple[int, ...]

aten = torch.ops.aten

LOOK_UPS = {
    aten.embedding.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.select.int,
    aten.slice.Tensor,
}
"""Operators that read no more of their first argument than they give back."""


def flops(program: Program) -> int:
    """Floating-point operations of one run on the example inputs, a multiply-add counted as two.

    PyTorch's own flop counter, run on tensors without data. It counts convolutions, matrix
    products and attention, and leaves elementwise operators out. Of the two branches of a
    `torch.cond` the dearer one counts, and the body of a `while_loop` counts once, since nobody
    knows how often it runs.
    """
    with _without_data(program) as leaves:
        _, total, _ = _counted(program.graph_module, leaves)
    return total


def _counted(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> tuple[Any, int, int]:
    """What a graph gives, its floating-point operations, and as many as the counter saw."""
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU)
    interpreter = _WithoutData(graph_module)
    with counter:
        result = interpreter.run(*leaves, enable_io_processing=False)
    seen = int(counter.get_total_flops())
    return result, seen + interpreter.correction, seen


class _WithoutData(fx.Interpreter):
    """Runs a graph on tensors without data, and each branch that it calls once.

    Attributes:
        correction: to add to the operations seen, for branches that run more than once or not.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.correction = 0

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As `fx.Interpreter` has it, without the gradients that the counter would hook onto."""
        found = super().get_attr(target, args, kwargs)
        return found.detach() if isinstance(found, torch.Tensor) else found

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """As `fx.Interpreter` has it, except for what calls branches."""
        name = getattr(target, "__name__", "")
        is_higher = isinstance(target, torch._ops.HigherOrderOperator)
        operands = operands_of(name, args) if is_higher else None
        if operands is None:
            return super().call_function(target, args, kwargs)
        inner = [each for each in args if isinstance(each, fx.GraphModule)]
        runs = [_counted(each, operands) for each in inner]
        totals = [total for _, total, _ in runs]
        result = runs[-1][0]
        times = 1
        if name == "cond":
            totals = [max(totals)]
        elif name == "while_loop":
            result = operands[: len(args[2])]
        else:
            sliced = args[2] if name == "scan" else args[1]
            carried = len(args[1]) if name == "scan" else 0
            times = len(sliced[0])
            stacked = [each.expand(times, *each.shape).clone() for each in result[carried:]]
            result = (*result[:carried], *stacked)
        self.correction += times * sum(totals) - sum(seen for _, _, seen in runs)
        return result


def compulsory_bytes(program: Program) -> int:
    """Bytes that one run on the example inputs moves at least.

    Every constant and every input that is used is read once, and every output written once. What
    passes from one operator to the next is left out, because an engine may keep it in a cache. Of
    a table that entries are looked up in, only what is looked up counts.
    """
    with _without_data(program) as leaves:
        sizes = _Sizes(program.graph_module)
        sizes.run(*leaves, enable_io_processing=False)
    graph_module = program.graph_module
    read: dict[Any, int] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        found = attribute(graph_module, str(node.target))
        if isinstance(found, torch.Tensor):
            memory = (found.data_ptr(), found.shape)
            read[memory] = max(read.get(memory, 0), _bytes_read(node, sizes.nbytes))
    for node in placeholders(graph_module.graph):
        read[node] = _bytes_read(node, sizes.nbytes)
    written = dict.fromkeys(graph_module.graph.output_node().all_input_nodes)
    return sum(read.values()) + sum(sizes.nbytes[node] for node in written)


def parameters(program: Program) -> int:
    """How many numbers the program's parameters hold; a shared one counts once.

    Buffers (such as batch norm's statistics) are not parameters, as `nn.Module.parameters` has it.
    """
    counted: dict[tuple[int, torch.Size], int] = {}
    for node in program.graph_module.graph.nodes:
        found = _parameter(program.graph_module, node)
        if found is not None:
            counted[found.data_ptr(), found.shape] = found.numel()
    return sum(counted.values())


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Of every query with every key, and of the weighted sum of the values."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


_ATTENTION_ON_CPU = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
"""What the flop counter does not know by itself: attention as it runs on a CPU. Having it taken
apart into matrix products would not do: their result lies in memory in another order, and the views
that were captured behind it no longer fit."""


def _parameter(graph_module: fx.GraphModule, node: fx.Node) -> torch.nn.Parameter | None:
    if node.op != "get_attr":
        return None
    found = attribute(graph_module, str(node.target))
    return found if isinstance(found, torch.nn.Parameter) else None


@contextmanager
def _without_data(program: Program) -> Iterator[list[Any]]:
    """The leaves of the example inputs as tensors without data, and the mode to run them in."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        leaves = flat_inputs(program.graph_module, program.example_args, program.example_kwargs)
        yield [
            mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]


class _Sizes(_WithoutData):
    """Runs a graph and notes how many bytes each node's result has, all its tensors together."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.nbytes: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As `fx.Interpreter` has it."""
        result = super().run_node(n)
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.nbytes[n] = sum(tensor.nbytes for tensor in tensors)
        return result


def _bytes_read(node: fx.Node, nbytes: dict[fx.Node, int]) -> int:
    """What the users of a constant or an input read of it at least."""
    if not node.users:
        return 0
    taken = 0
    for user in node.users:
        if user.target not in LOOK_UPS or user.args[:1] != (node,):
            return nbytes[node]
        taken += nbytes[user]
    return min(taken, nbytes[node])
