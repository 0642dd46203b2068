"""A network as a list of lines, each a module applied to earlier values.

It prints as a listing like

    x1 = Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1))(x0)
    x2 = BatchNorm2d(6, ...)(x1)
    return x2        # x0 is (2, 4, 7, 7), its batch size dynamic
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

Layout = Literal["image", "tokens", "other"]
"""Where channels are: (N, C, *space), or in the last dimension, or nowhere in particular."""

Open = Literal["nothing", "batch", "batch and space"]
"""Which sizes of the inputs are left open when the network is captured."""

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OWN_MEMORY = (*CONVOLUTIONS.values(), *BATCH_NORMS.values(), nn.Linear)


class Choices:
    """Makes one choice a byte, and the first of the possible ones where the bytes have run out.

    So a small network that fails is found by making bytes smaller: a zero is the first choice.
    """

    def __init__(self, drawn: bytes) -> None:
        self._bytes = iter(drawn)

    def integer(self, low: int, high: int) -> int:
        return low + next(self._bytes, 0) % (high - low + 1)

    def yes(self) -> bool:
        return self.integer(0, 1) == 1

    def one_of(self, possible: Sequence[Any]) -> Any:
        return possible[self.integer(0, len(possible) - 1)]

    def order(self, items: Sequence[Any]) -> list[Any]:
        waiting = list(items)
        return [waiting.pop(self.integer(0, len(waiting) - 1)) for _ in items]


class Apply(nn.Module):
    """A function of tensors with a name that says what it does."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self._name = name
        self._function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._function(*inputs)

    def __repr__(self) -> str:
        return self._name


class WithConstants(nn.Module):
    """A function of a tensor and of parameters or buffers."""

    def __init__(
        self, name: str, function: Callable[..., Any], *constants: torch.Tensor, buffers: bool
    ) -> None:
        super().__init__()
        self._name = name
        self._function = function
        self._names = []
        for number, constant in enumerate(constants):
            self._names.append(f"constant_{number}")
            if buffers:
                self.register_buffer(self._names[-1], constant)
            else:
                self.register_parameter(self._names[-1], nn.Parameter(constant))

    @property
    def constants(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in self._names]

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._function(*inputs, *self.constants)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(constant.shape)) for constant in self.constants)
        return f"({self._name}, c of shape {shapes})"


