"""What can be counted of a network: its operators before and after, what each pass did and left.

None of it depends on the machine, so it is what the snapshot in `docs/zoo.json` holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from benchmarks.zoo.refusals import generalised
from optfuse.convolution import BATCH_NORM, convolution_of
from optfuse.graph import arguments, is_call, operators, sole_user
from optfuse.stages import Program, Step


def figures_of(captured: Program, faster: Program) -> dict[str, Any]:
    """What can be counted of the two programs, and of what the passes say they did.

    Pairs are before and after: `operators`, `kinds` and `batch_norms`. `passes` holds the places of
    each and the operators it took away, `refused` how often each refused for each reason, and
    `behind_convolutions` how many batch norms are left that could be folded.
    """
    steps = [step for step in faster.trace if step.stage == "pass"]
    return {
        "operators": [sum(operators(each.graph_module).values()) for each in (captured, faster)],
        "kinds": _kinds(captured, faster),
        "passes": _passes(steps),
        "batch_norms": [len(batch_norms(each)) for each in (captured, faster)],
        "behind_convolutions": len(foldable(faster)),
        "refused": _refused(steps),
    }


def batch_norms(program: Program) -> list[fx.Node]:
    """Every batch norm with stored statistics in the graph."""
    return [node for node in program.graph_module.graph.nodes if is_call(node, BATCH_NORM)]


def foldable(program: Program) -> list[fx.Node]:
    """The batch norms that read what a convolution or linear layer gives to them alone."""
    return [
        node
        for node in batch_norms(program)
        if convolution_of(arguments(node)["input"]) is not None
        and sole_user(arguments(node)["input"]) is node
    ]


def _kinds(captured: Program, faster: Program) -> dict[str, list[int]]:
    """Operators of each kind before and after."""
    before, after = operators(captured.graph_module), operators(faster.graph_module)
    return {kind: [before.get(kind, 0), after.get(kind, 0)] for kind in sorted({*before, *after})}


def _passes(steps: Sequence[Step]) -> dict[str, list[int]]:
    """Of each pass that did something: the places, and the operators that it took away."""
    done: dict[str, list[int]] = {}
    for step in steps:
        if step.matched and not step.undone:
            places, taken = done.get(step.name, (0, 0))
            away = step.operators_before - step.operators_after
            done[step.name] = [places + step.matched, taken + away]
    return done


def _refused(steps: Sequence[Step]) -> dict[str, dict[str, int]]:
    """Of each pass that refused something: how often for each reason, the most frequent first."""
    refused: dict[str, dict[str, int]] = {}
    for step in steps:
        if step.refused:
            counted = Counter(generalised(each.reason) for each in step.refused)
            ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
            refused[step.name] = dict(ordered)
    return refused
