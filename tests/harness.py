"""What the tests of passes share: capture a module, run passes, compare in float64.

No comparison here has a default tolerance: each test states its own and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from optfuse.capture import capture
from optfuse.float64 import distance, random_inputs, run_float64
from optfuse.graph import operators
from optfuse.optimize import optimize, select
from optfuse.stages import LoadedModel, Program, Step


def scramble(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that no wrong formula gets right by luck, and put
    the module in eval mode: batch norms' initial 0 and 1 hide every folding bug."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.5 + 0.1
            parameter.copy_(drawn.to(parameter.dtype))
        for each in module.modules():
            mean, var = getattr(each, "running_mean", None), getattr(each, "running_var", None)
            if mean is not None and var is not None:
                mean.copy_(torch.randn(mean.shape, generator=generator))
                var.copy_(torch.rand(var.shape, generator=generator) * 2 + 0.3)
    return module.eval()


def captured(
    module: nn.Module, *args: Any, kwargs: Mapping[str, Any] | None = None, name: str = "test"
) -> Program:
    """The program of a module on these inputs."""
    return capture(LoadedModel(name, module, args, dict(kwargs or {})))


def optimized(program: Program, passes: str, *, seed: int = 0) -> Program:
    """The program after the passes, selected as on the command line; none may be undone."""
    after = optimize(program, select(passes), seed=seed)
    assert [each.undone for each in after.trace if each.undone] == []
    return after


def counts(program: Program) -> dict[str, int]:
    """Operators of each kind."""
    return operators(program.graph_module)


def step(program: Program, name: str) -> Step:
    """The first step of that pass."""
    return next(each for each in program.trace if each.name == name)


def reasons(program: Program, name: str) -> list[str]:
    """Why the pass refused, in graph order."""
    return [refused.reason for refused in step(program, name).refused]


def float64_distance(before: Program, after: Program, *, seed: int = 1) -> float:
    """Relative L2 between two programs run in float64 on fresh random inputs (their constants as
    they hold them, so an optimised float32 program is a few 1e-8 away from its original)."""
    inputs = random_inputs(before.example_args, before.example_kwargs, seed)
    return distance(
        run_float64(before.graph_module, *inputs), run_float64(after.graph_module, *inputs)
    )


def assert_same_function(before: Program, after: Program, *, tolerance: float) -> None:
    """The two programs give the same outputs on fresh inputs, within `tolerance` (relative L2)."""
    moved = float64_distance(before, after)
    assert moved <= tolerance, f"outputs moved by {moved:.1e}"


def assert_settled(program: Program, passes: str) -> None:
    """Running the passes again changes nothing."""
    again = optimized(program, passes)
    assert counts(again) == counts(program)
    added = again.trace[len(program.trace) :]
    assert [each.name for each in added if each.matched] == []
