"""Lines with linear layers and matrix products: chains, norms in front of them, attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tests.random_graphs.arithmetic import chain
from tests.random_graphs.convolutions import ACTIVATIONS
from tests.random_graphs.movement import add_tokens
from tests.random_graphs.network import Apply, Choices, Network, WithConstants, divisors, pick

WIDEST = 48


def tokens(choices: Choices, network: Network) -> int | None:
    """A value with its channels last, made of an image if there is none."""
    if "tokens" not in network.layouts:
        add_tokens(choices, network)
    found = pick(choices, network, "tokens")
    return found if found is not None and network.channels(found) <= WIDEST else None


def linear(choices: Choices, network: Network, source: int, width: int | None = None) -> int:
    width = choices.integer(1, 8) if width is None else width
    layer = nn.Linear(network.channels(source), width, bias=choices.yes())
    return network.add(layer, source)[0]


def normalised(choices: Choices, network: Network, source: int) -> int:
    channels = network.channels(source)
    if channels < 2:  # one number less its mean is nothing but noise
        return source
    if choices.yes():
        return network.add(nn.RMSNorm(channels, eps=1e-3), source)[0]
    return network.add(nn.LayerNorm(channels, elementwise_affine=choices.yes()), source)[0]


def add_linear(choices: Choices, network: Network) -> None:
    source = tokens(choices, network)
    if source is not None:
        linear(choices, network, source)


def add_linear_chain(choices: Choices, network: Network) -> None:
    """Linear layers with arithmetic between, behind and in front of them."""
    last = tokens(choices, network)
    for _ in range(choices.integer(1, 3)):
        if last is None:
            return
        if choices.yes():
            last = chain(choices, network, last)
        last = linear(choices, network, last)
        if choices.yes():
            last = chain(choices, network, last)


def add_norm_linear(choices: Choices, network: Network) -> None:
    """A norm with weight and bias, and one or more linear layers that read it."""
    source = tokens(choices, network)
    if source is not None:
        last = normalised(choices, network, source)
        for _ in range(choices.integer(1, 3)):
            linear(choices, network, last)


def add_perceptron(choices: Choices, network: Network) -> None:
    """x + s * linear(activation(linear(norm(x)))), as in a transformer or in ConvNeXt."""
    source = tokens(choices, network)
    if source is None:
        return
    last = linear(choices, network, normalised(choices, network, source))
    (last,) = network.add(choices.one_of([nn.GELU, *ACTIVATIONS])(), last)
    last = linear(choices, network, last, network.channels(source))
    if choices.yes():
        scale = torch.ones(network.channels(source))
        layer = WithConstants("x * c", torch.mul, scale, buffers=False)
        (last,) = network.add(layer, last)
    network.add(Apply("add", torch.add), source, last)


def add_linear_batch_norm(choices: Choices, network: Network) -> None:
    """Which counts its channels in dimension 1, whatever a linear layer has there."""
    source = tokens(choices, network)
    if source is None or not network.batched or network.values[source].dim() > 3:
        return
    if network.values[source].dim() == 2 or network.left_open != "batch and space":
        last = linear(choices, network, source)
        network.add(nn.BatchNorm1d(network.values[last].shape[1]), last)


def add_attention(choices: Choices, network: Network) -> None:
    """Query, key and value of one layer or of three, scaled somewhere, multiplied somehow."""
    source = tokens(choices, network)
    if source is None or network.values[source].dim() != 3 or not network.batched:
        return
    heads = choices.integer(1, 2)
    width = heads * choices.integer(1, 3)
    if choices.yes():
        joint = linear(choices, network, source, 3 * width)
        cut = [
            Apply("chunk in 3", lambda x: x.chunk(3, -1)),
            Apply("view, permute, unbind", lambda x: _unbound(x, width)),
        ]
        query, key, value = network.add(choices.one_of(cut), joint)
    else:
        query, key, value = (linear(choices, network, source, width) for _ in range(3))
    how = choices.one_of(sorted(ATTENTIONS))
    function = ATTENTIONS[how]
    (last,) = network.add(
        Apply(f"{how} of {heads} heads", lambda q, k, v: function(*_heads(heads, q, k, v))),
        *(query, key, value),
        layout="other",
    )
    merged = Apply("heads merged", lambda x: x.transpose(1, 2).flatten(2))
    (last,) = network.add(merged, last, layout="tokens")
    last = linear(choices, network, last, network.channels(source))
    if choices.yes():
        network.add(Apply("add", torch.add), source, last)


def _unbound(x: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    return x.view(*x.shape[:2], 3, width).permute(2, 0, 1, 3).unbind(0)


def _heads(heads: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2) for x in tensors]


def _batched(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1)


def _mask(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Minus infinity where a token must not look."""
    everything = torch.full((q.shape[-2], k.shape[-2]), -torch.inf, dtype=q.dtype)
    return everything.triu(1)


ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "softmax(q k / 1.7) v": lambda q, k, v: torch.softmax(q @ k.mT / 1.7, -1) @ v,
    "softmax((0.6 q) k) v": lambda q, k, v: torch.softmax((q * 0.6) @ k.mT, -1) @ v,
    "softmax(q (0.6 k)) v": lambda q, k, v: torch.softmax(q @ (k * 0.6).transpose(-1, -2), -1) @ v,
    "softmax(0.6 (q k + mask)) v": lambda q, k, v: (
        torch.softmax(0.6 * (q @ k.mT + _mask(q, k)), -1) @ v
    ),
    "softmax(0.6 q k, masked) v": lambda q, k, v: (
        torch.softmax((0.6 * q @ k.mT).masked_fill(_mask(q, k) < 0, -torch.inf), -1) @ v
    ),
    "0.5 (q k v)": lambda q, k, v: 0.5 * (q @ (k.mT @ v)),
    "scaled dot product": F.scaled_dot_product_attention,
    "scaled dot product, scale 0.3": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, scale=0.3
    ),
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.6, -1), v
    ),
    "bmm": lambda q, k, v: torch.bmm(
        torch.softmax(torch.bmm(_batched(q), _batched(k).transpose(1, 2)) * 0.6, -1), _batched(v)
    ).view_as(v),
    "baddbmm": lambda q, k, v: torch.baddbmm(
        _batched(v), torch.tanh(_batched(q) @ _batched(k).mT), _batched(v), beta=0.5, alpha=0.7
    ).view_as(v),
}


