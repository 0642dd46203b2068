"""Whether numbers fit a low precision: how large constants and results get, seen in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from optfuse.conv_act import CONV_ACT
from optfuse.errors import ModelError
from optfuse.float64 import run_stepwise
from optfuse.graph import arguments, copied, is_call
from optfuse.precision.rules import NAMES
from optfuse.stages import Program

HEADROOM = 4.0
"""How many times larger than on the samples a result may get elsewhere."""

MOST = 0.5
"""The share of a constant's numbers that may become zero."""

_IDENTITY = {"activation": "leaky_relu", "scalars": [1.0], "slope": None}
"""An activation of `conv_act` that leaves what it is given."""


def largest_results(
    program: Program, samples: Sequence[Sequence[torch.Tensor]]
) -> dict[str, float]:
    """The largest magnitude of each node's result on all samples, by the node's name.

    Of `optfuse::conv_act` it is that of its convolution and sum, too, which an activation may hide.

    Args:
        program: it is run in its own precision.
        samples: each a tensor for each of the program's inputs, in its order; the example inputs
            where there are none.

    Raises:
        ModelError: the program does not run on a sample.
    """
    graph_module, within = _with_sums(program.graph_module)
    largest: dict[str, float] = {}
    for args, kwargs in _calls(program, samples):
        try:
            for node, result in run_stepwise(graph_module, args, kwargs, widen=False):
                if node.op != "output":
                    name = within.get(node.name, node.name)
                    largest[name] = max(largest.get(name, 0.0), _largest(result))
                del result
        except Exception as error:  # an operator may raise anything
            raise ModelError(
                f"'{program.name}' cannot be run on its samples",
                f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                "Give samples of the shapes that it was captured for",
            ) from error
    return largest


def why_results_do_not_fit(largest: float, dtype: torch.dtype, what: str) -> str | None:
    """Why results as large as this do not go with a dtype, as a clause.

    Args:
        largest: their largest magnitude on the samples.
        what: they are, e.g. `its results`.
    """
    limits, name = torch.finfo(dtype), NAMES[dtype]
    if largest > limits.max / HEADROOM:
        return (
            f"{what} reach {largest:.2g} on the samples, and from {limits.max / HEADROOM:.2g} on, "
            f"{HEADROOM:.0f} times below the largest number of {name}, they may overflow elsewhere"
        )
    if 0 < largest < limits.tiny:
        return (
            f"{what} reach {largest:.2g} on the samples, and {name} loses digits below "
            f"{limits.tiny:.2g}"
        )
    return None


def why_constant_does_not_fit(constant: torch.Tensor, dtype: torch.dtype) -> str | None:
    """Why a constant cannot be held in a dtype, as a clause."""
    name = NAMES[dtype]
    largest = _largest(constant)
    if largest > torch.finfo(dtype).max:
        return f"a constant reaches {largest:.2g}, beyond the largest number of {name}"
    there = int(torch.count_nonzero(constant))
    lost = there - int(torch.count_nonzero(constant.to(dtype)))
    if lost > MOST * there:
        share = f"{lost} of {there} numbers" if there > 1 else "the one number"
        return f"{share} of a constant would become zero in {name}"
    return None


def fits(number: float, dtype: torch.dtype) -> bool:
    """Whether a number keeps its size in a dtype; infinities do."""
    if number == 0 or math.isinf(number):
        return True
    rounded = torch.tensor(number, dtype=torch.float64).to(dtype)
    return bool(torch.isfinite(rounded)) and bool(rounded != 0)


def _with_sums(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, str]]:
    """A copy in which what stands in front of each activation of a `conv_act` is computed as well,
    and the names of these nodes -> those of the operators."""
    graph = copied(graph_module.graph)
    within: dict[str, str] = {}
    for node in list(graph.nodes):
        if is_call(node, CONV_ACT):
            with graph.inserting_before(node):
                bound = {**arguments(node), **_IDENTITY}
                within[graph.call_function(CONV_ACT, tuple(bound.values())).name] = node.name
    return fx.GraphModule(graph_module, graph), within


def _calls(
    program: Program, samples: Sequence[Sequence[torch.Tensor]]
) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """What the program is called with: its example inputs, with each sample's tensors in them."""
    if not samples:
        yield program.example_args, program.example_kwargs
    leaves, structure = pytree.tree_flatten((program.example_args, dict(program.example_kwargs)))
    for sample in samples:
        tensors = iter(sample)
        taken = [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        yield pytree.tree_unflatten(taken, structure)


def _largest(result: Any) -> float:
    """The largest magnitude of any finite number in a result, 0 without any: what is infinite in
    float32, such as a mask, is meant."""
    leaves = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
    return max(
        (_largest_of(each.detach()) for each in leaves if each.is_floating_point()), default=0
    )


def _largest_of(tensor: torch.Tensor) -> float:
    for numbers in (tensor, tensor[torch.isfinite(tensor)]):
        if numbers.numel() == 0:
            return 0.0
        largest = float(torch.stack(torch.aminmax(numbers)).abs().max())
        if math.isfinite(largest):
            return largest
    raise AssertionError("a finite number that is not finite")
