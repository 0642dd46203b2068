"""Channels are put together where they are read, and weights take them in another order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models import shufflenet_v2
from optfuse.capture import capture
from optfuse.float64 import distance, random_inputs, run_stepwise
from optfuse.graph import equals
from optfuse.optimize import optimize, select
from optfuse.passes.route_channels import RouteChannels
from optfuse.routing.assemblies import Cost
from optfuse.routing.flow import cost_of_moving
from optfuse.stages import LoadedModel, Program
from tests.harness import assert_same_function, captured, counts, scramble

PASS = "route_channels"

# Where only whole layers are reordered, nothing may change, not even the last bit.
EXACT = 0.0
# A convolution sums its inputs in another order: a few units of 1e-16 in float64.
SUMMED_OTHERWISE = 1e-14

Function = Callable[..., object]


class Calls(nn.Module):
    """A function of modules and tensors as a module."""

    def __init__(self, function: Function, *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(modules)

    def forward(self, *tensors: Tensor) -> object:
        return self.function(*self.layers, *tensors)


def images(*channels: int, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, count, size, size, generator=generator).double() for count in channels]


def program(function: Function, *modules: nn.Module, inputs: list[Tensor] | None = None) -> Program:
    """A function called with scrambled modules and then tensors, one of 8 channels by default."""
    module = scramble(Calls(function, *modules)).double()
    return captured(module, *(images(8) if inputs is None else inputs))


def run(before: Program, first: str = "none") -> Program:
    after = optimize(before, [*select(first), RouteChannels()])
    assert [step.undone for step in after.trace if step.undone] == []
    return after


def check(
    before: Program,
    expected: dict[str, int],
    *,
    first: str = "none",
    tolerance: float = SUMMED_OTHERWISE,
) -> Program:
    after = run(before, first)
    assert counts(after) == expected
    assert_same_function(before, after, tolerance=tolerance)
    assert_equals_what_it_says(before, after)
    assert_settled(after)
    return after


def assert_settled(program: Program) -> None:
    again = run(program)
    assert counts(again) == counts(program)
    assert again.trace[-1].name == PASS
    assert again.trace[-1].matched == 0


def assert_equals_what_it_says(before: Program, after: Program) -> None:
    """Whatever a node claims to be the value of has its value: no reordered tensor does."""
    inputs = random_inputs(before.example_args, before.example_kwargs, 5)
    values = {
        node.name: result for node, result in run_stepwise(before.graph_module, *inputs, widen=True)
    }
    for node, result in run_stepwise(after.graph_module, *inputs, widen=True):
        for name in equals(node) if isinstance(result, Tensor) else ():
            moved = distance([values[name]], [result])
            # Float32 constants that were rounded after folding are 1e-7 away.
            assert moved <= 1e-5, f"{node.name} is not {name}: {moved:.1e}"


def moving(program: Program) -> Cost:
    """What moving channels costs in all of a program."""
    return sum((cost_of_moving(node) for node in program.graph_module.graph.nodes), Cost())


def notes(program: Program) -> list[str]:
    return [site.note for step in program.trace if step.name == PASS for site in step.sites]


def reasons(program: Program) -> list[str]:
    return [each.reason for step in program.trace if step.name == PASS for each in step.refused]


def refused(before: Program, *expected: str) -> None:
    """Nothing changes, and these are the reasons."""
    after = check(before, counts(before), tolerance=EXACT)
    assert reasons(after) == list(expected)


def cat(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors, 1)


def shuffle(x: Tensor, groups: int = 2) -> Tensor:
    """Channel shuffle as torchvision spells it."""
    batch, channels, *space = x.shape
    parted = x.view(batch, groups, channels // groups, *space)
    return torch.transpose(parted, 1, 2).contiguous().view(batch, channels, *space)


def conv(inputs: int = 8, outputs: int = 8, kernel: int = 1, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)  # type: ignore[arg-type]


# A permutation between two convolutions, in every spelling.


class Picked(nn.Module):
    """Picks channels by a constant index."""

    def __init__(self, *channels: int, method: bool = True) -> None:
        super().__init__()
        self.register_buffer("channels", torch.tensor(channels))
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.channels) if self.method else x[:, self.channels]


SHUFFLES: dict[str, tuple[Function, list[nn.Module]]] = {
    "view, transpose, view": (shuffle, []),
    "view, permute, reshape": (
        lambda x: x.view(2, 4, 2, 4, 4).permute(0, 2, 1, 3, 4).reshape(2, 8, 4, 4),
        [],
    ),
    "twice": (lambda x: shuffle(shuffle(x, 4)), []),
    "three factors": (
        lambda x: x.view(2, 2, 2, 2, 4, 4).permute(0, 3, 1, 2, 4, 5).reshape(x.shape),
        [],
    ),
    "channels last between": (
        lambda x: (
            x.permute(0, 2, 3, 1)
            .reshape(2, 4, 4, 2, 4)
            .transpose(3, 4)
            .flatten(3)
            .permute(0, 3, 1, 2)
        ),
        [],
    ),
    "module": (lambda module, x: module(x), [nn.ChannelShuffle(4)]),
    "unflatten": (lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2), []),
    "flip": (lambda x: x.flip(1), []),
    "roll": (lambda x: x.roll(3, 1), []),
    "index_select": (lambda module, x: module(x), [Picked(3, 1, 4, 0, 6, 7, 2, 5)]),
    "index": (lambda module, x: module(x), [Picked(3, 1, 4, 0, 6, 7, 2, 5, method=False)]),
    "chunk, cat": (lambda x: cat(*reversed(x.chunk(2, 1))), []),
    "slices with a step": (lambda x: cat(x[:, 1::2], x[:, ::2]), []),
    "split, stack": (lambda x: torch.stack(x.split(4, 1), 2).flatten(1, 2), []),
    "unbind": (lambda x: torch.stack(x.unbind(1)[::-1], 1), []),
    "tensor_split, narrow": (lambda x: cat(x.narrow(1, 5, 3), *x[:, :5].tensor_split(2, 1)), []),
    "through the batch": (
        lambda x: cat(*x.reshape(8, 2, 16).permute(1, 0, 2).reshape(2, 2, 4, 4, 4)),
        [],
    ),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_a_permutation_between_two_convolutions_goes_away(name: str) -> None:
    function, modules = SHUFFLES[name]
    before = program(
        lambda first, last, *rest: last(function(*rest[:-1], first(rest[-1]))),
        conv(bias=False),
        conv(outputs=3, kernel=3),
        *modules,
    )
    left = {"conv2d": 2}
    if name == "channels last between":
        left["permute"] = 2  # they move pixels, and no channel past another
    check(before, left)


@pytest.mark.parametrize("name", [name for name in SHUFFLES if "between" not in name])
def test_a_permutation_behind_a_convolution_goes_into_its_rows(name: str) -> None:
    function, modules = SHUFFLES[name]
    before = program(lambda first, *rest: function(*rest[:-1], first(rest[-1])), conv(), *modules)
    check(before, {"conv2d": 1}, tolerance=EXACT)


def test_a_permutation_in_front_of_a_convolution_goes_into_its_columns() -> None:
    after = check(program(lambda last, x: last(shuffle(x)), conv()), {"conv2d": 1})
    (site,) = after.trace[1].sites
    assert site.site == "transpose"
    assert site.note == "from 1 operator that moves 256 numbers to none, 1 layer reordered"


# What passes on an order.

BETWEEN: dict[str, tuple[Function, list[nn.Module], dict[str, int]]] = {
    "relu": (F.relu, [], {"relu": 1}),
    "clamp": (lambda x: x.clamp(-0.4, 0.7), [], {"clamp": 1}),
    "gelu": (F.gelu, [], {"gelu": 1}),
    "hardswish": (F.hardswish, [], {"hardswish": 1}),
    "softplus": (F.softplus, [], {"softplus": 1}),
    "numbers": (lambda x: 2 * x + 1, [], {"mul": 1, "add": 1}),
    "with itself": (lambda x: x * x.sigmoid(), [], {"sigmoid": 1, "mul": 1}),
    "max_pool": (lambda x: F.max_pool2d(x, 2), [], {"max_pool2d": 1}),
    "avg_pool": (lambda x: F.avg_pool2d(x, 3, 1, 1), [], {"avg_pool2d": 1}),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), [], {"upsample_nearest2d": 1}),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 1)), [], {"pad": 1}),
    "rows": (lambda x: x[:, :, 1:3].flip(3), [], {"slice": 1, "flip": 1}),
    "transposed": (lambda x: x.transpose(2, 3), [], {"transpose": 1}),
    "wide": (lambda x: torch.cat([x, x.exp()], 3), [], {"exp": 1, "cat": 1}),
    "squeeze and excite": (
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        [],
        {"mean": 1, "sigmoid": 1, "mul": 1},
    ),
    "squeeze and excite by linear layers": (
        lambda one, other, x: x * other(one(x.mean((2, 3)))).sigmoid()[:, :, None, None],
        [nn.Linear(8, 2), nn.Linear(2, 8)],
        {"mean": 1, "linear": 2, "sigmoid": 1, "unsqueeze": 2, "mul": 1},
    ),
    "depthwise": (
        lambda layer, x: layer(x),
        [conv(kernel=3, groups=8, bias=False)],
        {"conv2d": 1},
    ),
    "batch norm": (lambda layer, x: layer(x), [nn.BatchNorm2d(8)], {"batch_norm": 1}),
    "plain batch norm": (
        lambda layer, x: layer(x),
        [nn.BatchNorm2d(8, affine=False)],
        {"batch_norm": 1},
    ),
    "prelu": (lambda layer, x: layer(x), [nn.PReLU(8)], {"prelu": 1}),
    "one slope": (lambda layer, x: layer(x), [nn.PReLU(1)], {"prelu": 1}),
}


def plus(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in (*one, *other)}


@pytest.mark.parametrize("shuffled", ["before", "after"])
@pytest.mark.parametrize("name", BETWEEN)
def test_an_order_passes_through(name: str, shuffled: str) -> None:
    function, modules, expected = BETWEEN[name]

    def between(first: nn.Module, last: nn.Module, *rest: object) -> object:
        x = first(rest[-1])
        if shuffled == "before":
            return last(function(*rest[:-1], shuffle(x)))
        return last(shuffle(function(*rest[:-1], x)))

    before = program(between, conv(), conv(outputs=3), *modules)
    check(before, plus({"conv2d": 2}, expected))


def test_constants_with_one_number_a_channel_are_reordered_where_an_output_fixes_the_order() -> (
    None
):
    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.whole = nn.Parameter(torch.ones(1, 8, 4, 4))
            self.norm = nn.BatchNorm2d(8)
            self.slope = nn.PReLU(8)
            self.depthwise = conv(kernel=3, groups=8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.slope(self.norm(x * self.scale + self.whole))
            return shuffle(self.depthwise(x))

    before = program(lambda first, affine, x: affine(first(x)), conv(), Affine())
    expected = {"conv2d": 2, "mul": 1, "add": 1, "batch_norm": 1, "prelu": 1}
    after = check(before, expected, tolerance=EXACT)
    added = [name for name, _ in after.graph_module.named_parameters() if "routed" in name]
    # Two weights and two biases, the scale, the addend, the slope, and four of the norm.
    assert len(added) == 11


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
def test_every_rank(rank: int, batched: bool) -> None:
    layers = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    transposed = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
    dim = 1 if batched else 0

    def network(first: nn.Module, depthwise: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        one, other = depthwise(first(x)).chunk(2, dim)
        return last(torch.cat([other.flip(dim), one.relu()], dim))

    x = torch.randn(*([2] if batched else []), 5, *[4] * rank).double()
    before = program(
        network, layers(5, 6, 3), layers(6, 6, 1, groups=6), transposed(6, 3, 2), inputs=[x]
    )
    after = run(before)
    assert_same_function(before, after, tolerance=SUMMED_OTHERWISE)
    assert {"flip", "chunk", "split"} & counts(after).keys() == set()
    assert moving(after).below(moving(before))


def test_linear_layers() -> None:
    def network(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        one, other = first(x).chunk(2, -1)
        return last(torch.cat([other, one], -1).relu())

    before = program(network, nn.Linear(5, 6), nn.Linear(6, 3), inputs=[torch.randn(2, 7, 5)])
    check(before, {"linear": 2, "relu": 1})


def test_from_a_convolution_to_a_linear_layer() -> None:
    def head(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        return last(F.adaptive_avg_pool2d(shuffle(first(x)), 1).flatten(1))

    check(
        program(head, conv(), nn.Linear(8, 3)),
        {"conv2d": 1, "adaptive_avg_pool2d": 1, "view": 1, "linear": 1},
    )

    def last(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        return last(shuffle(first(x)).permute(0, 2, 3, 1))

    check(program(last, conv(), nn.Linear(8, 3)), {"conv2d": 1, "permute": 1, "linear": 1})


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups: int) -> None:
    def network(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        halves = [half.flip(1) for half in first(x).chunk(2, 1)]
        return last(cat(*halves))

    first = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=groups)
    last = nn.ConvTranspose2d(8, 6, 2, groups=groups, bias=False)
    check(program(network, first, last), {"conv_transpose2d": 2})


def test_grouped_convolutions_take_channels_that_stay_in_their_group() -> None:
    def within(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        return last(cat(*(half.flip(1) for half in first(x).chunk(2, 1))))

    check(program(within, conv(groups=2), conv(outputs=4, groups=2)), {"conv2d": 2})


def test_grouped_convolutions_take_groups_that_change_places() -> None:
    def exchanged(first: nn.Module, middle: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        one, other = first(x).chunk(2, 1)
        return last(middle(cat(other, one)))

    before = program(exchanged, conv(groups=2), conv(outputs=12, groups=2), conv(12, 3))
    check(before, {"conv2d": 3})


def test_a_depthwise_convolution_that_gives_several_channels_for_one() -> None:
    def network(first: nn.Module, middle: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        return last(middle(shuffle(first(x))))

    # The first is grouped and keeps its order, so the second's has groups in other places.
    before = program(network, conv(groups=4), conv(outputs=16, kernel=3, groups=8), conv(16, 3))
    check(before, {"conv2d": 3})


def test_a_grouped_convolution_between_dense_ones() -> None:
    def network(first: nn.Module, middle: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        return last(shuffle(middle(shuffle(first(x)))))

    check(program(network, conv(), conv(groups=2), conv()), {"conv2d": 3})


def test_both_operands_of_a_sum_are_brought_into_one_order() -> None:
    def residual(first: nn.Module, other: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        return last((shuffle(first(x)) + other(x)).relu())

    check(program(residual, conv(), conv(), conv()), {"conv2d": 3, "add": 1, "relu": 1})


def test_a_residual_that_cannot_change_gives_the_order() -> None:
    before = program(lambda first, x: shuffle(first(x)) + x, conv())
    check(before, {"conv2d": 1, "add": 1}, tolerance=EXACT)


def test_an_operand_that_cannot_change_is_brought_into_the_order_of_the_other_one() -> None:
    def gated(last: nn.Module, x: Tensor) -> Tensor:
        return last(shuffle(x.flip(1) * x.mean((2, 3), keepdim=True)))

    # It is the small one that is gathered.
    before = program(gated, conv())
    check(before, {"mean": 1, "index_select": 1, "mul": 1, "conv2d": 1})


def test_permutations_on_both_sides_of_a_layer() -> None:
    def network(first: nn.Module, middle: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        return shuffle(last(shuffle(middle(shuffle(first(x))), 4)))

    after = check(program(network, conv(), conv(), conv()), {"conv2d": 3})
    # What is rewritten at one place is read at the next one, so they are rewritten together.
    assert notes(after) == ["from 3 operators that move 768 numbers to none, 2 layers reordered"]


def test_fused_layers_are_layers() -> None:
    def network(
        first: nn.Module, slope: nn.Module, middle: nn.Module, last: nn.Module, x: Tensor
    ) -> Tensor:
        y = slope(first(x))
        return last(F.relu(middle(shuffle(y)) + y))

    def rows(first: nn.Module, slope: nn.Module, x: Tensor) -> Tensor:
        return shuffle(slope(first(x)))

    before = program(network, conv(), nn.PReLU(8), conv(), conv(outputs=3))
    check(before, {"conv_act": 2, "conv2d": 1}, first="fuse_conv_activation")
    check(
        program(rows, conv(), nn.PReLU(8)),
        {"conv_act": 1},
        first="fuse_conv_activation",
        tolerance=EXACT,
    )

    def added(first: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
        return shuffle(F.relu(first(x) + other(x)))

    before = program(added, conv(), conv())
    check(before, {"conv_act": 1, "conv2d": 1}, first="fuse_conv_activation", tolerance=EXACT)


# Several tensors.


def test_split_and_concat_between_convolutions() -> None:
    def network(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        a, b, c, d = first(x).split(2, 1)
        return last(cat(c, cat(a, d), b))

    check(program(network, conv(), conv()), {"conv2d": 2})


def test_nested_concats_and_cuts_of_concats() -> None:
    def network(last: nn.Module, other: nn.Module, a: Tensor, b: Tensor, c: Tensor) -> object:
        whole = cat(cat(a, b), c)
        return last(whole[:, :5]), other(whole[:, 5:])

    before = program(network, conv(5, 2), conv(6, 2), inputs=images(2, 3, 6))
    check(before, {"conv2d": 2, "cat": 1})


def test_what_two_read_is_put_together_once() -> None:
    def network(first: nn.Module, one: nn.Module, other: nn.Module, x: Tensor) -> object:
        whole = cat(x, first(x))
        return one(shuffle(whole)), other(whole.flip(1))

    check(program(network, conv(), conv(16, 2), conv(16, 2)), {"conv2d": 3, "cat": 1})


def test_rows_are_reordered_so_that_each_reader_finds_its_channels_beside_each_other() -> None:
    def network(first: nn.Module, one: nn.Module, other: nn.Module, x: Tensor) -> object:
        y = first(x)
        even, odd = y[:, ::2], y[:, 1::2]
        return one(even), other(cat(odd, x))

    before = program(network, conv(), conv(4, 3), conv(12, 3))
    after = check(before, {"conv2d": 3, "split_with_sizes": 1, "cat": 1})
    (split,) = (n for n in after.graph_module.graph.nodes if n.name.startswith("split"))
    assert split.args[1] == [4, 4]


def test_an_output_among_readers_gets_its_order_by_a_gather() -> None:
    def network(first: nn.Module, other: nn.Module, last: nn.Module, x: Tensor) -> object:
        whole = shuffle(cat(first(x), other(x)))
        return last(whole), shuffle(whole), whole

    before = program(network, conv(), conv(), conv(16, 3))
    after = run(before)
    assert_same_function(before, after, tolerance=SUMMED_OTHERWISE)
    assert counts(after) == counts(before)  # two gathers would be as dear as two transposes
    assert len(reasons(after)) == 1

    def longer(*given: nn.Module | Tensor) -> object:
        *layers, x = given
        for layer in layers[:-1]:
            kept, other = x.chunk(2, 1)
            x = shuffle(cat(kept, layer(other)))
        return x.clone(), layers[-1](x)

    before = program(longer, conv(4, 4), conv(4, 4), conv(4, 4), conv(8, 3))
    after = run(before)
    assert counts(after)["index_select"] == 1
    assert "transpose" not in counts(after)
    assert_same_function(before, after, tolerance=SUMMED_OTHERWISE)
    assert_settled(after)


# ShuffleNet V2.


def test_shufflenet_keeps_one_concat_and_one_split_a_unit() -> None:
    before = captured(shufflenet_v2.build(), *shufflenet_v2.example_inputs())
    after = run(before, "eliminate_identity,fold_conv_bn")
    left = counts(after)
    assert left == {
        "conv2d": 56,
        "relu": 37,
        "cat": 16,
        "split_with_sizes": 16,
        "adaptive_avg_pool2d": 1,
        "view": 1,  # of what the pooling gives, for the classifier
        "linear": 1,
        "max_pool2d": 1,
    }
    # Constants were rounded to float32 after folding: 6e-8 a layer.
    assert_same_function(before, after, tolerance=1e-6)
    assert_equals_what_it_says(before, after)
    assert_settled(after)
    assert notes(after) == [
        "from 11 operators that move 1,000,384 numbers to 8 operators that move 409,248 numbers, "
        "6 layers reordered",
        "from 23 operators that move 1,045,856 numbers to 16 operators that move 386,512 numbers, "
        "10 layers reordered",
        "from 11 operators that move 250,096 numbers to 8 operators that move 102,312 numbers, "
        "4 layers reordered",
    ]


class EvensAndOdds(nn.Module):
    """ShuffleNet V2's unit as its authors wrote it: the shuffle and the split in one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.transform = nn.Sequential(
            conv(half, half), nn.ReLU(), conv(half, half, 3, groups=half), conv(half, half)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        paired = x.reshape(batch * channels // 2, 2, height * width).permute(1, 0, 2)
        halves = paired.reshape(2, -1, channels // 2, height, width)
        return cat(halves[0], self.transform(halves[1]))


def test_units_that_take_evens_and_odds() -> None:
    units = nn.Sequential(*(EvensAndOdds(8) for _ in range(3)))
    before = program(lambda stem, units, last, x: last(units(stem(x))), conv(), units, conv())
    after = check(
        before,
        {"conv2d": 11, "relu": 3, "cat": 3, "split_with_sizes": 3},
    )
    # The rows of the stem are sorted by who reads them: 4, 2, 1 and the last one.
    splits = [n.args[1] for n in after.graph_module.graph.nodes if n.name.startswith("split")]
    assert splits[0] == [4, 2, 1, 1]


# Guards.


def said(after: str, before: str) -> str:
    return f"to put its channels where they are read would take {after}, against {before} now"


def mixed(x: Tensor) -> Tensor:
    """A pixel shuffle, written by hand."""
    batch, channels, height, width = x.shape
    parted = x.view(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return parted.reshape(batch, channels // 4, 2 * height, 2 * width)


ONE = "1 operator that moves 256 numbers"


@pytest.mark.parametrize(
    ("function", "modules", "reason"),
    [
        (shuffle, [], "they are an output of the model"),
        (
            lambda first, last, x: last(shuffle(first(x))),
            [conv(groups=2), conv(groups=2)],
            "conv2d_1 (layers.1) has 2 groups",
        ),
        (
            lambda first, last, x: (lambda y: last(shuffle(y) + y))(first(x)),
            [conv(), conv()],
            "add needs all in one order",
        ),
        (
            lambda first, x: (lambda y: (y, shuffle(y)))(first(x)),
            [conv()],
            "they are an output of the model",
        ),
        (
            lambda last, x: last(mixed(shuffle(x))),
            [conv(2, 3)],
            "conv2d (layers.0) reads them mixed with other dimensions",
        ),
        (
            lambda norm, x: norm(shuffle(x)),
            [nn.GroupNorm(2, 8)],
            "group_norm (layers.0) is not known to treat its channels alike",
        ),
        (
            lambda x: shuffle(x).softmax(1),
            [],
            "softmax is not known to treat its channels alike",
        ),
    ],
)
def test_refuses_where_an_order_is_needed(
    function: Function, modules: list[nn.Module], reason: str
) -> None:
    refused(program(function, *modules), f"{said(ONE, ONE)}, since {reason}")


def test_refuses_a_fused_layer_that_adds_what_it_cannot_reorder() -> None:
    def network(first: nn.Module, x: Tensor, wide: Tensor) -> Tensor:
        return shuffle(F.relu(first(x) + mixed(shuffle(wide))))

    before = program(network, conv(4, 4), inputs=[*images(4, size=8), *images(16)])
    after = run(before, "fuse_conv_activation")
    assert {"conv_act", "transpose"} <= counts(after).keys()
    wide = "1 operator that moves 512 numbers"
    assert reasons(after) == [
        f"{said(wide, wide)}, since conv_act adds them mixed with other dimensions",
        f"{said(wide, wide)}, since they are an output of the model",
    ]


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_refuses_a_layer_whose_constants_are_computed(what: str) -> None:
    def network(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(shuffle(x), weight, bias)

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 8, 1, 1))

        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            if what == "weight":
                return F.conv2d(shuffle(x), given)
            return F.conv2d(shuffle(x), self.weight, given)

    given = torch.randn(3, 8, 1, 1) if what == "weight" else torch.randn(3)
    before = captured(scramble(Computed()).double(), *images(8), given.double())
    refused(before, f"{said(ONE, ONE)}, since the {what} of conv2d is not a constant")


def test_refuses_a_computed_index() -> None:
    index = torch.tensor([3, 1, 0, 2])
    before = program(
        lambda last, x, index: last(x.index_select(1, index)), conv(4), inputs=[*images(8), index]
    )
    refused(before, "the index of index_select is not a constant")
    before = program(lambda last, x, index: last(x[:, index]), conv(4), inputs=[*images(8), index])
    refused(before, "the index of index is not a constant")


def test_refuses_what_would_move_less_with_more_operators() -> None:
    def network(one: nn.Module, other: nn.Module, *given: Tensor) -> object:
        whole = cat(*given)
        return one(whole[:, :9]), other(whole[:, 3:15])

    before = program(network, conv(9, 2), conv(12, 2), inputs=images(6, 6, 6))
    now = "3 operators that move 1,248 numbers"
    refused(before, said("5 operators that move 960 numbers", now))


def test_refuses_memory_that_the_model_writes_to() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.randn(2, 8, 4, 4))
            self.last = conv()

        def forward(self, x: Tensor) -> Tensor:
            before = self.last(self.state.flip(1))
            self.state.add_(x)
            return before

    before = captured(scramble(Written()).double(), *images(8))
    refused(before, "the model writes to the memory of state")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pixel_shuffle(x, 2),
        mixed,
        lambda x: x.reshape(2, 4, 8, 4).transpose(1, 2).reshape(2, 8, 4, 4),
        lambda x: x.reshape(4, 4, 4, 4).transpose(0, 1).reshape(2, 8, 4, 4),
        lambda x: x.view(2, 8, 16).transpose(1, 2).reshape(2, 8, 4, 4),
    ],
)
def test_what_mixes_channels_with_pixels_is_left_alone(function: Function) -> None:
    channels = 2 if function(images(8)[0]).shape[1] == 2 else 8  # type: ignore[attr-defined]
    before = program(lambda first, last, x: last(function(first(x))), conv(), conv(channels, 3))
    refused(before)