def add_constant_product(choices: Choices, network: Network) -> None:
    """A product with a constant matrix that is no layer's weight."""
    source = tokens(choices, network)
    if source is None:
        return
    channels = network.channels(source)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "x @ c": lambda x, c: x @ c,
        "einsum(...i,ij->...j)": lambda x, c: torch.einsum("...i,ij->...j", x, c),
        "linear(x, c.T * 0.5)": lambda x, c: F.linear(x, c.T * 0.5),
        "0.7 (x @ c)": lambda x, c: 0.7 * (x @ c),
        "(0.7 x) @ (2 c)": lambda x, c: (0.7 * x) @ (2 * c),
    }
    name = choices.one_of(list(functions))
    constant = torch.ones(channels, choices.integer(1, 6))
    network.add(WithConstants(name, functions[name], constant, buffers=choices.yes()), source)


def add_mixed_tokens(choices: Choices, network: Network) -> None:
    """A constant matrix on the left: a linear layer over the tokens, as in an MLP-Mixer."""
    source = tokens(choices, network)
    if source is None or network.left_open == "batch and space":
        return
    count = network.values[source].shape[-2]
    if network.values[source].dim() == 3 and network.batched and count <= WIDEST:
        constant = torch.ones(choices.integer(1, 5), count)
        layer = WithConstants("c @ x", lambda x, c: c @ x, constant, buffers=choices.yes())
        (last,) = network.add(layer, source)
        if choices.yes():
            chain(choices, network, last)


def add_token_arithmetic(choices: Choices, network: Network) -> None:
    source = tokens(choices, network)
    if source is not None:
        chain(choices, network, source)


def add_token_mean(choices: Choices, network: Network) -> None:
    """The mean over the tokens, or the first of them."""
    source = tokens(choices, network)
    if source is None or network.values[source].dim() != 3 or not network.batched:
        return
    mean = Apply("mean over 1 of ", lambda x: x.mean(1))
    first = Apply("(x[:, 0])", lambda x: x[:, 0])
    (last,) = network.add(choices.one_of([mean, first]), source)
    linear(choices, network, last)


def add_residual_tokens(choices: Choices, network: Network) -> None:
    source = tokens(choices, network)
    if source is not None:
        other = choices.one_of(network.alike(source))
        network.add(Apply("add", torch.add), *choices.order([source, other]))


def add_grouped_heads(choices: Choices, network: Network) -> None:
    """Channels viewed as (groups, width), scaled there, and viewed back."""
    source = tokens(choices, network)
    if source is None:
        return
    groups = choices.one_of(divisors(network.channels(source)))
    scale = WithConstants(
        f"channels in {groups} groups, each times its c",
        lambda x, c: (x.unflatten(-1, (groups, x.shape[-1] // groups)) * c).flatten(-2),
        torch.ones(groups, 1),
        buffers=choices.yes(),
    )
    linear(choices, network, network.add(scale, source)[0])


LINES = (
    add_linear,
    add_linear_chain,
    add_linear_chain,
    add_norm_linear,
    add_perceptron,
    add_linear_batch_norm,
    add_attention,
    add_attention,
    add_constant_product,
    add_mixed_tokens,
    add_token_arithmetic,
    add_token_mean,
    add_residual_tokens,
    add_grouped_heads,
)
