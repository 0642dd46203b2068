"""Run a captured graph in float64, the reference that every proof and every drift is taken from.

The program's own float types are read as float64: parameters, inputs, and every cast inside the
graph. So the float64 run computes the function the model was written for, not its rounding.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from optfuse.graph import ASSERT, attribute, flat_inputs, is_call

_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}


def random_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], seed: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs like the examples, with other numbers in them.

    Floating tensors are drawn from a normal distribution, booleans evenly, and integers evenly
    between the example's smallest and largest, since they are often indices with a limit.
    Everything else stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_floating_point() or leaf.is_complex():
            wide = torch.complex128 if leaf.is_complex() else torch.float64
            drawn = torch.randn(leaf.shape, generator=generator, dtype=wide)
        elif leaf.numel() == 0:
            return leaf
        elif leaf.dtype is torch.bool:
            drawn = torch.randint(0, 2, leaf.shape, generator=generator)
        else:
            low, high = int(leaf.min()), int(leaf.max())
            drawn = torch.randint(low, high + 1, leaf.shape, generator=generator)
        like: torch.Tensor = torch.empty_like(leaf)
        return like.copy_(drawn)

    drawn_args, drawn_kwargs = pytree.tree_map(draw, (tuple(args), dict(kwargs)))
    return drawn_args, drawn_kwargs


def run_float64(
    graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any], seed: int = 0
) -> list[Any]:
    """Run the graph once in float64 and return its outputs, flattened.

    One parameter at a time is widened, and every result is freed after its last use, so the run
    needs no float64 copy of the model.

    Args:
        graph_module: functional ATen, its signature taking `args` and `kwargs`.
        seed: for operators that draw random numbers.
    """
    with _float64_by_default(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for node, result in _walk(graph_module, args, kwargs, widen=True):
            if node.op == "output":
                return pytree.tree_leaves(result)
            del result  # or it would live on while the next node runs
    raise AssertionError("a graph without an output")


def run_stepwise(
    graph_module: fx.GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    widen: bool,
    seed: int = 0,
    replace: Callable[[fx.Node, Any], Any] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Run the graph node by node, and give each node that computes something with its result.

    Several of these can take turns: none sees another's random numbers or default dtype. What a
    step gave is freed after its last use, unless the caller keeps it.

    Args:
        graph_module, args, kwargs: as `run_float64` takes them.
        widen: in float64, as `run_float64` does; otherwise in the dtypes the graph has.
        seed: for operators that draw random numbers.
        replace: given each node and its result; what it returns is what later nodes read.

    Yields:
        Inputs, calls and, last, the output, each with what it gave by itself; constants are not
        among them.
    """
    steps = _walk(graph_module, args, kwargs, widen=widen, replace=replace)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = torch.get_rng_state()
    while True:
        default = _float64_by_default() if widen else nullcontext()
        with default, torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(drawn)
            step = next(steps, None)
            drawn = torch.get_rng_state()
        if step is None:
            return
        yield step
        del step


