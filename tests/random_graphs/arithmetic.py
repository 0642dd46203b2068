"""Lines of elementwise arithmetic, constants, casts and writes in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.random_graphs.convolutions import AVERAGE_POOLS, convolve
from tests.random_graphs.network import (
    Apply,
    Choices,
    Network,
    WithConstants,
    pick_any,
    pick_image,
)

PER_CHANNEL: dict[str, Callable[..., torch.Tensor]] = {
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
    "x * (c - min of c)": lambda x, c: x * (c - c.min()),
    "x in float32 or wider * c, and back": lambda x, c: (_wider(x) * _wider(c)).to(x.dtype),
    "x * 2 * c": lambda x, c: x * 2 * c,
    "x * exp(-c) + c": lambda x, c: x * torch.exp(-c) + c,
    "c / (1 + x * x)": lambda x, c: c / (1 + x * x),
    "addcmul(x, x, c)": lambda x, c: torch.addcmul(x, x, c, value=0.5),
    "lerp(x, c, 0.3)": lambda x, c: torch.lerp(x, c.expand_as(x), 0.3),
    "where(c > 1, x, 0.5 x)": lambda x, c: torch.where(c > 1, x, 0.5 * x),
}
NUMBERS: dict[str, Callable[..., torch.Tensor]] = {
    "x * 0.7": lambda x: x * 0.7,
    "x + 0.7": lambda x: x + 0.7,
    "0.7 - x": lambda x: 0.7 - x,
    "x / 1.7": lambda x: x / 1.7,
    "-2 * x": lambda x: -2 * x,
    "-x": lambda x: -x,
    "x * x / 2": lambda x: x * x / 2,
    "x * 8 ** -0.5": lambda x: x * 8**-0.5,
    "clamp(x, -1, 2)": lambda x: x.clamp(-1, 2),
    "where(x > 0, x, 0.1 x)": lambda x: torch.where(x > 0, x, 0.1 * x),
    "x * sigmoid(1.7 x)": lambda x: x * torch.sigmoid(1.7 * x),
    "sin(x)": torch.sin,
    "x + torch.tensor(0.3)": lambda x: x + torch.tensor(0.3, dtype=x.dtype),
    "x * ones_like(x) * 0.5": lambda x: x * torch.ones_like(x) * 0.5,
    "x + zeros_like(x)": lambda x: x + torch.zeros_like(x),
}
IDENTITIES: dict[str, Callable[..., torch.Tensor]] = {
    "x.view(x.shape)": lambda x: x.reshape(x.shape),
    "x.contiguous()": lambda x: x.contiguous(),
    "x * 1": lambda x: x * 1,
    "x + 0": lambda x: x + 0,
    "x ** 1": lambda x: x**1,
    "x.to(x.dtype)": lambda x: x.to(x.dtype),
    "transpose twice": lambda x: x.transpose(-1, 0).transpose(-1, 0),
    "permuted and back": lambda x: x.movedim(0, -1).movedim(-1, 0),
    "cat of one": lambda x: torch.cat([x], 0),
    "pad by nothing": lambda x: F.pad(x, (0, 0)),
    "all of x": lambda x: x[:],
    "clone": lambda x: x.clone(),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(-1).squeeze(-1),
    "flip twice": lambda x: x.flip(-1).flip(-1),
    "detach": lambda x: x.detach(),
    "expand to itself": lambda x: x.expand_as(x),
    "split and cat": lambda x: torch.cat(x.split(1, -1), -1),
    "chunk and cat": lambda x: torch.cat(x.chunk(2, -1), -1),
}


def _wider(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_channel(choices: Choices, network: Network, source: int, name: str) -> int:
    """Arithmetic with a constant that has one number a channel; or one for all of them, or one for
    each place along the last dimension, or for every element."""
    after = -1 - network.channel_dim(source)
    shape = [network.channels(source), *[1] * after]
    which = choices.integer(0, 9)
    if which == 9:
        shape = [1]
    elif which == 8:
        shape = []
    elif which == 7 and network.left_open != "batch and space":
        shape = list(network.values[source].shape[-1:])
    elif which == 6 and network.left_open == "nothing" and network.values[source].numel() <= 400:
        shape = list(network.values[source].shape)
    layer = WithConstants(name, PER_CHANNEL[name], torch.ones(shape), buffers=choices.yes())
    return network.add(layer, source)[0]


def named(choices: Choices, functions: dict[str, Callable[..., Any]]) -> nn.Module:
    name = choices.one_of(list(functions))
    return Apply(f"({name})", functions[name])


def add_arithmetic(choices: Choices, network: Network) -> None:
    """A chain of it, mostly behind a convolution, sometimes in front of one."""
    last = pick_image(choices, network)
    if choices.integer(0, 3) < 3:
        last = convolve(choices, network, last)
    last = chain(choices, network, last)
    if choices.integer(0, 2) == 2:
        convolve(choices, network, last)


def chain(choices: Choices, network: Network, last: int) -> int:
    for _ in range(choices.integer(1, 3)):
        if choices.yes():
            last = per_channel(choices, network, last, choices.one_of(list(PER_CHANNEL)))
        else:
            (last,) = network.add(named(choices, NUMBERS), last)
    return last


def add_preprocessing(choices: Choices, network: Network) -> None:
    """(x - mean) / std in front of a convolution, or of several."""
    last = pick_image(choices, network)
    last = per_channel(choices, network, last, choices.one_of(["x - c", "x * c"]))
    last = per_channel(choices, network, last, choices.one_of(["x / c", "x * c", "x + c"]))
    for _ in range(choices.integer(1, 2)):
        convolve(choices, network, last)


def add_frozen_batch_norm(choices: Choices, network: Network) -> None:
    """A convolution and a batch norm spelled as arithmetic on its statistics."""
    last = convolve(choices, network, pick_image(choices, network))
    shape = (network.channels(last), *[1] * network.rank_of(last))
    layer = WithConstants("frozen norm", frozen_norm, torch.ones(shape), buffers=True)
    network.add(layer, last)


def frozen_norm(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    scale = (c + 1e-3).rsqrt()
    return x * scale + (1.5 - c * scale)


def add_numbers(choices: Choices, network: Network) -> None:
    """Scalar scales and shifts behind each other, on a value of any layout."""
    last = pick_any(choices, network)
    for _ in range(choices.integer(1, 4)):
        (last,) = network.add(named(choices, NUMBERS), last)


def add_constant_subgraph(choices: Choices, network: Network) -> None:
    """What is calculated from constants alone, and then meets the input."""
    source = pick_image(choices, network)
    space = network.values[source].shape[-1]
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "x * softmax(c) + c.mean()": lambda x, c: x * torch.softmax(c, 0) + c.mean(),
        "x + (c * c).sum() / 9": lambda x, c: x + (c * c).sum() / 9,
        "x * (c @ c.T).diagonal()": lambda x, c: x * (c @ c.T / 9).diagonal().sum(),
        "x * c.flip(0).roll(1)": lambda x, c: x * c.flip(0).roll(1),
        "x + arange(c) / 9": lambda x, c: x + torch.arange(len(c), dtype=x.dtype).sum() / 9,
        "x + cat(c, c).mean()": lambda x, c: x + torch.cat([c, c], -1).mean(),
    }
    name = choices.one_of(list(functions))
    shape = (max(space, 1), 1) if "@" in name else (network.channels(source),)
    if name in ("x * softmax(c) + c.mean()", "x * c.flip(0).roll(1)"):
        shape = (*shape, *[1] * network.rank_of(source))
    layer = WithConstants(name, functions[name], torch.ones(shape), buffers=choices.yes())
    network.add(layer, source)


def add_what_does_nothing(choices: Choices, network: Network) -> None:
    kinds = ["dropout", "identity", "pool", "function", "function", "function"]
    layer = choices.one_of(kinds)
    if layer == "dropout":
        network.add(nn.Dropout(0.5), pick_any(choices, network))
    elif layer == "identity":
        network.add(nn.Identity(), pick_any(choices, network))
    elif layer == "pool":
        source = pick_image(choices, network)
        network.add(AVERAGE_POOLS[network.rank_of(source)](1, 1), source)
    else:
        # Spatial sizes have to be known to split them one by one.
        fixed = network.left_open != "batch and space"
        known = {k: f for k, f in IDENTITIES.items() if fixed or " and cat" not in k}
        network.add(named(choices, known), pick_any(choices, network))


def add_in_place(choices: Choices, network: Network) -> None:
    """A write to memory that the model made itself."""
    last = convolve(choices, network, pick_image(choices, network))
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "x.mul_(0.5)": lambda x: x.mul_(0.5),
        "x.add_(0.3)": lambda x: x.add_(0.3),
        "x.clamp_(-1)": lambda x: x.clamp_(-1),
        "x.relu_()": lambda x: x.relu_(),
        "x[..., :1] = 0.25": _write_a_part,
        "x[..., 0] += x[..., -1]": _add_a_part,
        "x.view(-1).mul_(0.5)": lambda x: x.view(-1).mul_(0.5).view_as(x),
        "x.flatten(1).add_(0.3), x": lambda x: (x.clone().flatten(1).add_(0.3), x)[1],
    }
    network.add(named(choices, functions), last)


def _write_a_part(x: torch.Tensor) -> torch.Tensor:
    x[..., :1] = 0.25
    return x


def _add_a_part(x: torch.Tensor) -> torch.Tensor:
    x[..., 0] += x[..., -1]
    return x


def add_cast(choices: Choices, network: Network) -> None:
    """To another dtype and back."""
    source = pick_any(choices, network)
    narrower = choices.one_of([torch.float32, torch.float64])
    network.rounds |= narrower is torch.float32
    name = f"to {str(narrower).removeprefix('torch.')}, doubled, and back"
    network.add(Apply(name, lambda x: (x.to(narrower) * 2).to(x.dtype)), source)


def add_dead_code(choices: Choices, network: Network) -> None:
    """A convolution whose result nothing uses."""
    network.not_returned.add(convolve(choices, network, pick_image(choices, network)))


def add_alias(choices: Choices, network: Network) -> None:
    """An output that is a view of another value: maybe of an output, or of an input."""
    source = pick_any(choices, network)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "x[..., :1]": lambda x: x[..., :1],
        "x.transpose(-1, -2)": lambda x: x.transpose(-1, -2),
        "x.unsqueeze(0)": lambda x: x.unsqueeze(0),
        "x.flatten(-2)": lambda x: x.flatten(-2),
    }
    (view,) = network.add(named(choices, functions), source, layout="other")
    network.also_returned += [source, view] if choices.yes() else [source]


def add_product(choices: Choices, network: Network) -> None:
    """Of two values, or of one with itself through something: a gate."""
    source = pick_any(choices, network)
    gate = choices.one_of([torch.sigmoid, torch.tanh])
    (gated,) = network.add(Apply(gate.__name__, gate), choices.one_of(network.alike(source)))
    network.add(Apply("mul", torch.mul), *choices.order([source, gated]))


LINES = (
    add_arithmetic,
    add_arithmetic,
    add_preprocessing,
    add_frozen_batch_norm,
    add_numbers,
    add_constant_subgraph,
    add_what_does_nothing,
    add_what_does_nothing,
    add_in_place,
    add_cast,
    add_dead_code,
    add_alias,
    add_product,
)
