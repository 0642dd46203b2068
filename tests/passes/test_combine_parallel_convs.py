"""Parallel convolutions, linear layers and products become one of each and a split."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models import googlenet
from optfuse.capture import capture
from optfuse.graph import prepare, value
from optfuse.stages import LoadedModel, Program
from tests.harness import (
    assert_same_function,
    assert_settled,
    captured,
    counts,
    optimized,
    reasons,
    scramble,
    step,
)

PASS = "combine_parallel_convs"
ANY_KERNEL = "combine_parallel_convs.any_kernel"
GROUPED = "combine_parallel_convs.grouped"
ALL_KINDS = f"{ANY_KERNEL},{GROUPED}"

# The weights are stacked, not changed; what moves is the order in which a convolution sums.
SUMMED_OTHERWISE = 1e-14


class Parallel(nn.Module):
    """Layers on one input, each with its own activation; gives all results."""

    def __init__(
        self,
        *layers: nn.Module,
        activations: Sequence[Callable[[Tensor], Tensor] | None] = (),
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activations = activations or [None] * len(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        results = [layer(x) for layer in self.layers]
        return [
            y if activate is None else activate(y)
            for y, activate in zip(results, self.activations, strict=True)
        ]


def parallel(
    *layers: nn.Module,
    x: Tensor | None = None,
    activations: Sequence[Callable[[Tensor], Tensor] | None] = (),
    seed: int = 0,
) -> Program:
    module = scramble(Parallel(*layers, activations=activations), seed).double()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(3)) if x is None else x
    return captured(module, x.double())


class Products(nn.Module):
    """Functions of x and a constant each."""

    def __init__(
        self, *products: tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.constants = nn.ParameterList(torch.empty(shape) for _, shape in products)
        self.functions = [function for function, _ in products]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [f(x, c) for f, c in zip(self.functions, self.constants, strict=True)]


def products(
    function: Callable[[Tensor, Tensor], Tensor], *shapes: tuple[int, ...], x: tuple[int, ...]
) -> Program:
    module = scramble(Products(*((function, shape) for shape in shapes))).double()
    return captured(module, torch.randn(x).double())


def from_the_left(x: Tensor, c: Tensor) -> Tensor:
    return torch.matmul(c, x)


def pointwise(out_channels: int, **settings: object) -> nn.Conv2d:
    return nn.Conv2d(4, out_channels, 1, **settings)  # type: ignore[arg-type]


def check(before: Program, expected: dict[str, int], passes: str = PASS) -> Program:
    after = optimized(before, passes)
    assert counts(after) == expected
    assert_same_function(before, after, tolerance=SUMMED_OTHERWISE)
    assert_settled(after, passes)
    return after


def test_three_convolutions_become_one_and_a_split() -> None:
    before = parallel(pointwise(3), pointwise(5), pointwise(1))
    assert counts(before) == {"conv2d": 3}
    after = check(before, {"conv2d": 1, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "3 convolutions into one of 9 channels"


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "clamp": lambda y: y.clamp(-0.2, 0.7),
    "clamp_min": lambda y: y.clamp_min(-0.2),
    "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "elu": lambda y: F.elu(y, 0.7),
    "celu": lambda y: F.celu(y, 0.7),
    "selu": F.selu,
    "gelu": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "softplus": lambda y: F.softplus(y, beta=2.0, threshold=3.0),
    "tanh": torch.tanh,
}


def test_every_equal_activation_moves_in_front_of_the_split() -> None:
    class EachActivation(nn.Module):
        """Two convolutions and an activation behind both, for every activation."""

        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.ModuleList(
                Parallel(pointwise(3), pointwise(5), activations=[activate, activate])
                for activate in ACTIVATIONS.values()
            )

        def forward(self, *images: Tensor) -> list[list[Tensor]]:
            return [pair(x) for pair, x in zip(self.pairs, images, strict=True)]

    images = [torch.randn(1, 4, 3, 3).double() for _ in ACTIVATIONS]
    before = captured(scramble(EachActivation()).double(), *images)
    pairs = len(ACTIVATIONS)
    assert counts(before) == {"conv2d": 2 * pairs, **dict.fromkeys(ACTIVATIONS, 2)}
    after = check(
        before, {"conv2d": pairs, "split_with_sizes": pairs, **dict.fromkeys(ACTIVATIONS, 1)}
    )
    assert [site.note for site in step(after, PASS).sites] == [
        f"2 convolutions into one of 8 channels, and the {name} behind them" for name in ACTIVATIONS
    ]


def test_the_activation_stands_between_the_convolution_and_the_split() -> None:
    after = optimized(parallel(pointwise(3), pointwise(5), activations=[F.relu, F.relu]), PASS)
    order = [n.name for n in after.graph_module.graph.nodes if n.op == "call_function"]
    assert order == ["conv2d_2", "relu_2", "split_with_sizes", "getitem", "getitem_1"]


MOVED_OR_NOT: list[tuple[list[Callable[[Tensor], Tensor] | None], dict[str, int], str]] = [
    ([F.relu, None], {"relu": 1}, "no activation follows it and relu follows"),
    ([None, F.relu], {"relu": 1}, "relu follows it and no activation follows"),
    ([F.relu, F.silu], {"relu": 1, "silu": 1}, "silu follows it and relu follows"),
    (
        [F.leaky_relu, lambda y: F.leaky_relu(y, 0.2)],
        {"leaky_relu": 2},
        "leaky_relu(0.2) follows it and leaky_relu(0.01) follows",
    ),
    (
        [lambda y: F.relu(y) + y, lambda y: F.relu(y)],
        {"relu": 2, "add": 1},
        "relu follows it and no activation follows",
    ),
]


@pytest.mark.parametrize(("activations", "kinds", "said"), MOVED_OR_NOT)
def test_convolutions_that_end_differently_stay_apart(
    activations: list[Callable[[Tensor], Tensor] | None], kinds: dict[str, int], said: str
) -> None:
    before = parallel(pointwise(3), pointwise(5), activations=activations)
    after = check(before, {"conv2d": 2, **kinds})
    assert reasons(after, PASS) == [
        f"{said} conv2d (layers.0) on the same tensor; behind a split that would not be fused"
    ]


@pytest.mark.parametrize(("activations", "kinds", "_said"), MOVED_OR_NOT)
def test_linear_layers_are_combined_whatever_follows_them(
    activations: list[Callable[[Tensor], Tensor] | None], kinds: dict[str, int], _said: str
) -> None:
    x = torch.randn(2, 5, 4)
    before = parallel(nn.Linear(4, 3), nn.Linear(4, 5), x=x, activations=activations)
    check(before, {"linear": 1, "split_with_sizes": 1, **kinds})


def test_activations_that_depend_on_other_tensors_stay_behind_the_split() -> None:
    before = parallel(pointwise(3), pointwise(5), activations=[lambda y: y.clamp(max=y.mean())] * 2)
    check(before, {"conv2d": 1, "split_with_sizes": 1, "clamp": 2, "mean": 2})


def test_an_activation_with_a_computed_limit_stays_behind_it() -> None:
    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = pointwise(3), pointwise(5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one = self.one(x)
            limit = x.abs().max().item()  # known only behind the first convolution
            return one.clamp(max=limit), self.two(x).clamp(max=limit)

    before = captured(scramble(Limited()).double(), torch.randn(1, 4, 3, 3).double())
    after = optimized(before, PASS)
    assert counts(after)["conv2d"] == 1
    assert counts(after)["clamp"] == 2
    assert_same_function(before, after, tolerance=SUMMED_OTHERWISE)


@pytest.mark.parametrize(
    ("activations", "left"),
    [
        ([lambda y: F.leaky_relu(y, 0.01), F.leaky_relu], {"leaky_relu": 1}),
        ([F.relu6, lambda y: F.hardtanh(y, 0.0, 6.0), lambda y: y.clamp(0, 6)], {"relu6": 1}),
        ([lambda y: y.clamp_min(0), F.relu], {"clamp_min": 1}),
        ([lambda y: y * y.sigmoid(), F.silu], {"sigmoid": 1, "mul": 1}),
    ],
)
def test_equal_activations_in_different_spellings_are_equal(
    activations: list[Callable[[Tensor], Tensor]], left: dict[str, int]
) -> None:
    layers = [pointwise(3 + index) for index in range(len(activations))]
    before = parallel(*layers, activations=activations)
    check(before, {"conv2d": 1, "split_with_sizes": 1, **left})


@pytest.mark.parametrize(
    ("name", "activate", "left"),
    [
        ("softsign", F.softsign, {"abs": 1, "add": 1, "div": 1}),
        ("silu", lambda y: torch.sigmoid(y) * y, {"sigmoid": 1, "mul": 1}),
    ],
)
def test_an_activation_of_several_operators_moves_as_a_whole(
    name: str, activate: Callable[[Tensor], Tensor], left: dict[str, int]
) -> None:
    before = parallel(pointwise(3), pointwise(5), activations=[activate, activate])
    after = check(before, {"conv2d": 1, "split_with_sizes": 1, **left})
    (site,) = step(after, PASS).sites
    assert site.note == f"2 convolutions into one of 8 channels, and the {name} behind them"


# Subsets


def test_a_member_that_ends_differently_leaves_the_others_combined() -> None:
    layers = [pointwise(size) for size in (3, 5, 2)]
    before = parallel(*layers, activations=[F.relu, None, F.relu])
    after = check(before, {"conv2d": 2, "relu": 1, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == (
        "2 convolutions into one of 5 channels, and the relu behind them; 1 more on the same "
        "tensor stays apart"
    )
    assert reasons(after, PASS) == [
        "no activation follows it and relu follows conv2d_3 (layers.0) on the same tensor; behind "
        "a split that would not be fused"
    ]


def test_a_subset_for_each_ending() -> None:
    activations = [F.relu, None, F.silu, F.relu, None, F.relu]
    layers = [pointwise(1 + index) for index in range(6)]
    before = parallel(*layers, activations=activations)
    after = check(before, {"conv2d": 3, "relu": 1, "silu": 1, "split_with_sizes": 2})
    assert [site.note for site in step(after, PASS).sites] == [
        "3 convolutions into one of 11 channels, and the relu behind them; 3 more on the same "
        "tensor stay apart",
        "2 convolutions into one of 7 channels; 4 more on the same tensor stay apart",
    ]
    assert [reason.split(" follows it")[0] for reason in reasons(after, PASS)] == [
        "no activation",
        "silu",
    ]


def test_what_stays_apart_is_fused_and_says_so_still() -> None:
    layers = [pointwise(size) for size in (3, 5, 2)]
    before = parallel(*layers, activations=[F.relu, F.relu, F.silu])
    after = optimized(before, f"{PASS},fuse_conv_activation")
    assert counts(after) == {"conv_act": 2, "split_with_sizes": 1}
    assert reasons(after, PASS) == [
        "silu follows it and relu follows conv_act (layers.0) on the same tensor; behind a split "
        "that would not be fused"
    ]


def test_refuses_what_is_fused_already() -> None:
    before = parallel(pointwise(3), pointwise(5), activations=[lambda y: F.leaky_relu(y, 0.2)] * 2)
    after = optimized(optimized(before, "fuse_conv_activation"), PASS)
    assert counts(after) == {"conv_act": 2}
    assert reasons(after, PASS) == ["its leaky_relu(0.2) is fused into it already"]


@pytest.mark.parametrize("fused", [False, True])
def test_refuses_a_prelu(fused: bool) -> None:
    before = parallel(*(nn.Sequential(pointwise(3), nn.PReLU()) for _ in range(2)))
    before = optimized(before, "fuse_conv_activation") if fused else before
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    (reason,) = reasons(after, PASS)
    beside = "conv_act (layers.0.1)" if fused else "conv2d (layers.0.0)"
    assert reason.startswith(f"prelu follows it and prelu follows {beside} on the same tensor;")


class Summed(nn.Module):
    """Two 1x1 convolutions on x; what is made of the second one's result is given by `end`."""

    def __init__(self, end: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.other = pointwise(3), pointwise(4), pointwise(4)
        self.end = end

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, two = self.one(x), self.two(x)
        return one, self.end(self, x, two)


def summed(end: Callable[..., Tensor]) -> Program:
    return captured(scramble(Summed(end)).double(), torch.randn(2, 4, 5, 5).double())


@pytest.mark.parametrize("swapped", [False, True])
def test_refuses_what_takes_in_a_sum(swapped: bool) -> None:
    before = summed(lambda _self, x, y: F.relu(x + y if swapped else y + x))
    after = check(before, {"conv2d": 2, "add": 1, "relu": 1})
    said = "relu of a sum follows it and no activation follows conv2d (one) on the same tensor"
    assert reasons(after, PASS) == [f"{said}; behind a split that would not be fused"]
    fused = optimized(before, f"{PASS},fuse_conv_activation")
    assert counts(fused) == {"conv2d": 1, "conv_act": 1}
    (reason,) = reasons(fused, PASS)
    assert reason.startswith("relu of a sum follows it and no activation follows conv2d (one)")


@pytest.mark.parametrize(
    ("end", "left"),
    [
        # The later convolution takes in the sum.
        (
            lambda self, x, y: F.relu(y + self.other(x.sin())),
            {"sin": 1, "conv2d": 2, "add": 1, "relu": 1},
        ),
        # None of these is fused.
        (lambda _self, x, y: torch.add(y, x, alpha=2).relu(), {"conv2d": 1, "add": 1, "relu": 1}),
        (lambda _self, x, y: F.relu(y + x.mean()), {"conv2d": 1, "mean": 1, "add": 1, "relu": 1}),
        (lambda _self, _x, y: F.relu(y + y), {"conv2d": 1, "add": 1, "relu": 1}),
        (lambda _self, _x, y: F.relu(y + 1.5), {"conv2d": 1, "add": 1, "relu": 1}),
        (lambda _self, x, y: F.selu(y + x), {"conv2d": 1, "add": 1, "selu": 1}),
        (lambda _self, x, y: y + x, {"conv2d": 1, "add": 1}),
        (lambda _self, x, y: y - x.relu(), {"conv2d": 1, "sub": 1, "relu": 1}),
    ],
)
def test_a_sum_that_it_does_not_take_in_parts_nothing(
    end: Callable[..., Tensor], left: dict[str, int]
) -> None:
    check(summed(end), {**left, "split_with_sizes": 1})


def test_of_two_summed_convolutions_the_later_one_stays_apart() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(pointwise(4) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, two, three = (layer(x) for layer in self.layers)
            return F.relu(one + two), three

    before = captured(scramble(Both()).double(), torch.randn(2, 4, 5, 5).double())
    after = check(before, {"conv2d": 2, "split_with_sizes": 1, "add": 1, "relu": 1})
    fused = optimized(after, "fuse_conv_activation")
    assert counts(fused) == {"conv2d": 1, "conv_act": 1, "split_with_sizes": 1}


@pytest.mark.parametrize("bias", [(True, False, True), (False, False, False)])
def test_a_missing_bias_is_zeros_beside_one_that_is_there(bias: tuple[bool, ...]) -> None:
    before = parallel(*(pointwise(2, bias=each) for each in bias))
    after = check(before, {"conv2d": 1, "split_with_sizes": 1})
    constants = [n for n in after.graph_module.graph.nodes if n.op == "get_attr"]
    assert len(constants) == 1 + any(bias)


@pytest.mark.parametrize("shape", [(2, 5, 4), (7, 4), (4,)])
def test_linear_layers_of_any_rank(shape: tuple[int, ...]) -> None:
    before = parallel(*(nn.Linear(4, 6, bias=b) for b in (True, True, False)), x=torch.randn(shape))
    assert counts(before) == {"linear": 3}
    after = check(before, {"linear": 1, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == "3 linear layers into one of 18 channels"


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_one_two_and_three_dimensions_batched_or_not(batch: tuple[int, ...], spatial: int) -> None:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    x = torch.randn(*batch, 4, *[5] * spatial)
    before = parallel(layer(4, 2, 1), layer(4, 3, 1), x=x)
    check(before, {f"conv{spatial}d": 1, "split_with_sizes": 1})


def test_settings_in_different_spellings_are_equal() -> None:
    before = parallel(
        pointwise(2, padding="valid"), pointwise(3, padding=0), pointwise(1, padding="same")
    )
    check(before, {"conv2d": 1, "split_with_sizes": 1})


def test_two_groups_on_one_tensor() -> None:
    strided = {"stride": 2}
    before = parallel(pointwise(2), pointwise(3, **strided), pointwise(1), pointwise(2, **strided))
    check(before, {"conv2d": 2, "split_with_sizes": 2})


def test_a_layer_that_runs_twice_on_one_tensor() -> None:
    layer = pointwise(3)
    before = parallel(layer, layer)
    check(before, {"conv2d": 1, "split_with_sizes": 1})


def test_groups_behind_each_other() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Parallel(pointwise(3), pointwise(4), activations=[F.relu, F.relu])
            self.second = Parallel(pointwise(2), pointwise(5))

        def forward(self, x: Tensor) -> list[Tensor]:
            short, x = self.first(x)
            return [short, *self.second(x)]

    module = scramble(Blocks()).double()
    before = captured(module, torch.randn(1, 4, 5, 5).double())
    check(before, {"conv2d": 2, "split_with_sizes": 2, "relu": 1})


def test_a_head_on_several_levels_keeps_one_set_of_weights() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Parallel(pointwise(2), pointwise(3))

        def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
            return self.head(x) + self.head(y)

    module = scramble(Head()).double()
    before = captured(module, torch.randn(1, 4, 8, 8).double(), torch.randn(1, 4, 4, 4).double())
    after = check(before, {"conv2d": 2, "split_with_sizes": 2})
    constants = {n.target for n in after.graph_module.graph.nodes if n.op == "get_attr"}
    assert len(constants) == 2  # one weight and one bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constants_keep_the_dtype_and_the_values_of_the_model(dtype: torch.dtype) -> None:
    class OfEachKind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = Parallel(pointwise(2), pointwise(3, bias=False))
            self.grouped = Parallel(pointwise(4, groups=2), pointwise(2, groups=2, bias=False))
            self.depthwise = Parallel(pointwise(4, groups=4), pointwise(4, groups=4, bias=False))
            self.products = Products((torch.matmul, (3, 2)), (torch.matmul, (3, 5)))

        def forward(self, *x: Tensor) -> list[list[Tensor]]:
            kinds = (self.plain, self.grouped, self.depthwise, self.products)
            return [kind(each) for kind, each in zip(kinds, x, strict=True)]

    module = scramble(OfEachKind()).to(dtype)
    before = captured(module, *(torch.randn(1, 4, 3, 3).to(dtype) for _ in range(4)))
    expected = {"conv2d": 3, "matmul": 1, "split_with_sizes": 4}
    after = check(before, {**expected, "cat": 1, "unflatten": 1, "flatten": 2}, GROUPED)
    assert {p.dtype for p in after.graph_module.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([pointwise(2), pointwise(3)], {"conv2d": 1}),
        (
            [pointwise(4, groups=2), pointwise(2, groups=2)],
            {"conv2d": 1, "unflatten": 1, "flatten": 2},
        ),
        ([pointwise(4, groups=4), pointwise(4, groups=4)], {"conv2d": 1, "cat": 1}),
        ([nn.ConvTranspose2d(4, 2, 1), nn.ConvTranspose2d(4, 3, 1)], {"conv_transpose2d": 1}),
        ([Products((torch.matmul, (5, 2))), Products((torch.matmul, (5, 3)))], {"matmul": 1}),
    ],
    ids=["plain", "grouped", "depthwise", "transposed", "products"],
)
def test_dynamic_batch_and_image_size(
    layers: Sequence[nn.Module], expected: dict[str, int]
) -> None:
    module = scramble(Parallel(*layers, activations=[relu_of_all, relu_of_all])).double()
    dims = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height")}
    x = torch.randn(2, 4, 6, 5).double()
    before = capture(LoadedModel("dynamic", module, (x,), {}, dynamic_shapes=({**dims},)))
    after = check(before, {**expected, "relu": 1, "split_with_sizes": 1}, GROUPED)
    x = torch.randn(5, 4, 9, 5).double()
    for expected_result, found in zip(module(x), after.graph_module(x), strict=True):
        # One float64 convolution of 4 inputs each: a few units of 1e-16.
        torch.testing.assert_close(found, expected_result, rtol=1e-12, atol=1e-12)


def relu_of_all(y: Tensor | list[Tensor]) -> Tensor:
    return F.relu(y[0] if isinstance(y, list) else y)


def test_any_kernel_combines_other_sizes_too() -> None:
    wide = {"padding": 1, "dilation": 1, "stride": 2}
    before = parallel(nn.Conv2d(4, 2, 3, **wide), nn.Conv2d(4, 5, 3, **wide))
    after = check(before, {"conv2d": 2})
    assert reasons(after, PASS) == [
        "its kernel is 3x3, not 1x1 (the option any_kernel would combine it with 1 more on the "
        "same tensor)"
    ]
    after = check(before, {"conv2d": 1, "split_with_sizes": 1}, ANY_KERNEL)
    assert needed(after) == [{"any_kernel"}]


def needed(after: Program) -> list[frozenset[str]]:
    """The options that each rewrite needed."""
    return [site.rewrite.options for site in step(after, PASS).sites if site.rewrite]


def test_a_rewrite_says_which_options_it_needed() -> None:
    before = parallel(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1, groups=2))
    every = f"{ANY_KERNEL},{GROUPED}"
    assert needed(optimized(before, every)) == [{"grouped"}]
    before = parallel(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 3, groups=2))
    assert needed(optimized(before, every)) == [{"any_kernel", "grouped"}]
    assert needed(optimized(parallel(pointwise(2), pointwise(3)), every)) == [frozenset()]


def test_same_padding_of_one_side_more() -> None:
    even = {"kernel_size": 2, "padding": "same"}
    before = parallel(nn.Conv2d(4, 2, **even), nn.Conv2d(4, 5, **even))
    check(before, {"conv2d": 1, "split_with_sizes": 1}, ANY_KERNEL)


@pytest.mark.parametrize("setting", ["stride", "padding"])
def test_refuses_a_lone_convolution_of_other_settings(setting: str) -> None:
    before = parallel(pointwise(2, **{setting: 2}), pointwise(3), pointwise(1))
    after = check(before, {"conv2d": 2, "split_with_sizes": 1})
    assert reasons(after, PASS) == [
        f"its {setting} is not that of conv2d (layers.0) on the same tensor"
    ]


def test_refuses_another_dilation() -> None:
    before = parallel(nn.Conv2d(4, 2, 3, dilation=2), nn.Conv2d(4, 2, 3))
    assert reasons(check(before, {"conv2d": 2}), PASS) == []  # nobody expects it of 3x3 kernels
    assert reasons(check(before, {"conv2d": 2}, ANY_KERNEL), PASS) == [
        "its dilation is not that of conv2d (layers.0) on the same tensor"
    ]


# Transposed, grouped and depthwise convolutions


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_transposed_convolutions(batch: tuple[int, ...], spatial: int) -> None:
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    wide = {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}
    x = torch.randn(*batch, 4, *[4] * spatial)
    before = parallel(
        layer(4, 2, 3, **wide),
        layer(4, 5, 3, bias=False, **wide),
        x=x,
        activations=[torch.tanh, torch.tanh],
    )
    name = "conv_transpose" + f"{spatial}d"
    assert counts(before) == {name: 2, "tanh": 2}
    after = check(before, {name: 1, "split_with_sizes": 1, "tanh": 1}, ANY_KERNEL)
    (site,) = step(after, PASS).sites
    assert site.note == (
        "2 transposed convolutions into one of 7 channels, and the tanh behind them"
    )


def test_transposed_convolutions_stay_apart_from_others() -> None:
    layers = [pointwise(4), nn.ConvTranspose2d(4, 4, 1), nn.ConvTranspose2d(4, 3, 1)]
    after = check(parallel(*layers), {"conv2d": 1, "conv_transpose2d": 1, "split_with_sizes": 1})
    assert reasons(after, PASS) == []


def test_refuses_another_output_padding() -> None:
    layers = [nn.ConvTranspose2d(4, 2, 1, stride=2, output_padding=each) for each in (0, 1)]
    after = check(parallel(*layers), {"conv_transpose2d": 2})
    assert reasons(after, PASS) == [
        "its output padding is not that of conv_transpose2d (layers.0) on the same tensor"
    ]


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_convolutions_are_interleaved(
    transposed: bool, spatial: int, batch: tuple[int, ...]
) -> None:
    kind = f"conv{'_transpose' if transposed else ''}{spatial}d"
    layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{spatial}d")
    x = torch.randn(*batch, 6, *[4] * spatial)
    before = parallel(
        layer(6, 4, 3, groups=2),
        layer(6, 2, 3, groups=2, bias=False),
        layer(6, 8, 3, groups=2),
        x=x,
        activations=[F.relu] * 3,
    )
    assert counts(before) == {kind: 3, "relu": 3}
    after = check(
        before, {kind: 1, "relu": 1, "unflatten": 1, "split_with_sizes": 1, "flatten": 3}, ALL_KINDS
    )
    (site,) = step(after, PASS).sites
    assert site.note.endswith("convolutions into one of 14 channels, and the relu behind them")


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions_stay_depthwise(
    multiplier: int, transposed: bool, spatial: int, batch: tuple[int, ...]
) -> None:
    kind = f"conv{'_transpose' if transposed else ''}{spatial}d"
    layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{spatial}d")
    out = 3 * multiplier
    before = parallel(
        layer(3, out, 2, stride=2, groups=3),
        layer(3, out, 2, stride=2, groups=3, bias=False),
        x=torch.randn(*batch, 3, *[4] * spatial),
        activations=[F.silu, F.silu],
    )
    after = check(before, {"cat": 1, kind: 1, "silu": 1, "split_with_sizes": 1}, ALL_KINDS)
    (call,) = [n for n in after.graph_module.graph.nodes if n.name.startswith("conv")]
    assert value(call).shape[len(batch)] == 2 * out
    assert value(call.args[0]).shape[len(batch)] == 6


def test_depthwise_convolutions_of_other_multipliers_stay_apart() -> None:
    layers = [nn.Conv2d(4, each, 1, groups=4) for each in (4, 8, 4)]
    expected = {"cat": 1, "conv2d": 2, "split_with_sizes": 1}
    assert reasons(check(parallel(*layers), expected, GROUPED), PASS) == []


def test_refuses_groups() -> None:
    for groups in (2, 4):
        before = parallel(pointwise(4, groups=groups), pointwise(4, groups=groups))
        assert reasons(check(before, {"conv2d": 2}, ANY_KERNEL), PASS) == [
            f"it has {groups} groups, not one (the option grouped would combine it with 1 more on "
            "the same tensor)"
        ]


def test_says_all_that_is_missing() -> None:
    layers = [nn.Conv2d(4, 4, (3, 1), groups=2) for _ in range(3)]
    assert reasons(check(parallel(*layers), {"conv2d": 3}), PASS) == [
        "its kernel is 3x1, not 1x1 and it has 2 groups, not one (the options any_kernel and "
        "grouped would combine it with 2 more on the same tensor)"
    ]
    (reason,) = reasons(check(parallel(*layers), {"conv2d": 3}, GROUPED), PASS)
    assert reason.endswith(
        "(the option any_kernel would combine it with 2 more on the same tensor)"
    )


def test_promises_no_more_than_the_options_would_do() -> None:
    wide = [nn.Conv2d(4, 4, 3) for _ in range(3)]
    before = parallel(*wide, activations=[F.relu, None, F.relu])
    (reason,) = reasons(check(before, {"conv2d": 3, "relu": 2}), PASS)
    assert reason.endswith("would combine it with 1 more on the same tensor)")
    before = parallel(*wide[:2], activations=[F.relu, None])
    assert reasons(check(before, {"conv2d": 2, "relu": 1}), PASS) == []


# Products


@pytest.mark.parametrize(
    ("function", "x", "shapes", "note"),
    [
        (torch.matmul, (2, 5, 4), [(4, 3), (4, 6)], "one of 9 columns"),
        (torch.matmul, (2, 5, 4), [(2, 4, 3), (2, 4, 1)], "one of 4 columns"),
        (torch.matmul, (5, 4), [(3, 2, 4, 3), (3, 2, 4, 2)], "one of 5 columns"),
        (torch.matmul, (4,), [(4, 3), (4, 6)], "one of 9 columns"),
        (torch.matmul, (4,), [(2, 4, 3), (2, 4, 6)], "one of 9 columns"),
        (torch.mm, (5, 4), [(4, 3), (4, 6)], "one of 9 columns"),
        (torch.bmm, (2, 5, 4), [(2, 4, 3), (2, 4, 6)], "one of 9 columns"),
        (from_the_left, (4, 5), [(3, 4), (6, 4)], "one of 9 rows"),
        (from_the_left, (2, 4, 5), [(3, 4), (6, 4)], "one of 9 rows"),
        (from_the_left, (4, 5), [(2, 3, 4), (2, 6, 4)], "one of 9 rows"),
        (from_the_left, (4,), [(3, 4), (6, 4)], "one of 9 rows"),
        (from_the_left, (4,), [(2, 3, 4), (2, 6, 4)], "one of 9 rows"),
    ],
)
def test_products_with_constants(
    function: Callable[[Tensor, Tensor], Tensor],
    x: tuple[int, ...],
    shapes: list[tuple[int, ...]],
    note: str,
) -> None:
    before = products(function, *shapes, x=x)
    (name,) = counts(before)
    assert counts(before)[name] == 2
    after = check(before, {name: 1, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == f"2 matrix products into {note}"


def einsum(equation: str) -> Callable[[Tensor, Tensor], Tensor]:
    swapped = equation.startswith("W")
    equation = equation.replace("W", "")

    def function(x: Tensor, c: Tensor) -> Tensor:
        return torch.einsum(equation, c, x) if swapped else torch.einsum(equation, x, c)

    function.__name__ = equation
    return function


@pytest.mark.parametrize(
    ("equation", "x", "shapes", "note"),
    [
        ("bij,jk->bik", (2, 5, 4), [(4, 3), (4, 6)], "one of 9 entries of k"),
        ("b i j, j k -> k b i", (2, 5, 4), [(4, 3), (4, 6)], "one of 9 entries of k"),
        ("bsd,dhe->bshe", (2, 5, 4), [(4, 2, 3), (4, 6, 3)], "one of 8 entries of h"),
        ("...d,dk->...k", (2, 5, 4), [(4, 3), (4, 6)], "one of 9 entries of k"),
        ("...d,dk->k...", (2, 5, 4), [(4, 3), (4, 6)], "one of 9 entries of k"),
        ("...d,dkh->k...h", (2, 5, 4), [(4, 3, 2), (4, 6, 2)], "one of 9 entries of k"),
        ("Wkj,bji->bki", (2, 4, 5), [(3, 4), (6, 4)], "one of 9 entries of k"),
    ],
)
def test_einsums_of_a_tensor_and_a_constant(
    equation: str, x: tuple[int, ...], shapes: list[tuple[int, ...]], note: str
) -> None:
    before = products(einsum(equation), *shapes, x=x)
    assert counts(before) == {"einsum": 2}
    after = check(before, {"einsum": 1, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == f"2 einsums into {note}"


@pytest.mark.parametrize(
    ("function", "x", "shapes", "name"),
    [
        (torch.matmul, (5, 4), [(4,), (4,)], "matmul"),
        (torch.matmul, (5, 4), [(4, 3), (2, 4, 3)], "matmul"),
        (torch.matmul, (2, 5, 4), [(2, 4, 3), (1, 4, 3)], "matmul"),
        (from_the_left, (4, 5), [(3, 4), (2, 3, 4)], "matmul"),
        (einsum("bij,jk"), (2, 5, 4), [(4, 3), (4, 6)], "einsum"),
        (einsum("bij,ij->bij"), (2, 5, 4), [(5, 4), (5, 4)], "einsum"),
        (einsum("bij,jkk->bi"), (2, 5, 4), [(4, 3, 3), (4, 3, 3)], "einsum"),
        (einsum("bij,jkk->bik"), (2, 5, 4), [(4, 3, 3), (4, 3, 3)], "einsum"),
        (einsum("bij,...jk->bik..."), (2, 5, 4), [(2, 4, 3), (2, 4, 3)], "einsum"),
        (einsum("bsd,dhe->bshe"), (2, 5, 4), [(4, 2, 3), (4, 2, 5)], "einsum"),
        (lambda x, c: torch.einsum("ij,jk,kl->il", x, c, c), (3, 4), [(4, 4), (4, 4)], "einsum"),
    ],
)
def test_products_that_cannot_be_stacked_are_left_alone(
    function: Callable[[Tensor, Tensor], Tensor],
    x: tuple[int, ...],
    shapes: list[tuple[int, ...]],
    name: str,
) -> None:
    before = products(function, *shapes, x=x)
    assert reasons(check(before, {name: 2}), PASS) == []


def test_products_of_different_spellings_are_one_and_sides_are_two() -> None:
    module = Products(
        (torch.matmul, (4, 3)), (from_the_left, (2, 4)), (torch.mm, (4, 4)), (from_the_left, (4, 4))
    )
    before = captured(scramble(module).double(), torch.randn(4, 4).double())
    assert counts(before) == {"matmul": 3, "mm": 1}
    check(before, {"matmul": 2, "split_with_sizes": 2})


def test_equal_activations_of_products_move_and_others_stay() -> None:
    def gate(x: Tensor, c: Tensor) -> Tensor:
        return torch.sigmoid(x @ c)

    before = products(gate, (4, 3), (4, 2), x=(5, 4))
    check(before, {"matmul": 1, "sigmoid": 1, "split_with_sizes": 1})
    module = scramble(Products((gate, (4, 3)), (torch.matmul, (4, 2)))).double()
    before = captured(module, torch.randn(5, 4).double())
    check(before, {"matmul": 1, "sigmoid": 1, "split_with_sizes": 1})


def test_refuses_products_with_what_is_not_a_constant() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Products((torch.matmul, (4, 3)), (torch.matmul, (4, 5)))

        def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
            return [x @ y, x @ y.sin(), *self.layers(x)]

    x, y = torch.randn(5, 4).double(), torch.randn(4, 2).double()
    before = captured(scramble(Given()).double(), x, y)
    after = check(before, {"matmul": 3, "sin": 1, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == (
        "2 matrix products into one of 8 columns; 2 more on the same tensor stay apart"
    )
    said = "its other operand is not a constant, so it stays apart from matmul_4 (layers) on the"
    assert reasons(after, PASS) == [f"{said} same tensor"] * 2


def test_one_constant_with_several_tensors_is_not_parallel() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.empty(4, 4))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return x @ self.constant, y @ self.constant, torch.einsum("ij,jk", y, self.constant)

    module = scramble(Tied()).double()
    before = captured(module, torch.randn(4, 4).double(), torch.randn(4, 4).double())
    assert reasons(check(before, {"matmul": 2, "einsum": 1}), PASS) == []


def test_the_same_weights_stacked_in_two_ways_are_two_constants() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Parameter(torch.empty(4, 4)), nn.Parameter(torch.empty(4, 4))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return F.linear(x, self.one), F.linear(x, self.two), y @ self.one, y @ self.two

    before = captured(
        scramble(Both()).double(), torch.randn(5, 4).double(), torch.randn(3, 4).double()
    )
    check(before, {"linear": 1, "matmul": 1, "split_with_sizes": 2})


# What is not a constant, and what is written


class Computed(nn.Module):
    """Three 1x1 convolutions; the second one's weight and the third one's bias are inputs."""

    def __init__(self, constants: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(pointwise(3) for _ in range(constants))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        computed = [F.conv2d(x, weight), F.conv2d(x, self.layers[0].weight, bias)]
        return computed + [layer(x) for layer in self.layers]


def test_refuses_what_is_not_a_constant_and_combines_the_rest() -> None:
    module = scramble(Computed(2)).double()
    weight, bias = torch.randn(3, 4, 1, 1).double(), torch.randn(3).double()
    before = captured(module, torch.randn(1, 4, 5, 5).double(), weight, bias)
    after = check(before, {"conv2d": 3, "split_with_sizes": 1})
    (site,) = step(after, PASS).sites
    assert site.note == (
        "2 convolutions into one of 6 channels; 2 more on the same tensor stay apart"
    )
    apart = "so it stays apart from conv2d_4 (layers.0) on the same tensor"
    assert reasons(after, PASS) == [
        f"its weight is not a constant, {apart}",
        f"its bias is not a constant, {apart}",
    ]


def test_says_nothing_of_partners_where_nothing_is_constant() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, *weights: Tensor) -> list[Tensor]:
            return [F.conv2d(x, weight) for weight in weights]

    weights = [torch.randn(size, 4, 1, 1).double() for size in (2, 3)]
    before = captured(Given(), torch.randn(1, 4, 5, 5).double(), *weights)
    assert reasons(check(before, {"conv2d": 2}), PASS) == ["its weight is not a constant"] * 2


def test_weights_of_open_sizes_stay_open() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, matrix: Tensor) -> list[Tensor]:
            y = F.conv2d(x, weight)
            return [y, F.conv2d(x, weight + 1), x @ matrix, x @ (matrix + 1)]

    sizes = [torch.export.Dim(name, max=8) for name in ("out", "kernel", "columns")]
    dims = (None, {0: sizes[0], 2: sizes[1]}, {1: sizes[2]})
    given = (torch.randn(2, 4, 9, 6), torch.randn(3, 4, 2, 2), torch.randn(6, 5))
    args = tuple(each.double() for each in given)
    before = capture(LoadedModel("open", Given(), args, {}, dynamic_shapes=dims))
    after = check(before, {"conv2d": 2, "matmul": 2, "add": 2})
    others = (torch.randn(2, 4, 9, 6), torch.randn(7, 4, 3, 2), torch.randn(6, 8))
    for got in after.graph_module(*(each.double() for each in others)):
        assert 7 in got.shape or 8 in got.shape


def test_refuses_a_weight_that_the_model_writes_to() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = pointwise(3)
            self.register_buffer("weight", torch.randn(3, 4, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            results = self.layer(x), F.conv2d(x, self.weight)
            self.weight.mul_(0.5)
            return results

    module = scramble(Written()).double()
    before = captured(module, torch.randn(1, 4, 5, 5).double())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == [
        "its weight is not a constant, so it stays apart from conv2d (layer) on the same tensor"
    ]


def test_refuses_layers_on_a_tensor_that_the_model_writes_to() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = pointwise(3), pointwise(2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            results = self.one(x), self.two(x)
            x.mul_(0.5)
            return results

    before = captured(scramble(Written()).double(), torch.randn(1, 4, 5, 5).double())
    after = optimized(before, PASS)
    assert counts(after) == counts(before)
    assert reasons(after, PASS) == ["the model writes to the tensor that it reads"] * 2


def test_refuses_a_result_that_is_written_and_combines_the_rest() -> None:
    before = parallel(pointwise(3), pointwise(5), pointwise(2))
    graph_module = before.graph_module
    _, second, _ = (n for n in graph_module.graph.nodes if n.op == "call_function")
    # Capturing leaves no such write; a graph by hand may have one.
    with graph_module.graph.inserting_after(second):
        write = graph_module.graph.call_function(torch.ops.aten.mul_.Tensor, (second, 2.0))
    write.meta["val"] = value(second)
    second.replace_all_uses_with(write, delete_user_cb=lambda user: user is not write)
    written = replace(before, graph_module=fx.GraphModule(graph_module, graph_module.graph))
    prepare(written.graph_module)
    after = check(written, {"conv2d": 2, "mul_": 1, "split_with_sizes": 1})
    assert reasons(after, PASS) == [
        "the model writes to its result, so it stays apart from conv2d_3 (layers.0) on the same "
        "tensor"
    ]


def test_leaves_alone_what_stands_alone() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = pointwise(4), nn.Conv2d(4, 3, 3)
            self.beside = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.second(self.first(x)), self.beside(x)

    before = captured(scramble(Chain()).double(), torch.randn(1, 4, 6, 6).double())
    assert reasons(check(before, {"conv2d": 2, "linear": 1}), PASS) == []


def test_convolutions_of_integers_are_left_alone() -> None:
    class Integers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.arange(1, 9).reshape(2, 4, 1, 1))
            self.register_buffer("two", torch.arange(5, 17).reshape(3, 4, 1, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return F.conv2d(x, self.one), F.conv2d(x, self.two)

    before = captured(Integers().eval(), torch.arange(1, 37).reshape(1, 4, 3, 3))
    assert reasons(check(before, {"conv2d": 2}), PASS) == []


def test_googlenet_has_39_convolutions_left_of_57() -> None:
    before = captured(scramble(googlenet.build()), torch.randn(1, 3, 64, 64))
    after = optimized(before, f"fold_conv_bn,{PASS}")
    assert counts(before)["conv2d"] == counts(before)["relu"] == 57
    assert counts(after)["conv2d"] == counts(after)["relu"] == 39
    assert counts(after)["split_with_sizes"] == 9
    assert len(step(after, PASS).sites) == 9