def call_float64(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What one operator gives when every float type in its arguments is read as float64.

    Args:
        target: an operator that draws no random numbers.
        args, kwargs: with real tensors for nodes, of any dtype; they are not written to.
    """
    with _float64_by_default(), torch.no_grad():
        return _call(target, args, kwargs)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that stands for `dtype` in a float64 run; integers and booleans stay."""
    return _WIDER.get(dtype, dtype)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run what is inside with that many of PyTorch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _float64_by_default() -> Iterator[None]:
    """Operators that make a float tensor without naming its dtype make a float64 one."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _call(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    wide_args, wide_kwargs = _widen_all((args, kwargs))
    return target(*wide_args, **wide_kwargs)


def distance(reference: Sequence[Any], other: Sequence[Any]) -> float:
    """The largest relative L2 distance of any output: max_i ||y_i - r_i|| / ||r_i||.

    The largest, not the one over all outputs together, so that a large output can't hide what
    happened to a small one. Not-a-numbers and infinities must stand in the same places, and
    integers and booleans must be equal; otherwise the distance is infinite.
    """
    if len(reference) != len(other):
        return float("inf")
    return max((_distance_of_one(r, o) for r, o in zip(reference, other, strict=True)), default=0.0)


def _distance_of_one(reference: Any, other: Any) -> float:
    if not isinstance(reference, torch.Tensor):
        return 0.0 if reference == other else float("inf")
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return float("inf")
    if not (reference.is_floating_point() or reference.is_complex()):
        return 0.0 if torch.equal(reference, other) else float("inf")
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(other)):
        return float("inf")
    if not bool(finite.all()):
        if not torch.equal(torch.nan_to_num(reference[~finite]), torch.nan_to_num(other[~finite])):
            return float("inf")
        reference, other = reference[finite], other[finite]
    if torch.equal(reference, other):
        return 0.0
    # Scaled, because the squares of huge numbers overflow and those of tiny ones vanish.
    largest = reference.abs().max()
    if largest == 0.0:
        return float("inf")
    error = torch.linalg.vector_norm(other / largest - reference / largest)
    return float(error / torch.linalg.vector_norm(reference / largest))


def _walk(
    graph_module: fx.GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    widen: bool,
    replace: Callable[[fx.Node, Any], Any] | None = None,
) -> Iterator[tuple[fx.Node, Any]]:
    """Every node that is not a constant, with its result, each freed after its last use."""
    inputs = iter(flat_inputs(graph_module, args, kwargs))
    results: dict[fx.Node, Any] = {}
    last_used_by = _last_used_by(graph_module.graph)

    def load(node: fx.Node) -> Any:
        # Constants are widened where they are used, so that only one at a time is held twice.
        return _constant(graph_module, node, widen) if node.op == "get_attr" else results[node]

    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            results[node] = _own_if_written(node, next(inputs), widen)
        elif node.op == "output":
            results[node] = fx.node.map_arg(node.args[0], load)
        elif node.op == "call_function" and not is_call(node, ASSERT):
            node_args, node_kwargs = fx.node.map_arg((node.args, node.kwargs), load)
            # Picking one of a thousand results does not read the other ones.
            if is_call(node, operator.getitem):
                results[node] = operator.getitem(*node_args)
            elif widen:
                results[node] = _call(node.target, node_args, node_kwargs)
            else:
                results[node] = node.target(*node_args, **node_kwargs)
            del node_args, node_kwargs
        if node in results:
            result = results[node]
            if replace is not None:
                results[node] = replace(node, result)
            yield node, result
            del result
        for used in (*last_used_by.get(node, ()), *([] if node.users else [node])):
            results.pop(used, None)


def _last_used_by(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the nodes whose last user it is."""
    last_user: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last_user[used] = node
    freed: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last_user.items():
        freed.setdefault(user, []).append(used)
    return freed


def _constant(graph_module: fx.GraphModule, node: fx.Node, widen: bool) -> Any:
    assert isinstance(node.target, str)
    found = attribute(graph_module, node.target)
    if isinstance(found, fx.GraphModule):
        return _widened_branch(found) if widen else found
    if isinstance(found, torch.Tensor):
        return _own_if_written(node, found.detach(), widen)
    return found


def _own_if_written(node: fx.Node, found: Any, widen: bool) -> Any:
    """The value of a constant or an input, copied where the graph writes to it: a proof must
    change neither the model nor its inputs, even where the model's own forward does."""
    if isinstance(found, torch.Tensor) and node.meta.get("written", True):
        found = found.clone()
    return _widen(found) if widen else found


def _widened_branch(branch: fx.GraphModule) -> fx.GraphModule:
    """A copy of a higher-order operator's branch with every float type read as float64."""
    copied = copy.deepcopy(branch).double()
    for module in copied.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = _widen_all((node.args, node.kwargs))
            module.recompile()
    return copied


def _widen(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and leaf.dtype in _WIDER:
        return leaf.to(_WIDER[leaf.dtype])
    return widened(leaf) if isinstance(leaf, torch.dtype) else leaf


def _widen_all(nested: Any) -> Any:
    return fx.node.map_aggregate(nested, _widen)
