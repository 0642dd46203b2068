"""Example inputs as the command line writes them, and random tensors for them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch

from optfuse.dimensions import NO_SHAPE
from optfuse.environment import environment
from optfuse.errors import LoadError, UsageError
from optfuse.stages import InputSpec
from optfuse.weights import describe

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""The dtypes an `--input` can have."""

MOST_ELEMENTS = 2**40
"""Of one input. More is a slip of the finger: it is 4 TiB in float32."""

LARGE_BYTES = 2**30
"""From here on the machine is asked whether it has memory for an input: Linux hands out more than
there is, and ends the process when it is written to."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What `forward` is called with: positional and keyword arguments."""


def parse_input(text: str, *, names: bool = False) -> InputSpec:
    """Read one `[NAME=]SHAPE[:DTYPE]`, e.g. `1x3x224x224` or `tokens=1x128:int64`.

    SHAPE is sizes joined by `x`, or `scalar`; DTYPE is one of `DTYPES`, float32 if left out.

    Args:
        text: as typed.
        names: a size may also be the name of a dimension, as the N of `Nx3x224x224`.

    Raises:
        UsageError: it is written differently, or nothing of that shape and dtype can exist.
    """
    name, equals, rest = text.rpartition("=")
    shape_text, colon, dtype = rest.partition(":")
    words = [] if shape_text == NO_SHAPE else shape_text.split("x")
    sizes = [_size(word) for word in words]
    if (equals and not name.isidentifier()) or None in sizes:
        raise UsageError(
            f"The input '{text}' cannot be read",
            "An input is [NAME=]SHAPE[:DTYPE], and a shape is sizes joined by 'x', or 'scalar'",
            "Write it like 1x3x224x224, or like tokens=1x128:int64",
        )
    named = [size for size in sizes if isinstance(size, str)]
    if named and not names:
        raise UsageError(
            f"The input '{text}' cannot be read",
            f"Its size '{named[0]}' is no number, and only 'optfuse optimize' and "
            "'optfuse explain' have --dim for open sizes",
            "Write a number in its place",
        )
    shape = tuple(size for size in sizes if size is not None)
    spec = InputSpec(name or None, shape, dtype if colon else "float32")
    require_possible(spec, text)
    return spec


def _size(word: str) -> int | str | None:
    """A size: a number, the name of a dimension, or None where it is neither."""
    if re.fullmatch(r"-?[0-9]+", word):
        # No size of 19 digits is possible, and Python refuses to convert thousands of them.
        return int(word[:19])
    return word if word.isidentifier() else None


def require_possible(spec: InputSpec, text: str = "") -> None:
    """Refuse what no tensor can be; `text` is how the user wrote it.

    A size that is a name may be anything.

    Raises:
        UsageError: an unknown dtype, a size that is not positive, or absurdly many elements.
    """
    thing = f"The input '{text or spec.name or 'x'.join(map(str, spec.shape))}' cannot be made"
    if spec.dtype not in DTYPES:
        close = get_close_matches(spec.dtype, DTYPES, n=1)
        raise UsageError(
            thing,
            f"There is no dtype '{spec.dtype}' among {', '.join(DTYPES)}",
            f"Did you mean '{close[0]}'?" if close else "Choose one of them",
        )
    numbers = _numbers(spec)
    if any(size <= 0 for size in numbers):
        raise UsageError(
            thing,
            f"Its size {min(numbers)} is not positive",
            "Give the real sizes that the model shall be optimized for",
        )
    if math.prod(numbers) > MOST_ELEMENTS:
        raise UsageError(
            thing, "It has more than 2^40 elements", "Check the shape for a size too many"
        )


def random_arguments(specs: Sequence[InputSpec], seed: int) -> Arguments:
    """Seeded random inputs: unnamed ones positional, named ones by keyword.

    Floats are standard normal and bools are a fair coin. Integers are 0 or 1: to a model they are
    mostly indices or masks, and these two are valid in every table of at least two rows.

    Raises:
        UsageError: a name is given twice.
        LoadError: there is no memory for one.
        ValueError: a size is a name.
    """
    generator = torch.Generator().manual_seed(seed)
    positional: list[torch.Tensor] = []
    named: dict[str, torch.Tensor] = {}
    for spec in specs:
        if spec.name in named:
            raise UsageError(
                f"The input '{spec.name}' cannot be used",
                "It is given more than once",
                "Give every named input once",
            )
        tensor = _random_tensor(spec, generator)
        if spec.name is None:
            positional.append(tensor)
        else:
            named[spec.name] = tensor
    return tuple(positional), named


def _numbers(spec: InputSpec) -> list[int]:
    return [size for size in spec.shape if isinstance(size, int)]


def _random_tensor(spec: InputSpec, generator: torch.Generator) -> torch.Tensor:
    dtype, shape = DTYPES[spec.dtype], _numbers(spec)
    if len(shape) < len(spec.shape):
        raise ValueError(f"there is no tensor of the shape {spec.shape}")
    thing = f"An input of shape {'x'.join(map(str, spec.shape))}:{spec.dtype} cannot be made"
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes >= LARGE_BYTES:
        memory_bytes = environment(1)["memory_bytes"]
        if memory_bytes is not None and size_bytes > memory_bytes:
            raise LoadError(
                thing,
                f"It takes {size_bytes / 1e9:.0f} GB, and this machine has "
                f"{memory_bytes / 1e9:.0f} GB of memory",
                "Choose a smaller shape",
            )
    try:
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=dtype)
        return torch.randint(0, 2, shape, generator=generator, dtype=dtype)
    except (RuntimeError, MemoryError) as error:
        raise LoadError(thing, describe(error), "Choose a smaller shape") from error
