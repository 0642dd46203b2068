"""What torch.export demands of open dimensions: met where that is a multiple, else explained.

torch.export is told a name and a range for each open size, and finds out what the model's code
takes for granted about it. Its message ends with `Suggested fixes:`, one line a dimension, whose
forms are those of `torch.export.Dim`: `N = 4*_N`, `N = Dim('N', max=16)`, `N = 8` and `M = N`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from optfuse.errors import CaptureError
from optfuse.stages import Dimension, LoadedModel

VIOLATED = "Constraints violated"
"""What torch.export's message begins with."""

_PART = "_of_"
"""In the name of the dimension behind a multiple: H is 16 times `H_of_16`."""


def with_multiples(model: LoadedModel, error: Exception) -> LoadedModel | None:
    """The model with dimensions that are multiples of what torch.export found they have to be.

    Args:
        model: with open sizes.
        error: what torch.export said.

    Returns:
        None where it demands nothing of that kind, or the model's dimensions are that already.

    Raises:
        CaptureError: the user's sizes are no such multiples.
    """
    assert model.sizes is not None
    factors = {
        name: int(factor)
        for name, factor in re.findall(r"^ +(\w+) = (\d+)\*_\1$", str(error), re.M)
    }
    made: dict[str, Any] = {}
    for each in model.sizes.dimensions:
        if each.name in factors:
            made[each.name] = _multiple(model.name, each, factors[each.name])
    if not made:
        return None
    shapes = pytree.tree_map(lambda dim: made.get(dim.__name__, dim), model.dynamic_shapes)
    return replace(model, dynamic_shapes=shapes)


def _multiple(model: str, dimension: Dimension, factor: int) -> Any:
    """The dimension as a multiple of one that stands behind it."""
    for size in (dimension.least, dimension.usual, dimension.most):
        if size % factor:
            raise CaptureError(
                f"'{model}' cannot be captured",
                f"The model takes multiples of {factor} alone for {dimension.name}, and {size} is "
                "none",
                f"Give multiples of {factor} with --dim {dimension.name}=MIN:OPT:MAX",
            )
    part = torch.export.Dim(
        f"{dimension.name}{_PART}{factor}",
        min=dimension.least // factor,
        max=dimension.most // factor,
    )
    return factor * part


def explain(model: LoadedModel, error: Exception) -> tuple[str, str] | None:
    """What torch.export found against an open dimension, and what to do about it.

    Args:
        model: with open sizes.
        error: what torch.export said.

    Returns:
        None where it is not about dimensions.
    """
    assert model.sizes is not None
    text = str(error)
    if VIOLATED not in text:
        return None
    dimensions = {each.name: each for each in model.sizes.dimensions}
    return (
        _explain_equal(text, dimensions)
        or _explain_number(text, dimensions)
        or _explain_range(text, dimensions)
        or _explain_guard(text, dimensions)
    )


def _explain_equal(text: str, dimensions: Mapping[str, Dimension]) -> tuple[str, str] | None:
    found = re.search(r"values of (\w+) = .*? and (\w+) = .*? must always be equal", text)
    if found is None or not {found[1], found[2]} <= dimensions.keys():
        return None
    one, other = sorted((found[1], found[2]), key=list(dimensions).index)
    return (
        f"The model takes {one} and {other} of the same size alone",
        f"Write --input with {one} in both places, and leave --dim {other} out",
    )


def _explain_number(text: str, dimensions: Mapping[str, Dimension]) -> tuple[str, str] | None:
    found = re.search(
        r"You marked (\w+) as dynamic but your code specialized it to be a constant"
        r"|generated for (\w+) = .*? resulted in a specialized value",
        text,
    )
    name = str(found[1] or found[2]) if found else ""
    if name not in dimensions:
        return None
    usual = dimensions[name].usual
    return (
        f"The model's code makes a plain number of {name}, or takes one size of it for granted, so "
        "that a program serves a single size",
        f"Take it from x.shape there, without int() or a number of your own, or give one size with "
        f"--dim {name}={usual}",
    )


def _explain_range(text: str, dimensions: Mapping[str, Dimension]) -> tuple[str, str] | None:
    for name, given in re.findall(r"^ +(\w+) = Dim\('\1', (.*)\)$", text, re.M):
        if name not in dimensions:
            continue
        dimension = dimensions[name]
        ends = {end: int(size) for end, size in re.findall(r"(min|max)=(\d+)", given)}
        least = max(ends.get("min", dimension.least), dimension.least)
        most = min(ends.get("max", dimension.most), dimension.most)
        if most < dimension.most:
            what, size = f"above {most}", dimension.most
        else:
            what, size = f"below {least}", dimension.least
        usual = min(max(dimension.usual, least), most)
        return (
            f"The model's code does something else for {name} {what}, or fails there, and --dim "
            f"has {size}",
            f"Give --dim {name}={least}:{usual}:{most}, or make that code the same for every size",
        )
    return None


def _explain_guard(text: str, dimensions: Mapping[str, Dimension]) -> tuple[str, str] | None:
    found = re.search(r"values of (\w+) = (.*?) in the specified range .*? guard (.*)$", text, re.M)
    if found is None or found[1] not in dimensions:
        return None
    guard = found[3].rstrip(".")
    for name, place in re.findall(r"values of (\w+) = (.*?) in the specified", text):
        guard = guard.replace(place, name)
    dimension = dimensions[found[1]]
    return (
        f"The model's code takes for granted that {guard}, which does not hold for every "
        f"{dimension.name} from {dimension.least} to {dimension.most}",
        "Give a narrower range with --dim, or make that code the same for every size",
    )
