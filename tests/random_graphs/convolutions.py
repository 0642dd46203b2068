"""Lines with convolutions in them, one function each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tests.random_graphs.network import (
    BATCH_NORMS,
    CONVOLUTIONS,
    TRANSPOSED,
    Apply,
    Choices,
    Network,
    WithConstants,
    divisors,
    pick_image,
)

MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
PADS = {
    1: (nn.ConstantPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d),
    2: (nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
    3: (nn.ConstantPad3d, nn.ReflectionPad3d, nn.ReplicationPad3d),
}
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


def convolve(choices: Choices, network: Network, source: int) -> int:
    """A convolution of any kind."""
    rank, channels = network.rank_of(source), network.channels(source)
    groups = choices.one_of(divisors(channels))
    out_channels = groups * choices.integer(1, max(2, 6 // groups))
    bias = choices.yes()
    if choices.integer(0, 2) == 2:
        size = choices.integer(1, 3)
        # Doubling again and again would make a network that takes seconds.
        by = choices.integer(1, 2) if network.space(source).numel() <= 140 else 1
        up = TRANSPOSED[rank](
            channels,
            out_channels,
            size,
            by,
            padding=choices.integer(0, (size - 1) // 2),
            output_padding=choices.integer(0, by - 1),
            groups=groups,
            bias=bias,
        )
        return network.add(up, source)[0]
    kernel: tuple[int, ...] = tuple(choices.one_of([1, 1, 2, 3]) for _ in range(rank))
    dilation = choices.one_of([1, 1, 2])
    padding = choices.one_of(["same", "valid", 0, 1])
    mode = choices.one_of(["zeros", "zeros", "zeros", "zeros", "zeros", "replicate", "circular"])
    stride = 1 if padding == "same" else choices.one_of([1, 1, 2])
    pads = 2 * padding if isinstance(padding, int) else 0
    spans = [dilation * (k - 1) + 1 for k in kernel]
    if any(n + pads < s for n, s in zip(network.space(source), spans, strict=True)):
        kernel, dilation = (1,) * rank, 1
    layer = CONVOLUTIONS[rank](
        channels,
        out_channels,
        kernel,
        stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=bias,
        padding_mode=mode,
    )
    return network.add(layer, source)[0]


def same_size(
    choices: Choices, network: Network, source: int, out_channels: int | None = None
) -> int:
    """A convolution that keeps the spatial size, and the channels if nothing else is said."""
    channels = network.channels(source)
    layer = CONVOLUTIONS[network.rank_of(source)](
        channels,
        channels if out_channels is None else out_channels,
        choices.one_of([1, 3]),
        padding="same",
        bias=choices.yes(),
    )
    return network.add(layer, source)[0]


def normalise(network: Network, source: int, *, eps: float = 1e-5, affine: bool = True) -> int:
    """Batch norm, where there is a batch."""
    if not network.batched:
        return source
    norm = BATCH_NORMS[network.rank_of(source)](network.channels(source), eps=eps, affine=affine)
    return network.add(norm, source)[0]


def join(network: Network, sources: Sequence[int], dim: int | None = None) -> int:
    """A concat, along channels if nothing else is said."""
    dim = network.channel_dim(sources[0]) if dim is None else dim
    concat = Apply(f"cat along {dim} of ", lambda *values: torch.cat(values, dim))
    return network.add(concat, *sources)[0]


def add_convolution(choices: Choices, network: Network) -> None:
    convolve(choices, network, pick_image(choices, network))


def add_batch_norm(choices: Choices, network: Network) -> None:
    source = pick_image(choices, network)
    normalise(network, source, eps=choices.one_of([1e-5, 0.1]), affine=choices.yes())


def add_convolution_norm_activation(choices: Choices, network: Network) -> None:
    last = normalise(network, convolve(choices, network, pick_image(choices, network)))
    activate(choices, network, last)


def activate(choices: Choices, network: Network, source: int) -> int:
    kind = choices.one_of(ACTIVATIONS)
    # One slope a channel, counted in dimension 1, where there is a batch.
    each = [network.channels(source)] if kind is nn.PReLU and network.batched else []
    return network.add(kind(*each), source)[0]


def add_norm_activation_convolution(choices: Choices, network: Network) -> None:
    """In the order that DenseNet and the later ResNets have, or with nothing in between."""
    last = normalise(network, pick_image(choices, network))
    if choices.yes():
        last = activate(choices, network, last)
    convolve(choices, network, last)


def add_activation(choices: Choices, network: Network) -> None:
    source = pick_image(choices, network)
    if source in network.fresh and choices.yes():
        network.add(nn.ReLU(inplace=True), source)
    else:
        activate(choices, network, source)


def add_residual(choices: Choices, network: Network) -> None:
    source = pick_image(choices, network)
    other = choices.one_of(network.alike(source))
    if choices.yes():
        source = same_size(choices, network, source)
    alpha = choices.one_of([1, 1, 2, 0.3])
    plus = "x + y" if alpha == 1 else f"x + {alpha} y"
    total = Apply(f"({plus}) of ", lambda x, y: torch.add(x, y, alpha=alpha))
    (last,) = network.add(total, *choices.order([source, other]))
    if choices.yes():
        network.add(choices.one_of(ACTIVATIONS)(), last)


def add_branches_summed(choices: Choices, network: Network) -> None:
    """As RepVGG has them: convolutions and batch norms side by side, and their sum."""
    source = pick_image(choices, network)
    channels, rank = network.channels(source), network.rank_of(source)
    groups = choices.one_of(divisors(channels))
    out_channels = choices.one_of([channels, groups * choices.integer(1, max(1, 5 // groups))])
    stride = choices.one_of([1, 1, 2])
    ends = []
    for _ in range(choices.integer(2, 3)):
        kernel = choices.one_of([1, 3, 3, 5])
        dilation = choices.one_of([1, 1, 2])
        layer = CONVOLUTIONS[rank](
            channels,
            choices.one_of([out_channels, out_channels, 1]),  # one channel is added to all others
            kernel,
            stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            groups=1,
            bias=choices.yes(),
        )
        if choices.yes() and out_channels % groups == 0:
            layer = CONVOLUTIONS[rank](
                channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups
            )
        (end,) = network.add(layer, source)
        ends.append(normalise(network, end) if choices.yes() else end)
    if out_channels == channels and stride == 1 and choices.yes():
        ends.append(normalise(network, source) if choices.yes() else source)
    total = ends[0]
    for end in choices.order(ends[1:]):
        (total,) = network.add(Apply("add", torch.add), *choices.order([total, end]))
    if choices.yes():
        activate(choices, network, total)


def add_concat_norm(choices: Choices, network: Network) -> None:
    """Batch norm behind a concat of convolutions, which each branch must take its part of."""
    source = pick_image(choices, network)
    branches = [
        same_size(choices, network, source, choices.integer(1, 4))
        for _ in range(choices.integer(2, 3))
    ]
    normalise(network, join(network, branches))


def add_parallel_convolutions(choices: Choices, network: Network) -> None:
    """Two or three 1x1 convolutions on one value, as in an Inception block."""
    source = pick_image(choices, network)
    channels = network.channels(source)
    activation = choices.one_of([None, nn.ReLU, nn.SiLU])
    normalised = choices.yes()
    ends = []
    for _ in range(choices.integer(2, 3)):
        out_channels, bias = choices.integer(1, 4), choices.yes()
        layer = CONVOLUTIONS[network.rank_of(source)](channels, out_channels, 1, bias=bias)
        (end,) = network.add(layer, source)
        if normalised:
            end = normalise(network, end)
        if activation is not None:
            (end,) = network.add(activation(), end)
        ends.append(end)
    joined = choices.integer(0, 3)
    if joined == 1:
        ends.append(choices.one_of(network.alike(ends[0], but=[network.channel_dim(ends[0])])))
    if joined:
        last = join(network, ends)
        if choices.yes():
            normalise(network, last)


def add_shared_convolution(choices: Choices, network: Network) -> None:
    """One that is already in the network, called again on another value."""
    source = pick_image(choices, network)
    kind = CONVOLUTIONS[network.rank_of(source)]
    fitting = [
        layer
        for layer in network.layers
        if isinstance(layer, kind)
        and layer.in_channels == network.channels(source)
        and set(layer.kernel_size) == {1}
    ]
    if fitting:
        (last,) = network.add(choices.one_of(fitting), source)
        if choices.yes():
            normalise(network, last)


def add_tied_convolution(choices: Choices, network: Network) -> None:
    """Another convolution that holds the weight of an earlier one."""
    source = pick_image(choices, network)
    kind = CONVOLUTIONS[network.rank_of(source)]
    fitting = [
        layer
        for layer in network.layers
        if isinstance(layer, kind)
        and layer.groups == 1
        and layer.in_channels == network.channels(source)
    ]
    if fitting:
        first = choices.one_of(fitting)
        layer = kind(first.in_channels, first.out_channels, first.kernel_size, padding="same")
        layer.weight = first.weight
        (last,) = network.add(layer, source)
        if choices.yes():
            normalise(network, last)


def add_pool(choices: Choices, network: Network) -> None:
    source = pick_image(choices, network)
    rank = network.rank_of(source)
    which = choices.integer(0, 3)
    if which == 0:
        network.add(MAX_POOLS[rank](3, 1, 1), source)
    elif which == 1 and min(network.space(source)) >= 2:
        network.add(AVERAGE_POOLS[rank](2), source)
    elif which == 2:
        network.add(ADAPTIVE_POOLS[rank](choices.integer(1, 2)), source)
    elif min(network.space(source)) >= 3:
        ceil_mode = choices.yes()
        pool = AVERAGE_POOLS[rank](3, 2, 1, ceil_mode, count_include_pad=choices.yes())
        if rank > 1 and choices.yes():
            pool.divisor_override = 5
        network.add(pool, source)


def add_pad(choices: Choices, network: Network) -> None:
    """A pad of its own, mostly in front of a convolution."""
    source = pick_image(choices, network)
    rank = network.rank_of(source)
    kind = choices.one_of([0, 0, 0, 0, 1, 2])
    amounts = [choices.integer(0, 2) for _ in range(rank)]
    sides = [side for amount in amounts for side in (amount, amount)]
    if choices.integer(0, 3) == 3:
        sides[0] += 1
    arguments = [choices.one_of([0.0, 0.0, 0.7])] if kind == 0 else []
    if kind == 1 and any(
        side >= size for side, size in zip(sides[::2], reversed(network.space(source)), strict=True)
    ):
        return
    (last,) = network.add(PADS[rank][kind](tuple(sides), *arguments), source)
    if choices.integer(0, 3) < 3:
        convolve(choices, network, last)


def add_squeeze_excite(choices: Choices, network: Network) -> None:
    """x * sigmoid(conv(relu(conv(mean of x))))."""
    source = pick_image(choices, network)
    rank, channels = network.rank_of(source), network.channels(source)
    dims = tuple(range(-rank, 0))
    mean: nn.Module = Apply(f"mean over {dims} of ", lambda x: x.mean(dims, keepdim=True))
    (last,) = network.add(choices.one_of([mean, ADAPTIVE_POOLS[rank](1)]), source)
    squeezed = choices.integer(1, 3)
    (last,) = network.add(CONVOLUTIONS[rank](channels, squeezed, 1), last)
    (last,) = network.add(nn.ReLU(), last)
    (last,) = network.add(CONVOLUTIONS[rank](squeezed, channels, 1), last)
    (last,) = network.add(choices.one_of([nn.Sigmoid, nn.Hardsigmoid])(), last)
    (last,) = network.add(Apply("mul", torch.mul), *choices.order([source, last]))
    if choices.yes():
        same_size(choices, network, last)


def add_depthwise_separable(choices: Choices, network: Network) -> None:
    source = pick_image(choices, network)
    rank, channels = network.rank_of(source), network.channels(source)
    depthwise = CONVOLUTIONS[rank](channels, channels, 3, padding=1, groups=channels, bias=False)
    last = normalise(network, network.add(depthwise, source)[0])
    (last,) = network.add(choices.one_of([nn.ReLU6, nn.Hardswish])(), last)
    (last,) = network.add(CONVOLUTIONS[rank](channels, choices.integer(1, 6), 1), last)
    normalise(network, last)


def add_the_same_again(choices: Choices, network: Network) -> None:
    """An earlier line once more, which gives the same values a second time."""
    fitting = [
        line
        for line, sources in enumerate(network.sources)
        if not isinstance(network.layers[line], nn.ReLU) or not network.layers[line].inplace
    ]
    if fitting:
        line = choices.one_of(fitting)
        first = network.results[line][0]
        layout = network.layouts[first]
        again = network.add(network.layers[line], *network.sources[line], layout=layout)[0]
        if choices.yes() and network.values[first].is_floating_point():
            network.add(Apply("add", torch.add), first, again)


def add_group_norm(choices: Choices, network: Network) -> None:
    """Group or instance norm, mostly in front of a convolution."""
    source = pick_image(choices, network)
    channels = network.channels(source)
    # One number normalised by itself is zero times infinity's neighbour: only noise.
    groups = [g for g in divisors(channels) if g < channels] or [1]
    group_norm = nn.GroupNorm(choices.one_of(groups), channels, affine=choices.yes())
    if network.space(source).numel() * channels < 4 or not network.batched:
        return
    (last,) = network.add(group_norm, source)
    if choices.integer(0, 3) < 3:
        convolve(choices, network, last)


def add_broadcast(choices: Choices, network: Network) -> None:
    """A sum or a product with something that has one channel, or one place in space."""
    source = pick_image(choices, network)
    rank = network.rank_of(source)
    if choices.yes():
        other = network.add(CONVOLUTIONS[rank](network.channels(source), 1, 1), source)[0]
    else:
        dims = choices.one_of([network.channel_dim(source), tuple(range(-rank, 0)), -1])
        mean = Apply(f"mean over {dims}, kept, of ", lambda x: x.mean(dims, keepdim=True))
        other = network.add(mean, source)[0]
    if choices.yes():
        source = same_size(choices, network, source)
    function = choices.one_of([torch.add, torch.mul, torch.sub])
    (last,) = network.add(Apply(function.__name__, function), *choices.order([source, other]))
    if choices.yes():
        convolve(choices, network, last)


def add_layer_norm_of_all(choices: Choices, network: Network) -> None:
    """Layer norm whose weight has a number for every element of an image."""
    source = pick_image(choices, network)
    if network.batched and network.left_open != "batch and space":
        shape = list(network.values[source].shape[1:])
        if 4 <= network.values[source][0].numel() <= 300:
            (last,) = network.add(nn.LayerNorm(shape), source)
            convolve(choices, network, last)


FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def add_computed_weight(choices: Choices, network: Network) -> None:
    """A convolution by a function; its weight is a parameter, or calculated from one or from x."""
    source = pick_image(choices, network)
    rank, channels = network.rank_of(source), network.channels(source)
    convolve = FUNCTIONS[rank]
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "conv(x, w)": lambda x, w: convolve(x, w),
        "conv(x, w / norm of w)": lambda x, w: convolve(x, w / w.flatten(1).norm()),
        "conv(x, w - mean of w, sum of w)": lambda x, w: convolve(
            x, w - w.mean(), w.flatten(1).sum(1)
        ),
        "conv(x, w, mean of x)": lambda x, w: convolve(x, w, x.mean().expand(w.shape[0])),
        "conv(x, w * sigmoid(mean of x))": lambda x, w: convolve(x, w * x.mean().sigmoid()),
    }
    name = choices.one_of(list(functions))
    weight = torch.ones(choices.integer(1, 5), channels, *[1] * rank)
    layer = WithConstants(name, functions[name], weight, buffers=choices.yes())
    (last,) = network.add(layer, source)
    if choices.yes():
        last = normalise(network, last)
    if choices.yes():
        network.add(nn.ReLU(), last)


LINES = (
    add_convolution,
    add_convolution_norm_activation,
    add_convolution_norm_activation,
    add_norm_activation_convolution,
    add_parallel_convolutions,
    add_parallel_convolutions,
    add_branches_summed,
    add_branches_summed,
    add_shared_convolution,
    add_tied_convolution,
    add_the_same_again,
    add_batch_norm,
    add_activation,
    add_residual,
    add_residual,
    add_concat_norm,
    add_pool,
    add_pad,
    add_squeeze_excite,
    add_depthwise_separable,
    add_group_norm,
    add_computed_weight,
    add_broadcast,
    add_broadcast,
    add_layer_norm_of_all,
)
