"""What a program costs, by counting: floating-point operations and parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from optfuse.graph import attribute
from optfuse.stages import Program


def flops(program: Program) -> int:
    """Floating-point operations of one run on the example inputs, a multiply-add counted as two.

    PyTorch's own flop counter, run on tensors without data. It counts convolutions, matrix
    products and attention, and leaves elementwise operators out.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():

        def without_data(leaf: Any) -> Any:
            return mode.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf

        args, kwargs = pytree.tree_map(
            without_data, (tuple(program.example_args), dict(program.example_kwargs))
        )
        # On a CPU the counter knows attention only as the matrix products it consists of.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            program.graph_module(*args, **kwargs)
    return int(counter.get_total_flops())


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


def _parameter(graph_module: fx.GraphModule, node: fx.Node) -> torch.nn.Parameter | None:
    if node.op != "get_attr":
        return None
    found = attribute(graph_module, str(node.target))
    return found if isinstance(found, torch.nn.Parameter) else None
