"""A case: a random network, and what is to be done with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hypothesis import strategies as st
from torch import nn

from optfuse import passes
from optfuse.passes import Pass
from tests.harness import scramble
from tests.random_graphs import arithmetic, convolutions, linear, movement
from tests.random_graphs.network import Choices, Network, Open, WithConstants

Also = Literal["another order", "captured again"]
"""What is done besides optimising: a permutation of the passes, or capturing what they gave."""

Line = Callable[[Choices, Network], None]

FAMILIES = (convolutions.LINES, convolutions.LINES, arithmetic.LINES, movement.LINES, linear.LINES)
LINES_AT_MOST = 12
BYTES_A_LINE = 40  # more than any line reads

OPTIONS = [f"{name}.{option}" for name in passes.ORDER for option in passes.load(name).OPTIONS]
EVERY_OPTION = ",".join(["all", *OPTIONS])


@dataclass(frozen=True)
class Case:
    """One network to check.

    Attributes:
        network: in its own dtype, with numbers in it, in eval mode.
        dtype: of its parameters and inputs.
        selection: the passes, as `--passes` takes them.
        also: what else must leave its function alone.
        order: the positions of all passes in another order; those not selected are left out.
        seed: of the inputs it is compared on.
        is_the_simplest: whether it is what every case shrinks to.
    """

    network: Network
    dtype: torch.dtype
    selection: str
    also: Also
    order: tuple[int, ...]
    seed: int
    is_the_simplest: bool

    def reordered(self, selected: Sequence[Pass]) -> list[Pass]:
        """The selected passes in the other order."""
        known = {each.name: each for each in selected}
        names = [passes.ORDER[position] for position in self.order]
        return [known[name] for name in names if name in known]

    def __repr__(self) -> str:
        then = f"then {self.also}"
        if self.also == "another order":
            then += ": " + ", ".join(passes.ORDER[position] for position in self.order)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.network}\n    in {dtype}, --passes {self.selection}, {then}\n"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """As Hypothesis prints it where it fails; otherwise it would list the fields."""
        printer.text(repr(self))


@st.composite
def cases(
    draw: Callable[[st.SearchStrategy[Any]], Any],
    selection: str | None = None,
    dtype: torch.dtype | None = None,
) -> Case:
    """A network of a few lines and what to do with it, in pieces of bytes.

    One piece a line, because Hypothesis varies and shrinks pieces.

    Args:
        draw: Hypothesis's own.
        selection, dtype: drawn if nothing is said.
    """
    piece = st.binary(min_size=BYTES_A_LINE, max_size=BYTES_A_LINE)
    first = draw(piece)
    lines = draw(st.lists(piece, min_size=2, max_size=LINES_AT_MOST))
    return case_of(first, lines, selection, dtype)


def case_of(
    first: bytes,
    lines: Sequence[bytes],
    selection: str | None = None,
    dtype: torch.dtype | None = None,
) -> Case:
    """The case that these bytes stand for."""
    choices = Choices(first)
    network = empty_network(choices)
    # Half of the lines are of one family, so that its lines meet each other.
    families = (*FAMILIES, *[choices.one_of(FAMILIES)] * len(FAMILIES))
    for line in lines:
        draw_line(Choices(line), network, families)
    if not network.layers:
        convolutions.add_convolution(choices, network)
    if choices.yes():
        network.also_returned.append(choices.integer(0, len(network.values) - 1))
    dtypes = [*[torch.float64] * 5, torch.float32, torch.bfloat16, torch.float16]
    drawn_dtype = choices.one_of(dtypes)
    seed = choices.integer(0, 9)
    also: Also = choices.one_of([*["another order"] * 3, "captured again"])
    drawn_selection = draw_selection(choices)
    dtype = dtype or drawn_dtype
    return Case(
        ready(network, seed).to(dtype),
        dtype,
        selection or drawn_selection,
        also,
        tuple(choices.order(range(len(passes.ORDER)))),
        seed,
        is_the_simplest=not any(first) and not any(map(any, lines)),
    )


def draw_line(choices: Choices, network: Network, families: Sequence[Sequence[Line]]) -> None:
    """One more line, or none: what every line shrinks to."""
    family = choices.integer(0, len(families))
    if family:
        choices.one_of(families[family - 1])(choices, network)


def draw_selection(choices: Choices) -> str:
    """All passes, those with every option, one alone, or some of them."""
    which = choices.integer(0, 7)
    if which < 4:
        return "all"
    if which < 6:
        return EVERY_OPTION
    if which == 6:
        return str(choices.one_of([*passes.ORDER, *OPTIONS]))
    some = [name for name in [*passes.ORDER, *OPTIONS] if choices.yes()]
    return ",".join(some or passes.ORDER[:1])


def empty_network(choices: Choices) -> Network:
    rank = choices.one_of([2, 2, 1, 3])
    batched = choices.integer(0, 5) < 5
    # Weighted by what capturing them takes: 1 to 3 to 4.
    possible = ["nothing", "nothing", "nothing", "batch", "batch and space"]
    left_open: Open = choices.one_of(possible) if batched else "nothing"
    # A size that is left open must not be 1 in the example: torch.export would take it for fixed.
    batch = choices.one_of([2, 1]) if left_open == "nothing" else 2
    sizes = choices.one_of([[7, 5, 4], [7, 5, 4], [4, 6, 4], [1, 5, 3]])[:rank]
    if left_open == "batch and space":
        sizes = [7, 5, 4][:rank]
    generator = torch.Generator().manual_seed(7)
    examples = []
    for _ in range(choices.one_of([1, 1, 2])):
        shape = (*([batch] if batched else []), choices.integer(1, 6), *sizes)
        examples.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return Network(examples, rank, batched=batched, left_open=left_open)


def ready(network: Network, numbers: int) -> Network:
    """Scrambled, with results of size one whatever the depth."""
    scramble(network, numbers)
    generator = torch.Generator().manual_seed(numbers)
    with torch.no_grad():
        for layer in network.modules():  # each once, however often it is called
            if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
                layer.weight.div_(layer.weight[0].numel() ** 0.5)
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
                layer.weight[:: 3 + numbers] = 0.0  # where a residual branch starts training
            if isinstance(layer, WithConstants):
                for constant in layer.constants:
                    drawn = torch.randn(constant.shape, generator=generator).abs() + 0.5
                    constant.copy_(drawn)  # some of them divide
    return network