def test_concats_and_splits_that_are_already_best_are_left_alone() -> None:
    def inception(first: nn.Module, second: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        one, other = first(x).split([3, 5], 1)
        return last(cat(one, second(other)))

    refused(program(inception, conv(), conv(5, 5, 3), conv()))


def test_a_concat_that_converts_an_input_is_left_alone() -> None:
    def converts(last: nn.Module, x: Tensor) -> Tensor:
        return last(cat(x.float(), x)[:, 4:12])

    refused(program(converts, conv()))


def test_an_unknown_number_of_channels_is_left_alone() -> None:
    def network(x: Tensor) -> Tensor:
        return torch.cat([x[:, 2:], x[:, :2]], 1).relu()

    dims = {1: torch.export.Dim("channels", min=4)}
    model = LoadedModel("dynamic", Calls(network), tuple(images(8)), {}, dynamic_shapes=((dims,),))
    refused(capture(model))


def test_an_operator_that_may_draw_random_numbers_keeps_its_order() -> None:
    def network(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        return last(F.dropout(shuffle(first(x)), training=True).flip(1))

    before = program(network, conv(), conv())
    after = run(before)
    # The shuffle goes into the first layer and the flip into the last, and none passes between.
    assert counts(after) == {"conv2d": 2, "native_dropout": 1}
    assert_same_function(before, after, tolerance=SUMMED_OTHERWISE)


# What else must stay as it is.


def test_shared_weights_are_not_written() -> None:
    shared = conv(bias=False)
    module = scramble(Calls(lambda layer, x: layer(shuffle(layer(x))) + layer(x), shared)).double()
    kept = shared.weight.detach().clone()
    before = captured(module, *images(8))
    check(before, {"conv2d": 3, "add": 1})
    assert torch.equal(shared.weight, kept)


def test_a_layer_called_twice_is_reordered_once() -> None:
    def network(first: nn.Module, twice: nn.Module, x: Tensor) -> object:
        y = first(x)
        return twice(shuffle(y)), twice(shuffle(y.relu()))

    after = check(program(network, conv(), conv()), {"conv2d": 3, "relu": 1})
    added = [name for name, _ in after.graph_module.named_parameters() if "routed" in name]
    assert added == ["layers_1_weight_routed"]


def test_no_output_becomes_an_input_or_another_output() -> None:
    def network(first: nn.Module, x: Tensor) -> object:
        y = first(x)
        return cat(*x.chunk(2, 1)), y, cat(*y.chunk(2, 1)), cat(*y.split(2, 1))

    before = program(network, conv())
    after = check(before, {"conv2d": 1, "clone": 3}, tolerance=EXACT)
    given, *results = after.graph_module.graph.output_node().args[0]
    assert given.name == "clone"
    assert len({given, *results}) == 4


def test_a_view_behind_it_finds_the_memory_that_it_needs() -> None:
    # What is cut out of a batch is no contiguous memory, and a view of it would fail.
    def network(first: nn.Module, last: nn.Module, x: Tensor) -> Tensor:
        a, b, c = first(x).split([2, 3, 3], 1)
        return last(cat(a, b).view(2 * 5, 16)) + c.mean()

    before = program(network, conv(), nn.Linear(16, 3))
    expected = {
        "conv2d": 1,
        "split_with_sizes": 1,
        "clone": 1,
        "view": 1,
        "linear": 1,
        "mean": 1,
        "add": 1,
    }
    check(before, expected, tolerance=EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constants_keep_their_dtype(dtype: torch.dtype) -> None:
    module = scramble(Calls(lambda a, b, x: b(shuffle(a(x)).relu()), conv(), conv())).to(dtype)
    before = captured(module, images(8)[0].to(dtype))
    # Constants are put in another order and not computed with: even rounded ones are exact.
    after = check(before, {"conv2d": 2, "relu": 1})
    assert {each.dtype for each in after.graph_module.parameters()} == {dtype}


def test_sizes_known_only_at_run_time() -> None:
    units = nn.Sequential(*(EvensAndOdds(8) for _ in range(2)))
    module = scramble(
        Calls(lambda stem, units, last, x: last(shuffle(units(stem(x)))), conv(), units, conv())
    ).double()
    dims = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", min=2, max=64),
        3: torch.export.Dim("width", min=2, max=64),
    }
    model = LoadedModel("dynamic", module, tuple(images(8)), {}, dynamic_shapes=((dims,),))
    before = capture(model)
    after = check(before, {"conv2d": 8, "relu": 2, "cat": 2, "split_with_sizes": 2})
    x = torch.randn(5, 8, 7, 3).double()
    with torch.no_grad():
        moved = distance([module(x)], [after.graph_module(x)])
    assert moved <= SUMMED_OTHERWISE


# Whatever is drawn.


class Drawn(nn.Module):
    """Layers and moves of channels, drawn number by number, each on earlier results.

    A line is four numbers: what it is, two that choose its operands, and one more choice.
    """

    def __init__(self, lines: list[tuple[int, int, int, int]], outputs: int) -> None:
        super().__init__()
        self.lines = lines
        self.outputs = outputs
        self.layers = nn.ModuleDict()
        self.eval()
        with torch.no_grad():
            self(*images(6, 4, size=3))
        scramble(self).double()

    def forward(self, *given: Tensor) -> list[Tensor]:
        results = list(given)
        for number, (kind, one, other, choice) in enumerate(self.lines):
            x = results[-1 - one % len(results)]
            y = results[-1 - other % len(results)]
            drawn = self.KINDS[kind % len(self.KINDS)](self, f"layer{number}", x, y, choice)
            results += [each for each in drawn if each.shape[1] > 0]
        kept = [each for index, each in enumerate(results) if self.outputs >> index % 16 & 1]
        return [*kept, results[-1]]

    def layer(self, name: str, make: Callable[[], nn.Module], x: Tensor) -> list[Tensor]:
        if name not in self.layers:
            self.layers[name] = make().double()
        return [self.layers[name](x)]

    def dense(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        return self.layer(name, lambda: conv(x.shape[1], 2 + choice % 5, 1 + choice % 2 * 2), x)

    def grouped(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        count = x.shape[1]
        groups = [each for each in range(1, count + 1) if count % each == 0]
        chosen = groups[choice % len(groups)]
        kind = nn.ConvTranspose2d if choice % 3 == 0 else nn.Conv2d
        return self.layer(name, lambda: kind(count, chosen * (1 + choice % 2), 1, groups=chosen), x)

    def norm(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        return self.layer(name, lambda: nn.BatchNorm2d(x.shape[1]).eval(), x)

    def pooled(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        return [F.max_pool2d(x, 3, 1, 1) if choice % 2 else x.relu()]

    def joined(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        return [cat(x, y)] if x.shape[1] + y.shape[1] <= 24 else [x.exp().reciprocal()]

    def halves(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        first = choice % (x.shape[1] + 1)
        return list(x.split([first, x.shape[1] - first], 1))

    def stepped(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        return [x[:, ::2], x[:, 1::2]]

    def shuffled(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        groups = [each for each in range(1, 7) if x.shape[1] % each == 0]
        return [shuffle(x.contiguous(), groups[choice % len(groups)])]

    def flipped(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        return [x.flip(1)]

    def summed(self, name: str, x: Tensor, y: Tensor, choice: int) -> list[Tensor]:
        return [x + y if x.shape == y.shape else x * y.mean(1, keepdim=True)]

    KINDS = (
        dense, dense, grouped, norm, pooled, joined, joined, halves, stepped, shuffled, flipped,
        summed,
    )  # fmt: skip


def check_drawn(lines: list[tuple[int, int, int, int]], outputs: int) -> int:
    """Everything that must hold of one network; how many places were rewritten."""
    before = captured(Drawn(lines, outputs), *images(6, 4, size=3))
    after = run(before)
    # As strict as the driver's own proof.
    assert_same_function(before, after, tolerance=1e-10)
    assert_equals_what_it_says(before, after)
    assert_settled(after)
    assert (moving(after) == moving(before)) == (notes(after) == [])
    assert moving(after) == moving(before) or moving(after).below(moving(before))
    return len(notes(after))


def test_any_network_of_layers_and_moves() -> None:
    rewritten = 0

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(
        st.lists(st.tuples(st.integers(0, 11), *[st.integers(0, 30)] * 3), min_size=4, max_size=11),
        st.integers(0, 2**16 - 1),
    )
    def each(lines: list[tuple[int, int, int, int]], outputs: int) -> None:
        nonlocal rewritten
        rewritten += check_drawn(lines, outputs)

    each()
    # Networks in which there is nothing to do would say nothing.
    assert rewritten > 0
