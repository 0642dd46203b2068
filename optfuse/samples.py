"""The user's own inputs, from a `.npz`, `.npy` or `.safetensors` file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from optfuse.errors import LoadError, UsageError

SUFFIXES = (".npz", ".npy", ".safetensors")

Size = int | str
"""A size, or the name of one that is open."""


@dataclass(frozen=True)
class Wanted:
    """An input that has to be given: its name, dtype as PyTorch has it, and shape."""

    name: str
    dtype: str
    shape: tuple[Size, ...]

    def __str__(self) -> str:
        return f"{_written(self.shape)} {self.dtype}"


def read_samples(path: Path, wanted: Sequence[Wanted]) -> list[list[torch.Tensor]]:
    """The inputs in a file, for one run or for several.

    Arrays are matched by the names of the inputs, or in their order where they have no names (a
    `.npy`, and the `arr_0`, `arr_1` of a `.npz`); a file with one array needs no name for a single
    input. Where the first dimension of an array is a multiple of what one run takes, each part is
    a sample of its own; an array for one run alone serves all of them.

    Args:
        path: of the file; nothing in it is unpickled.
        wanted: the inputs, in the program's order.

    Returns:
        For each sample, one CPU tensor an input.

    Raises:
        LoadError: the file cannot be read, or is of another kind than its name says.
        UsageError: its arrays do not fit the inputs.
    """
    arrays = _in_order(path, _read(path), wanted)
    runs = [_runs_in(path, array, each) for array, each in zip(arrays, wanted, strict=True)]
    number = max(runs, default=1)
    if set(runs) - {1, number}:
        raise UsageError(
            f"The arrays in '{path}' do not fit together",
            f"They hold inputs for {' and '.join(map(str, sorted(set(runs))))} runs",
            "Give as many samples of each input",
        )
    parts = [
        array.chunk(number) if count == number > 1 else [array] * number
        for array, count in zip(arrays, runs, strict=True)
    ]
    return [[part[index].contiguous() for part in parts] for index in range(number)]


def require_file(path: Path) -> None:
    """Refuse what cannot hold inputs, without reading it.

    Raises:
        LoadError: there is no such file.
        UsageError: its name says that it is of another kind.
    """
    thing = f"The inputs in '{path}' cannot be read"
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            thing,
            f"Its name ends in '{path.suffix}', and only {', '.join(SUFFIXES)} are read",
            "Save the arrays with numpy.savez, and give them the names of the inputs",
        )
    if not path.is_file():
        raise LoadError(thing, "There is no such file", "Check the path")


def require_finite(
    path: Path, samples: Sequence[Sequence[torch.Tensor]], wanted: Sequence[Wanted]
) -> None:
    """Refuse inputs that no distance can be taken on.

    Raises:
        UsageError: a number is NaN or infinite.
    """
    for number, sample in enumerate(samples):
        for each, tensor in zip(wanted, sample, strict=True):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise UsageError(
                    f"The inputs in '{path}' cannot be used",
                    f"Sample {number} of the input '{each.name}' has NaN or infinity in it",
                    "Save the data again without it",
                )


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The arrays in the file by their names; those of a `.npy` and unnamed ones are `arr_0` ..."""
    require_file(path)
    thing = f"The inputs in '{path}' cannot be read"
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            arrays = {"arr_0": found} if isinstance(found, np.ndarray) else dict(found)
        return {
            # PyTorch has no numbers of the other byte order.
            name: torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
            for name, array in arrays.items()
        }
    except Exception as error:  # numpy's, zipfile's and safetensors' own
        lines = str(error).strip().splitlines() or ["no message"]
        raise LoadError(
            thing,
            f"It is cut short or of another kind: {type(error).__name__}: {lines[0]}",
            "Save the arrays again, as plain numbers, with numpy.savez or safetensors",
        ) from error


def _in_order(
    path: Path, arrays: Mapping[str, torch.Tensor], wanted: Sequence[Wanted]
) -> list[torch.Tensor]:
    names = [each.name for each in wanted]
    if set(arrays) == set(names):
        return [arrays[name] for name in names]
    unnamed = all(re.fullmatch(r"arr_\d+", name) for name in arrays) or len(names) == 1
    if unnamed and len(arrays) == len(names):
        return [arrays[name] for name in sorted(arrays, key=_number)]
    raise UsageError(
        f"The arrays in '{path}' are not the inputs",
        f"They are {', '.join(arrays) or 'none'}, and the inputs are {', '.join(names) or 'none'}",
        "Save one array for each input under the input's name, and no other",
    )


def _number(name: str) -> int:
    found = re.fullmatch(r"arr_(\d+)", name)
    return int(found[1]) if found else 0


def _runs_in(path: Path, array: torch.Tensor, wanted: Wanted) -> int:
    """How many runs the array holds inputs for."""
    dtype = str(array.dtype).removeprefix("torch.")
    shape = tuple(array.shape)
    sizes = list(zip(shape, wanted.shape, strict=False))
    fits = len(shape) == len(wanted.shape) and all(
        isinstance(size, str) or given == size for given, size in sizes[1:]
    )
    runs = 1
    if fits and sizes:
        given, size = sizes[0]
        # An open first dimension takes all of it in one run.
        if isinstance(size, int):
            fits = size > 0 and given >= size and given % size == 0
            runs = given // size if fits else 1
    if fits and dtype == wanted.dtype:
        return runs
    raise UsageError(
        f"The array for the input '{wanted.name}' in '{path}' does not fit",
        f"It is {_written(shape)} {dtype}, and one run takes {wanted}",
        f"Save it with that shape, or a multiple of its first size, as {wanted.dtype}",
    )


def _written(shape: Sequence[Size]) -> str:
    return "x".join(map(str, shape)) or "scalar"
