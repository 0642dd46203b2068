"""What a program costs, by counting: floating-point operations, parameters and bytes moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

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
    products and attention, and leaves elementwise operators out.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU)
    with _without_data(program) as leaves, counter:
        fx.Interpreter(program.graph_module).run(*leaves, enable_io_processing=False)
    return int(counter.get_total_flops())


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


class _Sizes(fx.Interpreter):
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
