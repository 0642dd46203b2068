"""Lines that move data: cut it, join it, put it in another order or shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.random_graphs.convolutions import convolve, join, normalise, same_size
from tests.random_graphs.network import (
    CONVOLUTIONS,
    Apply,
    Choices,
    Network,
    WithConstants,
    divisors,
    pick,
    pick_any,
    pick_image,
)


def add_concat(choices: Choices, network: Network) -> None:
    """Along channels, sometimes of what is a concat already, and in front of a convolution."""
    source = pick_image(choices, network)
    dim = network.channel_dim(source)
    alike = network.alike(source, but=[dim])
    others = [choices.one_of(alike) for _ in range(choices.integer(1, 2))]
    if choices.integer(0, 5) == 5 and network.space(source).numel() <= 140:
        # Along another dimension: what is for channels only must keep away from it.
        alike = network.alike(source, but=[-1])
        join(network, choices.order([source, choices.one_of(alike)]), -1)
        return
    # The same dimension, counted from the front.
    named = choices.one_of([dim, network.values[source].dim() + dim])
    last = join(network, choices.order([source, *others]), named)
    if choices.yes():
        last = join(network, choices.order([last, choices.one_of(alike)]), dim)
    if choices.integer(0, 2) == 2 and network.channels(last) <= 24:
        convolve(choices, network, last)


def add_split(choices: Choices, network: Network) -> None:
    source = pick_any(choices, network)
    dim = network.channel_dim(source) if network.layouts[source] != "other" else -1
    channels = network.values[source].shape[dim]
    if channels < 2 or (network.layouts[source] == "other" and network.left_open != "nothing"):
        return
    parts = cut(choices, network, source, dim)
    if choices.yes():
        join(network, choices.order(parts), dim)


def cut(choices: Choices, network: Network, source: int, dim: int) -> list[int]:
    """The value in parts, cut in one of the ways there are."""
    channels = network.values[source].shape[dim]
    which = choices.integer(0, 4)
    if which == 0:
        first = choices.integer(1, channels - 1)
        sizes = [first, channels - first]
        return network.add(Apply(f"split {sizes}", lambda x: x.split(sizes, dim)), source)
    if which == 1:
        return network.add(Apply("chunk in 2", lambda x: x.chunk(2, dim)), source)
    if which == 2:
        at = choices.integer(1, channels - 1)
        return [
            *network.add(narrow(dim, 0, at), source),
            *network.add(narrow(dim, at, channels), source),
        ]
    if which == 3 and channels <= 6:
        kept = Apply("unbind, each kept", lambda x: [e.unsqueeze(dim) for e in x.unbind(dim)])
        # A dimension that is counted from the end stands elsewhere once it is taken away.
        if dim == -1:
            return network.add(kept, source)
    apart = Apply(
        "every second from 0, from 1",
        lambda x: (x.movedim(dim, 0)[::2].movedim(0, dim), x.movedim(dim, 0)[1::2].movedim(0, dim)),
    )
    return network.add(apart, source)


def add_slices(choices: Choices, network: Network) -> None:
    """Parts of the channels, which may overlap or leave something out."""
    source = pick_image(choices, network)
    channels, dim = network.channels(source), network.channel_dim(source)
    parts = []
    for _ in range(choices.integer(1, 3)):
        start = choices.integer(0, channels - 1)
        stop = choices.integer(start + 1, channels)
        parts += network.add(narrow(dim, start, stop), source)
    if choices.yes():
        last = join(network, parts)
        if choices.yes():
            convolve(choices, network, last)


def narrow(dim: int, start: int, stop: int) -> nn.Module:
    return Apply(f"channels {start}:{stop} of ", lambda x: x.narrow(dim, start, stop - start))


def reorder(choices: Choices, network: Network, source: int) -> int:
    """The channels in another order, or some of them twice, or not all of them."""
    channels, dim = network.channels(source), network.channel_dim(source)
    which = choices.integer(0, 4)
    if which == 0:
        groups = choices.one_of(divisors(channels))
        shuffle = Apply(f"shuffle of {groups} groups", lambda x: shuffled(x, groups, dim))
        return network.add(shuffle, source)[0]
    if which == 1:
        return network.add(Apply("flip of channels", lambda x: x.flip(dim)), source)[0]
    if which == 2:
        by = choices.integer(1, 3)
        return network.add(Apply(f"roll by {by}", lambda x: x.roll(by, dim)), source)[0]
    if which == 3:
        indices = torch.tensor(choices.order(range(channels)))
    else:
        count = choices.integer(1, channels + 1)
        indices = torch.tensor([choices.integer(0, channels - 1) for _ in range(count)])
    return network.add(Select(indices, dim), source)[0]


class Select(nn.Module):
    """Channels by their numbers."""

    indices: torch.Tensor

    def __init__(self, indices: torch.Tensor, dim: int) -> None:
        super().__init__()
        self._dim = dim
        self.register_buffer("indices", indices)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(self._dim, self.indices)

    def __repr__(self) -> str:
        return f"channels {self.indices.tolist()} of "


def shuffled(x: torch.Tensor, groups: int, dim: int) -> torch.Tensor:
    """As ShuffleNet spells it: view, transpose, view."""
    dim += x.dim()
    sizes = (groups, x.shape[dim] // groups)
    parted = x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
    return parted.transpose(dim, dim + 1).flatten(dim, dim + 1)


def add_reordered(choices: Choices, network: Network) -> None:
    """Other orders of channels, mostly between convolutions."""
    last = pick_image(choices, network)
    if choices.yes():
        last = convolve(choices, network, last)
    for _ in range(choices.integer(1, 2)):
        last = reorder(choices, network, last)
    if choices.integer(0, 3) < 3:
        convolve(choices, network, last)


def add_shuffle_unit(choices: Choices, network: Network) -> None:
    """Half of the channels through convolutions, the other half past them, then a shuffle."""
    source = pick_image(choices, network)
    channels, dim = network.channels(source), network.channel_dim(source)
    if channels % 2:
        return
    past, last = network.add(Apply("chunk in 2", lambda x: x.chunk(2, dim)), source)
    last = normalise(network, same_size(choices, network, last))
    (last,) = network.add(nn.ReLU(), last)
    last = join(network, [past, last])
    (last,) = network.add(Apply("shuffle of 2 groups", lambda x: shuffled(x, 2, dim)), last)
    if choices.yes():
        convolve(choices, network, last)


def add_grouped_and_shuffled(choices: Choices, network: Network) -> None:
    """A grouped 1x1 convolution, a shuffle, a depthwise convolution, as in ShuffleNet."""
    source = pick_image(choices, network)
    rank, channels = network.rank_of(source), network.channels(source)
    groups = choices.one_of(divisors(channels))
    out_channels = groups * choices.integer(1, max(1, 8 // groups))
    layer = CONVOLUTIONS[rank](channels, out_channels, 1, groups=groups)
    last = normalise(network, network.add(layer, source)[0])
    dim = network.channel_dim(last)
    shuffle = Apply(f"shuffle of {groups} groups", lambda x: shuffled(x, groups, dim))
    (last,) = network.add(shuffle, last)
    depthwise = CONVOLUTIONS[rank](out_channels, out_channels, 3, padding=1, groups=out_channels)
    network.add(depthwise, last)


def add_stack(choices: Choices, network: Network) -> None:
    """Two values whose channels alternate."""
    source = pick_image(choices, network)
    dim = network.channel_dim(source)
    if network.channels(source) <= 12:
        stack = Apply(
            "stack and flatten", lambda x, y: torch.stack([x, y], dim).flatten(dim - 1, dim)
        )
        network.add(stack, source, choices.one_of(network.alike(source)))


def add_resampled(choices: Choices, network: Network) -> None:
    """Upsampling, or channels moved into space and back."""
    source = pick_image(choices, network)
    rank = network.rank_of(source)
    if not network.batched or network.space(source).numel() > 140:
        return
    if choices.yes() and rank == 2:
        channels = network.channels(source)
        if choices.yes() and not any(size % 2 for size in network.space(source)):
            if network.left_open != "batch and space":
                network.add(nn.PixelUnshuffle(2), source)
        elif channels % 4 == 0:
            network.add(nn.PixelShuffle(2), source)
        else:
            layer = CONVOLUTIONS[rank](channels, 4 * choices.integer(1, 2), 1)
            network.add(nn.PixelShuffle(2), network.add(layer, source)[0])
        return
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank]
    mode = choices.one_of(["nearest", smooth])
    network.add(nn.Upsample(scale_factor=2, mode=mode), source)


def add_spatial(choices: Choices, network: Network) -> None:
    """What moves elements along space and leaves the channels alone."""
    source = pick_image(choices, network)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "x.flip(-1)": lambda x: x.flip(-1),
        "x.roll(1, -1)": lambda x: x.roll(1, -1),
        "x.transpose(-1, -2)": lambda x: x.transpose(-1, -2),
        "x[..., 1:]": lambda x: x[..., 1:],
        "x[..., ::2]": lambda x: x[..., ::2],
        "x[..., :-1]": lambda x: x[..., :-1],
        "x[..., -2:]": lambda x: x[..., -2:],
        "cut in two along -1, joined the other way round": lambda x: torch.cat(
            [x[..., 2:], x[..., :2]], -1
        ),
        "x summed along -1, kept": lambda x: x.sum(-1, keepdim=True),
    }
    if network.rank_of(source) == 1:
        del functions["x.transpose(-1, -2)"]
    if min(network.values[source].shape[-1], network.elsewhere[source].shape[-1]) < 2:
        return
    name = choices.one_of(list(functions))
    network.add(Apply(f"({name})", functions[name]), source)


def add_tokens(choices: Choices, network: Network) -> None:
    """From (N, C, *space) to channels last, with space flattened or not."""
    source = pick_image(choices, network)
    dim = network.channel_dim(source)
    if choices.yes():
        permuted = Apply("channels last", lambda x: x.movedim(dim, -1))
        network.add(permuted, source, layout="tokens")
    elif network.batched:
        tokens = Apply("flatten(2).transpose(1, 2)", lambda x: x.flatten(2).transpose(1, 2))
        network.add(tokens, source, layout="tokens")


def add_image_of_tokens(choices: Choices, network: Network) -> None:
    """Back from channels last."""
    source = pick(choices, network, "tokens")
    if source is not None and network.batched and 3 <= network.values[source].dim() <= 5:
        network.add(Apply("channels first", lambda x: x.movedim(-1, 1)), source, layout="image")


def add_pooled_vector(choices: Choices, network: Network) -> None:
    """(N, C) by a mean over space, or everything flattened, as in front of a classifier."""
    source = pick_image(choices, network)
    rank = network.rank_of(source)
    if not network.batched:
        return
    if choices.yes() or network.left_open == "batch and space":
        dims = tuple(range(-rank, 0))
        pools = [
            Apply(f"mean over {dims} of ", lambda x: x.mean(dims)),
            Apply(f"sum over {dims} of ", lambda x: x.sum(dims)),
            Apply(f"maximum over {dims} of ", lambda x: x.amax(dims)),
        ]
        network.add(choices.one_of(pools), source, layout="tokens")
    elif network.values[source][0].numel() <= 200:
        network.add(nn.Flatten(), source, layout="tokens")


def add_expanded(choices: Choices, network: Network) -> None:
    """Something of size one along a dimension, added to or multiplied with all of it."""
    source = pick_image(choices, network)
    constant = torch.ones(1, network.channels(source), *[1] * network.rank_of(source))
    if network.batched:
        layer = WithConstants("x + c.expand_as(x)", _plus_expanded, constant, buffers=choices.yes())
        network.add(layer, source)


def _plus_expanded(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return x + c.expand(x.shape[0], -1, *x.shape[2:])


LINES = (
    add_concat,
    add_concat,
    add_split,
    add_split,
    add_slices,
    add_reordered,
    add_reordered,
    add_shuffle_unit,
    add_grouped_and_shuffled,
    add_stack,
    add_resampled,
    add_spatial,
    add_tokens,
    add_tokens,
    add_image_of_tokens,
    add_pooled_vector,
    add_expanded,
)
