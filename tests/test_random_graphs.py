"""Random small convolution networks: whatever the passes make of one, its function stays.

Hypothesis draws a network line by line, so that a failure is printed as a listing like

    x1 = Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1))(x0)
    x2 = BatchNorm2d(6, ...)(x1)
    return x2        # x0 is (2, 4, 7, 7), its batch size dynamic

cut down to the fewest lines that still fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from optfuse import passes
from optfuse.capture import capture
from optfuse.float64 import distance
from optfuse.stages import LoadedModel, Program
from tests.harness import assert_same_function, assert_settled, optimized, scramble

# As strict as the driver's own proof. The networks are float64 and their numbers of size one, so
# an exact rewrite moves an output by 1e-15 or so, and a wrong formula by far more than this.
TOLERANCE = 1e-10

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
    nn.Softsign,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.GELU,
    nn.Mish,
)


class Choices:
    """Makes one choice a byte, and the first of the possible ones where the bytes have run out.

    One piece of bytes a line, because Hypothesis spends most of its examples on varying pieces of
    the last one, and networks are too slow to run to have most of them nearly alike. It still
    finds a small network that fails: bytes shrink to zeros, and a zero is the first choice.
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


class PerChannel(nn.Module):
    """Arithmetic with a parameter that has one number a channel."""

    def __init__(
        self, name: str, channels: int, rank: int, function: Callable[..., torch.Tensor]
    ) -> None:
        super().__init__()
        self._name = name
        self._function = function
        self.constant = nn.Parameter(torch.ones(channels, *[1] * rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(x, self.constant)

    def __repr__(self) -> str:
        return f"{self._name} with c of shape {tuple(self.constant.shape)}"


class Network(nn.Module):
    """Modules applied to earlier values, one a line; gives the values that nothing has used.

    Args:
        example: the input.
        rank: how many spatial dimensions it has; 1, 2 or 3.
        dynamic: whether to capture it with a batch size left open.
    """

    def __init__(self, example: torch.Tensor, rank: int, *, dynamic: bool) -> None:
        super().__init__()
        self.rank = rank
        self.dynamic = dynamic
        self.example = example
        self.batched = example.dim() == rank + 2
        self.layers = nn.ModuleList()
        self.sources: list[tuple[int, ...]] = []
        self.results: list[tuple[int, ...]] = []
        self.also_returned: list[int] = []
        self.values = [example]
        self.fresh: set[int] = set()
        """Values with memory of their own, which may be written in place."""

    def add(self, layer: nn.Module, *sources: int) -> list[int]:
        """Append a line and return which values it gives."""
        with torch.no_grad():
            given = layer.double().eval()(*[self.values[source] for source in sources])
        given = list(given) if isinstance(given, (tuple, list)) else [given]
        numbers = list(range(len(self.values), len(self.values) + len(given)))
        self.layers.append(layer)
        self.sources.append(sources)
        self.results.append(tuple(numbers))
        self.values += given
        if isinstance(layer, (*CONVOLUTIONS.values(), *BATCH_NORMS.values())):
            self.fresh.update(numbers)
        return numbers

    def channels(self, number: int) -> int:
        return self.values[number].shape[-1 - self.rank]

    def space(self, number: int) -> torch.Size:
        return self.values[number].shape[-self.rank :]

    def returned(self) -> list[int]:
        used = {source for sources in self.sources for source in sources}
        unused = [n for results in self.results for n in results if n not in used]
        return unused + [n for n in self.also_returned if n not in unused]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x]
        for layer, sources in zip(self.layers, self.sources, strict=True):
            given = layer(*[values[source] for source in sources])
            values += given if isinstance(given, (tuple, list)) else [given]
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
        left_open = ", its batch size dynamic" if self.dynamic else ""
        returned = ", ".join(f"x{n}" for n in self.returned())
        return "\n".join(
            ["", *lines, f"    return {returned}  # x0 is {tuple(self.example.shape)}{left_open}"]
        )


# One function a kind of line ----------------------------------------------------------------------


def pick(choices: Choices, network: Network) -> int:
    """A value to go on from: mostly the last one, so that chains form."""
    last = len(network.values) - 1
    return choices.integer(0, last) if choices.integer(0, 3) == 3 else last


def add_convolution(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    rank, channels = network.rank, network.channels(source)
    groups = choices.one_of(divisors(channels))
    out_channels = groups * choices.integer(1, max(2, 6 // groups))
    bias = choices.yes()
    if choices.integer(0, 2) == 2:
        kernel = choices.integer(1, 3)
        # Doubling again and again would make a network that takes seconds.
        stride = choices.integer(1, 2) if network.space(source).numel() <= 140 else 1
        layer = TRANSPOSED[rank](channels, out_channels, kernel, stride, groups=groups, bias=bias)
        network.add(layer, source)
        return
    kernel = tuple(choices.one_of([1, 1, 2, 3]) for _ in range(rank))
    dilation = choices.one_of([1, 1, 2])
    padding = choices.one_of(["same", "valid", 0, 1])
    stride = 1 if padding == "same" else choices.one_of([1, 1, 2])
    pads = 2 * padding if isinstance(padding, int) else 0
    spans = [dilation * (k - 1) + 1 for k in kernel]
    if any(n + pads < s for n, s in zip(network.space(source), spans, strict=True)):
        kernel, dilation = (1,) * rank, 1
    network.add(
        CONVOLUTIONS[rank](
            channels,
            out_channels,
            kernel,
            stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        ),
        source,
    )


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def add_batch_norm(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    if network.batched:
        norm = BATCH_NORMS[network.rank]
        eps = choices.one_of([1e-5, 0.1])
        network.add(norm(network.channels(source), eps=eps, affine=choices.yes()), source)


def add_convolution_norm_activation(choices: Choices, network: Network) -> None:
    add_convolution(choices, network)
    last = len(network.values) - 1
    if network.batched:
        (last,) = network.add(BATCH_NORMS[network.rank](network.channels(last)), last)
    network.add(choices.one_of(ACTIVATIONS)(), last)


def add_activation(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    kind = choices.one_of(ACTIVATIONS)
    in_place = kind is nn.ReLU and source in network.fresh and choices.yes()
    network.add(kind(inplace=True) if in_place else kind(), source)


def add_residual(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    alike = [n for n, v in enumerate(network.values) if v.shape == network.values[source].shape]
    other = choices.one_of(alike)
    if choices.yes():
        (source,) = network.add(same_size_convolution(choices, network, source), source)
        if network.values[source].shape != network.values[other].shape:
            return
    (total,) = network.add(Apply("add", torch.add), *choices.order([source, other]))
    if choices.yes():
        network.add(choices.one_of(ACTIVATIONS)(), total)


def same_size_convolution(choices: Choices, network: Network, source: int) -> nn.Module:
    channels = network.channels(source)
    kernel = choices.one_of([1, 3])
    return CONVOLUTIONS[network.rank](channels, channels, kernel, padding="same")


def add_concat(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    alike = [n for n in range(len(network.values)) if network.space(n) == network.space(source)]
    others = [choices.one_of(alike) for _ in range(choices.integer(1, 2))]
    dim = -1 - network.rank
    if network.batched and choices.yes():
        dim = 1
    join(network, dim, [source, *others])


def join(network: Network, dim: int, sources: Sequence[int]) -> int:
    concat = Apply(f"cat along {dim} of ", lambda *values: torch.cat(values, dim))
    return network.add(concat, *sources)[0]


def add_concat_norm(choices: Choices, network: Network) -> None:
    """Batch norm behind a concat of convolutions, which each branch must take its part of."""
    source = pick(choices, network)
    if network.batched:
        branches = []
        for _ in range(choices.integer(2, 3)):
            out_channels, kernel = choices.integer(1, 4), choices.one_of([1, 3])
            layer = CONVOLUTIONS[network.rank](
                network.channels(source), out_channels, kernel, padding="same", bias=choices.yes()
            )
            branches += network.add(layer, source)
        last = join(network, 1, branches)
        network.add(BATCH_NORMS[network.rank](network.channels(last)), last)


def add_split(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    channels, dim = network.channels(source), -1 - network.rank
    if channels < 2:
        return
    if choices.yes():
        first = choices.integer(1, channels - 1)
        sizes = [first, channels - first]
        parts = network.add(Apply(f"split {sizes}", lambda x: x.split(sizes, dim)), source)
    else:
        parts = network.add(Apply("chunk in 2", lambda x: x.chunk(2, dim)), source)
    if choices.yes():
        join(network, dim, choices.order(parts))


def add_slices(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    channels, dim = network.channels(source), -1 - network.rank
    cut = choices.integer(0, channels)
    bounds = [(start, stop) for start, stop in ((0, cut), (cut, channels)) if start < stop]
    parts = [network.add(narrow(dim, *bound), source)[0] for bound in bounds]
    if choices.yes():
        join(network, dim, choices.order(parts))


def narrow(dim: int, start: int, stop: int) -> nn.Module:
    return Apply(f"channels {start}:{stop} of ", lambda x: x.narrow(dim, start, stop - start))


def add_parallel_convolutions(choices: Choices, network: Network) -> None:
    """Two or three 1x1 convolutions on one value, as in an Inception block."""
    source = pick(choices, network)
    channels = network.channels(source)
    activation = choices.one_of([None, nn.ReLU, nn.SiLU])
    normalised = network.batched and choices.yes()
    ends = []
    for _ in range(choices.integer(2, 3)):
        out_channels, bias = choices.integer(1, 4), choices.yes()
        layer = CONVOLUTIONS[network.rank](channels, out_channels, 1, bias=bias)
        (end,) = network.add(layer, source)
        if normalised:
            (end,) = network.add(BATCH_NORMS[network.rank](out_channels), end)
        if activation is not None:
            (end,) = network.add(activation(), end)
        ends.append(end)
    joined = choices.integer(0, 3)
    if joined == 1:
        ends.append(pick_alike(choices, network, ends[0]))
    if joined:
        last = join(network, -1 - network.rank, ends)
        if network.batched and choices.yes():
            network.add(BATCH_NORMS[network.rank](network.channels(last)), last)


def pick_alike(choices: Choices, network: Network, like: int) -> int:
    space = network.space(like)
    return choices.one_of([n for n in range(len(network.values)) if network.space(n) == space])


def add_shared_convolution(choices: Choices, network: Network) -> None:
    """One that is already in the network, called again on another value."""
    known = [layer for layer in network.layers if isinstance(layer, CONVOLUTIONS[network.rank])]
    source = pick(choices, network)
    fitting = [
        layer
        for layer in known
        if layer.in_channels == network.channels(source) and set(layer.kernel_size) == {1}
    ]
    if fitting:
        (last,) = network.add(choices.one_of(fitting), source)
        if network.batched and choices.yes():
            network.add(BATCH_NORMS[network.rank](network.channels(last)), last)


def add_the_same_again(choices: Choices, network: Network) -> None:
    """An earlier line once more, which gives the same values a second time."""
    if len(network.layers) > 0:
        line = choices.integer(0, len(network.layers) - 1)
        first = network.results[line][0]
        (again, *_) = network.add(network.layers[line], *network.sources[line])
        if choices.yes():
            network.add(Apply("add", torch.add), first, again)


PER_CHANNEL = {
    "x * c": lambda x, c: x * c,
    "c * x": lambda x, c: c * x,
    "x + c": lambda x, c: x + c,
    "x + 3 c": lambda x, c: torch.add(x, c, alpha=3),
    "c + 2 x": lambda x, c: torch.add(c, x, alpha=2),
    "x - c": lambda x, c: x - c,
    "c - x": lambda x, c: c - x,
    "rsub(x, c)": lambda x, c: torch.rsub(x, c),
    "x / c": lambda x, c: x / c,
    "x * (c + 2)": lambda x, c: x * (c + 2.0),
}
NUMBERS = {
    "x * 0.7": lambda x: x * 0.7,
    "x + 0.7": lambda x: x + 0.7,
    "0.7 - x": lambda x: 0.7 - x,
    "x / 1.7": lambda x: x / 1.7,
    "-2 * x": lambda x: -2 * x,
}
IDENTITIES = {
    "x.view(x.shape)": lambda x: x.view(x.shape),
    "x.contiguous()": lambda x: x.contiguous(),
    "x * 1": lambda x: x * 1,
    "x + 0": lambda x: x + 0,
    "x.to(float64)": lambda x: x.to(torch.float64),
    "transpose twice": lambda x: x.transpose(-1, 0).transpose(-1, 0),
    "cat of one": lambda x: torch.cat([x], 0),
    "pad by nothing": lambda x: F.pad(x, (0, 0)),
    "all of x": lambda x: x[:],
    "clone": lambda x: x.clone(),
}


def add_arithmetic(choices: Choices, network: Network) -> None:
    """A chain of it, mostly behind a convolution."""
    if choices.integer(0, 3) < 3:
        add_convolution(choices, network)
    last = pick(choices, network)
    for _ in range(choices.integer(1, 3)):
        if choices.yes():
            name = choices.one_of(sorted(PER_CHANNEL))
            layer = PerChannel(name, network.channels(last), network.rank, PER_CHANNEL[name])
        else:
            layer = named(choices, NUMBERS)
        (last,) = network.add(layer, last)


def add_frozen_batch_norm(choices: Choices, network: Network) -> None:
    """A convolution and a batch norm spelled as arithmetic on its statistics."""
    add_convolution(choices, network)
    last = len(network.values) - 1
    layer = PerChannel("frozen norm", network.channels(last), network.rank, frozen_norm)
    network.add(layer, last)


def frozen_norm(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    scale = (c + 1e-3).rsqrt()
    return x * scale + (1.5 - c * scale)


def named(choices: Choices, functions: dict[str, Callable[..., Any]]) -> nn.Module:
    name = choices.one_of(sorted(functions))
    return Apply(f"({name})", functions[name])


def add_what_does_nothing(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    layer = choices.one_of(["dropout", "identity", "pool", "function", "function"])
    if layer == "dropout":
        network.add(nn.Dropout(0.5), source)
    elif layer == "identity":
        network.add(nn.Identity(), source)
    elif layer == "pool":
        network.add(AVERAGE_POOLS[network.rank](1, 1), source)
    else:
        network.add(named(choices, IDENTITIES), source)


def add_pool(choices: Choices, network: Network) -> None:
    source = pick(choices, network)
    if choices.yes():
        network.add(MAX_POOLS[network.rank](3, 1, 1), source)
    elif min(network.space(source)) >= 2:
        network.add(AVERAGE_POOLS[network.rank](2), source)


def add_nothing(choices: Choices, network: Network) -> None:
    """What every line shrinks to."""


LINES = (
    add_nothing,
    add_convolution,
    add_convolution_norm_activation,
    add_convolution_norm_activation,
    add_parallel_convolutions,
    add_parallel_convolutions,
    add_shared_convolution,
    add_the_same_again,
    add_batch_norm,
    add_activation,
    add_residual,
    add_concat,
    add_concat_norm,
    add_split,
    add_slices,
    add_arithmetic,
    add_arithmetic,
    add_frozen_batch_norm,
    add_what_does_nothing,
    add_pool,
)


BYTES_A_LINE = 24  # more than any line reads


@st.composite
def networks(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Network:
    """A network of a few lines, its numbers scrambled, in float64 and eval mode."""
    piece = st.binary(min_size=BYTES_A_LINE, max_size=BYTES_A_LINE)
    choices = Choices(draw(piece))
    network = empty_network(choices)
    for drawn in draw(st.lists(piece, min_size=2, max_size=12)):
        line = Choices(drawn)
        line.one_of(LINES)(line, network)
    if not network.layers:
        add_convolution(choices, network)
    if choices.yes():
        network.also_returned.append(choices.integer(1, len(network.values) - 1))
    return ready(network, numbers=choices.integer(0, 9))


def empty_network(choices: Choices) -> Network:
    rank = choices.one_of([2, 2, 1, 3])
    batched = choices.integer(0, 5) < 5
    shape = (*([2] if batched else []), choices.integer(1, 6), *[7, 5, 4][:rank])
    generator = torch.Generator().manual_seed(7)
    example = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Network(example, rank, dynamic=batched and choices.yes())


def ready(network: Network, numbers: int) -> Network:
    """Scrambled, with results of size one whatever the depth."""
    scramble(network, numbers)
    with torch.no_grad():
        for layer in set(network.modules()):
            if isinstance(layer, nn.modules.conv._ConvNd):
                layer.weight.div_(layer.weight[0].numel() ** 0.5)
            if isinstance(layer, PerChannel):
                layer.constant.copy_(layer.constant.abs() + 0.5)  # one of them divides
    return network


# The property -------------------------------------------------------------------------------------

OPTIONS = [f"{name}.{option}" for name in passes.ORDER for option in passes.load(name).OPTIONS]


def program_of(network: Network) -> Program:
    dynamic_shapes = ({0: torch.export.Dim("batch")},) if network.dynamic else None
    return capture(LoadedModel("random", network, (network.example,), {}, dynamic_shapes))


def check(network: Network, selection: str) -> Counter[str]:
    """Everything that must hold of one network; how often each pass matched."""
    kept = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert network.returned() != []
    before = program_of(network)
    after = optimized(before, selection)  # asserts that no pass was undone
    assert_same_function(before, after, tolerance=TOLERANCE)
    assert_computes_what_the_model_computes(network, after)
    assert_settled(after, selection)
    now = network.state_dict()
    assert list(now) == list(kept)
    # Bit for bit: the caller's model is not ours to write.
    assert [name for name in kept if not torch.equal(now[name], kept[name])] == []
    matched: Counter[str] = Counter()
    for step in after.trace:
        matched[step.name] += step.matched
    return matched


def assert_computes_what_the_model_computes(network: Network, after: Program) -> None:
    """Eager PyTorch against the rewritten graph as it is run: neither the float64 interpreter nor
    the captured graph takes part, and a batch size left open is another one."""
    x = network.example.flip(-1) * 1.5
    if network.dynamic:
        x = torch.cat([x, x[:1] - 0.3])
    with torch.no_grad():
        moved = distance(list(network(x)), list(after.graph_module(x)))
    assert moved <= TOLERANCE, f"outputs moved by {moved:.1e}"


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("selection", "seeds", "examples"),
    [("all", 4, 11), (",".join(["all", *OPTIONS]), 2, 10)],
    ids=["all", "every_option"],
)
def test_passes_keep_the_function_of_random_networks(
    selection: str, seeds: int, examples: int
) -> None:
    matched: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(network=networks())
    def every_network_keeps_its_function(network: Network) -> None:
        matched.update(check(network, selection))

    # Fixed seeds, so that every run draws the same; several, since examples drawn late in one run
    # vary those drawn early.
    for start in range(seeds):
        seed(start)(every_network_keeps_its_function)()
    # Networks in which a pass finds nothing to do would say nothing about it.
    assert [name for name in passes.ORDER if matched[name] == 0] == []
