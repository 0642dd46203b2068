"""Open dimensions as the command line writes them: `--dim N=1:8:32`, for the N of `Nx3x224x224`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from optfuse.errors import UsageError
from optfuse.stages import Dimension, InputSpec

LIKE = "Write it like --dim N=1:8:32, with the least size, the usual one and the most"

NO_SHAPE = "scalar"
"""What an `--input` has in the place of sizes that it has not; no dimension can be called so."""


def parse_dimension(text: str) -> Dimension:
    """Read one `NAME=MIN:OPT:MAX`.

    `NAME=MIN:MAX` is usually MAX, and `NAME=SIZE` a number under a name.

    Raises:
        UsageError: it is written differently, or contradicts itself.
    """
    name, equals, rest = text.partition("=")
    if not equals:
        raise _unreadable(text, "A dimension is NAME=MIN:OPT:MAX", LIKE)
    _check_name(name, text)
    words = rest.split(":")
    if len(words) > 3:
        raise _unreadable(text, f"It has {len(words)} sizes, and three are the most", LIKE)
    for word in words:
        # No size of 10 digits is possible, and Python refuses to convert thousands of them.
        if not re.fullmatch(r"0*[1-9][0-9]{0,8}", word):
            cause = f"'{word}' is no whole number from 1 to 999999999"
            raise _unreadable(text, cause, LIKE)
    sizes = [int(word) for word in words]
    least, most = sizes[0], sizes[-1]
    dimension = Dimension(name, least, sizes[1] if len(sizes) == 3 else most, most)
    _require_order(dimension, text)
    return dimension


def require_consistent(dimensions: Sequence[Dimension], specs: Sequence[InputSpec]) -> None:
    """Refuse dimensions that contradict themselves, or that do not go together with the inputs.

    Raises:
        UsageError: as it says.
    """
    names = [each.name for each in dimensions]
    named = dict.fromkeys(size for spec in specs for size in spec.shape if isinstance(size, str))
    for each in dimensions:
        _check_name(each.name, _written(each))
        _require_order(each, _written(each))
        if names.count(each.name) > 1:
            raise UsageError(
                f"The dimension '{each.name}' cannot be used",
                "It is given more than once",
                "Give every --dim once; it holds for each input that names it",
            )
        if each.name not in named:
            raise UsageError(
                f"The dimension '{each.name}' is not used",
                "No --input names it" if specs else "There is no --input that could name it",
                f"Write an input's shape with it, like --input {each.name}x3x224x224",
            )
    for name in named:
        if name not in names:
            raise UsageError(
                f"The size '{name}' of an input is not known",
                f"There is no --dim {name} that says what it stands for",
                f"Give it with --dim {name}=MIN:OPT:MAX, or write a number in its place",
            )


def numbered(specs: Iterable[InputSpec], sizes: Mapping[str, int]) -> tuple[InputSpec, ...]:
    """The inputs with numbers in the place of names; a name that has none stays."""
    return tuple(
        replace(spec, shape=tuple(sizes.get(str(size), size) for size in spec.shape))
        for spec in specs
    )


def spelled(sizes: Mapping[str, int]) -> str:
    """Sizes of dimensions as text, e.g. `N=8, H=224`."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def points(dimensions: Sequence[Dimension]) -> list[dict[str, int]]:
    """All dimensions at their least, at their usual and at their most; equal sizes once."""
    found: list[dict[str, int]] = []
    for sizes in (
        {each.name: each.least for each in dimensions},
        {each.name: each.usual for each in dimensions},
        {each.name: each.most for each in dimensions},
    ):
        if sizes not in found:
            found.append(sizes)
    return found


def capture_sizes(
    dimensions: Sequence[Dimension], taken: Collection[int] = ()
) -> list[dict[str, int]]:
    """Sizes to capture a model on, the first that does: small ones, because every proof runs on
    them, then the usual ones, then the most.

    torch.export takes sizes of 0 and 1 for granted, so each is at least 2. Where it can be, each is
    unlike the others and unlike every fixed size, so that none is taken for another by accident.

    Args:
        dimensions: each with a least and a most that differ.
        taken: the fixed sizes of the inputs.
    """
    small: dict[str, int] = {}
    for each in dimensions:
        # A model may take multiples alone; what the user gave is one. At 1, everything is.
        given = (each.least, each.usual, each.most)
        candidates = given if each.least > 1 else range(2, each.most + 1)
        others = {*taken, *small.values()}
        small[each.name] = next((s for s in candidates if s not in others), candidates[0])
    found = [small]
    for sizes in points(dimensions)[1:]:
        choice = {name: size if size > 1 else small[name] for name, size in sizes.items()}
        if choice not in found:
            found.append(choice)
    return found


def _check_name(name: str, text: str) -> None:
    if "x" in name:
        cause = f"The name '{name}' has an 'x', which joins the sizes of a shape"
        raise _unreadable(text, cause, "Choose a name without one, such as N")
    if not name.isidentifier() or name == NO_SHAPE:
        cause = f"'{name}' is no name: letters, digits and '_', beginning with no digit"
        if name == NO_SHAPE:
            cause = f"'{name}' is what an input without sizes is called"
        raise _unreadable(text, cause, LIKE)


def _require_order(dimension: Dimension, text: str) -> None:
    if 1 <= dimension.least <= dimension.usual <= dimension.most:
        return
    if dimension.least < 1:
        cause = f"Its least size, {dimension.least}, is not positive"
    elif dimension.least > dimension.most:
        cause = f"Its least size, {dimension.least}, is larger than its most, {dimension.most}"
    else:
        cause = (
            f"Its usual size, {dimension.usual}, does not lie from {dimension.least} to "
            f"{dimension.most}"
        )
    raise UsageError(f"The dimension '{text}' contradicts itself", cause, LIKE)


def _written(dimension: Dimension) -> str:
    return f"{dimension.name}={dimension.least}:{dimension.usual}:{dimension.most}"


def _unreadable(text: str, cause: str, next_step: str) -> UsageError:
    return UsageError(f"The dimension '{text}' cannot be read", cause, next_step)
