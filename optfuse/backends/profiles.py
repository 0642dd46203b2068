"""The shapes that an engine of the TensorRT family is built for: one optimisation profile.

A profile says of every input the smallest shape, the one to be fastest at, and the largest. Whether
it makes sense is checked here, before anything is built: the packages find out late and say little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from optfuse.errors import EngineError, UsageError
from optfuse.stages import InputShapes

OPEN_SHAPES = "Name it with --dim, e.g. --dim N=1:8:32 for an --input of Nx3x224x224"

_KINDS = ("smallest", "usual", "largest")


def check_shapes(shapes: Sequence[InputShapes]) -> None:
    """Whether each input's three shapes go together.

    Raises:
        UsageError: an input is named twice, or its shapes contradict each other.
    """
    names = [each.name for each in shapes]
    for each in shapes:
        if names.count(each.name) > 1:
            raise _refused(each.name, "It is given shapes more than once", "Give them once")
        _check_order(each)


def _check_order(given: InputShapes) -> None:
    three = (given.least, given.usual, given.most)
    named = list(zip(_KINDS, three, strict=True))
    if len({len(shape) for shape in three}) > 1:
        described = ", ".join(f"{kind} {written(shape)}" for kind, shape in named)
        raise _refused(
            given.name,
            f"They have different numbers of dimensions: {described}",
            "Give all three the same number of dimensions",
        )
    for kind, shape in named:
        if any(size < 1 for size in shape):
            raise _refused(
                given.name,
                f"Its {kind} shape, {written(shape)}, has a size below 1",
                "Give sizes of 1 and more",
            )
    for (smaller, one), (larger, other) in pairwise(named):
        if any(a > b for a, b in zip(one, other, strict=True)):
            raise _refused(
                given.name,
                f"Its {smaller} shape, {written(one)}, is not within its {larger} shape, "
                f"{written(other)}",
                "Give --dim the smallest size, the usual one and the largest, in this order",
            )


def check_network(
    inputs: Mapping[str, Sequence[int]], shapes: Sequence[InputShapes], failed: str
) -> None:
    """Whether the shapes fit what the network takes.

    Args:
        inputs: each input's shape, with -1 for a dimension that is open.
        shapes: as in `BuildOptions`, already through `check_shapes`.
        failed: what could not be done, for the error.

    Raises:
        UsageError: shapes for an input that isn't there, or that it cannot have.
        EngineError: an input has open dimensions and is given no shapes.
    """
    for each in shapes:
        if each.name not in inputs:
            raise _refused(
                each.name,
                f"The network has no such input: it has {', '.join(inputs) or 'none'}",
                "Give shapes for an input that it has",
            )
        takes = tuple(inputs[each.name])
        for shape in (each.least, each.usual, each.most):
            if len(shape) != len(takes) or any(
                size not in (-1, wanted) for size, wanted in zip(takes, shape, strict=True)
            ):
                raise _refused(
                    each.name,
                    f"The network takes {written(takes)} there, and was given {written(shape)}",
                    "Give the dimensions that are not open the size that the network has",
                )
    given = {each.name for each in shapes}
    for name, wanted_shape in inputs.items():
        if name not in given and any(size < 0 for size in wanted_shape):
            raise EngineError(
                failed,
                f"Its input '{name}', {written(wanted_shape)}, has dimensions that are open",
                OPEN_SHAPES,
            )


def add_profile(builder: Any, config: Any, shapes: Sequence[InputShapes], failed: str) -> None:
    """Give a builder's configuration the profile; none where no input was given shapes.

    Raises:
        EngineError: the package refuses it.
    """
    if not shapes:
        return
    profile = builder.create_optimization_profile()
    try:
        for each in shapes:
            profile.set_shape(each.name, each.least, each.usual, each.most)
        accepted = config.add_optimization_profile(profile) >= 0
    except ValueError as error:  # what the package calls an inconsistency
        raise EngineError(failed, f"Its shapes were refused: {error}", "Change --dim") from error
    if not accepted:
        raise EngineError(failed, "Its shapes were refused without a reason", "Change --dim")


def written(shape: Sequence[int]) -> str:
    """A shape as people write it, e.g. `?x3x224x224`, with ? for what is open."""
    return "x".join("?" if size < 0 else str(size) for size in shape) or "scalar"


def _refused(name: str, cause: str, next_step: str) -> UsageError:
    return UsageError(f"No engine can be built for the shapes of '{name}'", cause, next_step)