class Network(nn.Module):
    """Modules applied to earlier values, one a line; gives the values that nothing has used.

    Every line is run at once on two sets of inputs, the example and one whose open sizes are
    others: two values have the same shape for every input only where they have it in both.

    Args:
        examples: the inputs, with the batch first if they are batched.
        rank: how many spatial dimensions they have; 1, 2 or 3.
        batched: whether they have a batch dimension.
        left_open: which of their sizes are dynamic.
    """

    def __init__(
        self, examples: Sequence[torch.Tensor], rank: int, *, batched: bool, left_open: Open
    ) -> None:
        super().__init__()
        self.rank = rank
        self.batched = batched
        self.left_open: Open = left_open
        self.examples = tuple(examples)
        self.layers = nn.ModuleList()
        self.sources: list[tuple[int, ...]] = []
        self.results: list[tuple[int, ...]] = []
        self.also_returned: list[int] = []
        self.not_returned: set[int] = set()
        self.rounds = False
        """Whether it casts to a narrower dtype on the way, and so is not exact in float64."""
        self.values = list(examples)
        self.elsewhere = [self.with_other_sizes(example) for example in examples]
        self.layouts: list[Layout] = ["image"] * len(examples)
        self.fresh: set[int] = set()
        """Values with memory of their own, which may be written in place."""

    def with_other_sizes(self, example: torch.Tensor) -> torch.Tensor:
        """Random numbers in the shape of an example, but for the sizes that are left open."""
        sizes = list(example.shape)
        if self.left_open != "nothing":
            sizes[0] += 1
        if self.left_open == "batch and space":
            sizes[-self.rank :] = [size + 3 + size % 2 for size in sizes[-self.rank :]]
        generator = torch.Generator().manual_seed(11)
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    def add(self, layer: nn.Module, *sources: int, layout: Layout | None = None) -> list[int]:
        """Append a line and return which values it gives; laid out as the first source if nothing
        else is said."""
        layer.double().eval()
        given, elsewhere = (
            _as_list(_run(layer, [values[source] for source in sources]))
            for values in (self.values, self.elsewhere)
        )
        numbers = list(range(len(self.values), len(self.values) + len(given)))
        self.layers.append(layer)
        self.sources.append(sources)
        self.results.append(tuple(numbers))
        self.values += given
        self.elsewhere += elsewhere
        self.layouts += [layout or self.layouts[sources[0]]] * len(given)
        if isinstance(layer, OWN_MEMORY):
            self.fresh.update(numbers)
        return numbers

    def channel_dim(self, number: int) -> int:
        """The dimension of the channels, counted from the end."""
        return -1 if self.layouts[number] == "tokens" else -1 - self.rank_of(number)

    def rank_of(self, number: int) -> int:
        """How many spatial dimensions an image has."""
        return self.values[number].dim() - (2 if self.batched else 1)

    def channels(self, number: int) -> int:
        return self.values[number].shape[self.channel_dim(number)]

    def space(self, number: int) -> torch.Size:
        return self.values[number].shape[-self.rank_of(number) :]

    def alike(self, number: int, *, but: Iterable[int] = ()) -> list[int]:
        """The values with the shape of this one whatever the inputs' sizes are, save along some
        dimensions (counted from the end)."""
        return [
            other
            for other in range(len(self.values))
            if self.layouts[other] == self.layouts[number]
            and self.values[other].dtype == self.values[number].dtype
            and all(
                _shape(values[other], but) == _shape(values[number], but)
                for values in (self.values, self.elsewhere)
            )
        ]

    def returned(self) -> list[int]:
        used = {source for sources in self.sources for source in sources}
        given = [n for results in self.results for n in results]
        unused = [n for n in given if n not in used and n not in self.not_returned]
        return (unused or given[-1:]) + self.also_returned

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = list(inputs)
        for layer, sources in zip(self.layers, self.sources, strict=True):
            values += _as_list(layer(*[values[source] for source in sources]))
        return tuple(values[number] for number in self.returned())

    def __repr__(self) -> str:
        lines = []
        seen: dict[int, int] = {}
        for layer, sources, results in zip(self.layers, self.sources, self.results, strict=True):
            first = seen.setdefault(id(layer), results[0])
            shared = f"  # the same module as for x{first}" if first != results[0] else ""
            left = ", ".join(f"x{n}" for n in results)
            right = ", ".join(f"x{n}" for n in sources)
            lines.append(f"    {left} = {layer}({right}){shared}")
        inputs = ", ".join(f"x{n} is {tuple(e.shape)}" for n, e in enumerate(self.examples))
        left_open = "" if self.left_open == "nothing" else f", {self.left_open} dynamic"
        returned = ", ".join(f"x{n}" for n in self.returned())
        return "\n".join(["", *lines, f"    return {returned}  # {inputs}{left_open}"])


def _as_list(given: Any) -> list[torch.Tensor]:
    return list(given) if isinstance(given, (tuple, list)) else [given]


def _run(layer: nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    with torch.no_grad():
        # In-place lines may not change what later lines are drawn by.
        return layer(*[each.clone() for each in inputs])


def _shape(tensor: torch.Tensor, but: Iterable[int]) -> list[int | None]:
    sizes: list[int | None] = list(tensor.shape)
    for dim in but:
        sizes[dim] = None
    return sizes


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


# Picking values -----------------------------------------------------------------------------------


def pick(choices: Choices, network: Network, layout: Layout = "image") -> int | None:
    """A value to go on from: mostly the last one, so that chains form; None if there is none."""
    fitting = [
        number
        for number, found in enumerate(network.layouts)
        if found == layout and network.values[number].is_floating_point()
    ]
    return pick_among(choices, fitting)


def pick_image(choices: Choices, network: Network) -> int:
    """As `pick`; there is always an image, since the inputs are."""
    found = pick(choices, network)
    assert found is not None
    return found


def pick_any(choices: Choices, network: Network) -> int:
    """A value of any layout."""
    fitting = [n for n, value in enumerate(network.values) if value.is_floating_point()]
    found = pick_among(choices, fitting)
    assert found is not None
    return found


def pick_among(choices: Choices, fitting: Sequence[int]) -> int | None:
    if not fitting:
        return None
    if choices.integer(0, 3) == 3:
        return int(choices.one_of(fitting))
    return fitting[-1]
